"""How it is going: what `health.read()` finds, also when the servers are away, and what it costs."""

import json
import re
import socket
from contextlib import closing
from datetime import datetime, timedelta
from typing import Any

import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext
from django.utils import timezone
from waffle import get_waffle_switch_model

from config.servers import RedisServer
from jobs import Backoff, clock, health, job, operations, pauses, queues, scheduler, sweep, tallies
from jobs.claims import Attempt, take
from jobs.health import Item, Problem
from jobs.jobs import selfheal_operate
from jobs.models import Claim, Run, Schedule, Tally
from jobs.testing import drain, perform, tick
from tests.cast.jobs import do_task, schedule_tasks
from tests.cast.models import Task
from tests.integration.conftest import QUEUES
from tests.machine import within

pytestmark = pytest.mark.django_db(transaction=True)


def item(name: str) -> Item:
    return next(each for each in health.read().items if each.name == name)


def problems() -> list[tuple[str, str, str]]:
    return [(each.severity, each.code, each.about) for each in health.read().problems]


def the_problem(code: str) -> Problem:
    [problem] = [each for each in health.read().problems if each.code == code]
    return problem


def claim(number: int, **values: Any) -> Claim:
    row = {"job": "do_task", "model": "cast.task", "object_pk": str(number), "first_claimed_at": timezone.now()}
    return Claim.objects.create(**{**row, **values})


def ended(outcome: str = "done", ago: timedelta = timedelta(0), took: float = 0.05, job: str = "do_task") -> None:
    at = timezone.now() - ago
    times = {"started_at": at - timedelta(seconds=took), "first_claimed_at": at - timedelta(seconds=20 * took)}
    Run.objects.create(job=job, outcome=outcome, finished_at=at, **times)


# --- What it finds ----------------------------------------------------------------------------------------------------


def test_when_all_is_well_there_is_nothing_to_say(at_work):
    found = health.read()
    assert (found.problems, found.is_well) == ([], True)
    assert found.ticking.is_alive
    assert found.database.is_up
    assert [(server.name, server.is_up) for server in found.redis] == [
        (f"Redis 127.0.0.1:{at_work.connection.connection_pool.connection_kwargs['port']}", True)
    ]
    [worker] = found.workers
    assert (worker.name, worker.queues, worker.state) == (at_work.name, QUEUES, "idle")
    assert abs(worker.last_heartbeat_at - timezone.now()) < timedelta(minutes=1)


def test_all_of_it_is_json(at_work):
    claim(1, quarantined_at=timezone.now())
    found = json.loads(json.dumps(health.read().as_dict()))
    assert found["is_well"] is False
    assert found["problems"][0]["about"] == "do_task"
    assert datetime.fromisoformat(found["at"]).tzinfo
    assert {each["name"] for each in found["items"]} >= {"do_task", "schedule_tasks", "nightly", "touch_file"}


def test_each_kind_is_told_apart(at_work):
    kinds = {each.name: (each.kind, each.queue) for each in health.read().items}
    assert kinds["schedule_tasks"] == ("sweep", "background")
    assert kinds["do_task"] == ("swept", "default")
    assert kinds["nightly"] == ("cron", "default")
    assert kinds["touch_file"] == ("plain", "urgent")


def test_a_sweep_shows_when_and_how_it_ran(at_work):
    Task.objects.create()
    Schedule.objects.filter(name="schedule_tasks").owe()
    tick()
    drain()
    found = item("schedule_tasks")
    assert found.last_sweep == {"matched": 1, "enqueued": 1, "already_queued": 0, "waiting": 0}
    assert found.last_outcome == "done"
    assert found.last_finished_at >= found.last_started_at
    assert found.next_run_at > timezone.now() - timedelta(minutes=1)


def test_claims_are_counted_by_what_they_wait_for(at_work):
    later, earlier = timezone.now() + timedelta(hours=1), timezone.now() - timedelta(hours=1)
    claim(1, lease_key="cast.task:1", lease_expires_at=later, holder=f"{at_work.name}@here:1")
    claim(2, lease_key="cast.task:2", lease_expires_at=earlier)
    claim(3, next_attempt_at=later)
    claim(4, next_attempt_at=later)
    claim(5, next_attempt_at=earlier)
    for number in (6, 7, 8):
        claim(number, quarantined_at=earlier, next_attempt_at=later)
    claim(9, job="gone_since", quarantined_at=earlier)
    found = item("do_task")
    assert (found.leased, found.due, found.backing_off, found.quarantined) == (1, 2, 2, 3)
    assert the_problem("quarantined").what == "3 rows of do_task are in quarantine."


def test_who_works_on_what_is_in_the_database_whatever_redis_has_forgotten(at_work, redis):
    task = Task.objects.create()
    take(Attempt(do_task, "cast.task", str(task.pk), worker=at_work.name))
    [worker] = health.read().workers
    assert worker.works_on == [f"do_task: cast.task {task.pk}"]
    redis.flushall()
    [worker] = health.read().workers
    assert (worker.name, worker.works_on) == (at_work.name, [f"do_task: cast.task {task.pk}"])
    assert abs(worker.last_heartbeat_at - timezone.now()) < timedelta(minutes=1)


def test_outcomes_and_times_are_those_of_the_tallies(at_work):
    for _ in range(98):
        ended()
    for _ in range(2):
        ended(took=7)
    ended("failed")
    ended("crashed", ago=5 * tallies.HOUR)
    ended(ago=24 * tallies.HOUR)
    tallies.count(None)
    found = item("do_task")
    assert found.outcomes == {"done": 100, "failed": 1}
    assert (found.done[-1], sum(found.done), len(found.done)) == (100, 100, 24)
    assert (found.failed[-1], found.failed[-6], sum(found.failed)) == (1, 1, 2)
    assert 0.03 <= found.took_median <= 0.1 < 3 <= found.took_p99 <= 10
    assert 0.3 <= found.settled_median <= 1 < 100 <= found.settled_p99 <= 300


# --- What is wrong ----------------------------------------------------------------------------------------------------


def test_work_that_waits_for_a_worker_which_nobody_started(at_work, redis):
    redis.rpush("rq:queue:urgent", "a", "b")
    assert problems() == []
    at_work.register_death()
    found = {each.about: each for each in health.read().problems if each.code == "worker"}
    assert str(found["urgent"]) == (
        "No worker serves the queue urgent, although 2 jobs wait in it. Start manage.py rqworker urgent."
    )
    assert {name: each.severity for name, each in found.items()} == {
        "urgent": "critical", "default": "warning", "background": "warning"
    }  # fmt: skip


def test_nobody_ticks(at_work, redis):
    redis.delete(scheduler.TICKED_KEY)
    assert problems() == []
    Schedule.objects.filter(name="selfheal_tally").update(next_run_at=timezone.now() - timedelta(minutes=1))
    found = the_problem("ticking")
    assert found.severity == "critical"
    assert found.what == "Nobody ticks: what came due 60 s ago was not taken."
    # As one that has just ticked does, and whoever stands in for it.
    scheduler.stands_in(redis)
    assert problems() == []
    assert abs(health.read().ticking.last_tick_at - timezone.now()) < timedelta(minutes=1)
    redis.delete(scheduler.TICKED_KEY)
    scheduler.Scheduler(connection=redis).enqueue_jobs()
    assert health.read().ticking.is_alive
    assert redis.get(scheduler.TICKED_KEY)


def test_a_database_that_was_just_migrated_has_no_tick_yet(worker):
    Schedule.objects.update(next_run_at=None)
    assert the_problem("ticking").what == "Nobody has ticked yet."


def test_a_sweep_that_failed_and_one_that_is_late(at_work):
    Schedule.objects.filter(name="schedule_tasks").update(last_outcome="failed")
    long_ago = timezone.now() - timedelta(minutes=4)
    Schedule.objects.filter(name__in=["schedule_databases", "nightly"]).update(last_succeeded_at=long_ago)
    # New, and has never succeeded in three times.
    Schedule.objects.filter(name="schedule_tickets").update(last_succeeded_at=None)
    Schedule.objects.filter(name="schedule_keyed").update(last_succeeded_at=None, due_runs=3)
    assert problems() == [
        ("warning", "late", "schedule_databases"),
        ("warning", "late", "schedule_keyed"),
        ("warning", "failed", "schedule_tasks"),
    ]


def test_a_cron_job_that_is_tried_again_after_a_failure_has_not_failed_yet(at_work):
    Schedule.objects.filter(name="nightly").update(last_outcome="failed")
    claim = Claim.objects.create(
        job="nightly", model="selfheal.schedule", object_pk="nightly", first_claimed_at=timezone.now()
    )
    assert problems() == []
    claim.delete()
    assert problems() == [("warning", "failed", "nightly")]


def test_a_cron_job_that_has_run_may_still_fail_when_it_is_called(at_work):
    Schedule.objects.filter(name="nightly").update(last_outcome="done")
    for _ in range(5):
        ended("failed", job="nightly")
    tallies.count(None)
    assert problems() == [("warning", "failing", "nightly")]


def test_what_makes_all_of_them_late_is_said_once(at_work, redis):
    Schedule.objects.update(last_succeeded_at=timezone.now() - timedelta(hours=1))
    late = [about for _, code, about in problems() if code == "late"]
    assert "schedule_databases" in late
    Schedule.objects.update(next_run_at=timezone.now() - timedelta(minutes=59))
    redis.delete(scheduler.TICKED_KEY)
    assert problems() == [("critical", "ticking", "")]
    assert {item.state for item in health.read().items if item.name in late} == {"late"}


def test_a_sweep_is_not_called_late_where_no_worker_serves_its_queue(at_work):
    Schedule.objects.filter(name="schedule_databases").update(last_succeeded_at=timezone.now() - timedelta(hours=1))
    assert problems() == [("warning", "late", "schedule_databases")]
    at_work.register_death()
    assert problems() == [("warning", "worker", name) for name in ("urgent", "default", "background")]


def test_a_job_whose_attempts_fail_more_often_than_not(at_work):
    for outcome in ("done", "done", "failed", "crashed"):
        ended(outcome)
    tallies.count(None)
    assert problems() == []
    ended("failed")
    tallies.count(None)
    claim = Claim.objects.create(
        job="do_task",
        model="cast.task",
        object_pk="1",
        first_claimed_at=timezone.now(),
        next_attempt_at=timezone.now() + timedelta(minutes=1),
    )
    assert the_problem("failing").what == "3 of the last 5 attempts of do_task failed."
    # All that failed has succeeded since.
    claim.delete()
    assert problems() == []


def test_a_job_that_succeeds_and_leaves_its_rows_as_they_were(at_work):
    """It returns early, say: every minute a run for each row, and nobody would ever know."""
    Task.objects.create(behaviour="leave_pending")
    for _ in range(10):
        assert schedule_tasks.sweep().enqueued == 1
        assert drain() == {"done": 1}
    Schedule.objects.filter(name="schedule_tasks").update(matched=1)
    tallies.count(None)
    assert str(the_problem("in_vain")) == (
        "do_task succeeds, and its rows still need work: 10 times of 10 within the last hour. Have it change the row "
        "so that its sweep does not match, or raise if it cannot do the work yet."
    )
    assert not health.read().is_well
    assert (item("do_task").state, item("do_task").still_needed) == ("in vain", 10)
    # Mended: its sweep finds nothing.
    Schedule.objects.filter(name="schedule_tasks").update(matched=0)
    assert problems() == []


def test_one_that_now_and_then_has_a_row_changed_under_it_does_not(at_work):
    for number in range(30):
        Task.objects.create(behaviour="leave_pending" if number < 10 else "succeed")
    Schedule.objects.filter(name="schedule_tasks").update(matched=1)
    schedule_tasks.sweep()
    drain()
    tallies.count(None)
    assert item("do_task").still_needed == 10
    assert problems() == []


def test_nor_does_one_that_does_its_work_in_parts(at_work, monkeypatch):
    monkeypatch.setattr(operations, "ATTEMPT_SECONDS", 0)
    monkeypatch.setattr(operations, "BATCH", 1)
    for number in range(12):
        claim(number, next_attempt_at=timezone.now() + timedelta(hours=1))
    operation = operations.request("queue_now", {})
    while operation.finished_at is None:
        assert perform(selfheal_operate, operation) == "done"
        operation.refresh_from_db()
    Schedule.objects.filter(name="selfheal_operations").update(matched=1)
    tallies.count(None)
    assert (item("selfheal_operate").outcomes, problems()) == ({"done": 13}, [])


def test_what_is_paused_is_said_and_is_no_reason_for_alarm(at_work):
    until = timezone.now() + timedelta(hours=2)
    pauses.pause("schedule_tasks", reason="the disk is full", until=until, by="anna")
    long_ago = timezone.now() - timedelta(days=3)
    Schedule.objects.filter(name="schedule_tasks").update(last_succeeded_at=long_ago, last_outcome="failed")
    # This one was paused before, and is now by somebody in waffle's admin: neither reason nor end are of this pause.
    pauses.pause("delete_task", reason="an old reason", until=until, by="anna")
    for on in (False, True):
        flipped = get_waffle_switch_model().objects.get(name="disable_delete_task")
        flipped.active = on
        flipped.save()
    found = health.read()
    assert found.is_well
    assert problems() == [
        ("notice", "paused", "delete_task"),
        ("notice", "paused", "schedule_task_deletions"),
        ("notice", "paused", "schedule_tasks"),
    ]
    said = found.problems[2].what
    assert said.startswith("schedule_tasks is paused since 20")
    assert said.endswith(" UTC by anna: the disk is full.")
    assert re.fullmatch(r"delete_task is paused since 20\S+ \S+ UTC\.", found.problems[0].what)


def test_the_worst_comes_first(at_work, switch, redis):
    switch("do_task")
    claim(1, quarantined_at=timezone.now())
    at_work.register_death()
    redis.rpush("rq:queue:default", "a")
    assert [severity for severity, _, _ in problems()] == sorted(
        [severity for severity, _, _ in problems()], key=health.SEVERITIES.index
    )
    assert problems()[0] == ("critical", "worker", "default")


# --- Servers that are away --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("away", ["refusing_redis", "hanging_redis"])
def test_with_redis_away_the_database_still_answers_within_a_second(at_work, away, request):
    claim(1, next_attempt_at=timezone.now() + timedelta(hours=1))
    request.getfixturevalue(away)
    with within(1):
        found = health.read()
    [server] = found.redis
    assert not server.is_up
    assert {queue.name: (queue.depth, queue.workers) for queue in found.queues} == dict.fromkeys(QUEUES, (None, None))
    assert found.delayed is None
    assert next(each.backing_off for each in found.items if each.name == "do_task") == 1
    assert [problem.code for problem in found.problems] == ["redis"]
    assert found.ticking.is_alive


def test_however_long_a_push_may_wait_this_does_not(at_work, hanging_redis, settings):
    settings.JOBS = {**settings.JOBS, "REDIS_TIMEOUT": timedelta(seconds=10)}
    with within(1):
        [server] = health.read().redis
    assert server.trouble == "It did not answer within 0.7 s."


def test_those_that_hang_hide_none_that_answers(at_work, settings):
    with closing(socket.socket()) as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        for number, name in enumerate(["urgent", "default"]):
            settings.RQ_QUEUES[name] = {"URL": f"redis://127.0.0.1:{silent.getsockname()[1]}/{number}"}
        assert {each.name: each.depth for each in health.read().queues} == {
            "urgent": None, "default": None, "background": 0
        }  # fmt: skip


def test_many_redis_that_hang_share_one_second(at_work, hanging_redis, redis_server: RedisServer, settings):
    for number, name in enumerate(QUEUES):
        settings.RQ_QUEUES[name] = {"URL": redis_server.url.replace("/0", f"/{number}")}
    with within(1):
        found = health.read()
    assert [server.is_up for server in found.redis] == [False] * 3


def test_a_redis_that_lets_nobody_in_says_so_without_secrets(at_work, redis, settings):
    redis.config_set("requirepass", "hidden")
    queues.get("default").connection.connection_pool.disconnect()
    try:
        [server] = health.read().redis
    finally:
        redis.execute_command("AUTH", "hidden")
        redis.config_set("requirepass", "")
    assert "uth" in server.trouble
    settings.JOBS = {**settings.JOBS, "REDACT": lambda text: text.replace("Connection refused", "***")}
    settings.RQ_QUEUES["urgent"] = {"URL": "redis://:secret@127.0.0.1:1/0"}
    trouble = next(each for each in health.read().redis if each.name == "Redis 127.0.0.1:1").trouble
    assert "***" in trouble
    assert "secret" not in str(health.read())


def test_whatever_stands_in_redis_where_something_else_belongs_hides_nothing_else(at_work, redis):
    redis.set("rq:queue:default", "no list")
    redis.sadd("rq:workers", "rq:worker:gone", b"rq:worker:\xff")
    redis.hset("rq:worker:odd", mapping={"queues": "default", "last_heartbeat": "never", "pid": "x"})
    redis.sadd("rq:workers", "rq:worker:odd")
    found = health.read()
    depths = {queue.name: queue.depth for queue in found.queues}
    assert depths["default"] is None
    assert depths["urgent"] == 0
    assert {worker.name for worker in found.workers} == {at_work.name, "odd"}


# --- What it costs ----------------------------------------------------------------------------------------------------


def declare_many(count: int) -> None:
    for number in range(count):
        each = job(name=f"work_{number}", backoff=Backoff())(lambda row: None)
        sweep(each, name=f"sweep_{number}", cron="* * * * *")(Task.objects.pending)


def test_it_asks_as_much_about_a_hundred_jobs_as_about_one(at_work, declaring, round_trips):
    def cost() -> tuple[int, int]:
        health.read()
        with CaptureQueriesContext(connection) as statements, round_trips() as sent:
            health.read()
        return len(statements), len(sent)

    few = cost()
    declare_many(100)
    tick()
    for number in range(100):
        claim(number, job=f"work_{number}")
        Tally.objects.create(
            hour=tallies.hour_of(clock.read()), job=f"work_{number}", outcome="done", took=[1] * 13, settled_after=[]
        )
    assert cost() == few
    statements, sent = few
    assert statements <= 10
    assert sent == 2


def test_a_row_that_is_performed_is_seen_in_the_end(at_work):
    assert perform(do_task, Task.objects.create()) == "done"
    tallies.count(None)
    assert item("do_task").outcomes == {"done": 1}


def test_durations_are_short():
    texts = {0: "0 ms", 0.34: "340 ms", 5.25: "5.2 s", 119: "119 s", 150: "2 min", 7300: "2 h", 200_000: "2 d"}
    assert {seconds: health.duration(seconds) for seconds in texts} == texts
    assert health.duration(timedelta(minutes=5)) == "5 min"
