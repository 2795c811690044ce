"""Rows whose jobs raise, kill, hang or never finish, and the good rows beside them."""

import itertools
import time

import pytest
from django.utils import timezone

from jobs.claims import STILL_NEEDED
from jobs.explain import explain
from jobs.models import Claim
from tests.cast.jobs import do_task
from tests.cast.models import Task
from tests.recovery.conftest import LEASE, Stack

pytestmark = pytest.mark.long_on_sqlite


def test_one_that_raises_and_one_that_kills_among_a_hundred_good_ones(stack: Stack) -> None:
    killer = Task.objects.create(behaviour="kill_my_process")
    raiser = Task.objects.create(behaviour="always_raise")
    good = Task.objects.bulk_create([Task() for _ in range(100)])
    stack.scheduler()
    stack.worker("one")
    stack.worker("two")
    stack.wait_until_done(*good)
    stack.wait_for(
        lambda: Claim.objects.filter(object_pk=str(killer.pk), quarantined_at__isnull=False).exists(), "quarantine"
    )
    stack.wait_for(lambda: stack.runs(raiser).count("failed") >= 3, "three failures")
    stack.wait_for_sweeps(2)
    assert len(stack.intervals(killer)) == 3
    assert stack.runs(killer) == ["crashed"] * 3
    assert "SIGKILL" in Claim.objects.get(object_pk=str(killer.pk)).last_error
    # It goes on failing while we look.
    stack.wait_for(
        lambda: Claim.objects.get(object_pk=str(raiser.pk)).attempts == len(stack.runs(raiser)), "each failure counted"
    )
    backing_off = Claim.objects.get(object_pk=str(raiser.pk))
    assert backing_off.quarantined_at is None
    assert "cannot succeed" in backing_off.last_error
    starts = [interval.start for interval in stack.intervals(raiser)]
    # At least half of the first delay of one second, then of two.
    assert starts[1] - starts[0] >= 0.5
    assert all(later - earlier >= 1 for earlier, later in itertools.pairwise(starts[1:]))
    assert [stack.writes(task) for task in good] == [1] * 100
    # The workers have lived through it all.
    assert stack.exits == []


def test_one_that_swallows_its_time_limit(stack: Stack) -> None:
    """It goes on after the exception that should end it, and is ended past that: here after three seconds, not 30."""
    task = Task.objects.create(behaviour="swallow_everything")
    stack.scheduler()
    stack.worker(CAST_TIMEOUT="1", TEST_RUNAWAY_AFTER="3")
    worker, child = stack.pid(), stack.child_at_work(task)
    began = stack.intervals(task)[0].start
    good = Task.objects.create()
    gone_at = stack.wait_until_gone(child.pid)
    assert 4 <= gone_at - began < 4 + LEASE
    assert [event["event"] for event in stack.events() if event["pid"] == child.pid] == ["start", "swallowed"]
    stack.wait_until_done(good)
    stack.wait_for(lambda: stack.runs(task), "its death written down")
    # On a busy machine it may have been tried again by now.
    assert set(stack.runs(task)) == {"crashed"}
    assert Claim.objects.get(object_pk=str(task.pk)).deaths >= 1
    assert stack.pid() == worker


def test_one_that_never_lets_go_of_the_interpreter(stack: Stack) -> None:
    """No heartbeat and no signal handler can run in its process. It is gone before its lease is."""
    task = Task.objects.create(behaviour="never_let_go")
    stack.scheduler()
    stack.worker("one")
    child = stack.child_at_work(task)
    stack.worker("two")
    expires_at = Claim.objects.get(object_pk=str(task.pk)).lease_expires_at
    stack.wait_until_gone(child.pid)
    assert timezone.now() < expires_at
    Task.objects.filter(pk=task.pk).update(behaviour="succeed")
    stack.wait_until_done(task)
    assert not stack.at_once(task)
    assert stack.runs(task) == ["crashed", "done"]


def test_one_that_succeeds_and_still_needs_work(stack: Stack) -> None:
    task = Task.objects.create(behaviour="leave_pending")
    stack.scheduler()
    stack.worker()
    stack.wait_for(lambda: len(stack.runs(task)) >= 3, "three successes")
    good = Task.objects.create()
    stack.wait_until_done(good)
    assert set(stack.runs(task)) == {"done"}
    explanation = explain(do_task, task)
    assert {run.error for run in explanation.runs} == {STILL_NEEDED}
    assert [step.state for step in explanation.steps if step.title == "Attempts"] == ["problem"]
    # Nothing is held against it, and it is not queued again before the next sweep.
    assert not Claim.objects.filter(object_pk=str(task.pk), lease_key__isnull=True).exists()
    starts = [interval.start for interval in stack.intervals(task)]
    assert len(starts) <= (time.monotonic() - starts[0]) / 2 + 2
    Task.objects.filter(pk=task.pk).update(behaviour="succeed")
    stack.wait_until_done(task)
    assert stack.state(task) == "done"
