"""The watch sees a real process die."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from demo.ledger import Event, Process, intervals
from demo.watch import Watch, is_alive

pytestmark = pytest.mark.once


def clock() -> float:
    return time.clock_gettime(time.CLOCK_MONOTONIC)


@pytest.fixture
def child():
    running = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield running
    running.kill()
    running.communicate()


def process_of(child) -> Process:
    return Process(child.pid, psutil.Process(child.pid).create_time())


def write(ledger: Path, *lines: bytes) -> None:
    with ledger.open("ab") as file:
        file.writelines(lines)


def test_a_killed_process_is_dead_from_when_it_was_last_seen_alive(tmp_path, child):
    ledger = tmp_path / "ledger"
    process = process_of(child)
    write(ledger, Event("start", "create", "a", *process, at=clock(), wall=time.time()).line())
    watch = Watch(ledger)
    watch.look()
    assert list(watch.working()) == [process]
    seen_alive = clock()

    os.kill(child.pid, signal.SIGKILL)
    while is_alive(process):
        time.sleep(0.01)
    watch.look()

    assert watch.working() == {}
    [interval] = intervals(watch.events, watch.deaths)
    assert interval.closed_by == "death"
    assert interval.start <= interval.end <= seen_alive


def test_a_zombie_is_dead(child):
    process = process_of(child)
    assert is_alive(process)
    os.kill(child.pid, signal.SIGKILL)
    deadline = clock() + 10
    while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE and clock() < deadline:
        time.sleep(0.01)
    assert not is_alive(process)


def test_a_successor_of_the_same_pid_is_not_the_process(child):
    pid, born = process_of(child)
    assert not is_alive(Process(pid, born - 60))


def test_the_moment_of_a_kill_of_our_own_is_kept(tmp_path):
    watch = Watch(tmp_path / "none yet")
    watch.died(Process(1, 1.0), at=5.0)
    watch.died(Process(1, 1.0), at=9.0)
    assert watch.deaths == {Process(1, 1.0): 5.0}


def test_the_ledger_is_read_on_from_where_the_last_look_ended(tmp_path, child):
    ledger = tmp_path / "ledger"
    watch = Watch(ledger)
    watch.look()
    assert watch.events == []
    line = Event("start", "create", "a", *process_of(child), at=1, wall=1).line()
    write(ledger, line, line[:20])
    watch.look()
    assert len(watch.events) == 1
    write(ledger, line[20:])
    watch.look()
    assert len(watch.events) == 2
