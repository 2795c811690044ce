"""A run of the tests that is killed, in whatever way, leaves nothing behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from config import BASE_DIR
from tests import guardian

pytestmark = pytest.mark.once

# A run that has started a server, which has started others, and waits.
A_RUN = """
import sys, time
from tests import guardian
home = guardian.begin()
from config.servers import PostgresServer
PostgresServer(home / "postgres").start()
print(home, flush=True)
time.sleep(600)
"""
PATIENCE = 30


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Callable[..., tuple[subprocess.Popen[str], Path]]]:
    """Start a run, whose folder is in this test's, and return it with that folder."""
    runs = []
    # This process may be one of several that run tests side by side. A run of its own is not.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "SELFHEAL_"))}

    def begin(*command: str) -> tuple[subprocess.Popen[str], Path]:
        run = subprocess.Popen(
            [sys.executable, *command],
            cwd=BASE_DIR,
            env={**environment, "TMPDIR": str(tmp_path)},
            stdout=subprocess.PIPE,
            text=True,
            # As a shell does with what it starts in the background.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
        )
        runs.append(run)
        wait_for(lambda: list(tmp_path.glob(f"{guardian.PREFIX}*")), "its folder")
        [home] = tmp_path.glob(f"{guardian.PREFIX}*")
        return run, home

    yield begin
    for run in runs:
        run.kill()
        run.wait()
        run.stdout.close()


def wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def processes(home: Path) -> list[psutil.Process]:
    """Whatever belongs to a run, its guardian too."""
    return [process for process in psutil.process_iter() if belongs(process, home)]


def command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        # It has ended since.
        return []


def belongs(process: psutil.Process, home: Path) -> bool:
    try:
        return process.environ().get(guardian.MARK) == str(home)
    except psutil.Error:
        return False


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_what_a_killed_run_has_started_ends_with_it(begin, number):
    run, home = begin("-c", A_RUN)
    assert run.stdout
    assert run.stdout.readline().strip() == str(home)
    assert len(processes(home)) > 1
    run.send_signal(number)
    run.wait()
    wait_for(lambda: not home.exists() and not processes(home), "nothing left")


def test_what_is_left_when_its_guardian_is_killed_too_is_ended_by_the_next_run(begin, tmp_path, monkeypatch):
    run, home = begin("-c", A_RUN)
    assert run.stdout
    run.stdout.readline()
    watching = [process for process in processes(home) if guardian.__file__ in command(process)]
    assert len(watching) == 1
    # Before it sees that the run is over.
    watching[0].kill()
    run.kill()
    run.wait()
    watching[0].wait()
    assert processes(home)
    monkeypatch.setattr(guardian.tempfile, "gettempdir", lambda: str(tmp_path))
    guardian.end_what_is_over()
    assert not home.exists()
    assert not processes(home)


def test_pytest_is_such_a_run(begin):
    """In the middle of it, beside others, with the servers that it has started."""
    run, home = begin(
        "-m", "pytest", "-n", "2", "--postgres", "-p", "no:cacheprovider", "tests/integration/test_sweep.py"
    )
    names = {"postgres", "valkey-server"}
    wait_for(lambda: names <= {Path(word).name for process in processes(home) for word in command(process)}, "servers")
    run.terminate()
    run.communicate()
    wait_for(lambda: not home.exists() and not processes(home), "nothing left")


def test_a_process_that_a_test_has_left_behind_fails_the_run(begin, tmp_path):
    leaves = tmp_path / "test_leaves.py"
    leaves.write_text("import subprocess\n\ndef test_one():\n    subprocess.Popen(['sleep', '600'])\n")
    run, home = begin("-m", "pytest", "-p", "no:cacheprovider", "-W", "ignore", "-c", "pyproject.toml", str(leaves))
    said, _ = run.communicate(timeout=60)
    assert "1 passed" in said
    assert run.returncode == 1
    wait_for(lambda: not home.exists() and not processes(home), "nothing left")
