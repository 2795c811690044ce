"""Redis loses what is in it, wholly or in part."""

import time
from datetime import timedelta

import pytest
from rq import Worker

from tests.cast.jobs import do_task
from tests.cast.models import Task
from tests.recovery.conftest import SOON, Stack

# About Redis.
pytestmark = pytest.mark.any_database


def test_emptied_before_a_job_runs(stack: Stack) -> None:
    tasks = [Task.objects.create() for _ in range(5)]
    do_task.enqueue_many(tasks)
    assert len(stack.queued()) == 5
    stack.redis.flush()
    stack.scheduler()
    stack.worker()
    stack.wait_until_done(*tasks)
    assert [stack.runs(task) for task in tasks] == [["done"]] * 5


def test_emptied_while_a_job_runs(stack: Stack) -> None:
    task = Task.objects.create(seconds=4)
    stack.scheduler()
    stack.worker("worker", "default")
    stack.worker("sweeper", "background")
    stack.child_at_work(task)
    behind = Task.objects.create()
    do_task.enqueue(behind)
    assert stack.queued() == [f"do_task-{behind.pk}"]
    stack.redis.flush()
    # Within one sweep interval and one tick; on a machine that is busy, the worker may be free again by then.
    stack.wait_for(lambda: stack.queued() == [f"do_task-{behind.pk}"] or stack.intervals(behind), "queued again", SOON)
    stack.wait_until_done(task, behind)
    assert stack.runs(task) == stack.runs(behind) == ["done"]
    assert len(stack.intervals(task)) == 1
    assert stack.exits == []


def test_emptied_after_a_job_has_run(stack: Stack) -> None:
    task = Task.objects.create()
    stack.scheduler()
    stack.worker()
    stack.wait_until_done(task)
    stack.redis.flush()
    struck_at = time.monotonic()
    # Nobody queues it: the schedule itself has to have survived.
    later = Task.objects.create()
    stack.wait_until_done(later)
    assert stack.intervals(later)[0].start - struck_at < SOON
    stack.wait_for_sweeps(2)
    assert stack.writes(task) == 1
    assert stack.runs(task) == ["done"]


def test_only_the_lists_lost(stack: Stack) -> None:
    at_work = Task.objects.create(seconds=3)
    stack.worker()
    do_task.enqueue(at_work)
    stack.child_at_work(at_work)
    behind, spread = [Task.objects.create() for _ in range(3)], Task.objects.create()
    do_task.enqueue_many(behind)
    do_task.enqueue_with_jitter(spread, min_wait=timedelta(seconds=2), max_wait=timedelta(seconds=4))
    assert len(stack.queued()) == 3
    stack.client.delete(*stack.client.keys("rq:queue*"))
    assert stack.queued() == []
    stack.scheduler()
    stack.wait_until_done(at_work, spread, *behind)
    assert [stack.writes(task) for task in (at_work, spread, *behind)] == [1] * 5


def test_only_the_delayed_set_lost(stack: Stack) -> None:
    tasks = [Task.objects.create() for _ in range(3)]
    for task in tasks:
        do_task.enqueue_with_jitter(task, min_wait=timedelta(hours=1), max_wait=timedelta(hours=2))
    stack.scheduler()
    stack.worker()
    # To wait in the delayed set is to be queued: the sweep leaves them there.
    stack.wait_for_sweeps(2)
    assert len(stack.delayed()) == 3
    assert not any(map(stack.intervals, tasks))
    stack.client.delete("rq:scheduler:scheduled_jobs")
    struck_at = time.monotonic()
    stack.wait_until_done(*tasks)
    assert all(stack.intervals(task)[0].start - struck_at < SOON for task in tasks)
    assert stack.delayed() == {}


def test_only_the_keys_of_the_workers_lost(stack: Stack) -> None:
    def registered() -> bool:
        return [worker.pid for worker in Worker.all(connection=stack.client)] == [stack.pid()]

    def lose_them() -> None:
        keys = stack.client.keys("rq:worker*")
        # Its own key, that of all workers, and one for each of its queues.
        assert len(keys) == 5
        stack.client.delete(*keys)

    stack.worker()
    stack.wait_for(registered, "registered")
    lose_them()
    stack.wait_for(registered, "registered again while it waits")
    task = Task.objects.create(seconds=4)
    do_task.enqueue(task)
    stack.child_at_work(task)
    lose_them()
    stack.wait_for(registered, "registered again while it works")
    assert stack.intervals(task)[0].end is None
    stack.wait_until_done(task)
    assert stack.runs(task) == ["done"]
    assert stack.exits == []
