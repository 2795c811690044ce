"""What machines ask: probes and metrics, the rules and the dashboard that are made of them, and servers that hang."""

import json
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from io import StringIO
from typing import Any

import pytest
import yaml
from django.core.management import CommandError, call_command
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.utils import timezone
from prometheus_client.parser import text_string_to_metric_families

from config import BASE_DIR
from jobs import health, job, metrics, sweep, tallies, views
from jobs.jobs import selfheal_prune
from jobs.models import Claim, Run, Schedule, Tally
from jobs.testing import tick
from jobs.worker import Worker
from tests.cast.models import Task
from tests.integration.test_health import ended
from tests.machine import within

MONITORING = BASE_DIR / "docs" / "monitoring"

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture(autouse=True)
def _no_reading_of_another_test() -> Iterator[None]:
    yield
    for reading in views._readings.values():
        reading.exception(10)
    views._readings.clear()


def ready(client: Client) -> tuple[int, dict[str, Any]]:
    response = client.get("/readyz")
    return response.status_code, response.json()


def scrape(client: Client) -> dict[tuple[str, ...], float]:
    """The samples by their name and the values of their labels."""
    response = client.get("/metrics")
    assert response.status_code == 200, response.content
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(response.content.decode())
        for sample in family.samples
    }


def swept(name: str) -> None:
    """Declare a job and its sweep."""
    made = job(name=name)(lambda task: None)
    sweep(made, cron="* * * * *", name=f"schedule_{name}")(Task.objects.pending)


# --- Probes -----------------------------------------------------------------------------------------------------------


def test_a_process_that_lives_says_so_whatever_else_is_away(client, django_assert_num_queries, hanging_redis):
    with within(0.5), django_assert_num_queries(0):
        response = client.get("/healthz")
    assert (response.status_code, response.content) == (200, b"ok\n")
    assert client.post("/healthz").status_code == 405


def test_it_is_ready_while_work_gets_done(client, at_work: Worker):
    well = {"ready": True, "database": "answers", "redis": "answers", "late_sweeps": [], "queues_without_worker": []}
    assert ready(client) == (200, well)
    long_ago = timezone.now() - timedelta(minutes=4)
    Schedule.objects.filter(name__in=["schedule_tasks", "selfheal_prune"]).update(last_succeeded_at=long_ago)
    assert ready(client) == (503, {**well, "ready": False, "late_sweeps": ["schedule_tasks"]})


def test_it_is_not_for_the_probe_to_say_that_something_is_paused(client, at_work, switch):
    switch("schedule_tasks")
    Schedule.objects.filter(name="schedule_tasks").update(last_succeeded_at=timezone.now() - timedelta(days=1))
    assert ready(client)[0] == 200


def test_it_is_not_ready_without_a_worker_for_each_queue(client, at_work, redis):
    redis.hset(at_work.key, "queues", "default,background")
    status, said = ready(client)
    assert (status, said["queues_without_worker"]) == (503, ["urgent"])
    # And so it is with what a monitor asks in a terminal, although nothing waits there yet.
    with pytest.raises(CommandError, match="All is not well"):
        call_command("jobs", "check", stdout=StringIO())
    redis.hset(at_work.key, "queues", "urgent,default,background")
    assert ready(client)[0] == 200
    call_command("jobs", "check", stdout=StringIO())


@pytest.mark.parametrize("away", ["refusing_redis", "hanging_redis"])
def test_it_is_not_ready_without_redis_and_says_so_within_a_second(client, at_work, away, request):
    request.getfixturevalue(away)
    with within(1):
        status, said = ready(client)
    assert (status, said["database"], said["redis"]) == (503, "answers", "does not answer")
    # Nobody knows.
    assert said["queues_without_worker"] == []


@contextmanager
def locked_against_everybody() -> Iterator[None]:
    """Nobody can read the schedules, on a connection of its own."""
    other = connection.copy()
    try:
        with other.cursor() as cursor:
            cursor.execute("BEGIN")
            cursor.execute(f"LOCK TABLE {Schedule._meta.db_table} IN ACCESS EXCLUSIVE MODE")
        yield
    finally:
        other.close()


# A file has nobody in it who could hang.
@pytest.mark.postgres
def test_a_database_that_hangs_is_said_to_within_a_second_and_holds_one_thread_a_page(client, at_work, race):
    with locked_against_everybody():
        with within(2):
            answers = race(*[lambda: Client().get("/readyz")] * 5)
        assert [answer.status_code for answer in answers] == [503] * 5
        with within(2):
            answers = race(*[lambda: Client().get("/metrics")] * 5)
        assert [answer.status_code for answer in answers] == [503] * 5
        assert [thread.name for thread in threading.enumerate()].count("selfheal-read") == 2
    assert views._readings[health.read].result(10).database.is_up
    assert ready(client)[0] == 200


def test_nothing_that_is_secret_is_said(client, at_work, settings):
    settings.RQ_QUEUES["urgent"] = {"URL": "redis://user:hidden@127.0.0.1:1/0"}
    for path in ("/readyz", "/metrics"):
        assert b"hidden" not in client.get(path).content


# --- Metrics ----------------------------------------------------------------------------------------------------------


def test_the_metrics_are_what_is_there(client, at_work, redis):
    Schedule.objects.filter(name="schedule_tasks").update(
        matched=12, enqueued=3, already_queued=4, waiting=5, last_started_at=timezone.now() - timedelta(seconds=7),
        last_finished_at=timezone.now() - timedelta(seconds=5),
    )  # fmt: skip
    later = timezone.now() + timedelta(hours=1)
    for number in range(3):
        claim = {"job": "do_task", "model": "cast.task", "first_claimed_at": timezone.now()}
        Claim.objects.create(**claim, object_pk=f"w{number}", next_attempt_at=later)
    Claim.objects.create(**claim, object_pk="q", quarantined_at=later)
    redis.rpush("rq:queue:default", *"abcde")
    for took in (0.02, 0.2, 20):
        ended(took=took)
    ended("failed")
    tallies.count(None)
    found = scrape(client)
    expected = {
        ("selfheal_needs_work", "do_task"): 12,
        ("selfheal_queued", "do_task"): 7,
        ("selfheal_backing_off", "do_task"): 3,
        ("selfheal_quarantined", "do_task"): 1,
        ("selfheal_leased", "do_task"): 0,
        ("selfheal_queue_depth", "default"): 5,
        ("selfheal_queue_workers", "urgent"): 1,
        ("selfheal_runs_total", "do_task", "done"): 3,
        ("selfheal_runs_total", "do_task", "failed"): 1,
        ("selfheal_run_duration_seconds_bucket", "0.01", "do_task"): 0,
        ("selfheal_run_duration_seconds_bucket", "0.3", "do_task"): 2,
        ("selfheal_run_duration_seconds_bucket", "+Inf", "do_task"): 3,
        ("selfheal_paused", "do_task"): 0,
        ("selfheal_redis_up",): 1,
        ("selfheal_database_up",): 1,
        ("selfheal_warning_problems",): 1,
    }
    assert {name: found[name] for name in expected} == expected
    assert found["selfheal_sweep_duration_seconds", "schedule_tasks"] == pytest.approx(2, abs=0.1)
    assert found["selfheal_tick_age_seconds",] < 60
    age = timezone.now().timestamp() - found["selfheal_last_success_timestamp_seconds", "schedule_tasks"]
    assert 0 <= age < 60


def test_labels_are_declared_names_and_nothing_that_grows(client, at_work):
    ended(job="gone_since")
    tallies.count(None)
    assert not [name for name in scrape(client) if "gone_since" in name]


def test_what_is_counted_never_becomes_less(client, at_work, settings):
    settings.JOBS = {**settings.JOBS, "KEEP_RUNS": timedelta(days=1)}
    for days in range(3):
        ended(ago=timedelta(days=days))
        ended("failed", ago=timedelta(days=days))
        tallies.count_hour(tallies.hour_of(timezone.now() - timedelta(days=days)))
    before = scrape(client)
    selfheal_prune()
    assert Run.objects.count() == 2
    assert Tally.objects.filter(hour=Tally.BEFORE).exists()
    after = scrape(client)
    counted = [name for name in before if name[0].startswith("selfheal_run")]
    assert {name: after[name] for name in counted} == {name: before[name] for name in counted}
    assert before["selfheal_runs_total", "do_task", "failed"] == 3


def test_what_hangs_while_the_totals_are_read_holds_up_no_request(client, at_work, monkeypatch):
    goes_on, outcomes = threading.Event(), tallies.outcomes
    monkeypatch.setattr(tallies, "outcomes", lambda names: goes_on.wait(20) and outcomes(names))
    with within(1.5):
        assert client.get("/metrics").status_code == 503
    goes_on.set()
    [reading] = views._readings.values()
    assert reading.exception(10) is None
    assert client.get("/metrics").status_code == 200


def test_the_metrics_of_hundreds_of_jobs_cost_no_more_statements_and_the_database_adds_up(
    client, at_work, nothing_else, monkeypatch
):
    """What is read grows with the jobs, and not with the hours that were counted."""

    def read() -> int:
        with CaptureQueriesContext(connection) as queries:
            metrics.read()
        sums = [query["sql"] for query in queries if "selfheal_tally" in query["sql"]]
        assert len(sums) == 5
        assert all("GROUP BY" in sql for sql in sums)
        return len(queries)

    swept("job_0")
    few = read()
    for number in range(1, 250):
        swept(f"job_{number}")
    call_command("migrate", verbosity=0)
    now, times = timezone.now(), [1] * len(tallies.BOUNDS)
    Tally.objects.bulk_create(
        Tally(hour=tallies.last(hours, now), job=f"job_{number}", outcome="done", runs=1, took=times)
        for number in range(250)
        for hours in range(100)
    )
    assert read() == few
    # This machine may be busy.
    monkeypatch.setattr(views, "PATIENCE_SECONDS", 20)
    with within(1):
        assert scrape(client)["selfheal_runs_total", "job_7", "done"] == 100
    # After a day all that nobody asks for by the hour is one row.
    selfheal_prune()
    assert Tally.objects.count() == 250 * (25 + 1)
    assert scrape(client)["selfheal_run_duration_seconds_bucket", "0.01", "job_7"] == 100


def test_with_redis_away_its_figures_are_missing_and_not_nothing(client, at_work, refusing_redis):
    found = scrape(client)
    assert found["selfheal_redis_up",] == 0
    assert ("selfheal_queue_depth", "default") not in found
    assert ("selfheal_leased", "do_task") in found


def test_without_the_library_the_page_says_what_to_install(client, monkeypatch):
    monkeypatch.setattr(sys, "meta_path", [NotInstalled(), *sys.meta_path])
    for name in [
        name for name in sys.modules if name.partition(".")[0] == "prometheus_client" or name == "jobs.metrics"
    ]:
        monkeypatch.delitem(sys.modules, name)
    assert client.get("/metrics").status_code == 404


class NotInstalled:
    """As if prometheus_client were not there."""

    def find_spec(self, name: str, *args: Any) -> None:
        if name.partition(".")[0] == "prometheus_client":
            raise ModuleNotFoundError(name)


# --- What is made of them ---------------------------------------------------------------------------------------------


def test_the_rules_and_the_dashboard_ask_for_what_is_there(client, at_work):
    ended()
    tallies.count(None)
    tick()
    Schedule.objects.update(last_started_at=timezone.now(), last_finished_at=timezone.now())
    exposed = {name for name, *_ in scrape(client)}
    rules = [
        rule for group in yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"] for rule in group["rules"]
    ]
    assert len(rules) >= 6
    panels = json.loads((MONITORING / "dashboard.json").read_text())["panels"]
    asked = [rule["expr"] for rule in rules] + [target["expr"] for panel in panels for target in panel["targets"]]
    for expression in asked:
        names = set(re.findall(r"\bselfheal_\w+", expression))
        assert names, expression
        assert names <= exposed, expression
        labels = set(re.findall(r"(?:by|without) \(([\w, ]+)\)", expression))
        assert {label for each in labels for label in each.split(", ")} <= {"name", "queue", "outcome", "le"}
    for rule in rules:
        assert rule["annotations"].keys() == {"summary", "action"}
        assert set(re.findall(r"\$labels\.(\w+)", str(rule["annotations"]))) <= {"name", "queue"}
    assert len({panel["id"] for panel in panels}) == len(panels)
