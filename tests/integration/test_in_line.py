"""Two jobs that want one row: whoever finds it in the other's hands waits in line, and begins when it is free."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from django.db import transaction
from django.utils import timezone

from jobs import Backoff, claims, enqueue, explain, job, sweep
from jobs.claims import Attempt
from jobs.job import Job
from jobs.message import Message
from jobs.models import Claim
from jobs.sweep import Sweep, SweepResult
from jobs.testing import drain, perform, tick
from tests.cast.jobs import delete_task, do_task
from tests.cast.models import Task

pytestmark = pytest.mark.django_db(transaction=True)

A_MINUTE = timedelta(minutes=1)


@pytest.fixture
def on_pending(declaring: None) -> Callable[..., tuple[Job, Sweep]]:
    """Declare a job that wants the pending tasks, with its sweep."""

    def declare(function: Callable[[Any], Any], **options: Any) -> tuple[Job, Sweep]:
        made = job(backoff=Backoff(first=A_MINUTE), **options)(function)
        return made, sweep(made, cron="0 0 1 1 *", name=f"schedule_{made.name}")(Task.objects.pending)

    return declare


def attempt(task: Task, of: Job = do_task) -> Attempt:
    return Attempt(of, "cast.task", str(task.pk), worker="w1")


def taken(task: Task, of: Job = do_task) -> Attempt:
    made = attempt(task, of)
    assert isinstance(claims.take(made), Claim)
    return made


def in_line(task: Task) -> list[str]:
    return list(Claim.objects.in_line().filter(object_pk=str(task.pk)).values_list("job", flat=True))


# --- A place ----------------------------------------------------------------------------------------------------------


def test_whoever_finds_the_row_in_another_jobs_hands_has_a_place_in_line(task):
    taken(task)
    for _ in range(3):
        assert claims.take(attempt(task, delete_task)) == "busy"
    assert in_line(task) == ["delete_task"]
    # Not for the same job twice, which is at it.
    assert claims.take(attempt(task)) == "busy"
    assert Claim.objects.count() == 2


def test_so_has_whoever_is_found_by_a_sweep_meanwhile(task, on_pending):
    """Whose sweep always comes while the other is at work is never popped."""
    _, schedule = on_pending(lambda task: None, name="audit")
    taken(task)
    assert schedule.sweep(dry_run=True) == SweepResult(matched=1, waiting=1)
    assert in_line(task) == []
    for _ in range(2):
        assert schedule.sweep() == SweepResult(matched=1, waiting=1)
        assert in_line(task) == ["audit"]


def test_a_place_that_is_lost_to_a_race_breaks_no_transaction(task):
    taken(task)
    with transaction.atomic():
        Task.objects.create(name="written before")
        assert claims.take(attempt(task, delete_task)) == "busy"
        Task.objects.create(name="written after")
    assert in_line(task) == ["delete_task"]
    assert Task.objects.filter(name__startswith="written").count() == 2


def test_nobody_waits_in_line_for_a_row_that_was_freed_in_the_same_moment(race, queued, redis):
    """Either the second one has it, or whoever freed it has seen that it waits."""
    for _ in range(10):
        task = Task.objects.create()
        first, second = taken(task), attempt(task, delete_task)

        def free(first: Attempt = first) -> None:
            claims.settle(first, {})
            enqueue.next_in_line(first.model, first.pk)

        _, outcome = race(free, lambda second=second: claims.take(second))
        assert isinstance(outcome, Claim) or queued() == [f"delete_task-{task.pk}"]
        redis.flushall()


# --- Its turn ---------------------------------------------------------------------------------------------------------


def finishes(task: Task) -> None:
    Task.objects.update(state="deleting")


def fails(task: Task) -> None:
    Task.objects.update(state="deleting")
    raise RuntimeError("No space left")


def finds_out_that_it_is_not_needed(task: Task) -> None:
    Task.objects.update(state="deleting")
    with claims.with_lock(task):
        pytest.fail("the block was entered")


@pytest.mark.parametrize("end", [finishes, fails, finds_out_that_it_is_not_needed])
def test_however_an_attempt_ends_who_waits_for_its_row_is_queued_at_once(task, on_pending, queued, end):
    def create(task: Task) -> None:
        delete_task.enqueue(task)
        assert drain() == {"busy": 1}
        end(task)

    create_task, _ = on_pending(create)
    perform(create_task, task)
    assert queued() == [f"delete_task-{task.pk}"]
    assert drain() == {"done": 1}
    assert Task.objects.get().state == "deleted"
    assert not Claim.objects.exists()


@pytest.mark.parametrize(("was_killed", "stopping"), [(True, True), (False, True), (False, False)])
def test_also_when_it_is_its_worker_who_says_so(task, worker, queued, was_killed, stopping):
    made = taken(task)
    assert claims.take(attempt(task, delete_task)) == "busy"
    worker._stop_requested = stopping
    message = Message.fetch(f"do_task-{task.pk}", connection=worker.connection)
    worker._note_death(message, made, 0.0, 4711, 9, was_killed)
    assert f"delete_task-{task.pk}" in queued()


def test_whoever_has_waited_comes_before_what_was_queued_meanwhile_and_once(task, queued):
    made = taken(task)
    assert claims.take(attempt(task, delete_task)) == "busy"
    others = [Task.objects.create() for _ in range(3)]
    delete_task.enqueue_many(others)
    delete_task.enqueue(task)
    delete_task.enqueue_with_jitter(Task.objects.create(), max_wait=A_MINUTE)
    claims.release(made)
    enqueue.next_in_line("cast.task", str(task.pk))
    # What has been given back may be attempted now, too.
    assert [id for id in queued() if id.startswith("delete")] == [f"delete_task-{each.pk}" for each in (task, *others)]


def test_two_that_wait_come_in_the_order_in_which_they_came(task, on_pending, queued):
    later, earlier = (on_pending(lambda task: None, name=name)[0] for name in ("later", "earlier"))
    made = taken(task)
    for each in (earlier, later):
        assert claims.take(attempt(task, each)) == "busy"
    claims.settle(made, {})
    enqueue.next_in_line("cast.task", str(task.pk))
    assert queued() == [f"earlier-{task.pk}", f"later-{task.pk}"]


def test_a_job_that_takes_most_of_each_interval_does_not_keep_another_from_its_row(task, on_pending):
    """Both sweeps come at the same moment, and always the same one first."""
    done: list[str] = []

    def often(task: Task) -> None:
        done.append("often")
        # The worker beside it.
        drain()

    _, schedule_often = on_pending(often)
    _, schedule_rarely = on_pending(lambda task: done.append("rarely"), name="rarely")
    for _ in range(4):
        schedule_often.sweep()
        schedule_rarely.sweep()
        drain()
    assert done == ["often", "rarely"] * 4


def test_who_is_switched_off_or_backs_off_or_is_quarantined_is_in_nobodys_way(task, on_pending, queued, switch):
    paused, waits, aside, next_one = (
        on_pending(lambda task: None, name=name)[0] for name in ("paused", "waits", "aside", "next_one")
    )
    made = taken(task)
    for each in (paused, waits, aside, next_one):
        assert claims.take(attempt(task, each)) == "busy"
    switch("paused")
    Claim.objects.filter(job="waits").update(next_attempt_at=timezone.now() + A_MINUTE)
    Claim.objects.filter(job="aside").update(quarantined_at=timezone.now())
    claims.settle(made, {})
    enqueue.next_in_line("cast.task", str(task.pk))
    assert queued() == [f"next_one-{task.pk}"]
    assert drain() == {"done": 1}


def test_the_tick_brings_them_when_redis_has_lost_them_but_not_while_they_wait(task, queued, redis):
    made = taken(task)
    Task.objects.update(state="deleting")
    assert claims.take(attempt(task, delete_task)) == "busy"
    tick()
    assert f"delete_task-{task.pk}" not in queued()
    claims.settle(made, {})
    enqueue.next_in_line("cast.task", str(task.pk))
    redis.flushall()
    tick()
    assert f"delete_task-{task.pk}" in queued()


def test_a_redis_that_is_away_costs_a_warning(task, refusing_redis, caplog):
    made = taken(task)
    assert claims.take(attempt(task, delete_task)) == "busy"
    claims.settle(made, {})
    enqueue.next_in_line("cast.task", str(task.pk))
    assert "delete_task was not queued" in caplog.text


# --- Seen -------------------------------------------------------------------------------------------------------------


def test_it_is_said_for_whom_it_waits(task, admin_client):
    Task.objects.update(state="deleting")
    taken(task)
    assert claims.take(attempt(task, delete_task)) == "busy"
    explanation = explain.explain(delete_task, task)
    assert explanation.verdict == ("It waits for do_task, which holds the row.", "waiting", "")
    page = admin_client.get("/admin/selfheal/claim/", {"state": "in_line"})
    [shown] = page.context["cl"].result_list
    assert (shown.job, shown.state) == ("delete_task", "in_line")
    assert "waits for the job that holds the row" in page.content.decode()
    assert not Claim.objects.due().exists()
