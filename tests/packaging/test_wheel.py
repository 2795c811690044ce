"""What a stranger gets: the wheel, in a fresh virtual environment, beside a project that Django itself made.

Code, settings and commands come out of README.md, so what it tells people to do is what is done here.
"""

import os
import re
import shlex
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from email.parser import HeaderParser
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
from redis import Redis

from config import BASE_DIR
from config.servers import RedisServer
from config.stack import Supervisor

README = (BASE_DIR / "README.md").read_text()
# The Python blocks that begin with a file's name, by that name, and the commands that `manage.py` is given.
CODE = dict(re.findall(r"^```python\n# (\S+\.py)\n(.*?)^```", README, re.DOTALL | re.MULTILINE))
COMMANDS = [
    shlex.split(line, comments=True) for line in re.findall(r"^\$ python manage\.py (.+)$", README, re.MULTILINE)
]
# A stranger's project has a database of its own, and the versions that pip finds for it.
pytestmark = pytest.mark.once

REDIS_OF_THE_README = "redis://localhost:6379/0"

# What a reader of the example supplies without being told.
MODELS_BEGIN = "from django.db import models\n\n\n"
JOBS_BEGIN = """\
import time
from types import SimpleNamespace

from databases.models import Database

provisioner = SimpleNamespace(create=lambda name: time.sleep(0.1))


"""
A_VISITOR = """\
from databases.jobs import create_database
from databases.models import Database
for name in {names!r}:
{view}
"""

PATIENCE = 60
LABELLED_JOBS = """\
from django.apps import AppConfig


class VacanciesConfig(AppConfig):
    name = "vacancies"
    label = "jobs"
    default_auto_field = "django.db.models.BigAutoField"
"""
VACANCY = MODELS_BEGIN + "class Job(models.Model):\n    title = models.CharField(max_length=100)\n"


def run(*command: str | Path, cwd: Path, environment: dict[str, str] | None = None) -> str:
    """Run a command to its end and return what it said; fail with that if it fails."""
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={**os.environ, **(environment or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, f"{command}:\n{done.stdout}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", folder, BASE_DIR, cwd=folder)
    [path] = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a fresh virtual environment that holds the wheel and what the wheel asks for, no more."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", wheel, cwd=folder)
    return python


# --- What is in it ----------------------------------------------------------------------------------------------------


def test_it_holds_the_app_and_nothing_else(wheel):
    with ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    files = (path for path in (BASE_DIR / "jobs").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    assert names == {path.relative_to(BASE_DIR).as_posix() for path in files}
    assert {"jobs/__init__.py", "jobs/py.typed", "jobs/migrations/0001_the_truth_about_work.py"} <= names
    assert {"jobs/templates/admin/selfheal/explained.html", "jobs/static/jobs/explain.css"} <= names


def test_it_says_what_it_is(wheel):
    with ZipFile(wheel) as archive:
        [path] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = HeaderParser().parsestr(archive.read(path).decode())
    assert metadata["Name"] == "django-selfheal"
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "MIT"
    assert {"local", "postgres"} <= set(metadata.get_all("Provides-Extra"))
    assert "Typing :: Typed" in metadata.get_all("Classifier")
    assert metadata.get_payload() == README


# --- Whether it works -------------------------------------------------------------------------------------------------


class Project:
    """A project made by `django-admin startproject`, with the README's settings, and the README's app in it."""

    def __init__(self, python: Path, folder: Path, redis_url: str, more_apps: dict[str, dict[str, str]]) -> None:
        self.python = python
        self.folder = folder
        # pytest runs under settings of its own.
        self.environment = {"DJANGO_SETTINGS_MODULE": "shop.settings", "PYTHONPATH": ""}
        folder.mkdir()
        run(python, "-m", "django", "startproject", "shop", folder, cwd=folder, environment={"PYTHONPATH": ""})
        assert README.count(REDIS_OF_THE_README) == 1
        settings = folder / "shop" / "settings.py"
        for app, files in more_apps.items():
            self.manage("startapp", app)
            for name, code in files.items():
                (folder / app / name).write_text(code)
        added = f"\nINSTALLED_APPS += {[*more_apps]}\n" + CODE["settings.py"].replace(REDIS_OF_THE_README, redis_url)
        settings.write_text(settings.read_text() + added)

    def command(self, *arguments: str) -> list[str]:
        return [str(self.python), str(self.folder / "manage.py"), *arguments]

    def manage(self, *arguments: str) -> str:
        return run(*self.command(*arguments), cwd=self.folder, environment=self.environment)

    def execute(self, statement: str) -> list[Any]:
        """Execute one statement in its database, as an operator would."""
        with closing(sqlite3.connect(self.folder / "db.sqlite3", timeout=20)) as database, database:
            return database.execute(statement).fetchall()

    def visit(self, *names: str) -> None:
        """Do what the README's view does, once for each name."""
        view = "".join(f"    {line}\n" for line in CODE["databases/views.py"].splitlines())
        self.manage("shell", "-c", A_VISITOR.format(names=names, view=view))

    def states(self) -> dict[str, str]:
        return dict(self.execute("SELECT name, state FROM databases_database"))


def wait_for(condition: Callable[[], Any], what: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"Not within {PATIENCE} seconds:\n{what()}")
        time.sleep(0.1)


OF_THE_README = {
    "databases": {
        "models.py": MODELS_BEGIN + CODE["databases/models.py"],
        "jobs.py": JOBS_BEGIN + CODE["databases/jobs.py"],
        "admin.py": CODE["databases/admin.py"],
    }
}
LABELLED = {"vacancies": {"apps.py": LABELLED_JOBS, "models.py": VACANCY}}


@pytest.mark.long
@pytest.mark.parametrize(
    "others",
    [
        pytest.param({}, id="alone"),
        pytest.param(LABELLED, id="beside an app with the label jobs"),
    ],
)
def test_a_strangers_project_heals(others, python, tmp_path, redis_server: RedisServer, redis: Redis):
    project = Project(python, tmp_path / "project", redis_server.url, {**others, **OF_THE_README})
    migrate, scheduler, worker, *steering = COMMANDS
    assert migrate == ["migrate"]
    where = project.manage("shell", "-c", "import jobs; print(jobs.__file__)")
    assert str(python.parent.parent) in where

    assert "no issues" in project.manage("check", "--fail-level", "WARNING")
    project.manage("makemigrations")
    project.manage(*migrate)
    # Every minute is what the README says, and too long to wait for.
    project.execute("UPDATE selfheal_schedule SET cron = '* * * * * *' WHERE name = 'schedule_databases'")

    project.visit("ada", "grace")
    assert redis.llen("rq:queue:default") == 2
    redis_server.flush()
    assert project.states() == {"ada": "pending", "grace": "pending"}

    with Supervisor(tmp_path / "processes", project.environment) as processes:
        processes.start("scheduler", project.command(*scheduler))
        processes.start("worker", project.command(*worker))

        def said() -> str:
            logs = [path.read_text() for path in sorted(processes.logs.iterdir())]
            return "\n".join([f"{project.states()}", *logs])

        def all_ready() -> bool:
            assert processes.poll() == [], said()
            return set(project.states().values()) == {"ready"}

        wait_for(all_ready, said)
        # Again, with everything at work.
        project.visit(*(f"later-{number}" for number in range(20)))
        redis_server.flush()
        wait_for(all_ready, said)
        assert len(project.states()) == 22
        # Each ends when it is told to, after the message in work.
        processes.stop(grace=30)
        assert "Scheduler stopped" in said()
        assert re.search(r"Worker \w+ stopped", said())
        assert "Traceback" not in said()
    assert project.execute("SELECT count(*) FROM selfheal_claim") == [(0,)]
    outcomes = project.execute("SELECT DISTINCT outcome FROM selfheal_run WHERE job = 'create_database'")
    assert outcomes == [("done",)]
    if not others:
        assert [command[1] for command in steering] == ["status", "explain", "pause", "resume", "sweep", "retry"]
        for command in steering:
            project.manage(*command)
