"""Somebody writes into Redis what looks like ours: it hides no row, stops no worker, and keeps nobody from ticking."""

import logging
import os
import time
from datetime import timedelta
from typing import Any

import pytest
from django.test import Client

from jobs import enqueue, health, queues, scheduler
from jobs.explain import explain
from jobs.models import Schedule
from jobs.testing import drain, tick
from tests.cast.jobs import do_task, schedule_tasks, touch_file, unique_until_done
from tests.cast.models import Task
from tests.integration.conftest import BACKGROUND_LIST, URGENT_LIST

pytestmark = pytest.mark.django_db(transaction=True)

A_DAY = timedelta(days=1)


@pytest.fixture(params=["next year", "for ever"])
def far(request: pytest.FixtureRequest) -> float:
    return time.time() + 365 * 86_400 if request.param == "next year" else float("inf")


def hide(redis: Any, far: float, *ids: str) -> None:
    redis.zadd(queues.DELAYED_KEY, dict.fromkeys(ids, far))


def test_a_row_that_is_delayed_for_too_long_is_found_by_its_sweep(task, far, redis, queued):
    hide(redis, far, f"do_task-{task.pk}")
    assert schedule_tasks.sweep().enqueued == 1
    assert queued() == [f"do_task-{task.pk}"]


def test_and_is_queued_when_it_is_asked_for(task, far, redis, queued, delayed):
    hide(redis, far, f"do_task-{task.pk}")
    do_task.enqueue(task)
    do_task.enqueue_many([task])
    assert queued() == [f"do_task-{task.pk}"]
    redis.delete("rq:queue:default")
    do_task.enqueue_with_jitter(task, max_wait=timedelta(minutes=1))
    assert delayed()[f"do_task-{task.pk}"] < time.time() + 61


def test_any_number_of_them_take_no_room(task, far, redis, queued):
    Schedule.objects.update_or_create(name="schedule_tasks", defaults={"limit": 5})
    hide(redis, far, *[f"do_task-{n}" for n in range(1_000_000, 1_000_010)])
    do_task.enqueue(task)
    assert queued() == [f"do_task-{task.pk}"]
    redis.delete("rq:queue:default")
    assert schedule_tasks.sweep().enqueued == 1


def test_one_that_is_spread_out_comes_when_it_should(declaring, task, far, redis, delayed, monkeypatch):
    monkeypatch.setattr(schedule_tasks, "jitter", timedelta(minutes=1))
    hide(redis, far, f"do_task-{task.pk}")
    assert schedule_tasks.sweep().enqueued == 1
    assert delayed()[f"do_task-{task.pk}"] < time.time() + 61


def test_a_schedule_runs_all_the_same(far, redis, queued):
    tick()
    redis.flushall()
    hide(redis, far, "schedule_tasks")
    Schedule.objects.filter(name="schedule_tasks").update(next_run_at="2020-01-01T00:00Z")
    tick()
    assert queued(BACKGROUND_LIST).count("schedule_tasks") == 1


def test_the_tick_drops_them_and_says_so(task, far, redis, delayed, caplog):
    far_away = [f"do_task-{n}" for n in range(1500)]
    hide(redis, far, *far_away, "nightly", "touch_file-x", "of_another_version-7")
    soon = time.time() + A_DAY.total_seconds() - 60
    redis.zadd(queues.DELAYED_KEY, {f"do_task-{task.pk}": soon})
    with caplog.at_level(logging.WARNING, "selfheal"):
        tick()
        tick()
    # Plain calls may wait for as long as they like.
    assert set(delayed()) <= {f"do_task-{task.pk}", "touch_file-x", "of_another_version-7"}
    assert delayed()["touch_file-x"] == far
    said = [record.getMessage() for record in caplog.records if "Dropped" in record.getMessage()]
    assert said[0].startswith("Dropped 1")
    assert "nothing of ours waits for more than 1 day" in said[0]


def test_what_may_wait_no_longer_than_that_is_refused_longer(task):
    do_task.enqueue_with_jitter(task, max_wait=A_DAY)
    with pytest.raises(
        ValueError, match="a row waits in the queue for 1 day, 0:00:00 at most; have the sweep of do_ta"
    ):
        do_task.enqueue_with_jitter(task, max_wait=A_DAY * 2)
    touch_file.enqueue_with_jitter("/tmp/x", max_wait=A_DAY * 2)


def test_the_pages_do_not_believe_them(task, far, redis, admin_client: Client):
    hide(redis, far, f"do_task-{task.pk}")
    assert "spread out" not in explain(do_task, task.pk).verdict.sentence


@pytest.mark.parametrize("expiry", [None, 365 * 86_400])
def test_who_says_for_ever_that_somebody_ticks_is_not_believed(expiry, redis, at_work):
    redis.set(scheduler.TICKED_KEY, time.time() + 365 * 86_400, ex=expiry)
    Schedule.objects.update(next_run_at="2020-01-01T00:00Z")
    assert not health.read().ticking.is_alive
    assert scheduler.stands_in(redis)
    # Once. As after one that has really ticked.
    assert not scheduler.stands_in(redis)
    scheduler.Scheduler(connection=redis).enqueue_jobs()
    assert not scheduler.stands_in(redis)


@pytest.mark.parametrize("expiry", [None, 365 * 86_400])
def test_a_unique_key_keeps_no_call_out_for_longer_than_it_may(expiry, redis, queued):
    unique_until_done.enqueue(1)
    [key] = redis.keys("selfheal:unique:*")
    redis.delete(key, URGENT_LIST)
    redis.set(key, "x", ex=expiry)
    unique_until_done.enqueue(1)
    assert len(queued(URGENT_LIST)) == 1
    # And then for as long as it may.
    unique_until_done.enqueue(1)
    assert len(queued(URGENT_LIST)) == 1


def test_a_unique_key_of_another_type_keeps_no_call_from_ending(redis, tmp_path):
    unique_until_done.enqueue(1)
    [key] = redis.keys("selfheal:unique:*")
    redis.delete(key)
    redis.rpush(key, "x")
    assert drain()["done"] == 1
    assert redis.zcard(queues.CALLS_KEY) == 0


def test_what_is_refused_is_one_dequeue_each(redis, task):
    """So that nobody can keep a worker in one for ever."""
    redis.rpush("rq:queue:default", *["rubbish"] * 5, f"do_task-{task.pk}")
    assert drain() == {"done": 1}
    assert Task.objects.get(pk=task.pk).state == "done"
    assert enqueue.queued_ids(queues.get("default"), "do_task") == set()


def test_what_is_no_name_among_those_of_workers_keeps_nobody_from_watching_his_child(worker, redis):
    """A worker that met it there would go on to the next message, and its child with nobody to watch it."""
    redis.sadd("rq:workers:default", b"\xff")
    worker._announced_at = None
    worker._announce("busy")
    assert redis.hget(worker.key, "state") == b"busy"


def test_nothing_but_its_end_makes_a_worker_leave_its_child(worker, monkeypatch):
    def fails(*whatever: Any) -> None:
        raise OSError("Resource temporarily unavailable")

    monkeypatch.setattr(worker, "_announce", fails)
    worker._stop_requested = True
    pid, status, _ = worker._in_child("a child", lambda: time.sleep(0.5), 30, fails)
    assert status == 0
    with pytest.raises(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
