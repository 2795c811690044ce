"""The history of attempts: what is kept for how long, and how it is asked."""

import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from django.db import connection
from django.db.models.signals import post_delete, pre_delete
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from jobs import claims, clock, enqueue, queues, tallies
from jobs import jobs as library
from jobs.jobs import selfheal_prune
from jobs.models import Claim, Operation, Run, Schedule, Tally
from jobs.testing import drain, perform, tick
from tests.cast.jobs import do_task, schedule_tasks
from tests.cast.models import Task

pytestmark = pytest.mark.django_db

NOON = datetime(2026, 5, 1, 12, tzinfo=UTC)


def runs(*ages: timedelta) -> list[Run]:
    now = timezone.now()
    return [Run.objects.create(job="do_task", outcome="done", finished_at=now - age) for age in ages]


# --- Pruning ----------------------------------------------------------------------------------------------------------


def test_what_is_older_than_keep_runs_is_deleted(settings):
    day = timedelta(days=1)
    kept = runs(timedelta(0), 13 * day, 14 * day - timedelta(minutes=1))
    runs(14 * day + timedelta(minutes=1), 400 * day)
    selfheal_prune()
    assert set(Run.objects.all()) == set(kept)

    settings.JOBS = {**settings.JOBS, "KEEP_RUNS": timedelta(hours=1)}
    selfheal_prune()
    assert set(Run.objects.all()) == {kept[0]}


def test_it_is_deleted_a_batch_at_a_time(monkeypatch, django_assert_num_queries):
    monkeypatch.setattr(library, "BATCH", 3)
    runs(*[timedelta(days=20)] * 7)
    asks_for_the_time = connection.vendor == "postgresql"
    # Three times: look, then delete; and a last look. A look at what is claimed, the claims of jobs that are gone, and
    # operations. The newest hour that was counted, and a locked look at the tallies.
    with django_assert_num_queries(2 * asks_for_the_time + 3 * 2 + 1 + 2 + 1 + 1 + 3):
        selfheal_prune()
    assert not Run.objects.exists()


def test_claims_of_jobs_that_are_gone_do_not_stay_for_ever():
    """No sweep settles them: a deploy has renamed their job, or removed it."""
    now, past, day = timezone.now(), timezone.now() - timedelta(days=15), timedelta(days=1)

    def claim(pk: str, job: str = "renamed_since", first: datetime = past, **values: Any) -> Claim:
        return Claim.objects.create(job=job, model="cast.task", object_pk=pk, first_claimed_at=first, **values)

    claim("1")
    claim("2", quarantined_at=past)
    claim("3", lease_key="cast.task:3", token="dead", lease_expires_at=now - day)
    kept = {
        claim("4", first=now - 13 * day),
        claim("5", lease_key="cast.task:5", token="at work", lease_expires_at=now + day),
        claim("6", job="do_task", quarantined_at=past),
    }
    selfheal_prune()
    assert set(Claim.objects.all()) == kept


def test_nothing_else_is_deleted():
    Claim.objects.create(job="do_task", model="cast.task", object_pk="1", first_claimed_at=NOON, quarantined_at=NOON)
    Task.objects.create(state="done")
    selfheal_prune()
    assert (Claim.objects.count(), Task.objects.count()) == (1, 1)


@pytest.fixture
def told() -> Iterator[list[Any]]:
    """What the receivers of a project are told that listen to every deletion, of whatever it is."""
    heard: list[Any] = []

    def listen(instance: Any, **kwargs: Any) -> None:
        heard.append(instance)

    for signal in (pre_delete, post_delete):
        signal.connect(listen)
    yield heard
    for signal in (pre_delete, post_delete):
        signal.disconnect(listen)


def test_whoever_listens_to_deletions_no_row_is_read_to_be_deleted(told, task):
    """Django itself would read 2,000 tracebacks."""
    now, old = timezone.now(), timezone.now() - timedelta(days=20)
    long = "Traceback\n" * 1000
    Run.objects.bulk_create(
        Run(job="gone", outcome="failed", error="E", traceback=long, finished_at=old) for _ in range(2000)
    )
    Claim.objects.create(job="gone", model="cast.task", object_pk="1", first_claimed_at=old, last_error=long)
    Operation.objects.create(action="release", last_pk=1, requested_at=old, finished_at=old)
    tallies.count_hour(tallies.hour_of(old))
    tallies.count_hour(tallies.hour_of(now))
    with CaptureQueriesContext(connection) as queries:
        selfheal_prune()
        tallies.count_hour(tallies.hour_of(now))
        assert perform(do_task, task) == "done"
    assert not any("traceback" in query["sql"] and query["sql"].startswith("SELECT") for query in queries)
    deletions = re.findall(r'DELETE FROM "(\w+)"', " ".join(query["sql"] for query in queries))
    once = ["selfheal_run", "selfheal_claim", "selfheal_operation", "selfheal_tally", "selfheal_tally"]
    assert deletions == [*once, "selfheal_claim"]
    assert told == []
    assert (Operation.objects.count(), Claim.objects.count(), Tally.objects.count()) == (0, 0, 1)


@pytest.mark.django_db(transaction=True)
def test_it_is_a_cron_job_like_any_other():
    runs(timedelta(days=20))
    assert selfheal_prune.is_scheduled
    Schedule.objects.filter(name="selfheal_prune").owe()
    assert "selfheal_prune" in tick()
    assert drain() == {"done": 1}
    assert [(run.job, run.outcome) for run in Run.objects.all()] == [("selfheal_prune", "done")]
    assert Schedule.objects.get(name="selfheal_prune").last_outcome == "done"


# --- The clock --------------------------------------------------------------------------------------------------------


def test_the_clock_can_be_held_still_and_goes_on_afterwards():
    with clock.fixed(NOON):
        assert (clock.now(), clock.read(), clock.timestamp()) == (NOON, NOON, NOON.timestamp())
        assert clock.now(timedelta(seconds=5)) == NOON + timedelta(seconds=5)
        with clock.fixed(None):
            assert clock.read() > NOON
        assert clock.read() == NOON
    assert abs(clock.read() - timezone.now()) < timedelta(seconds=5)


def test_the_clock_of_one_thread_is_not_anothers(race):
    def held(hour: int) -> datetime:
        with clock.fixed(NOON.replace(hour=hour)):
            return clock.read()

    assert race(lambda: held(1), lambda: held(2)) == [NOON.replace(hour=1), NOON.replace(hour=2)]


# --- Asked for by index -----------------------------------------------------------------------------------------------


def plan(queryset: Any) -> str:
    if connection.vendor == "postgresql":
        with connection.cursor() as cursor:
            # It would read a table as small as this one from end to end.
            cursor.execute("SET LOCAL enable_seqscan = off")
    return queryset.explain().upper()


def test_what_is_asked_for_each_row_and_each_tick_uses_an_index():
    """A million rows in quarantine must not make each claim slower."""
    claimed = Claim.objects.all()
    for queryset in (
        claimed.filter(token="0" * 32),
        claimed.filter(lease_key="cast.task:1", lease_expires_at__lte=timezone.now()),
        claimed.filter(job="do_task", model="cast.task", object_pk="1"),
        claimed.filter(model="cast.task", object_pk__in=["1", "2"]),
        claimed.of_rows("do_task", "cast.task", ["1", "2"]),
        # Who waits in line, asked after each attempt.
        claimed.due().filter(model="cast.task", object_pk="1"),
        Run.objects.filter(model="cast.task", object_pk="1"),
        Run.objects.filter(job="do_task").order_by("finished_at"),
        Run.objects.filter(finished_at__lt=timezone.now()).order_by("finished_at"),
    ):
        explained = plan(queryset)
        assert "INDEX" in explained, explained
        assert not re.search(r"(\d|SEQ) SCAN", explained), explained


def test_a_claim_costs_a_handful_of_statements(task, django_assert_max_num_queries):
    attempt = claims.Attempt(do_task, "cast.task", str(task.pk))
    with django_assert_max_num_queries(4):
        claims.take(attempt)
    with django_assert_max_num_queries(4):
        claims.settle(attempt, {})


# --- Several databases of Redis ---------------------------------------------------------------------------------------


@pytest.mark.django_db(transaction=True)
def test_queues_in_several_redis_are_all_looked_after(settings, task, redis_server, redis):
    settings.RQ_QUEUES["background"] = {"URL": redis_server.url.replace("/0", "/1")}
    assert len(queues.connections()) == 2
    elsewhere = queues.get("background").connection
    elsewhere.zadd(queues.DELAYED_KEY, {"schedule_tasks": 0})
    redis.zadd(queues.DELAYED_KEY, {f"do_task-{task.pk}": 0})
    assert [enqueue.move_due(connection) for connection in queues.connections()] == [1, 1]
    assert elsewhere.lrange("rq:queue:background", 0, -1) == [b"schedule_tasks"]
    assert redis.lrange("rq:queue:default", 0, -1) == [f"do_task-{task.pk}".encode()]
    assert schedule_tasks.sweep().already_queued == 1
