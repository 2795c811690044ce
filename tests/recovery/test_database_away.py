"""The database refuses, for longer than anybody can wait."""

import time

import pytest

from tests import database
from tests.cast.jobs import do_task
from tests.cast.models import Task
from tests.recovery.conftest import LEASE, Stack, locked_database, missing_database
from tests.recovery.traps import Trap


def test_heartbeat_cut_off_from_the_database(stack: Stack) -> None:
    task = Task.objects.create(seconds=3 * LEASE)
    stack.scheduler()
    stack.worker()
    before = [stack.pid("scheduler"), stack.pid("worker")]
    child = stack.child_at_work(task)
    Task.objects.filter(pk=task.pk).update(seconds=0)
    with locked_database():
        locked_at = time.monotonic()
        # The last renewal may have been before this moment, and never after it.
        gone_at = stack.wait_until_gone(child.pid)
        assert gone_at - locked_at < LEASE
    stack.wait_until_done(task)
    first, _second = stack.intervals(task)
    assert first.pid == child.pid
    assert first.end is None
    assert not stack.at_once(task)
    assert len(stack.intervals(task)) == 2
    assert stack.writes(task) == 1
    assert [stack.pid("scheduler"), stack.pid("worker")] == before


def test_locked_while_everybody_is_at_work(stack: Stack) -> None:
    """A lock that is held for less than a lease costs an attempt at most, and never a death."""
    tasks = [Task.objects.create(seconds=1) for _ in range(2)]
    stack.scheduler()
    stack.worker("one")
    stack.worker("two")
    for task in tasks:
        stack.child_at_work(task)
    with locked_database():
        locked_at = time.monotonic()
        # Past the end of the work: what waits now is the writing down.
        stack.wait_for(lambda: time.monotonic() - locked_at > LEASE / 2, "half a lease")
        assert {stack.state(task) for task in tasks} == {"pending"}
    stack.wait_until_done(*tasks)
    for task in tasks:
        # On PostgreSQL nobody waits for a lock for that long.
        *before, last = stack.runs(task)
        assert (set(before) - {"failed"}, last) == (set(), "done")
        assert stack.writes(task) == 1


@pytest.mark.parametrize(
    ("until", "runs"),
    [
        # Within half a lease it tries again: nobody else can have the row by then.
        ("could not be written down, trying again", ["done"]),
        # After that the lease runs out, and a sweep settles what the row itself says.
        ("the database does not answer", ["resolved"]),
    ],
)
def test_locked_when_an_attempt_wants_to_end(stack: Stack, until: str, runs: list[str]) -> None:
    trap = Trap("before", "jobs.claims.settle", how="SIGSTOP")
    task = Task.objects.create()
    do_task.enqueue(task)
    stack.worker(trap=trap, TEST_DATABASE_TIMEOUT="0.2")
    child, _ = stack.wait_until_sprung(trap)
    stack.wait_until_frozen(child)
    with locked_database():
        stack.thaw(child)
        stack.wait_for(lambda: until in stack.log("worker"), until)
    stack.scheduler()
    stack.wait_until_done(task)
    assert [outcome for outcome in stack.runs(task) if outcome != "crashed"] == runs
    assert stack.writes(task) == 1
    assert stack.exits == []


def test_locked_for_longer_than_the_scheduler_waits(stack: Stack) -> None:
    stack.scheduler(TEST_DATABASE_TIMEOUT="0.5")
    stack.worker(TEST_DATABASE_TIMEOUT="0.5")
    stack.wait_for_sweeps(1)
    task = Task.objects.create()
    with locked_database():
        do_task.enqueue(task)
        stack.wait_for(lambda: "A tick failed" in stack.log("scheduler"), "the scheduler has noticed")
        stack.wait_for(lambda: "the database does not answer" in stack.log("worker"), "the worker has noticed")
        assert stack.state(task) == "pending"
    stack.wait_until_done(task)
    assert stack.runs(task) == ["done"]
    assert stack.exits == []


def test_gone_and_back(stack: Stack) -> None:
    stack.scheduler()
    stack.worker()
    stack.wait_for_sweeps(1)
    with missing_database(stack):
        stack.wait_for(lambda: "A tick failed" in stack.log("scheduler"), "the scheduler has noticed")
        task = Task.objects.create()
        do_task.enqueue(task)
        stack.wait_for(lambda: "the database does not answer" in stack.log("worker"), "the worker has noticed")
        assert stack.state(task) == "pending"
    stack.wait_until_done(task)
    assert stack.runs(task) == ["done"]
    assert stack.exits == []


@pytest.mark.postgres
def test_read_only_it_does_not_empty_the_queue(stack: Stack) -> None:
    """What cannot be claimed would only be taken out of it, and be there again a minute later."""
    tasks = [Task.objects.create() for _ in range(20)]
    do_task.enqueue_many(tasks)
    with database.read_only():
        stack.worker()
        refused = "the database does not answer"
        stack.wait_for(lambda: stack.log("worker").count(refused) >= 2, "two attempts refused")
        assert len(stack.queued()) >= 17
    stack.wait_for(lambda: not stack.queued(), "all the others performed")
    stack.scheduler()
    stack.wait_until_done(*tasks)
    assert stack.exits == []


def test_started_before_the_database_is_there(stack: Stack) -> None:
    task = Task.objects.create()
    with missing_database(stack):
        stack.scheduler()
        stack.worker()
        stack.wait_for(lambda: "A tick failed" in stack.log("scheduler"), "the scheduler has noticed")
        do_task.enqueue(task)
        stack.wait_for(lambda: "the database does not answer" in stack.log("worker"), "the worker has noticed")
    stack.wait_until_done(task)
    assert stack.runs(task) == ["done"]
    assert stack.exits == []
