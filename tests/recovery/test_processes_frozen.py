"""A process stands still for longer than its lease (SIGSTOP, a paused machine), and then goes on."""

import json

import pytest

from jobs.models import Claim
from tests.cast.jobs import do_task
from tests.cast.models import Task
from tests.recovery.conftest import INTERVALS, LEASE, Stack
from tests.recovery.traps import Trap

pytestmark = pytest.mark.long_on_sqlite


def test_child_frozen_past_its_lease(stack: Stack) -> None:
    task = Task.objects.create(seconds=2)
    stack.scheduler()
    stack.worker("one")
    stack.worker("two")
    frozen = stack.child_at_work(task)
    stack.freeze(frozen.pid)
    stack.wait_until_done(task)
    # Somebody else has the row again, and is at work on it, when the frozen one wakes up: it still looks to that one as
    # if its work were needed.
    Task.objects.filter(pk=task.pk).update(state="pending", seconds=4)
    do_task.enqueue(task)
    other = stack.child_at_work(task)
    stack.thaw(frozen.pid)
    stack.wait_until_gone(frozen.pid)
    stack.wait_until_done(task)
    # By the first of the others and by the second; the frozen one has not written.
    assert stack.writes(task) == 2
    first, second, third = stack.intervals(task)
    assert first.pid == frozen.pid
    assert first.end is None
    assert second.start - first.start > LEASE
    assert third.pid == other.pid
    # Whether it noticed by itself ("lost") or the watchdog was faster.
    assert [outcome for outcome in stack.runs(task) if outcome != "lost"] == ["crashed", "done", "done"]


def test_worker_and_child_frozen_past_the_lease(stack: Stack) -> None:
    task = Task.objects.create(seconds=2)
    stack.scheduler()
    stack.worker("one")
    child = stack.child_at_work(task)
    frozen = stack.pid("one")
    stack.worker("two")
    stack.freeze(frozen, child.pid)
    stack.wait_until_done(task)
    stack.thaw(child.pid, frozen)
    stack.wait_until_gone(child.pid)
    # What it knew of that child counts no more against the row.
    stack.kill(stack.pid("two"))
    stack.supervisor.hold("two")
    later = Task.objects.create()
    stack.wait_until_done(later)
    assert stack.pid("one") == frozen
    assert stack.intervals(task)[0].end is None
    assert len(stack.intervals(task)) == 2
    assert stack.writes(task) == 1
    assert not Claim.objects.filter(object_pk=str(task.pk)).exists()


def test_child_frozen_between_pop_and_claim(stack: Stack) -> None:
    trap = Trap("before", "jobs.claims.take", how="SIGSTOP")
    task = Task.objects.create()
    do_task.enqueue(task)
    stack.worker("one", trap=trap)
    frozen, _ = stack.wait_until_sprung(trap)
    stack.wait_until_frozen(frozen)
    stack.scheduler()
    stack.worker("two")
    stack.wait_until_done(task)
    stack.thaw(frozen)
    stack.wait_until_gone(frozen)
    assert stack.runs(task) == ["done"]
    assert stack.writes(task) == 1
    assert not Claim.objects.filter(object_pk=str(task.pk)).exists()


def test_child_frozen_before_it_settles(stack: Stack) -> None:
    trap = Trap("before", "jobs.claims.settle", how="SIGSTOP")
    task = Task.objects.create()
    do_task.enqueue(task)
    stack.worker("one", trap=trap)
    frozen, _ = stack.wait_until_sprung(trap)
    stack.wait_until_frozen(frozen)
    # The work is done and the claim is there. Once the lease is over, somebody else settles it, and needs the row anew.
    stack.scheduler()
    stack.worker("two")
    stack.wait_until_done(task)
    Task.objects.filter(pk=task.pk).update(state="pending", seconds=3)
    do_task.enqueue(task)
    other = stack.child_at_work(task)
    stack.thaw(frozen)
    stack.wait_until_gone(frozen)
    # It has not settled what is not its own.
    assert Claim.objects.get(object_pk=str(task.pk)).holder.endswith(f":{other.pid}")
    stack.wait_until_done(task)
    # A sweep settles it, or a worker that was sent to it by a tick and counts the crash first. Whether the frozen one
    # noticed by itself ("lost") or the watchdog was faster.
    assert [outcome for outcome in stack.runs(task) if outcome != "lost"][-2:] == ["resolved", "done"]
    assert stack.writes(task) == 2


def test_worker_frozen_and_its_child_at_work(stack: Stack) -> None:
    task = Task.objects.create(seconds=LEASE + 1)
    stack.scheduler()
    stack.worker("one")
    child = stack.child_at_work(task)
    frozen = stack.pid("one")
    stack.freeze(frozen)
    stack.worker("two")
    stack.wait_until_done(task)
    stack.thaw(frozen)
    assert [interval.pid for interval in stack.intervals(task)] == [child.pid]
    assert stack.runs(task) == ["done"]
    assert stack.exits == []


def test_claim_taken_away_from_a_process_that_is_well(stack: Stack) -> None:
    task = Task.objects.create(seconds=20)
    stack.scheduler()
    stack.worker("one")
    stack.worker("two")
    robbed = stack.child_at_work(task)
    Task.objects.filter(pk=task.pk).update(seconds=0)
    Claim.objects.filter(object_pk=str(task.pk)).delete()
    # Its next heartbeat finds out.
    stack.wait_until_gone(robbed.pid)
    stack.wait_until_done(task)
    assert stack.intervals(task)[0].end is None
    assert stack.writes(task) == 1
    # That it ended says nothing about the row.
    assert stack.runs(task) == ["done"]
    assert stack.exits == []


def test_claim_taken_away_before_the_job_writes(stack: Stack) -> None:
    """Between two heartbeats only the token stands between a process that lost its claim and the row."""
    task = Task.objects.create(seconds=2.5)
    stack.scheduler()
    for name in ("one", "two"):
        stack.worker(name, TEST_JOBS=json.dumps({**INTERVALS, "HEARTBEAT": 3}))
    robbed = stack.child_at_work(task)
    Task.objects.filter(pk=task.pk).update(seconds=5)
    Claim.objects.filter(object_pk=str(task.pk)).delete()
    do_task.enqueue(task)
    other = stack.child_at_work(task)
    stack.wait_until_gone(robbed.pid)
    # It wanted to write while the other one was at work, and did not.
    assert stack.runs(task) == ["lost"]
    assert other.is_running()
    assert (stack.state(task), stack.writes(task)) == ("pending", 0)
    stack.wait_until_done(task)
    assert stack.runs(task) == ["lost", "done"]
    assert stack.writes(task) == 1
