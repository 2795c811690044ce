"""A real kill before and after every single thing that an engine does to the outside, and then once more.

What is done next finds one database, one change and nothing else, whatever had been done before.
"""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from django.conf import settings as django_settings

from tests.engines import Engine, password_of

# Does what it is told, each time in a process of its own, which it kills before the n-th thing that this does: Python
# reports what is done to files to an audit hook before it happens, SQLite each statement; PostgreSQL's client is asked.
STRUCK = """
import json, os, signal, sqlite3, subprocess, sys
from datetime import timedelta
from pathlib import Path
from django.conf import settings
told = json.loads(sys.argv[1])
folder = told["settings"]["DATABASES_FOLDER"]
settings.configure(**told["settings"])
import psycopg
from databases.provisioners import get_provisioner
from databases.provisioners import postgresql, sqlite
steps = None

def count_down(what):
    global steps
    if steps is not None:
        steps -= 1
        if steps < 0:
            os.kill(os.getpid(), signal.SIGKILL)

def watch(event, arguments):
    if event == "subprocess.Popen" or (arguments and folder in str(arguments[0])):
        count_down(event)

def connect(*arguments, **options):
    connection = sqlite3_connect(*arguments, **options)
    connection.set_trace_callback(count_down)
    return connection

def execute(self, statement, *arguments, **options):
    text = statement if isinstance(statement, (str, bytes)) else statement.as_string(self)
    text = text.decode() if isinstance(text, bytes) else text
    # To look changes nothing.
    if text.split()[0] not in ("SELECT", "SET", "RESET"):
        count_down(text)
    return psycopg_execute(self, statement, *arguments, **options)

def leave(self, *arguments):
    count_down("COMMIT")
    return psycopg_leave(self, *arguments)

sqlite3_connect, sqlite3.connect = sqlite3.connect, connect
psycopg_execute, psycopg.Connection.execute = psycopg.Connection.execute, execute
psycopg_leave, psycopg.Transaction.__exit__ = psycopg.Transaction.__exit__, leave
sys.addaudithook(watch)

for line in sys.stdin:
    engine, method, arguments, how_many = json.loads(line)
    if (child := os.fork()) == 0:
        steps = how_many
        timed = [timedelta(minutes=1)] if method == "deploy" else []
        paths = [Path(each) if os.sep in each else each for each in arguments]
        getattr(get_provisioner(engine), method)(*(arguments if method == "deploy" else paths), *timed)
        # Done, and killed before it can tell anybody, or not.
        count_down("done")
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Struck:
    """Runs a method of an engine, killed before its n-th step."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        names = ("DATABASES_FOLDER", "DATABASES_POSTGRES_URL", "DATABASES_POSTGRES_BIN", "DATABASES_PROVISIONERS")
        told: dict[str, Any] = {name: getattr(django_settings, name) for name in names}
        argument = json.dumps({"settings": told}, default=str)
        self._process = subprocess.Popen(
            [sys.executable, "-c", STRUCK, argument],
            cwd=Path(__file__).parents[2],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, method: str, *arguments: str, steps: int) -> bool:
        """Return whether it was killed; False when it ended before it came to that step."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps([self.engine.name, method, arguments, steps]) + "\n")
        self._process.stdin.flush()
        code = int(self._process.stdout.readline())
        assert code in {0, -signal.SIGKILL}
        return code != 0

    def end(self) -> None:
        self._process.communicate()


@pytest.fixture
def struck(engine) -> Iterator[Struck]:
    struck = Struck(engine)
    yield struck
    struck.end()


def both(*names: str) -> set[str]:
    return {f"{kind} {name}" for kind in ("database", "role") for name in names}


def of(engine: Engine, *names: str) -> set[str]:
    """What there is of these databases when all is well."""
    return both(*names) if engine.name == "postgresql" else {f"{name}.sqlite3" for name in names}


def fewest(engine: Engine, sqlite: int, postgresql: int) -> int:
    """How many steps there are at least: fewer would mean that they are not seen."""
    return sqlite if engine.name == "sqlite" else postgresql


def test_creation(engine, struck):
    for steps in range(100):
        name = f"shop_{steps}"
        killed = struck.run("create", name, password_of(name), steps=steps)
        engine.create(name)
        assert engine.everything() == of(engine, name)
        engine.do(name, "CREATE TABLE orders (id integer)")
        engine.provisioner.delete(name)
        if not killed:
            break
    assert steps > fewest(engine, 20, 7)


def test_a_copy(engine, struck):
    engine.fill("shop")
    for steps in range(100):
        name = f"branch_{steps}"
        killed = struck.run("copy", "shop", name, password_of(name), steps=steps)
        engine.copy("shop", name)
        assert engine.everything() == of(engine, "shop", name)
        engine.do(name, "ALTER TABLE orders ADD COLUMN note text")
        assert engine.ask(name, "SELECT count(*) FROM orders") == [(3,)]
        engine.provisioner.delete(name)
        if not killed:
            break
    assert steps > fewest(engine, 20, 7)


def test_a_copy_that_is_not_wanted_any_more(engine, struck):
    engine.fill("shop")
    for steps in range(100):
        name = f"branch_{steps}"
        killed = struck.run("copy", "shop", name, password_of(name), steps=steps)
        engine.provisioner.delete(name)
        assert engine.everything() == of(engine, "shop")
        if not killed:
            break
    assert steps > fewest(engine, 20, 7)


def test_a_change(engine, struck):
    engine.fill("shop")
    was_made_by_the_killed = []
    for steps in range(100):
        sql = f"CREATE TABLE visits_{steps} (id integer); INSERT INTO orders VALUES ({7 + steps}, 'a visit', 0, NULL)"
        killed = struck.run("deploy", "shop", password_of("shop"), f"change {steps}", sql, steps=steps)
        was_made_by_the_killed.append(engine.has("shop", f"visits_{steps}"))
        engine.deploy("shop", sql, f"change {steps}")
        assert engine.has("shop", f"visits_{steps}")
        assert engine.ask("shop", f"SELECT count(*) FROM orders WHERE id = {7 + steps}") == [(1,)]
        if not killed:
            break
    assert steps > fewest(engine, 9, 5)
    # All of it or nothing of it, and it was killed on either side of the commit.
    assert was_made_by_the_killed == sorted(was_made_by_the_killed)
    assert was_made_by_the_killed[-2:] == [True, True]
    markers = engine.ask(
        "shop", "SELECT count(*), count(DISTINCT marker) FROM selfheal_deploys WHERE marker <> 'filled'"
    )
    assert markers == [(steps + 1, steps + 1)]


def test_a_deletion(engine, struck):
    engine.fill("parent")
    for steps in range(100):
        name = f"shop_{steps}"
        engine.copy("parent", name)
        engine.copy(name, "branch")
        killed = struck.run("delete", name, steps=steps)
        engine.provisioner.delete(name)
        assert engine.everything() == of(engine, "parent", "branch")
        engine.provisioner.delete("branch")
        if not killed:
            break
    assert steps > fewest(engine, 4, 2)


def test_a_trial(engine, struck, tmp_path):
    engine.fill("shop")
    dump = tmp_path / "dump"
    engine.provisioner.dump("shop", dump)
    for steps in range(100):
        killed = struck.run("try_load", str(dump), f"scratch_{steps}", steps=steps)
        engine.provisioner.discard(f"scratch_{steps}")
        assert engine.everything() == of(engine, "shop")
        if not killed:
            break
    assert steps > fewest(engine, 10, 9)


def test_a_restore(engine, struck, tmp_path):
    engine.fill("shop")
    dump = tmp_path / "dump"
    in_it = engine.provisioner.dump("shop", dump)
    for steps in range(100):
        name = f"restored_{steps}"
        killed = struck.run("load", name, str(dump), password_of(name), steps=steps)
        assert engine.provisioner.load(name, dump, password_of(name)) == in_it
        assert engine.everything() == of(engine, "shop", name)
        engine.provisioner.delete(name)
        if not killed:
            break
    assert steps > fewest(engine, 20, 8)
