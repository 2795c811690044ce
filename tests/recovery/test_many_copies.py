"""One row is queued many times, and one sweep comes due many times while nobody performs it."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from django.db import connections

from jobs.models import Schedule
from tests.cast.jobs import do_task
from tests.cast.models import Task
from tests.recovery.conftest import Stack

pytestmark = pytest.mark.long_on_sqlite

MANY = 100


def at_once(do: Callable[[], None]) -> None:
    def do_and_leave(_: int) -> None:
        try:
            do()
        finally:
            connections.close_all()

    with ThreadPoolExecutor(max_workers=20) as pool:
        list(pool.map(do_and_leave, range(MANY)))


def test_enqueued_a_hundred_times_at_once(stack: Stack) -> None:
    task = Task.objects.create(seconds=0.5)
    at_once(lambda: do_task.enqueue(task.pk))
    assert stack.queued() == [f"do_task-{task.pk}"]
    stack.scheduler()
    for name in ("one", "two", "three"):
        stack.worker(name)
    stack.wait_until_done(task)
    stack.wait_until_drained()
    assert len(stack.intervals(task)) == 1
    assert stack.runs(task) == ["done"]


def test_enqueued_a_hundred_times_while_workers_take_it(stack: Stack) -> None:
    task = Task.objects.create(seconds=2)
    stack.scheduler()
    for name in ("one", "two", "three"):
        stack.worker(name)
    stack.wait_until_up("one", "two", "three")
    at_once(lambda: do_task.enqueue(task))
    stack.wait_until_done(task)
    stack.wait_until_drained()
    assert len(stack.intervals(task)) == 1
    assert stack.runs(task) == ["done"]
    assert stack.writes(task) == 1


def test_a_hundred_copies_in_the_list(stack: Stack) -> None:
    """What no enqueue of ours would do, and a replayed backup of Redis might."""
    task = Task.objects.create(seconds=2)
    after = Task.objects.create()
    copies = [f"do_task-{task.pk}"] * MANY
    stack.client.rpush("rq:queue:default", *copies, f"do_task-{after.pk}")
    for name in ("one", "two", "three"):
        stack.worker(name)
    stack.wait_until_done(task, after)
    stack.wait_until_drained()
    assert len(stack.intervals(task)) == 1
    assert stack.runs(task) == ["done"]
    assert stack.writes(task) == 1


def test_a_hundred_copies_of_a_row_that_fails_at_first(stack: Stack) -> None:
    task = Task.objects.create(behaviour="raise_once")
    stack.client.rpush("rq:queue:default", *[f"do_task-{task.pk}"] * MANY)
    stack.scheduler()
    for name in ("one", "two", "three"):
        stack.worker(name)
    stack.wait_until_done(task)
    stack.wait_until_drained()
    # Copies do not shorten its backoff.
    first, second = stack.intervals(task)
    assert second.start - first.start >= 0.5
    assert stack.runs(task) == ["failed", "done"]
    assert stack.writes(task) == 1


def test_workers_away_for_thirty_ticks(stack: Stack) -> None:
    schedule = Schedule.objects.filter(name="schedule_tasks")
    schedule.update(cron="* * * * * *")
    stack.scheduler(TEST_JOBS='{"TICK": 0.1}')
    tasks = [Task.objects.create() for _ in range(3)]
    due = set()

    def ticks() -> int:
        """Each asks once what is due in the delayed set."""
        return stack.client.info("commandstats").get("cmdstat_zrangebyscore", {"calls": 0})["calls"]

    def long_enough() -> bool:
        due.add(schedule.get().next_run_at)
        return ticks() > 30 and len(due) > 3

    stack.wait_for(long_enough, "thirty ticks, and three times due")
    stack.wait_for(lambda: {"schedule_tasks", "schedule_task_deletions"} <= set(stack.queued("background")), "queued")
    queued = stack.queued("background")
    # At the full minute those of the databases join them.
    assert len(queued) == len(set(queued))
    assert stack.queued() == []
    enqueued_at = schedule.get().last_enqueued_at
    stack.worker("one")
    stack.worker("two")
    stack.wait_until_done(*tasks)
    stack.wait_for(lambda: schedule.filter(last_finished_at__gt=enqueued_at).exists(), "the sweep over")
    assert [stack.writes(task) for task in tasks] == [1, 1, 1]
