"""The supervisor, with real processes that really die."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from config import BASE_DIR
from config.stack import MARK, Death, StackError, Supervisor, job_commands
from tests.machine import within

pytestmark = pytest.mark.once

# A process with a child that, like a worker's, is in a group of its own and outlives it.
WITH_CHILD = [
    sys.executable,
    "-c",
    "import subprocess, time; subprocess.Popen(['sleep', '600'], start_new_session=True); print('up'); time.sleep(600)",
]
STUBBORN = [
    sys.executable,
    "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up'); time.sleep(600)",
]


def wait_for(condition: Callable[[], object], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def marked(folder: Path) -> list[psutil.Process]:
    def is_marked(process: psutil.Process) -> bool:
        try:
            return process.environ().get(MARK) == str(folder)
        except psutil.Error:
            return False

    return [process for process in psutil.process_iter() if is_marked(process)]


def is_up(folder: Path, name: str = "it") -> bool:
    log = folder / "logs" / f"{name}.log"
    return log.exists() and "up" in log.read_text()


def kill(stack: Supervisor, name: str) -> int:
    pid = stack.pid(name)
    assert pid
    os.kill(pid, signal.SIGKILL)
    return pid


def test_a_dead_process_is_told_and_replaced(tmp_path):
    with Supervisor(tmp_path) as stack:
        stack.start("it", WITH_CHILD)
        wait_for(lambda: is_up(tmp_path))
        assert stack.poll() == []
        pid = kill(stack, "it")

        deaths: list[Death] = []
        wait_for(lambda: deaths.extend(stack.poll()) or (deaths and stack.pid("it")))

        assert deaths == [Death("it", pid, -signal.SIGKILL)]
        assert stack.pid("it") != pid


def test_a_process_that_is_held_stays_down_until_it_is_released(tmp_path):
    with Supervisor(tmp_path) as stack:
        stack.start("it", WITH_CHILD)
        wait_for(lambda: is_up(tmp_path))
        stack.hold("it")
        assert stack.pid("it")
        kill(stack, "it")
        wait_for(stack.poll)
        time.sleep(1.2)
        assert stack.poll() == []
        assert stack.pid("it") is None

        stack.release("it")
        stack.poll()
        assert stack.pid("it")


def test_a_process_that_cannot_start_is_not_tried_over_and_over(tmp_path):
    with Supervisor(tmp_path) as stack:
        stack.start("it", [sys.executable, "-c", "raise SystemExit(3)"])
        deaths: list[Death] = []
        until = time.monotonic() + 1.5
        while time.monotonic() < until:
            deaths += stack.poll()
            time.sleep(0.02)
        assert 1 <= len(deaths) <= 2
        assert {death.code for death in deaths} == {3}


def test_nothing_is_left_neither_orphans_nor_the_stubborn_nor_the_frozen(tmp_path):
    with Supervisor(tmp_path) as stack:
        stack.start("it", WITH_CHILD)
        stack.start("stubborn", STUBBORN)
        stack.start("frozen", WITH_CHILD)
        wait_for(lambda: all(is_up(tmp_path, name) for name in stack.names))
        kill(stack, "it")
        os.kill(stack.pid("frozen"), signal.SIGSTOP)
        assert len(marked(tmp_path)) >= 4
        with within(5):
            stack.stop(grace=1)
        assert marked(tmp_path) == []


def test_the_environment_and_the_output_are_its_own(tmp_path):
    with Supervisor(tmp_path, env={"A": "a", "B": "b"}) as stack:
        code = "import os, sys; print(os.environ['A'], os.environ['B'], 'up'); print('oops', file=sys.stderr)"
        stack.start("it", [sys.executable, "-c", code], env={"B": "c"})
        wait_for(stack.poll)
    assert (tmp_path / "logs" / "it.log").read_text().splitlines()[:2] == ["a c up", "oops"]


def test_a_name_is_used_once(tmp_path):
    with Supervisor(tmp_path) as stack:
        stack.start("it", ["sleep", "600"])
        with pytest.raises(StackError, match="already"):
            stack.start("it", ["sleep", "600"])


def test_two_supervisors_cannot_share_a_folder(tmp_path):
    with Supervisor(tmp_path) as first:
        first.start("it", ["sleep", "600"])
        with pytest.raises(StackError, match=f"Process {os.getpid()} already runs a stack"), Supervisor(tmp_path):
            pass
        assert first.poll() == []
    with Supervisor(tmp_path):
        pass


def test_what_a_killed_supervisor_left_is_ended_by_the_next(tmp_path):
    code = f"""
import sys, time
from config.stack import Supervisor
with Supervisor(sys.argv[1]) as stack:
    stack.start("it", {WITH_CHILD!r})
    time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=BASE_DIR) as owner:
        wait_for(lambda: is_up(tmp_path))
        owner.kill()
    assert len(marked(tmp_path)) == 2

    with Supervisor(tmp_path):
        assert marked(tmp_path) == []


def test_the_stack_is_made_of_stock_commands():
    commands = {name: argv[2:] for name, argv in job_commands(workers=2).items()}
    assert commands == {
        "scheduler": ["rqscheduler"],
        "worker-1": ["rqworker", "urgent", "background", "default"],
        "worker-2": ["rqworker", "urgent", "background", "default"],
        "worker-background": ["rqworker", "background"],
    }
