"""Somebody changes or deletes the row while its job works on it, and two jobs want one row."""

import itertools
import time
from datetime import timedelta

import pytest
from django.db import transaction
from django.utils import timezone

from jobs.models import Claim, Run
from tests.cast.jobs import delete_task, do_task
from tests.cast.models import Task
from tests.recovery.conftest import PATIENCE, Stack

pytestmark = pytest.mark.long_on_sqlite


def test_deleted_while_its_job_works(stack: Stack) -> None:
    task = Task.objects.create(seconds=2)
    stack.scheduler()
    stack.worker()
    worker, child = stack.pid(), stack.child_at_work(task)
    Task.objects.filter(pk=task.pk).delete()
    stack.wait_until_gone(child.pid)
    later = Task.objects.create()
    stack.wait_until_done(later)
    assert not Task.objects.filter(pk=task.pk).exists()
    # It ended quietly: no failure, nothing unsettled, nothing written.
    assert stack.runs(task) == []
    assert not Claim.objects.filter(object_pk=str(task.pk)).exists()
    assert stack.intervals(task)[0].end is None
    assert stack.pid() == worker


def test_deleted_while_it_is_backing_off(stack: Stack) -> None:
    task = Task.objects.create(behaviour="always_raise")
    stack.scheduler()
    stack.worker()
    stack.wait_for(lambda: "failed" in stack.runs(task), "a first failure")
    Task.objects.filter(pk=task.pk).delete()
    stack.wait_for(lambda: not Claim.objects.filter(object_pk=str(task.pk)).exists(), "the claim settled")
    assert stack.runs(task)[-1] == "resolved"


def test_changed_while_its_job_works(stack: Stack) -> None:
    task = Task.objects.create(seconds=2)
    stack.scheduler()
    stack.worker()
    child = stack.child_at_work(task)
    # A state that no sweep asks for.
    Task.objects.filter(pk=task.pk).update(state="paused", name="by a user")
    stack.wait_until_gone(child.pid)
    stack.wait_for_sweeps(1)
    task.refresh_from_db()
    assert (task.state, task.name, task.writes) == ("paused", "by a user", 0)
    assert stack.runs(task) == []
    assert not Claim.objects.filter(object_pk=str(task.pk)).exists()


def test_changed_in_a_transaction_that_commits_when_the_job_wants_to_write(stack: Stack) -> None:
    task = Task.objects.create(seconds=1)
    stack.scheduler()
    stack.worker()
    child = stack.child_at_work(task)
    with transaction.atomic():
        locked = Task.objects.select_for_update().get(pk=task.pk)
        locked.state, locked.name = "paused", "by a user"
        locked.save()
        # The job wants to write by now, and has to wait.
        stack.wait_for(lambda: stack.intervals(task)[0].start + 1.2 < time.monotonic(), "the job wants to write")
    stack.wait_until_gone(child.pid)
    task.refresh_from_db()
    assert (task.state, task.name, task.writes) == ("paused", "by a user", 0)


def test_wanted_by_another_job_while_its_job_works(stack: Stack) -> None:
    task = Task.objects.create(seconds=3)
    stack.scheduler()
    for name in ("one", "two", "three"):
        stack.worker(name)
    stack.child_at_work(task)
    Task.objects.filter(pk=task.pk).update(state="deleting")
    # By the user's hint, by a flood of hints, and by its sweep.
    delete_task.enqueue(task)
    stack.client.rpush("rq:queue:default", *[f"delete_task-{task.pk}", f"do_task-{task.pk}"] * 20)
    stack.wait_for_sweeps(1, "schedule_task_deletions")
    assert [interval.job for interval in stack.intervals(task)] == ["do_task"]
    stack.wait_until_done(task, state="deleted")
    # The first found out too late that it was not needed; nobody knows when exactly it gave up, but the claims do.
    assert [interval.job for interval in stack.intervals(task)] == ["do_task", "delete_task"]
    first, second = stack.intervals(task)
    assert second.start - first.start >= task.seconds
    assert stack.writes(task) == 0
    assert stack.runs(task, "do_task") == []
    assert stack.runs(task, "delete_task") == ["done"]


def test_deleted_by_a_user_during_a_long_creation(stack: Stack) -> None:
    """The deletion begins as soon as the creation has ended: no sweep, and no tick, has to find it again."""
    task = Task.objects.create(seconds=2)
    for name in ("one", "two"):
        stack.worker(name)
    do_task.enqueue(task)
    stack.child_at_work(task)
    Task.objects.filter(pk=task.pk).update(state="deleting", seconds=0)
    delete_task.enqueue(task)
    stack.wait_until_done(task, state="deleted")
    first, second = stack.intervals(task)
    assert (first.job, second.job) == ("do_task", "delete_task")
    assert second.start - first.start < task.seconds + 1.5
    assert stack.queued() == []


def test_deleted_by_a_user_while_the_process_of_the_creation_dies(stack: Stack) -> None:
    """Its worker sees that, and queues the deletion."""
    task = Task.objects.create(seconds=PATIENCE)
    for name in ("one", "two"):
        stack.worker(name)
    do_task.enqueue(task)
    child = stack.child_at_work(task)
    Task.objects.filter(pk=task.pk).update(state="deleting", seconds=0)
    delete_task.enqueue(task)
    stack.wait_for(lambda: Claim.objects.in_line().filter(job="delete_task").exists(), "a place in line")
    stack.kill(child.pid)
    stack.wait_for(lambda: stack.state(task) == "deleted", "the deletion")
    assert stack.runs(task) == ["crashed"]


def test_wanted_by_two_jobs_in_turn(stack: Stack) -> None:
    """A row that changes its mind again and again, under hints for both jobs, is worked on by one at a time."""
    task = Task.objects.create(seconds=0.7, behaviour="leave_pending")
    stack.scheduler()
    for name in ("one", "two", "three"):
        stack.worker(name)
    for state in ["deleting", "pending"] * 3:
        stack.client.rpush("rq:queue:default", *[f"delete_task-{task.pk}", f"do_task-{task.pk}"] * 5)
        begun = len(stack.intervals(task))
        stack.wait_for(lambda begun=begun: len(stack.intervals(task)) > begun, "somebody at work")
        Task.objects.filter(pk=task.pk).update(state=state)
    Task.objects.filter(pk=task.pk).update(state="deleting")
    stack.wait_until_done(task, state="deleted")
    assert {interval.job for interval in stack.intervals(task)} == {"do_task", "delete_task"}
    starts = sorted(interval.start for interval in stack.intervals(task))
    assert all(later - earlier >= 0.7 for earlier, later in itertools.pairwise(starts))


def test_quarantined_and_mended_by_hand(stack: Stack) -> None:
    mended, released = (Task.objects.create(behaviour="kill_my_process") for _ in range(2))
    stack.scheduler()
    stack.worker()
    stack.wait_for(lambda: Claim.objects.filter(quarantined_at__isnull=False).count() == 2, "both quarantined")
    Task.objects.filter(pk=mended.pk).update(state="done")
    # Nobody has to release it: when its sweep has not matched it for a day, that settles it.
    unmatched = Claim.objects.filter(object_pk=str(mended.pk), unmatched_since__isnull=False)
    stack.wait_for(unmatched.all().exists, "seen not to match")
    stack.wait_for_sweeps(1)
    assert unmatched.update(unmatched_since=timezone.now() - timedelta(days=1)) == 1
    stack.wait_until_done(mended)
    assert stack.runs(mended) == ["crashed"] * 3 + ["resolved"]
    # Where the cause was mended and the row still needs work, it takes a release.
    Task.objects.filter(pk=released.pk).update(behaviour="succeed")
    stack.wait_for_sweeps(2)
    assert stack.state(released) == "pending"
    assert len(stack.intervals(released)) == 3
    Claim.objects.filter(object_pk=str(released.pk)).release()
    stack.wait_until_done(released)
    assert stack.runs(released) == ["crashed"] * 3 + ["done"]
    assert not Run.objects.filter(outcome="failed").exists()
