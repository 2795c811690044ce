"""`make run`, as a person uses it: started, looked at, ended."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil
import pytest

from config import BASE_DIR
from config.servers import free_port

# On what `make run` runs when nothing is set.
pytestmark = pytest.mark.once


class Run:
    """`python -m config.run` in a folder of its own."""

    def __init__(self, home: Path, port: int) -> None:
        self.home = home
        self.log = home.with_suffix(".log")
        environment = {**os.environ, "SELFHEAL_HOME": str(home)}
        # The settings of the tests, and whatever steers them, are not a person's.
        for name in (
            "DJANGO_SETTINGS_MODULE",
            "REDIS_URL",
            "DATABASE_URL",
            "DATABASES_FOLDER",
            "DATABASES_SQLITE_PROVISIONER",
            "DATABASES_POSTGRES_URL",
        ):
            environment.pop(name, None)
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "config.run", "--port", str(port)],
                cwd=BASE_DIR,
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def said(self) -> str:
        return self.log.read_text()

    def wait_until_up(self) -> None:
        deadline = time.monotonic() + 60
        while "Ctrl-C" not in self.said:
            assert self.process.poll() is None, self.said
            assert time.monotonic() < deadline, self.said
            time.sleep(0.1)

    def end(self, number: signal.Signals) -> int:
        self.process.send_signal(number)
        return self.process.wait(30)

    def processes(self) -> list[psutil.Process]:
        """Whatever lives and belongs to this folder, its servers included; of PostgreSQL's many the first."""

        def belongs(process: psutil.Process) -> bool:
            with contextlib.suppress(psutil.Error):
                if process.environ().get("SELFHEAL_HOME") == str(self.home):
                    return not is_fork(process)
            return False

        def is_fork(process: psutil.Process) -> bool:
            # PostgreSQL's write on their command line what they are at. Of ours, a scheduler's tick is one.
            with contextlib.suppress(psutil.Error):
                if parent := process.parent():
                    return process.name() == parent.name() == "postgres" or process.cmdline() == parent.cmdline()
            return False

        return [process for process in psutil.process_iter() if belongs(process)]


@pytest.fixture
def start(tmp_path):
    runs = []

    def start(port: int, folder: str = "home") -> Run:
        runs.append(Run(tmp_path / folder, port))
        return runs[-1]

    yield start
    for run in runs:
        run.process.kill()
        run.process.wait()
        # And again: what was the fork of one of them is one by itself when that is gone.
        while left := run.processes():
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(left)


def fetch(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10) as page:
        return page.read().decode()


def test_it_serves_the_admin_until_a_signal_and_leaves_nothing(start):
    port = free_port()
    run = start(port)
    run.wait_until_up()

    assert "Log in" in fetch(port)
    password = re.search(r"password (\S+)", run.said)[1]
    assert f"http://127.0.0.1:{port}/         user admin, password {password}\n" in run.said
    # Scheduler, four workers, web, Redis, PostgreSQL, and the one that runs them.
    assert len(run.processes()) == 9

    # Its port is taken now; whoever wants it too is told so.
    another = start(port, "another")
    assert another.process.wait(30) == 1
    assert f"Port {port} cannot be used" in another.said
    assert another.processes() == []

    # Killed, it leaves all but itself, which the next one ends; that has the same data, and password.
    servers_port = (run.home / "postgres-port").read_text()
    run.end(signal.SIGKILL)
    left = run.processes()
    assert len(left) == 8
    second = start(port)
    second.wait_until_up()
    assert f"password {password}\n" in second.said
    assert (second.home / "postgres-port").read_text() == servers_port
    assert not set(left) & set(second.processes())
    assert "Log in" in fetch(port)

    assert second.end(signal.SIGINT) == 0
    assert second.processes() == []
    assert second.said.endswith("Stopped; no process is left.\n")


@pytest.mark.long
def test_a_polite_end_is_the_same(start):
    run = start(free_port())
    run.wait_until_up()
    assert run.end(signal.SIGTERM) == 0
    assert run.processes() == []
