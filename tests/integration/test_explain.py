"""Why a row is not ready: each cause by itself, said in a sentence, with what mends it."""

import re
from datetime import timedelta
from typing import Any

import pytest
from django.db import connection
from django.db.models import Q
from django.utils import timezone
from rq import worker_registration

from jobs import claims, explain, job, pauses, queues, sweep
from jobs.claims import Attempt
from jobs.models import Claim, Run, Schedule
from jobs.testing import perform, tick
from jobs.worker import Worker
from tests.cast.jobs import delete_task, do_keyed, do_task, nightly, schedule_tasks, touch_file
from tests.cast.models import Keyed, Task
from tests.machine import within

pytestmark = pytest.mark.django_db(transaction=True)

A_MINUTE = timedelta(minutes=1)


@pytest.fixture(autouse=True)
def all_is_well(redis: Any) -> None:
    """A worker for the queue is heard of, somebody ticks, and the sweep ran a moment ago."""
    # On a connection of its own, since a worker has more patience than a page.
    worker = Worker([queues.get("default")], connection=redis)
    worker.birth_date = timezone.now()
    worker._announce("idle")
    tick()
    now = timezone.now()
    Schedule.objects.filter(name="schedule_tasks").update(
        next_run_at=now + A_MINUTE,
        last_started_at=now,
        last_finished_at=now,
        last_outcome="done",
        matched=1,
        enqueued=1,
    )


def schedule(**values: Any) -> None:
    Schedule.objects.filter(name="schedule_tasks").update(**values)


def claim(task: Task, **values: Any) -> None:
    identity = {"job": "do_task", "model": "cast.task", "object_pk": str(task.pk)}
    Claim.objects.create(**identity, first_claimed_at=timezone.now(), **values)


def taken(task: Task, by: Any = do_task) -> None:
    assert isinstance(claims.take(Attempt(by, "cast.task", str(task.pk), worker="w1")), Claim)


# What is the matter; what is said; whether that is fine, only waiting or a problem; what mends it; what a step says.
CAUSES: dict[str, tuple[Any, str, str, str, str]] = {
    "nothing yet": (
        lambda task: None,
        "not queued yet; the sweep does that at",
        "waiting",
        "queue_now",
        "Not in default",
    ),
    "queued": (do_task.enqueue, "It is queued: number 1 of 1.", "waiting", "", "Number 1 of 1 in default"),
    "spread out": (
        lambda task: do_task.enqueue_with_jitter(task, max_wait=A_MINUTE, min_wait=A_MINUTE),
        "It is spread out: it is queued at",
        "waiting",
        "",
        "Delayed until",
    ),
    "at work": (taken, "It is being worked on.", "fine", "", "w1@"),
    "another job at work": (
        lambda task: taken(task, delete_task),
        "It waits for delete_task, which holds the row.",
        "waiting",
        "",
        "works on it for delete_task",
    ),
    "its process is gone": (
        lambda task: (taken(task), Claim.objects.update(lease_expires_at=timezone.now() - A_MINUTE)),
        "is gone; the next tick queues it again",
        "waiting",
        "",
        "is over",
    ),
    "backing off": (
        lambda task: claim(task, attempts=3, next_attempt_at=timezone.now() + A_MINUTE, last_error="No space left"),
        "It failed, and is attempted again at",
        "waiting",
        "queue_now",
        "3 attempts failed. No space left",
    ),
    "quarantined": (
        lambda task: claim(task, crashes=3, quarantined_at=timezone.now(), last_error="Killed"),
        "It is quarantined",
        "problem",
        "release",
        "3 processes died. Killed",
    ),
    "paused": (
        lambda task: pauses.pause("do_task", by="ada", reason="The disk is full."),
        "do_task is paused by ada",
        "waiting",
        "resume",
        "Reason: The disk is full.",
    ),
    "its sweep is paused": (
        lambda task: pauses.pause("schedule_tasks", until=timezone.now() + A_MINUTE),
        "schedule_tasks is paused by an unknown person",
        "waiting",
        "resume",
        ", until ",
    ),
    "nobody ticks": (
        lambda task: schedule(next_run_at=timezone.now() - 5 * A_MINUTE),
        "Nobody ticks",
        "problem",
        "",
        "no scheduler or worker has taken note",
    ),
    "its sweep does not run": (
        lambda task: schedule(due_runs=9, settled_runs=2),
        "Its sweep does not run: no worker comes to background",
        "problem",
        "",
        "7 runs came due since then",
    ),
    "its sweep fails": (
        lambda task: schedule(last_outcome="failed"),
        "Its sweep failed the last time",
        "problem",
        "run_sweep",
        ": failed",
    ),
    "the queue is full": (
        lambda task: (schedule(limit=1, already_queued=1), do_task.enqueue(Task.objects.create())),
        "The queue is full, with 1 jobs",
        "waiting",
        "",
        "That is its limit, 1.",
    ),
    "the queue is full of others": (
        lambda task: (schedule(limit=1, enqueued=0), delete_task.enqueue(Task.objects.create())),
        "not queued yet",
        "waiting",
        "queue_now",
        "Not in default, which has 1 entries",
    ),
    "the queue was full": (
        lambda task: schedule(limit=1, already_queued=1),
        "not queued yet",
        "waiting",
        "queue_now",
        "Not in default, which has 0 entries",
    ),
    "nobody works": (
        lambda task: queues.get("default").connection.delete(worker_registration.WORKERS_BY_QUEUE_KEY % "default"),
        "No worker serves the queue default",
        "problem",
        "",
        "None serves default",
    ),
    "it succeeds in vain": (
        lambda task: (Task.objects.update(behaviour="leave_pending"), [perform(do_task, task) for _ in range(3)]),
        "It succeeded 3 times, and still needs work: the job must change the row",
        "problem",
        "",
        "It succeeded 3 times",
    ),
    "it succeeded in vain once": (
        lambda task: (Task.objects.update(behaviour="leave_pending"), perform(do_task, task)),
        "not queued yet",
        "waiting",
        "queue_now",
        "It succeeded 1 time, and still needs work",
    ),
    "it comes due again after many successes": (
        lambda task: [(perform(do_task, task), Task.objects.update(state="pending")) for _ in range(5)],
        "not queued yet",
        "waiting",
        "queue_now",
        "Nobody works on it, and nothing went wrong before.",
    ),
    "quarantined, and needs nothing": (
        lambda task: (claim(task, quarantined_at=timezone.now()), Task.objects.update(state="done")),
        "It is quarantined, and needs nothing at present.",
        "waiting",
        "release",
        "it needs nothing",
    ),
    "it needs nothing": (
        lambda task: Task.objects.update(state="done"),
        "the sweep does not match this row",
        "fine",
        "",
        "it needs nothing",
    ),
    "it is gone": (lambda task: Task.objects.all().delete(), "The row is gone", "fine", "", "It is gone."),
}


@pytest.mark.parametrize("cause", CAUSES)
def test_each_cause_is_said_with_what_mends_it(task, cause):
    bring_about, sentence, state, remedy, found = CAUSES[cause]
    pk = task.pk
    bring_about(task)
    explanation = explain.explain(do_task, pk)
    assert sentence in explanation.verdict.sentence
    assert explanation.verdict[1:] == (state, remedy)
    steps = {step.title: step for step in explanation.steps}
    assert found in " ".join(step.found for step in explanation.steps)
    # What the verdict calls a problem is one in the chain too, and nothing is called well that is not.
    assert (state == "problem") == any(step.state == "problem" for step in explanation.steps)
    assert explanation.is_well == (state == "fine") or cause == "queued"
    assert steps["Job"].state == "fine"


@pytest.mark.parametrize("first", ["paused", "backing off", "its sweep fails", "nobody ticks", "queued"])
def test_who_is_at_work_is_said_whatever_else_is_wrong(task, first):
    taken(task)
    if first == "queued":
        queues.get("default").connection.rpush("rq:queue:default", f"do_task-{task.pk}")
    elif first != "backing off":
        CAUSES[first][0](task)
    assert explain.explain(do_task, task).verdict.sentence == "It is being worked on."


def test_a_deletion_that_waits_for_a_creation_says_so(task):
    taken(task)
    Task.objects.update(state="deleting")
    assert "It waits for do_task" in explain.explain(delete_task, task).verdict.sentence


def test_the_timeline_is_of_this_row_and_job_newest_first(task):
    Task.objects.update(behaviour="always_raise")
    perform(do_task, task)
    Claim.objects.update(next_attempt_at=None)
    Task.objects.update(behaviour="succeed")
    perform(do_task, task)
    perform(do_task, Task.objects.create())
    for _ in range(30):
        Run.objects.create(
            job="delete_task", model="cast.task", object_pk=task.pk, outcome="done", finished_at=timezone.now()
        )
    runs = explain.explain(do_task, task).runs
    assert [run.outcome for run in runs] == ["done", "failed"]
    assert "cannot succeed" in runs[1].error
    assert "in do_task" in runs[1].traceback
    assert len(explain.explain(delete_task, task).runs) == explain.RUNS


def test_rows_that_need_work_are_counted_up_to_a_point(monkeypatch):
    Task.objects.bulk_create([Task() for _ in range(4)])
    assert explain.explain(do_task, 1).needy == 4
    monkeypatch.setattr(explain, "COUNTED", 2)
    assert explain.explain(do_task, 1).needy == 3


@pytest.mark.parametrize("cause", ["nothing yet", "quarantined", "paused", "it is gone"])
def test_it_asks_a_bounded_number_of_questions(task, cause, django_assert_max_num_queries, round_trips):
    pk = task.pk
    CAUSES[cause][0](task)
    Task.objects.bulk_create([Task() for _ in range(500)])
    with django_assert_max_num_queries(11) as queries, round_trips() as sent:
        explain.explain(do_task, pk)
    # Nothing is written, not even to Redis.
    assert not [query for query in queries if not re.match("SELECT|BEGIN|COMMIT|SAVEPOINT|RELEASE", query["sql"])]
    assert len(sent) == 2


@pytest.mark.parametrize("away", ["hanging_redis", "refusing_redis"])
def test_with_redis_away_it_answers_from_the_database_within_a_second(request, task, away):
    request.getfixturevalue(away)
    with within(1):
        explanation = explain.explain(do_task, task)
    assert explanation.redis_is_away
    assert "Redis does not answer" in explanation.verdict.sentence
    claim(task, quarantined_at=timezone.now())
    with within(0.4):
        assert explain.explain(do_task, task, ask_redis=False).verdict.remedy == "release"


def test_what_is_spoiled_in_redis_is_no_error(redis, task):
    redis.delete("rq:queue:default")
    redis.set("rq:queue:default", "rubbish")
    assert explain.explain(do_task, task).redis_is_away
    redis.delete("rq:queue:default")
    for key in redis.smembers("rq:workers:default"):
        redis.hset(key, "last_heartbeat", b"\xffrubbish")
    assert explain.explain(do_task, task).verdict.remedy == "queue_now"


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("taken_out", "No job named taken_out is declared"),
        (touch_file, "No sweep feeds touch_file"),
        (nightly, "a run of the schedule nightly"),
        (schedule_tasks.name, "a run of the schedule schedule_tasks"),
    ],
)
def test_of_what_no_sweep_feeds_there_is_little_to_say(name, sentence):
    assert sentence in explain.explain(name, "1").verdict.sentence


def test_a_claim_from_before_its_job_was_given_another_model_is_told_from_the_others():
    assert "works on cast.task now" in explain.explain("do_task", "1", model="cast.keyed").verdict.sentence
    with pytest.raises(ValueError, match="no primary key"):
        explain.explain(do_task, "one")


def test_a_queryset_that_fails_is_the_answer_and_not_an_error(declaring, task):
    @job
    def work(task):
        pass

    @sweep(work, cron="* * * * *")
    def schedule_work():
        return Task.objects.extra(where=["no_such_column = 1"]) if work.fails else Task.objects.pending()

    work.fails = False
    assert explain.explain(work, task).is_needed
    work.fails = True
    explanation = explain.explain(work, task)
    assert "no_such_column" in explanation.verdict.sentence
    assert explanation.verdict.state == "problem"


def test_a_row_whose_key_is_text():
    Keyed.objects.create(key="a / b-c")
    do_keyed.enqueue("a / b-c")
    assert explain.explain(do_keyed, "a / b-c").verdict.sentence == "It is queued: number 1 of 1."


@pytest.mark.postgres
def test_the_timeline_is_read_by_the_index_on_the_row():
    now = timezone.now()
    Run.objects.bulk_create(
        Run(job="do_task", model="cast.task", object_pk=str(n % 5_000), outcome="done", finished_at=now)
        for n in range(20_000)
    )
    with connection.cursor() as cursor:
        cursor.execute("ANALYZE selfheal_run")
    runs = Run.objects.filter(Q(model="cast.task", object_pk="7"), job="do_task").order_by("-pk")[: explain.RUNS]
    assert "selfheal_run_by_row" in runs.explain()
