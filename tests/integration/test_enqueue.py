"""Single, bulk and delayed: when a push happens, that it happens once, and which rows it leaves alone."""

import time
import uuid
from collections.abc import Callable
from contextlib import nullcontext, suppress
from datetime import timedelta
from typing import Any

import pytest
from django.db import transaction
from django.utils import timezone

from config.servers import free_port
from jobs import job, queues, sweep
from jobs.job import Job
from jobs.models import Claim, Schedule
from jobs.testing import drain, tick
from tests.cast.jobs import delete_task, do_keyed, do_task, do_ticket, touch_file, unique_until_done
from tests.cast.models import Task, Ticket
from tests.integration.conftest import DEFAULT_LIST, URGENT_LIST

pytestmark = pytest.mark.django_db(transaction=True)

A_MINUTE = timedelta(minutes=1)

# The three ways to queue one row, and the three ways to queue one plain call.
SWEPT: dict[str, Callable[[Task], None]] = {
    "enqueue": do_task.enqueue,
    "enqueue_many": lambda task: do_task.enqueue_many([task]),
    "enqueue_many of a queryset": lambda task: do_task.enqueue_many(Task.objects.filter(pk=task.pk)),
    "enqueue_with_jitter": lambda task: do_task.enqueue_with_jitter(task, max_wait=A_MINUTE),
}
PLAIN: dict[str, Callable[[], None]] = {
    "enqueue": lambda: touch_file.enqueue("/tmp/x"),
    "enqueue_many": lambda: touch_file.enqueue_many(["/tmp/x"]),
    "enqueue_with_jitter": lambda: touch_file.enqueue_with_jitter("/tmp/x", max_wait=A_MINUTE),
}
swept = pytest.mark.parametrize("enqueue", SWEPT.values(), ids=SWEPT.keys())
plain = pytest.mark.parametrize("enqueue", PLAIN.values(), ids=PLAIN.keys())


@pytest.fixture
def in_redis(queued: Any, delayed: Any) -> Callable[[], list[str]]:
    """Everything that is queued anywhere."""
    return lambda: [*queued(), *queued(URGENT_LIST), *delayed()]


def claim(task: Task, job: str = "do_task", **values: Any) -> Claim:
    identity = {"job": job, "model": "cast.task", "object_pk": str(task.pk)}
    return Claim.objects.create(first_claimed_at=timezone.now(), **identity, **values)


def limited(limit: int) -> Job:
    """A job of which only so many are queued at once."""

    @job
    def work_a_little(task):
        pass

    sweep(work_a_little, cron="0 0 1 1 *", limit=limit, name="schedule_a_little")(Task.objects.pending)
    return work_a_little


# --- The commit rule --------------------------------------------------------------------------------------------------


@swept
def test_a_row_is_queued_when_its_transaction_commits(enqueue, task, in_redis):
    with transaction.atomic():
        assert enqueue(task) is None
        assert in_redis() == []
    assert in_redis() == [f"do_task-{task.pk}"]


@plain
def test_a_plain_call_is_queued_when_the_transaction_commits(enqueue, in_redis):
    with transaction.atomic():
        assert enqueue() is None
        assert in_redis() == []
    assert len(in_redis()) == 1


@swept
def test_a_rollback_takes_the_row_along(enqueue, task, in_redis):
    with suppress(ZeroDivisionError), transaction.atomic():
        enqueue(task)
        raise ZeroDivisionError
    assert in_redis() == []


@plain
def test_a_rollback_takes_the_plain_call_along(enqueue, redis, in_redis):
    with suppress(ZeroDivisionError), transaction.atomic():
        enqueue()
        raise ZeroDivisionError
    assert in_redis() == []
    assert redis.keys() == []


@swept
def test_a_savepoint_that_is_rolled_back_takes_the_row_along(enqueue, task, in_redis):
    with transaction.atomic():
        with suppress(ZeroDivisionError), transaction.atomic():
            enqueue(task)
            raise ZeroDivisionError
        do_ticket.enqueue(Ticket.objects.create())
    assert [id.partition("-")[0] for id in in_redis()] == ["do_ticket"]


@plain
def test_a_savepoint_that_is_rolled_back_takes_the_plain_call_along(enqueue, task, in_redis):
    with transaction.atomic():
        with suppress(ZeroDivisionError), transaction.atomic():
            enqueue()
            raise ZeroDivisionError
        do_task.enqueue(task)
    assert in_redis() == [f"do_task-{task.pk}"]


@swept
def test_without_a_transaction_it_is_queued_at_once(enqueue, task, in_redis):
    enqueue(task)
    assert in_redis() == [f"do_task-{task.pk}"]


def test_which_rows_a_queryset_means_is_decided_when_it_is_enqueued(in_redis):
    meant = Task.objects.create()
    with transaction.atomic():
        do_task.enqueue_many(Task.objects.pending())
        Task.objects.create()
    assert in_redis() == [f"do_task-{meant.pk}"]


class ReadsFromReplica:
    """A database router of which only the answers matter: there is no replica here that anybody may ask."""

    def db_for_read(self, model: Any, **hints: Any) -> str:
        return "replica"

    def db_for_write(self, model: Any, **hints: Any) -> str:
        return "default"


def test_a_row_that_was_read_from_a_replica_waits_for_the_commit_of_the_primary(task, settings, in_redis):
    settings.DATABASE_ROUTERS = [ReadsFromReplica()]
    task._state.db = "replica"
    with transaction.atomic():
        do_task.enqueue(task)
        do_task.enqueue_many([task])
        assert in_redis() == []
    assert in_redis() == [f"do_task-{task.pk}"]


def test_without_routers_the_commit_is_that_of_the_rows_own_database(task):
    task._state.db = "shard"
    assert do_task.identify(task)[1] == "shard"
    assert do_task.identify_many([1])[1] == "default"


# --- What can be passed -----------------------------------------------------------------------------------------------


def test_a_row_or_its_key_is_the_same(task, queued):
    do_task.enqueue(task)
    do_task.enqueue(task.pk)
    do_task.enqueue(str(task.pk))
    do_task.enqueue_many([task, task.pk])
    assert queued() == [f"do_task-{task.pk}"]


def test_a_key_of_another_type_than_text_or_number(queued):
    key = uuid.uuid4()
    do_ticket.enqueue(key)
    do_ticket.enqueue(str(key).upper())
    assert queued() == [f"do_ticket-{key}"]


def test_a_negative_key(queued):
    do_task.enqueue(-5)
    assert queued() == ["do_task--5"]


def test_many_rows_as_a_queryset_a_list_or_a_generator(queued):
    tasks = [Task.objects.create() for _ in range(6)]
    do_task.enqueue_many(Task.objects.filter(pk__in=[tasks[0].pk, tasks[1].pk]).order_by("pk"))
    do_task.enqueue_many(tasks[2:4])
    do_task.enqueue_many(task.pk for task in tasks[4:])
    assert queued() == [f"do_task-{task.pk}" for task in tasks]
    do_task.enqueue_many([])
    do_task.enqueue_many(Task.objects.none())
    assert len(queued()) == 6


def test_the_same_row_passed_twice_is_queued_once(queued):
    tasks = [Task.objects.create() for _ in range(2)]
    do_task.enqueue_many([tasks[0], tasks[1], tasks[0], tasks[0].pk])
    assert sorted(queued()) == sorted(f"do_task-{task.pk}" for task in tasks)
    do_ticket.enqueue_many(key for _ in range(2) for key in [uuid.UUID(int=number) for number in range(1500)])
    assert len(queued()) == 1502


def test_a_row_that_is_not_there_yet_may_be_queued_by_its_key(queued):
    do_task.enqueue(10**9)
    assert queued() == [f"do_task-{10**9}"]


@pytest.mark.parametrize("unsaved", [lambda: Task(), lambda: Task(pk=5), lambda: deleted()])
@pytest.mark.parametrize("in_transaction", [True, False])
def test_an_unsaved_row_is_refused(unsaved, in_transaction, in_redis):
    for enqueue in (SWEPT["enqueue"], SWEPT["enqueue_many"], SWEPT["enqueue_with_jitter"]):
        with (
            pytest.raises(ValueError, match=r"is not saved yet: save it, then enqueue do_task\."),
            transaction.atomic() if in_transaction else nullcontext(),
        ):
            enqueue(unsaved())
    assert in_redis() == []


def deleted() -> Task:
    task = Task.objects.create()
    task.delete()
    return task


def test_what_can_be_no_key_is_refused_also_while_redis_is_away(settings):
    settings.RQ_QUEUES = {**settings.RQ_QUEUES, "default": {"URL": f"redis://localhost:{free_port()}"}}
    for wrong in (None, Task(), "x"):
        with pytest.raises(ValueError, match=r"is no primary key|is not saved yet"):
            do_task.enqueue_many([1, wrong])


def test_a_key_that_no_database_stores_is_refused(in_redis):
    for enqueue in (do_keyed.enqueue, lambda subject: do_keyed.enqueue_many([subject])):
        with pytest.raises(ValueError, match="with a NUL in it"):
            enqueue("a\0b")
    assert in_redis() == []


@pytest.mark.parametrize("wrong", [None, True, "", "x", "1.5"])
def test_what_can_be_no_key_is_refused(wrong, in_redis):
    for enqueue in (do_task.enqueue, lambda subject: do_task.enqueue_many([subject])):
        with pytest.raises(ValueError, match="is no primary key"):
            enqueue(wrong)
    assert in_redis() == []


def test_a_truth_value_is_no_key_either_where_any_text_would_be(in_redis):
    for wrong in (True, False, None):
        with pytest.raises(ValueError, match="is no primary key"):
            do_keyed.enqueue(wrong)
    assert in_redis() == []


@pytest.mark.parametrize("wrong", [object(), {"pk": 1}, {1}, b"1"])
def test_what_is_no_row_and_no_key_is_refused(wrong, in_redis):
    for enqueue in (do_task.enqueue, lambda subject: do_task.enqueue_many([subject])):
        with pytest.raises(TypeError, match="do_task works on a row"):
            enqueue(wrong)
    with pytest.raises(TypeError, match="do_keyed works on a row"):
        do_keyed.enqueue(wrong)
    assert in_redis() == []


def test_a_row_of_another_model_is_refused(in_redis):
    ticket = Ticket.objects.create()
    for enqueue in (do_task.enqueue, lambda row: do_task.enqueue_many([row])):
        with pytest.raises(TypeError, match=r"do_task works on cast\.Task, not on cast\.Ticket\."):
            enqueue(ticket)
    with pytest.raises(TypeError, match=r"do_task works on cast\.Task, not on cast\.Ticket\."):
        do_task.enqueue_many(Ticket.objects.all())
    assert in_redis() == []


def test_a_swept_job_takes_one_row_and_nothing_else(task, in_redis):
    for arguments, options in [((), {}), ((task, task), {}), ((task,), {"force": True})]:
        with pytest.raises(TypeError, match="do_task works on one row: pass the row or its primary key"):
            do_task.enqueue(*arguments, **options)
        with pytest.raises(TypeError, match="do_task works on one row"):
            do_task.enqueue_with_jitter(*arguments, max_wait=A_MINUTE, **options)
    for rows in (task, 5, "12", b"12"):
        with pytest.raises(TypeError, match="enqueue_many takes a queryset, primary keys or rows, not"):
            do_task.enqueue_many(rows)
    assert in_redis() == []


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (object(), "object"),
        (b"bytes", "bytes"),
        (timedelta(1), "timedelta"),
        (uuid.UUID(int=0), "UUID"),
        ({1, 2}, "set"),
        ({1: 2}, "the key 1, which is no text"),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
        ([[object()]], "object"),
        ({"deep": {"in": Task()}}, "Task"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_arguments_that_are_not_json_are_refused(value, named, redis):
    for enqueue in (
        lambda: touch_file.enqueue(value),
        lambda: touch_file.enqueue(path=value),
        lambda: touch_file.enqueue_many(["/tmp/x", value]),
        lambda: touch_file.enqueue_with_jitter(value, max_wait=A_MINUTE),
    ):
        with pytest.raises(TypeError, match=f"touch_file cannot be queued with .*{named}.*: pass JSON values"):
            enqueue()
    assert redis.keys() == []


def test_arguments_that_contain_themselves_are_refused(redis):
    circle: list[object] = []
    circle.append(circle)
    with pytest.raises(TypeError, match="touch_file cannot be queued with arguments that contain themselves"):
        touch_file.enqueue(circle)
    assert redis.keys() == []


def test_arguments_come_back_as_they_went(declaring, redis):
    seen: list[Any] = []

    @job
    def remember(*args, **kwargs):
        seen.append((args, kwargs))

    remember.enqueue(None, True, -1, 1.5, "ü😀\x00", [1, {"a": []}], key={"b": None})
    remember.enqueue_many(["only", (1, 2), [1, 2]])
    assert drain() == {"done": 4}
    assert seen == [
        ((None, True, -1, 1.5, "ü😀\x00", [1, {"a": []}]), {"key": {"b": None}}),
        (("only",), {}),
        ((1, 2), {}),
        (([1, 2],), {}),
    ]


def test_arguments_that_are_too_large_are_refused(redis):
    with pytest.raises(ValueError, match=r"take 1,000,\d+ bytes; 1,000,000 is the most\. Keep the data in a row"):
        touch_file.enqueue("x" * 1_000_000)
    touch_file.enqueue("x" * 999_900)
    assert redis.llen(URGENT_LIST) == 1


# --- Exact ------------------------------------------------------------------------------------------------------------


def test_a_row_that_is_queued_is_not_queued_again(task, queued):
    for enqueue in SWEPT.values():
        enqueue(task)
        enqueue(task)
    assert queued() == [f"do_task-{task.pk}"]


def test_a_row_that_waits_in_the_delayed_set_is_not_queued_again(task, queued, delayed):
    do_task.enqueue_with_jitter(task, max_wait=A_MINUTE, min_wait=A_MINUTE)
    before = delayed()
    for enqueue in SWEPT.values():
        enqueue(task)
    assert queued() == []
    assert delayed() == before


def test_enqueued_a_hundred_times_at_once_it_is_queued_once(task, race, queued):
    race(*[lambda: [do_task.enqueue(task.pk) for _ in range(10)] for _ in range(10)])
    assert queued() == [f"do_task-{task.pk}"]


def test_rows_are_queued_in_their_order(queued):
    tasks = [Task.objects.create() for _ in range(4)]
    for task in (tasks[2], tasks[0]):
        do_task.enqueue(task)
    do_task.enqueue_many(Task.objects.order_by("-pk"))
    assert queued() == [f"do_task-{tasks[i].pk}" for i in (2, 0, 3, 1)]


def test_another_jobs_copy_of_the_row_does_not_count(task, queued):
    delete_task.enqueue(task)
    do_task.enqueue(task)
    assert queued() == [f"delete_task-{task.pk}", f"do_task-{task.pk}"]


def test_many_rows_cost_a_round_trip_per_thousand(round_trips, queued, django_assert_num_queries):
    with round_trips() as sent:
        do_task.enqueue_many(range(1, 3001))
    assert len(queued()) == 3000
    # A look at what is queued, and one for each thousand.
    assert len(sent) == 1 + 3
    # The switch, the limit, and whether anything is unsettled; only then, for each thousand, which of them wait.
    with django_assert_num_queries(3):
        do_task.enqueue_many(range(1, 3001))
    claim(Task.objects.create(pk=1), attempts=1)
    with django_assert_num_queries(3 + 3):
        do_task.enqueue_many(range(1, 3001))


@pytest.mark.parametrize("target", [do_task, touch_file])
def test_one_costs_one_round_trip_also_when_redis_has_just_been_restarted(target, redis, round_trips, queued):
    redis.script_flush()
    with round_trips() as sent:
        target.enqueue("1")
    assert len(sent) == 1
    assert len(queued(DEFAULT_LIST) + queued(URGENT_LIST)) == 1


def test_one_row_costs_three_statements(task, django_assert_num_queries):
    # Whether it waits, the switch, and the limit.
    with django_assert_num_queries(3):
        do_task.enqueue(task)


def test_many_plain_calls_cost_a_round_trip_per_thousand(round_trips, queued):
    with round_trips() as sent:
        touch_file.enqueue_many(f"/tmp/{number}" for number in range(2000))
    assert len(queued(URGENT_LIST)) == 2000
    assert len(sent) == 2


# --- Rows that are left alone -----------------------------------------------------------------------------------------


@swept
def test_a_row_that_backs_off_is_left_alone(enqueue, task, in_redis):
    claim(task, attempts=1, next_attempt_at=timezone.now() + A_MINUTE)
    enqueue(task)
    assert in_redis() == []


@swept
def test_a_row_in_quarantine_is_left_alone(enqueue, task, in_redis):
    claim(task, quarantined_at=timezone.now())
    enqueue(task)
    assert in_redis() == []


@swept
def test_a_row_whose_backing_off_is_over_is_queued(enqueue, task, in_redis):
    claim(task, attempts=1, next_attempt_at=timezone.now() - A_MINUTE)
    enqueue(task)
    assert in_redis() == [f"do_task-{task.pk}"]


@swept
def test_what_another_job_does_with_the_row_does_not_count(enqueue, task, in_redis):
    claim(task, job="delete_task", quarantined_at=timezone.now(), next_attempt_at=timezone.now() + A_MINUTE)
    enqueue(task)
    assert in_redis() == [f"do_task-{task.pk}"]


@swept
def test_while_the_job_is_switched_off_nothing_is_queued(enqueue, task, in_redis, switch):
    switch("do_task")
    enqueue(task)
    assert in_redis() == []
    switch("do_task", on=False)
    enqueue(task)
    assert in_redis() == [f"do_task-{task.pk}"]


@swept
def test_a_sweep_that_is_switched_off_does_not_stop_the_fast_path(enqueue, task, in_redis, switch):
    switch("schedule_tasks")
    enqueue(task)
    assert in_redis() == [f"do_task-{task.pk}"]


# --- The limit --------------------------------------------------------------------------------------------------------


def test_single_pushes_stop_at_the_limit(declaring, queued):
    work = limited(3)
    for number in range(5):
        work.enqueue(number)
    assert queued() == [f"work_a_little-{number}" for number in range(3)]


def test_a_bulk_push_stops_at_the_limit(declaring, queued):
    work = limited(3)
    work.enqueue(7)
    work.enqueue_many(range(10))
    assert queued() == [f"work_a_little-{number}" for number in (7, 0, 1)]


def test_an_operators_limit_comes_before_the_codes_for_single_pushes_too(queued):
    Schedule.objects.filter(name="schedule_tasks").update(limit=2)
    for _ in range(4):
        do_task.enqueue(Task.objects.create())
    assert len(queued()) == 2


def test_an_operators_limit_comes_before_the_codes(queued):
    Schedule.objects.filter(name="schedule_tasks").update(limit=2)
    do_task.enqueue_many(range(5))
    assert queued() == ["do_task-0", "do_task-1"]
    do_task.enqueue_many(range(5))
    assert len(queued()) == 2


def test_a_bulk_push_in_a_transaction_stops_at_the_limit(declaring, queued):
    work = limited(1500)
    with transaction.atomic():
        work.enqueue_many(range(5000))
    assert len(queued()) == 1500


def test_what_is_delayed_counts_towards_the_limit(declaring, queued, delayed):
    work = limited(3)
    for number in range(2):
        work.enqueue_with_jitter(number, max_wait=A_MINUTE, min_wait=A_MINUTE)
    for number in range(2, 5):
        work.enqueue(number)
    assert len(queued()) + len(delayed()) == 3
    work.enqueue_with_jitter(6, max_wait=A_MINUTE, min_wait=A_MINUTE)
    assert len(queued()) + len(delayed()) == 3


def test_the_jobs_of_others_do_not_count_towards_the_limit(declaring, queued, delayed):
    work = limited(3)
    do_ticket.enqueue_many([uuid.UUID(int=number) for number in range(10)])
    do_task.enqueue_with_jitter(1, max_wait=A_MINUTE)
    work.enqueue(1)
    work.enqueue_many([2])
    assert queued()[-2:] == ["work_a_little-1", "work_a_little-2"]
    work.enqueue_with_jitter(3, max_wait=A_MINUTE)
    work.enqueue_with_jitter(4, max_wait=A_MINUTE)
    assert "work_a_little-3" in delayed()
    assert "work_a_little-4" not in delayed()


# --- Delayed ----------------------------------------------------------------------------------------------------------


def test_a_random_wait_is_between_its_ends(task, delayed):
    before = time.time()
    for number in range(30):
        do_task.enqueue_with_jitter(number, max_wait=3 * A_MINUTE, min_wait=A_MINUTE)
    waits = [at - before for at in delayed().values()]
    assert len(waits) == 30
    assert min(waits) >= 60
    assert max(waits) <= 180 + (time.time() - before)
    assert max(waits) - min(waits) > 10


def test_what_is_delayed_is_in_no_list_until_its_time_has_come(task, queued, delayed):
    do_task.enqueue_with_jitter(task, max_wait=A_MINUTE, min_wait=A_MINUTE)
    touch_file.enqueue_with_jitter("/tmp/x", max_wait=A_MINUTE, min_wait=A_MINUTE)
    tick()
    assert len(delayed()) == 2
    assert queued() == queued(URGENT_LIST) == []

    tick(now=timezone.now() + A_MINUTE)

    assert delayed() == {}
    assert queued() == [f"do_task-{task.pk}"]
    assert len(queued(URGENT_LIST)) == 1


def test_what_is_due_moves_a_thousand_at_a_time(redis, queued, delayed, round_trips):
    redis.zadd(queues.DELAYED_KEY, {f"do_task-{number}": number for number in range(2500)})
    with round_trips() as sent:
        tick()
    assert queued() == [f"do_task-{number}" for number in range(2500)]
    assert delayed() == {}
    assert len([command for command in sent if b"ZRANGEBYSCORE" in command or b"EVAL" in command]) <= 6


def test_a_wait_is_from_zero_by_default(task, delayed):
    do_task.enqueue_with_jitter(task, max_wait=timedelta(0))
    assert list(delayed().values()) == [pytest.approx(time.time(), abs=5)]


@pytest.mark.parametrize("target", [do_task, touch_file])
def test_a_wait_that_makes_no_sense_is_refused(target, redis):
    with pytest.raises(ValueError, match="The wait must go from zero or more up to max_wait"):
        target.enqueue_with_jitter("1", max_wait=A_MINUTE, min_wait=2 * A_MINUTE)
    with pytest.raises(TypeError, match="must be timedeltas"):
        target.enqueue_with_jitter("1", max_wait=60)
    with pytest.raises(TypeError, match="max_wait"):
        target.enqueue_with_jitter("1")
    assert redis.keys() == []


def test_the_list_is_known_to_rqs_pages(task, redis):
    do_task.enqueue(task)
    unique_until_done.enqueue(1)
    do_ticket.enqueue_many([uuid.UUID(int=1)])
    assert redis.smembers("rq:queues") == {DEFAULT_LIST.encode(), URGENT_LIST.encode()}
