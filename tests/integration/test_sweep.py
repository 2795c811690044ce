"""Rows that need work become ids in the queue: which, how many, in what order, and at what cost."""

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from django.contrib.auth.models import Group, Permission
from django.db import connection
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from jobs import SweepResult, claims, clock, enqueue, job, queues, sweep
from jobs.exceptions import Misconfigured
from jobs.models import Claim, Run, Schedule
from jobs.sweep import Sweep, _each_once
from jobs.testing import drain, perform, tick
from tests.cast.jobs import delete_task, do_task, schedule_keyed, schedule_tasks, schedule_tickets
from tests.cast.models import Keyed, Parcel, Sticker, Task, Ticket

pytestmark = pytest.mark.django_db(transaction=True)

A_MINUTE = timedelta(minutes=1)


def ids(tasks: Any) -> list[str]:
    return [f"do_task-{task.pk}" for task in tasks]


def make(count: int) -> list[Task]:
    return Task.objects.bulk_create([Task() for _ in range(count)])


def claim(task: Task, job: str = "do_task", **values: Any) -> Claim:
    identity = {"job": job, "model": "cast.task", "object_pk": str(task.pk)}
    return Claim.objects.create(first_claimed_at=timezone.now(), **identity, **values)


def leased(task: Task, job: str = "do_task", expires_in: timedelta = A_MINUTE) -> Claim:
    return claim(
        task,
        job,
        lease_key=f"cast.task:{task.pk}",
        token="0" * 32,
        leased_at=timezone.now(),
        lease_expires_at=timezone.now() + expires_in,
    )


@pytest.fixture
def sweeping(declaring: None) -> Callable[..., Sweep]:
    """A sweep of tasks with options of its own. Its job is called `work`."""

    def sweeping(rows: Callable[[], Any] = Task.objects.pending, **options: Any) -> Sweep:
        @job
        def work(task):
            task.state = "done"
            task.save()

        return sweep(work, cron="0 0 1 1 *", name="schedule_work", **options)(rows)

    return sweeping


# --- Which rows -------------------------------------------------------------------------------------------------------


def test_every_row_that_matches_is_queued_and_no_other(queued):
    tasks = make(3)
    Task.objects.create(state="done")
    assert schedule_tasks.sweep() == SweepResult(matched=3, enqueued=3, already_queued=0, waiting=0)
    assert queued() == ids(tasks)


def test_nothing_to_do_is_nothing_queued(redis):
    assert schedule_tasks.sweep() == SweepResult(0, 0, 0, 0)
    assert redis.exists("rq:queue:default") == 0


def test_swept_again_nothing_is_queued_twice(queued):
    tasks = make(3)
    schedule_tasks.sweep()
    assert schedule_tasks.sweep() == SweepResult(matched=3, enqueued=0, already_queued=3, waiting=0)
    assert queued() == ids(tasks)


def test_what_redis_lost_is_queued_again(redis, queued):
    tasks = make(3)
    schedule_tasks.sweep()
    redis.lrem("rq:queue:default", 1, f"do_task-{tasks[1].pk}")
    assert schedule_tasks.sweep() == SweepResult(matched=3, enqueued=1, already_queued=2, waiting=0)
    redis.flushall()
    assert schedule_tasks.sweep().enqueued == 3
    assert queued() == ids(tasks)


def test_what_is_in_the_delayed_set_is_queued(task, queued):
    do_task.enqueue_with_jitter(task, max_wait=A_MINUTE, min_wait=A_MINUTE)
    assert schedule_tasks.sweep() == SweepResult(matched=1, enqueued=0, already_queued=1, waiting=0)
    assert queued() == []


@pytest.mark.parametrize("size", [1, 3, 4, 100])
def test_what_is_queued_is_read_in_slices(size, monkeypatch, queued):
    """Of the list and the delayed set, one longer than the other, with ids of another job among them."""
    monkeypatch.setattr(enqueue, "SLICE", size)
    tasks = make(12)
    for number, task in enumerate(tasks[:8]):
        do_task.enqueue(task)
        if number % 2:
            delete_task.enqueue(task)
    for task in tasks[8:11]:
        do_task.enqueue_with_jitter(task, max_wait=A_MINUTE, min_wait=A_MINUTE)
    assert schedule_tasks.sweep() == SweepResult(matched=12, enqueued=1, already_queued=11, waiting=0)
    assert queued()[-1] == f"do_task-{tasks[11].pk}"


def test_rows_that_are_held_are_left(queued):
    tasks = make(7)
    leased(tasks[0])
    leased(tasks[1], job="delete_task")
    claim(tasks[2], attempts=1, next_attempt_at=timezone.now() + A_MINUTE)
    claim(tasks[3], quarantined_at=timezone.now())
    assert schedule_tasks.sweep() == SweepResult(matched=7, enqueued=3, already_queued=0, waiting=4)
    assert queued() == ids(tasks[4:])


def test_rows_that_are_not_held_any_more_are_queued(queued):
    tasks = make(4)
    leased(tasks[0], expires_in=-A_MINUTE)
    claim(tasks[1], attempts=1, next_attempt_at=timezone.now() - A_MINUTE)
    # Another job's own affairs.
    claim(tasks[2], job="delete_task", quarantined_at=timezone.now())
    claim(tasks[3], job="delete_task", attempts=1, next_attempt_at=timezone.now() + A_MINUTE)
    assert schedule_tasks.sweep() == SweepResult(matched=4, enqueued=4, already_queued=0, waiting=0)
    assert queued() == ids(tasks)


def test_the_counts_always_add_up(queued):
    tasks = make(10)
    for task in tasks[:2]:
        do_task.enqueue(task)
    do_task.enqueue_with_jitter(tasks[2], max_wait=A_MINUTE, min_wait=A_MINUTE)
    leased(tasks[3])
    claim(tasks[4], quarantined_at=timezone.now())
    result = schedule_tasks.sweep()
    assert result == SweepResult(matched=10, enqueued=5, already_queued=3, waiting=2)
    assert result.matched == sum(result[1:])


@pytest.mark.parametrize("batch_size", [1000, 2])
def test_a_row_that_a_join_finds_twice_is_queued_once(sweeping, queued, batch_size):
    permissions = list(Permission.objects.all()[:5])
    groups = [Group.objects.create(name=str(number)) for number in range(3)]
    for group in groups:
        group.permissions.set(permissions)
    found_by_each = Group.objects.filter(permissions__in=permissions).order_by("permissions__pk", "pk")
    result = sweeping(lambda: found_by_each, batch_size=batch_size).sweep()
    assert queued() == [f"work-{group.pk}" for group in groups]
    assert result.enqueued == 3
    assert result.matched == sum(result[1:])


@pytest.mark.parametrize("copies", [1, 5])
def test_of_what_joins_find_no_more_is_read_than_it_takes(sweeping, queued, copies):
    """Rows without any of the others come once; those with many of them as often as they have."""
    parcels = [Parcel.objects.create() for _ in range(30)]
    Sticker.objects.bulk_create(Sticker(parcel=parcel) for parcel in parcels[:20] for _ in range(copies))
    bare = sweeping(lambda: Parcel.objects.filter(stickers=None).order_by("pk"), limit=4)
    with CaptureQueriesContext(connection) as captured:
        assert bare.sweep().enqueued == 4
    assert sum("sticker" in query["sql"] and " LIMIT " in query["sql"] for query in captured) == 1
    with CaptureQueriesContext(connection) as captured:
        marked = Parcel.objects.filter(stickers__isnull=False).order_by("pk")
        assert list(_each_once(marked, 4, 1000)) == [parcel.pk for parcel in parcels[:4]]
        assert list(_each_once(marked, 50, 1000)) == [parcel.pk for parcel in parcels[:20]]
        assert list(_each_once(marked, 0, 1000)) == []
    assert all(" LIMIT " in query["sql"] for query in captured)
    assert len(captured) <= 5


@pytest.mark.parametrize("key", ["a/b", "ключ 😀", "x" * 500, "-", "_"])
def test_rows_with_keys_of_text_are_queued_once(key, queued):
    Keyed.objects.create(key=key)
    assert schedule_keyed.sweep().enqueued == 1
    assert schedule_keyed.sweep().already_queued == 1
    assert len(queued()) == 1


def test_rows_with_uuids_are_held_and_found_like_others(queued):
    first, second = Ticket.objects.create(), Ticket.objects.create()
    Claim.objects.create(
        job="do_ticket",
        model="cast.ticket",
        object_pk=str(first.pk),
        quarantined_at=timezone.now(),
        first_claimed_at=timezone.now(),
    )
    assert schedule_tickets.sweep() == SweepResult(matched=2, enqueued=1, already_queued=0, waiting=1)
    assert queued() == [f"do_ticket-{second.pk}"]


# --- In what order, and how many --------------------------------------------------------------------------------------


def test_the_order_is_the_querysets(sweeping, queued):
    tasks = make(5)
    sweeping(lambda: Task.objects.order_by("-pk"), batch_size=2).sweep()
    assert queued() == [f"work-{task.pk}" for task in reversed(tasks)]


def test_without_an_order_the_oldest_key_comes_first(sweeping, queued):
    tasks = make(5)
    with CaptureQueriesContext(connection) as captured:
        sweeping(lambda: Task.objects.all()).sweep()
    assert queued() == [f"work-{task.pk}" for task in tasks]
    # It may have come so by chance.
    assert [query for query in captured if 'FROM "cast_task" ORDER BY' in query["sql"]]


def test_no_more_than_the_limit_are_queued_the_oldest_first(sweeping, queued):
    tasks = make(10)
    swept = sweeping(limit=4)
    assert swept.sweep().enqueued == 4
    assert queued() == [f"work-{task.pk}" for task in tasks[:4]]
    assert swept.sweep().enqueued == 0
    assert len(queued()) == 4


def test_the_next_ones_follow_as_the_queue_empties(sweeping, redis, queued):
    tasks = make(10)
    swept = sweeping(limit=4)
    swept.sweep()
    for _ in range(3):
        redis.lpop("rq:queue:default")
    Task.objects.filter(pk__in=[task.pk for task in tasks[:3]]).update(state="done")
    swept.sweep()
    assert queued() == [f"work-{task.pk}" for task in tasks[3:7]]


def test_both_parts_count_towards_the_limit(sweeping, queued, delayed):
    tasks = make(10)
    swept = sweeping(limit=4)
    swept.job.enqueue(tasks[8])
    swept.job.enqueue_with_jitter(tasks[9], max_wait=A_MINUTE, min_wait=A_MINUTE)
    result = swept.sweep()
    assert result.enqueued == 2
    assert queued() == [f"work-{tasks[i].pk}" for i in (8, 0, 1)]
    assert len(delayed()) == 1
    assert swept.sweep().enqueued == 0


def test_the_jobs_of_others_take_no_room(sweeping, queued):
    tasks = make(3)
    do_task.enqueue_many(range(100, 120))
    assert sweeping(limit=3).sweep() == SweepResult(matched=3, enqueued=3, already_queued=0, waiting=0)
    assert queued()[-3:] == [f"work-{task.pk}" for task in tasks]


def test_rows_at_the_front_that_cannot_succeed_do_not_stop_the_others(sweeping, queued):
    tasks = make(20)
    for task in tasks[:15]:
        claim(task, job="work", quarantined_at=timezone.now())
    result = sweeping(limit=3, batch_size=2).sweep()
    assert result.enqueued == 3
    assert queued() == [f"work-{task.pk}" for task in tasks[15:18]]


def test_an_operators_limit_comes_before_the_codes(queued):
    make(10)
    Schedule.objects.filter(name="schedule_tasks").update(limit=2)
    assert schedule_tasks.sweep().enqueued == 2
    Schedule.objects.filter(name="schedule_tasks").update(limit=5)
    assert schedule_tasks.sweep().enqueued == 3
    Schedule.objects.filter(name="schedule_tasks").update(limit=0)
    assert schedule_tasks.sweep().enqueued == 0
    Schedule.objects.filter(name="schedule_tasks").update(limit=None)
    assert schedule_tasks.sweep().enqueued == 5


def test_a_backlog_is_not_read_to_its_end(sweeping, redis, monkeypatch):
    make(50)
    seen: list[str] = []
    batches = enqueue.batches

    def watched(items, size):
        return batches((seen.append(item) or item for item in items), size)

    monkeypatch.setattr(enqueue, "batches", watched)
    swept = sweeping(limit=5, batch_size=2)
    result = swept.sweep()
    assert result.enqueued == 5
    assert len(seen) <= 7

    # Nor when the queue is full of ids of which it meets none.
    redis.delete("rq:queue:default")
    redis.rpush("rq:queue:default", *[f"work-{number}" for number in range(-5, 0)])
    seen.clear()
    assert swept.sweep().enqueued == 0
    assert len(seen) <= 7


def test_jitter_spreads_them_over_the_delayed_set(sweeping, queued, delayed):
    tasks = make(30)
    before = time.time()
    swept = sweeping(jitter=timedelta(minutes=10))
    assert swept.sweep().enqueued == 30
    assert queued() == []
    waits = [at - before for at in delayed().values()]
    assert set(delayed()) == {f"work-{task.pk}" for task in tasks}
    assert min(waits) >= 0
    assert max(waits) <= 600 + time.time() - before
    assert max(waits) - min(waits) > 60

    again = delayed()
    assert swept.sweep() == SweepResult(matched=30, enqueued=0, already_queued=30, waiting=0)
    assert delayed() == again
    tick(now=timezone.now() + timedelta(minutes=11))
    assert len(queued()) == 30


# --- Trying it --------------------------------------------------------------------------------------------------------


def test_a_dry_run_counts_and_changes_nothing(redis, switch):
    tasks = make(5)
    do_task.enqueue(tasks[0])
    claim(tasks[1], quarantined_at=timezone.now())
    claim(Task.objects.create(state="done"), quarantined_at=timezone.now())
    redis_before = redis.lrange("rq:queue:default", 0, -1)
    claims_before = list(Claim.objects.values())

    expected = SweepResult(matched=5, enqueued=3, already_queued=1, waiting=1)
    assert schedule_tasks.sweep(dry_run=True) == expected
    switch("schedule_tasks")
    assert schedule_tasks.sweep(dry_run=True) == expected

    assert redis.lrange("rq:queue:default", 0, -1) == redis_before
    assert list(Claim.objects.values()) == claims_before
    assert not Run.objects.exists()


# --- Switched off -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("switched_off", ["schedule_tasks", "do_task"])
def test_its_own_switch_or_its_jobs_stops_it_and_nothing_is_lost(switched_off, switch, redis):
    make(3)
    mended = claim(Task.objects.create(state="done"), quarantined_at=timezone.now())
    switch(switched_off)
    assert schedule_tasks.sweep() == SweepResult(0, 0, 0, 0)
    assert redis.exists("rq:queue:default") == 0
    assert Claim.objects.filter(pk=mended.pk).exists()
    switch(switched_off, on=False)
    assert schedule_tasks.sweep().enqueued == 3


def test_another_jobs_switch_does_not(switch):
    make(3)
    switch("delete_task")
    switch("schedule_task_deletions")
    assert schedule_tasks.sweep().enqueued == 3


# --- Claims of rows that need nothing any more ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        {"attempts": 2, "next_attempt_at": timezone.now() + timedelta(days=1), "last_error": "No space left"},
        {
            "quarantined_at": timezone.now() - timedelta(days=9),
            "unmatched_since": timezone.now() - timedelta(days=1),
            "last_error": "No space left",
        },
        {
            "lease_key": "cast.task:gone",
            "token": "0" * 32,
            "leased_at": timezone.now() - timedelta(hours=1),
            "lease_expires_at": timezone.now() - timedelta(minutes=50),
            "holder": "worker@host:7",
            "last_error": "No space left",
        },
    ],
    ids=["backing off", "quarantined", "lease expired"],
)
@pytest.mark.parametrize("how", ["changed", "deleted"])
def test_a_row_that_was_mended_by_hand_is_settled_by_the_sweep(values, how, task):
    claim(task, **values)
    if how == "deleted":
        pk = task.pk
        task.delete()
    else:
        pk = task.pk
        Task.objects.update(state="done")
    schedule_tasks.sweep()
    assert not Claim.objects.exists()
    [run] = Run.objects.all()
    assert (run.job, run.model, run.object_pk, run.outcome, run.error) == (
        "do_task",
        "cast.task",
        str(pk),
        "resolved",
        "No space left",
    )


def test_a_quarantine_outlives_what_only_happens_to_its_row_for_a_while(task):
    """Its account is suspended for a sweep, say. A job that kills its process must not be let loose on it again."""
    set_aside = claim(task, quarantined_at=timezone.now(), crashes=3, deaths=3)
    Task.objects.update(state="suspended")
    schedule_tasks.sweep()
    schedule_tasks.sweep()
    Task.objects.update(state="pending")
    assert schedule_tasks.sweep() == SweepResult(matched=1, enqueued=0, already_queued=0, waiting=1)
    assert perform(do_task, task) == "quarantined"
    # What is over counts no more: the row would have to be unmatched for a whole day again.
    set_aside.refresh_from_db()
    assert (set_aside.deaths, set_aside.unmatched_since) == (3, None)


def test_nor_has_anything_happened_to_a_quarantined_row_until_that_has_lasted_for_a_day(task):
    claim(task, quarantined_at=timezone.now())
    Task.objects.update(state="done")
    with clock.fixed(now := timezone.now()):
        schedule_tasks.sweep()
    with clock.fixed(now + timedelta(hours=23)):
        schedule_tasks.sweep()
    assert Claim.objects.get().unmatched_since == now
    with clock.fixed(now + timedelta(hours=25)):
        schedule_tasks.sweep()
    assert not Claim.objects.exists()


def test_a_quarantined_row_that_is_gone_needs_no_day(task):
    claim(task, quarantined_at=timezone.now())
    task.delete()
    schedule_tasks.sweep()
    assert not Claim.objects.exists()


def test_whoever_waits_in_line_for_nothing_leaves_no_history(task):
    leased(task, "delete_task")
    assert perform(do_task, task) == "busy"
    Task.objects.update(state="done")
    schedule_tasks.sweep()
    assert [each.job for each in Claim.objects.all()] == ["delete_task"]
    assert not Run.objects.exists()


def test_a_claim_that_somebody_works_on_is_left_to_them():
    task = Task.objects.create(state="done")
    leased(task)
    schedule_tasks.sweep()
    assert Claim.objects.count() == 1


def test_nor_one_that_is_taken_at_the_very_moment_when_it_is_looked_at(monkeypatch):
    task = Task.objects.create(state="done")
    claim(task, attempts=1)
    needed = claims._needed

    def needed_and_taken(*arguments: Any) -> set[str]:
        assert isinstance(claims.take(claims.Attempt(do_task, "cast.task", str(task.pk))), Claim)
        return needed(*arguments)

    monkeypatch.setattr(claims, "_needed", needed_and_taken)
    schedule_tasks.sweep()
    assert Claim.objects.get().lease_key is not None
    assert not Run.objects.exists()


def test_a_claim_of_another_job_is_left_to_its_own_sweep(task):
    claim(task, job="delete_task", quarantined_at=timezone.now())
    schedule_tasks.sweep()
    assert Claim.objects.count() == 1


def test_a_claim_of_a_row_that_still_matches_stays(task):
    claim(task, quarantined_at=timezone.now())
    schedule_tasks.sweep()
    assert Claim.objects.count() == 1
    assert not Run.objects.exists()


def test_of_more_claims_than_are_looked_at_together_each_is_settled_that_can_be():
    # A thousand are read at a time. These are the first, and the last.
    Task.objects.bulk_create(
        [Task(state="done" if number < 5 or number >= 1020 else "pending") for number in range(1030)]
    )
    now, later = timezone.now(), timezone.now() + timedelta(days=1)
    Claim.objects.bulk_create(
        Claim(
            job="do_task", model="cast.task", object_pk=str(pk), first_claimed_at=now, attempts=1, next_attempt_at=later
        )
        for pk in Task.objects.order_by("pk").values_list("pk", flat=True)
    )
    assert schedule_tasks.sweep() == SweepResult(matched=1015, enqueued=0, already_queued=0, waiting=1015)
    assert Claim.objects.count() == 1015
    assert Run.objects.filter(outcome="resolved").count() == 15


def test_a_claim_on_a_key_that_the_model_no_longer_has_is_settled():
    Claim.objects.create(job="do_task", model="cast.task", object_pk="a/b", first_claimed_at=timezone.now())
    schedule_tasks.sweep()
    assert not Claim.objects.exists()


# --- What it costs ----------------------------------------------------------------------------------------------------


def test_a_thousand_rows_cost_one_round_trip(round_trips, django_assert_num_queries):
    make(3000)
    with round_trips() as sent, django_assert_num_queries(4):
        # Its switches, the number of claims, the limit, and the rows.
        assert schedule_tasks.sweep().enqueued == 3000
    # One look at what is queued, and one push for each thousand.
    assert len(sent) == 1 + 3


def test_with_claims_there_is_one_more_query_per_thousand(django_assert_num_queries):
    tasks = make(3000)
    claim(tasks[0], quarantined_at=timezone.now())
    with django_assert_num_queries(5 + 2 + 3):
        # And for the claim: whether its row still matches, and whether there are more; for each batch, what is held.
        assert schedule_tasks.sweep() == SweepResult(matched=3000, enqueued=2999, already_queued=0, waiting=1)


def test_swept_again_it_only_looks(round_trips):
    make(2500)
    schedule_tasks.sweep()
    with round_trips() as sent:
        assert schedule_tasks.sweep().already_queued == 2500
    assert len(sent) == 1


def test_a_smaller_batch_is_pushed_as_such(sweeping, round_trips):
    make(10)
    with round_trips() as sent:
        sweeping(batch_size=3).sweep()
    assert len(sent) == 1 + 4


# --- As a run of its schedule -----------------------------------------------------------------------------------------


def test_a_run_keeps_the_counts_and_no_history(queued):
    make(3)
    claim(Task.objects.last(), quarantined_at=timezone.now())
    schedule = Schedule.objects.filter(name="schedule_tasks")
    schedule.owe()
    tick()
    # The sweep, and the two rows that it queued.
    assert drain() == {"done": 3}
    kept = schedule.get()
    assert (kept.matched, kept.enqueued, kept.already_queued, kept.waiting) == (3, 2, 0, 1)
    assert kept.last_outcome == "done"
    assert kept.last_started_at is not None
    assert kept.last_finished_at >= kept.last_started_at >= kept.last_enqueued_at
    assert set(Run.objects.values_list("job", flat=True)) == {"do_task"}


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        (lambda: None, "schedule_work returned NoneType; return a queryset of the rows."),
        (lambda: Task.objects.all()[:3], "cannot be filtered any further, because it is a slice"),
        (lambda: Task.objects.values("pk"), "schedule_work returned values"),
    ],
)
def test_a_queryset_that_cannot_be_asked_is_refused(sweeping, rows, sentence):
    with pytest.raises(Misconfigured, match=sentence):
        sweeping(rows).sweep()


def test_a_sweep_that_raises_says_so(sweeping):
    def broken():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        sweeping(broken).sweep()


def test_it_asks_the_database_that_is_written_to(sweeping):
    assert sweeping().queryset()._db == "default"
    assert sweeping(lambda: Task.objects.using("elsewhere")).queryset()._db == "elsewhere"


def test_the_whole_way_from_row_to_row(sweeping):
    tasks = make(3)
    swept = sweeping()
    swept.sweep()
    assert [perform(swept.job, task) for task in tasks] == ["done"] * 3
    assert swept.sweep() == SweepResult(0, 0, 0, 0)


def test_combined_querysets_feed_one_job(sweeping, queued):
    pending = Task.objects.create()
    deleting = Task.objects.create(state="deleting")
    sweeping(lambda: Task.objects.pending() | Task.objects.deleting()).sweep()
    assert queued() == [f"work-{pending.pk}", f"work-{deleting.pk}"]
    assert delete_task.sweep is not None
    assert queues.get("default").count == 2
