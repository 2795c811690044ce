"""Plain jobs: at most so many attempts, at most one copy if asked, and no more durable than Redis is."""

import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from django.db import transaction
from django.utils import timezone
from redis import Redis

from config.servers import free_port
from jobs import Backoff, QueueUnavailable, clock, enqueue, job, queues, registry
from jobs import perform as performing
from jobs.message import Message
from jobs.models import Claim, Run
from jobs.testing import drain, tick
from tests.cast.jobs import nightly, touch_file, unique_until_done, unique_until_start
from tests.cast.models import Task
from tests.integration.conftest import DEFAULT_LIST, URGENT_LIST

pytestmark = pytest.mark.django_db(transaction=True)

LATER = timedelta(hours=2)
FIRST_DELAY = Backoff(first=timedelta(seconds=10), cap=timedelta(minutes=1))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "file"


@pytest.fixture
def attempts(file: Path) -> Callable[[], int]:
    """How often `touch_file` was called."""
    return lambda: len(file.read_text().splitlines()) if file.exists() else 0


def pass_time(seconds: float = LATER.total_seconds()) -> None:
    """Until every backoff and every time limit is over: what waits or got lost comes back into the queue."""
    # Only this part of a tick: the sweeps of the cast come due every other second, and are not what is counted here.
    with clock.fixed(timezone.now() + timedelta(seconds=seconds)):
        for connection in queues.connections():
            enqueue.move_due(connection)
            enqueue.find_lost_calls(connection)


def leftovers(redis: Redis) -> set[bytes]:
    """Whatever is still in Redis of calls that have ended."""
    return set(redis.keys()) - {b"rq:queues"}


def test_what_is_lost_of_a_call_is_not_kept_for_ever(file, redis, queued):
    touch_file.enqueue(str(file))
    [id] = queued(URGENT_LIST)
    a_month = timedelta(days=30).total_seconds()
    assert a_month - 60 < redis.ttl(f"rq:job:{id}") <= a_month
    # Each attempt begins it anew.
    redis.expire(f"rq:job:{id}", 100)
    enqueue.start_call(Message.fetch(id, connection=redis), redis, time.time() + 100)
    assert redis.ttl(f"rq:job:{id}") > 100


def test_what_waits_for_long_is_kept_for_as_long(file, redis, delayed):
    touch_file.enqueue_with_jitter(str(file), min_wait=timedelta(days=60), max_wait=timedelta(days=90))
    [(id, due_at)] = delayed().items()
    assert time.time() + redis.ttl(f"rq:job:{id}") - due_at > timedelta(days=29).total_seconds()


# --- Attempts ---------------------------------------------------------------------------------------------------------


def test_a_call_that_succeeds_leaves_a_run_and_nothing_in_redis(file, attempts, redis):
    touch_file.enqueue(str(file))
    assert drain() == {"done": 1}
    assert attempts() == 1
    assert leftovers(redis) == set()
    [run] = Run.objects.all()
    assert (run.job, run.model, run.object_pk, run.outcome, run.error) == ("touch_file", "", "", "done", "")
    assert run.started_at <= run.finished_at
    assert not Claim.objects.exists()


def test_a_failure_waits_in_the_delayed_set_with_its_attempt_number(file, attempts, redis, queued, delayed):
    touch_file.enqueue(str(file), fail_times=1)
    [id] = queued(URGENT_LIST)
    assert drain() == {"failed": 1}
    assert list(delayed()) == [id]
    assert queued(URGENT_LIST) == []
    assert redis.hget(f"rq:job:{id}", "attempt") == b"1"

    pass_time()

    assert queued(URGENT_LIST) == [id]
    assert drain() == {"done": 1}
    assert attempts() == 2
    assert leftovers(redis) == set()
    assert [run.outcome for run in Run.objects.order_by("pk")] == ["failed", "done"]


def test_the_wait_is_the_jobs_backoff(declaring, delayed):
    @job(backoff=FIRST_DELAY)
    def fails():
        raise RuntimeError

    fails.enqueue()
    for longest in (10, 20, 40, 60):
        drain()
        [again_at] = delayed().values()
        assert longest / 2 - 1 <= again_at - time.time() <= longest
        pass_time()


def test_after_its_last_attempt_it_is_given_up(file, attempts, redis):
    touch_file.enqueue(str(file), fail_times=99)
    for _ in range(3):
        assert drain() == {"failed": 1}
        pass_time()
    assert drain() == {}
    assert attempts() == touch_file.max_attempts == 3
    assert leftovers(redis) == set()
    runs = Run.objects.order_by("pk")
    assert [run.error for run in runs] == [f"RuntimeError: attempt {number} fails" for number in (1, 2, 3)]
    assert "Traceback (most recent call last)" in runs[0].traceback


def test_by_default_there_are_five(declaring):
    calls: list[int] = []

    @job
    def fails():
        calls.append(1)
        raise RuntimeError

    fails.enqueue()
    for _ in range(8):
        drain()
        pass_time()
    assert len(calls) == 5


def test_without_an_end_it_goes_on(declaring):
    calls: list[int] = []

    @job(max_attempts=None)
    def fails():
        calls.append(1)
        raise SystemExit

    fails.enqueue()
    for _ in range(8):
        drain()
        pass_time()
    assert len(calls) == 8


def test_arguments_that_do_not_fit_are_a_failure(declaring):
    @job
    def takes_two(one, two):
        pass

    takes_two.enqueue(1)
    assert drain() == {"failed": 1}
    assert Run.objects.get().error.startswith("TypeError: ")


def test_one_that_leaves_a_transaction_open_has_failed(declaring):
    """What it wrote there would be rolled back, and nobody would know."""

    @job
    def forgets_to_commit() -> None:
        transaction.set_autocommit(False)
        Task.objects.create(name="written by it")

    forgets_to_commit.enqueue()
    try:
        assert drain() == {"failed": 1}
        assert "has left a transaction open on default" in Run.objects.get().error
    finally:
        # As the worker does.
        transaction.rollback()
        transaction.set_autocommit(True)
    assert not Task.objects.exists()


# --- A process that dies ----------------------------------------------------------------------------------------------


def started(file: Path, redis: Redis, gone_after: float = 100, **options: Any) -> Any:
    """Begin a call as a worker does, which is killed before it ends; return the message."""
    touch_file.enqueue(str(file), **options)
    popped = queues.Queue.dequeue_any([queues.get("urgent")], None, connection=redis)
    message = popped[0]
    assert enqueue.start_call(message, redis, time.time() + gone_after) == 1
    return message


def test_a_call_in_work_waits_in_the_delayed_set_for_the_death_of_its_process(file, redis, delayed, queued):
    message = started(file, redis)
    assert delayed()[message.id] == pytest.approx(time.time() + 100, abs=5)
    tick()
    assert queued(URGENT_LIST) == []


def test_a_worker_killed_with_its_child_costs_a_delay_and_not_the_call(file, redis, attempts):
    started(file, redis)
    pass_time()
    assert drain() == {"done": 1}
    assert attempts() == 1
    assert leftovers(redis) == set()


def test_a_process_that_dies_each_time_is_given_up_in_the_end(file, redis, attempts, queued):
    started(file, redis)
    for number in (2, 3):
        pass_time()
        popped = queues.Queue.dequeue_any([queues.get("urgent")], None, connection=redis)
        assert enqueue.start_call(popped[0], redis, time.time() + 100) == number
    pass_time()
    assert drain() == {"failed": 1}
    assert attempts() == 0
    assert leftovers(redis) == set()
    assert "Its process died in each of its 3 attempts" in Run.objects.get().error


@pytest.mark.parametrize(
    ("place", "comes_after"),
    [
        # Not begun, or begun and not ended: soon.
        (None, 10),
        (100, 10),
        # Its process has put it off for longer before it died, or another is at work on it.
        (3000, 3000),
    ],
)
def test_a_call_whose_process_died_comes_back_soon_unless_it_was_put_off(file, redis, delayed, place, comes_after):
    touch_file.enqueue(str(file))
    message = Message.fetch(redis.lpop(URGENT_LIST).decode(), connection=redis)
    with clock.fixed(timezone.now()):
        if place is not None:
            assert enqueue.start_call(message, redis, clock.timestamp() + place) == 1
        enqueue.redeliver_call(message, redis, clock.timestamp() + 100, timedelta(seconds=10))
        assert delayed()[message.id] == pytest.approx(clock.timestamp() + comes_after)


def test_a_call_whose_process_died_after_its_end_is_over(file, redis):
    message = started(file, redis)
    enqueue.end_call(message, redis)
    enqueue.redeliver_call(message, redis, time.time(), timedelta(seconds=10))
    assert leftovers(redis) == set()


def test_a_call_that_has_ended_is_not_run_again_by_a_late_copy(file, redis, attempts, queued):
    touch_file.enqueue(str(file))
    [id] = queued(URGENT_LIST)
    message = Message.fetch(id, connection=redis)
    assert drain() == {"done": 1}
    redis.rpush(URGENT_LIST, id)
    assert drain() == {}
    # And not by one that was popped before the call ended.
    assert enqueue.start_call(message, redis, time.time() + 100) == 0
    assert attempts() == 1
    assert leftovers(redis) == set()


def test_losing_redis_loses_the_call_and_breaks_nothing(file, redis, attempts):
    touch_file.enqueue(str(file))
    redis.flushall()
    assert drain() == {}
    assert attempts() == 0
    touch_file.enqueue(str(file))
    assert drain() == {"done": 1}


def test_losing_its_arguments_too(file, redis, attempts, queued, caplog):
    touch_file.enqueue(str(file))
    [id] = queued(URGENT_LIST)
    redis.delete(f"rq:job:{id}")
    assert drain() == {}
    assert "its arguments are gone from Redis" in caplog.text
    pass_time()
    assert leftovers(redis) == set()
    touch_file.enqueue(str(file))
    assert drain() == {"done": 1}


# --- Lost on its way --------------------------------------------------------------------------------------------------


def test_one_whose_worker_died_before_it_was_started_comes_back(file, redis, attempts, queued):
    touch_file.enqueue(str(file))
    [id] = queued(URGENT_LIST)
    assert redis.lpop(URGENT_LIST).decode() == id
    pass_time(50)
    assert queued(URGENT_LIST) == []
    pass_time(70)
    assert queued(URGENT_LIST) == [id]
    assert drain() == {"done": 1}
    assert attempts() == 1
    assert leftovers(redis) == set()


def test_the_scheduler_looks_for_it(file, redis, queued):
    touch_file.enqueue(str(file))
    redis.delete(URGENT_LIST)
    tick(timezone.now() + timedelta(seconds=70))
    assert len([id for id in queued(URGENT_LIST) if id.startswith("touch_file-")]) == 1


def test_those_that_are_in_their_places_are_left_there(file, redis, queued, delayed):
    touch_file.enqueue(str(file))
    touch_file.enqueue(str(file), fail_times=1)
    touch_file.enqueue_with_jitter(str(file), min_wait=4 * LATER, max_wait=5 * LATER)
    in_work = Message.fetch(redis.lpop(URGENT_LIST).decode(), connection=redis)
    assert enqueue.start_call(in_work, redis, time.time() + 3 * LATER.total_seconds()) == 1
    before = queued(URGENT_LIST), delayed()
    for _ in range(3):
        pass_time()
    assert (queued(URGENT_LIST), delayed()) == before


def test_a_copy_is_not_run_beside_it(file, redis, attempts, queued):
    touch_file.enqueue(str(file))
    [id] = queued(URGENT_LIST)
    slow = Message.fetch(redis.lpop(URGENT_LIST).decode(), connection=redis)
    pass_time(70)
    assert queued(URGENT_LIST) == [id]
    # Its worker was only slow. Whoever comes second leaves it to the first.
    assert enqueue.start_call(slow, redis, time.time() + 100) == 1
    assert drain() == {"not_needed": 1}
    assert attempts() == 0
    enqueue.end_call(slow, redis)
    assert leftovers(redis) == set()


def test_what_nobody_can_read_is_looked_for_once(file, redis, queued, caplog):
    touch_file.enqueue(str(file))
    [id] = queued(URGENT_LIST)
    redis.hset(f"rq:job:{id}", "data", "nonsense")
    assert drain() == {}
    assert "its arguments cannot be read" in caplog.text
    pass_time()
    assert queued(URGENT_LIST) == []


@pytest.mark.parametrize("id", ["touch_file-0", "do_task-1", "os.system", "", b"\xff\x00"])
def test_what_is_no_call_is_not_looked_for_again(redis, queued, id):
    redis.zadd(queues.CALLS_KEY, {id: 0})
    pass_time()
    assert leftovers(redis) == set()


def test_so_many_at_a_time(file, redis, queued):
    touch_file.enqueue_many([str(file)] * 2300)
    redis.delete(URGENT_LIST)
    for found in (1000, 2000, 2300, 2300):
        pass_time(70)
        assert len(set(queued(URGENT_LIST))) == len(queued(URGENT_LIST)) == found


def test_a_list_that_is_too_long_is_not_searched(file, redis, queued, monkeypatch, declaring):
    """To read all of it would hold up Redis at every tick. A call in another list is found meanwhile."""
    monkeypatch.setattr(enqueue, "LOOKED_FOR", 5)

    @job
    def elsewhere():
        pass

    touch_file.enqueue_many([str(file)] * 7)
    redis.lpop(URGENT_LIST)
    elsewhere.enqueue()
    redis.delete(DEFAULT_LIST)
    for minutes in (2, 4, 6, 8):
        pass_time(60 * minutes)
    assert len(queued(URGENT_LIST)) == 6
    assert len(queued(DEFAULT_LIST)) == 1
    assert drain() == {"done": 7}
    for minutes in (10, 12):
        pass_time(60 * minutes)
    assert drain() == {"done": 1}


def test_two_who_look_at_once_queue_it_once(file, redis, queued, race):
    touch_file.enqueue_many([str(file)] * 20)
    redis.delete(URGENT_LIST)
    race(*[lambda: pass_time(70)] * 4)
    assert len(queued(URGENT_LIST)) == 20


def test_one_redis_that_is_away_keeps_no_other_from_being_searched(file, redis, queued, settings):
    away = {"URL": f"redis://localhost:{free_port()}"}
    touch_file.enqueue(str(file))
    redis.delete(URGENT_LIST)
    settings.RQ_QUEUES = {"elsewhere": away, **settings.RQ_QUEUES}
    with pytest.raises(Exception, match="refused"):
        tick(timezone.now() + timedelta(seconds=70))
    assert len([id for id in queued(URGENT_LIST) if id.startswith("touch_file-")]) == 1


def test_a_place_is_not_taken_by_a_call_that_could_not_be_queued(redis, queued):
    redis.set(queues.CALLS_KEY, "not a set")
    with pytest.raises(QueueUnavailable):
        unique_until_done.enqueue(1)
    redis.delete(queues.CALLS_KEY)
    unique_until_done.enqueue(1)
    assert len(queued(URGENT_LIST)) == 1


# --- Unique -----------------------------------------------------------------------------------------------------------


def test_a_second_call_with_the_same_arguments_is_not_queued(queued, redis):
    for _ in range(3):
        assert unique_until_done.enqueue(1) is None
    unique_until_done.enqueue_many([1, 1, (1,)])
    unique_until_done.enqueue_with_jitter(1, max_wait=LATER)
    assert len(queued(URGENT_LIST)) == 1
    assert redis.zcard(queues.DELAYED_KEY) == 0
    # Nor is anything left of those that were turned away.
    assert len(redis.keys("rq:job:*")) == 1


def test_other_arguments_are_another_call(queued):
    unique_until_done.enqueue(1)
    unique_until_done.enqueue(2)
    unique_until_done.enqueue(1, fail=False)
    unique_until_done.enqueue("1")
    unique_until_start.enqueue(1)
    assert len(queued(URGENT_LIST)) == 5


def test_the_order_of_keywords_does_not_matter(declaring, queued):
    @job(queue="urgent", unique_for=LATER)
    def once(**options):
        pass

    once.enqueue(a=1, b={"c": 1, "d": 2})
    once.enqueue(b={"d": 2, "c": 1}, a=1)
    assert len(queued(URGENT_LIST)) == 1


def test_given_by_place_or_by_name_it_is_the_same_call(queued):
    unique_until_done.enqueue(1, True)
    unique_until_done.enqueue(number=1, fail=True)
    unique_until_done.enqueue(1, fail=True)
    assert len(queued(URGENT_LIST)) == 1


def test_enqueued_at_once_from_everywhere_it_is_queued_once(race, queued):
    race(*[lambda: [unique_until_done.enqueue(1) for _ in range(5)] for _ in range(8)])
    assert len(queued(URGENT_LIST)) == 1


def test_until_done_it_is_free_again_when_it_has_ended(queued, redis):
    unique_until_done.enqueue(1)
    assert drain() == {"done": 1}
    assert leftovers(redis) == set()
    unique_until_done.enqueue(1)
    assert len(queued(URGENT_LIST)) == 1


def test_until_done_it_is_taken_while_it_runs_and_while_it_waits_for_its_next_attempt(declaring, queued, delayed):
    seen: list[int] = []

    @job(queue="urgent", unique_for=LATER, max_attempts=2)
    def once():
        once.enqueue()
        seen.append(len(queued(URGENT_LIST)))
        raise RuntimeError

    once.enqueue()
    assert drain() == {"failed": 1}
    assert seen == [0]
    once.enqueue()
    assert queued(URGENT_LIST) == []
    pass_time()
    assert drain() == {"failed": 1}
    # Given up is an end as well.
    once.enqueue()
    assert len(queued(URGENT_LIST)) == 1


def test_until_start_it_is_free_again_when_it_starts(declaring, queued):
    seen: list[int] = []

    @job(queue="urgent", unique_for=LATER, unique_until="start")
    def once(again):
        if again:
            once.enqueue(False)
            once.enqueue(True)
            seen.append(len(queued(URGENT_LIST)))
            raise SystemExit

    once.enqueue(True)
    once.enqueue(True)
    assert len(queued(URGENT_LIST)) == 1
    assert drain_one() == "failed"
    assert seen == [2]


def drain_one() -> str:
    queue = queues.get("urgent")
    message, _ = queues.Queue.dequeue_any([queue], None, connection=queue.connection)
    return performing.perform_call(message, queue.connection, time.time())


def test_until_start_a_later_attempt_does_not_free_the_place_of_a_newer_call(declaring, queued, redis):
    @job(queue="urgent", unique_for=LATER, unique_until="start")
    def once():
        raise RuntimeError

    once.enqueue()
    assert drain_one() == "failed"
    once.enqueue()
    [newer] = queued(URGENT_LIST)
    [key] = redis.keys("selfheal:unique:*")
    assert redis.get(key).decode() == newer
    # The newer one is taken by somebody. The first call's second attempt begins, and ends.
    redis.lpop(URGENT_LIST)
    with clock.fixed(timezone.now() + LATER):
        enqueue.move_due(redis)
    assert drain_one() == "failed"
    assert redis.get(key).decode() == newer
    once.enqueue()
    assert queued(URGENT_LIST) == []


def test_never_longer_than_it_was_asked_for(queued, redis):
    unique_until_done.enqueue(1)
    [key] = redis.keys("selfheal:unique:*")
    redis.pexpire(key, 1)
    deadline = time.monotonic() + 10
    while redis.exists(key):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    unique_until_done.enqueue(1)
    assert len(queued(URGENT_LIST)) == 2


def test_a_minute_is_a_minute(redis):
    unique_until_start.enqueue(1)
    [key] = redis.keys("selfheal:unique:unique_until_start:*")
    assert 59_000 < redis.pttl(key) <= 60_000


def test_the_end_of_an_expired_call_does_not_free_the_place_of_a_newer_one(declaring, redis, queued):
    @job(queue="urgent", unique_for=LATER)
    def once():
        pass

    once.enqueue()
    [key] = redis.keys("selfheal:unique:*")
    redis.delete(key)
    once.enqueue()
    newer = queued(URGENT_LIST)[1].encode()
    assert drain_one() == "done"
    assert redis.get(key) == newer


def test_a_rolled_back_call_takes_no_place(queued):
    with transaction.atomic():
        unique_until_done.enqueue(1)
        transaction.set_rollback(True)
    unique_until_done.enqueue(1)
    assert len(queued(URGENT_LIST)) == 1


def test_a_unique_call_that_waits_keeps_the_others_out(delayed, queued):
    unique_until_done.enqueue_with_jitter(1, max_wait=LATER, min_wait=LATER)
    unique_until_done.enqueue(1)
    assert len(delayed()) == 1
    assert queued(URGENT_LIST) == []
    tick(now=timezone.now() + LATER)
    assert drain() == {"done": 1}


# --- Calls of a cron job ----------------------------------------------------------------------------------------------


def test_a_cron_job_can_be_called_too_and_that_is_no_run_of_its_schedule(queued):
    nightly.enqueue()
    [id] = queued()
    assert id.startswith("nightly-")
    assert drain() == {"done": 1}
    assert Run.objects.get().object_pk == ""


def test_switched_off_its_calls_are_dropped(queued, redis, switch):
    nightly.enqueue()
    switch("nightly")
    assert drain() == {"disabled": 1}
    assert leftovers(redis) == set()
    nightly.enqueue()
    assert queued() == []


def test_a_plain_job_has_no_switch(file, attempts, switch):
    assert not touch_file.is_scheduled
    switch("touch_file")
    touch_file.enqueue(str(file))
    assert drain() == {"done": 1}


# --- Jobs that were taken out of the code -----------------------------------------------------------------------------


def test_a_call_of_a_job_that_is_no_longer_declared_is_dropped_and_logged(queued, caplog):
    with registry.sandbox():

        @job(queue="urgent")
        def short_lived():
            pass

        short_lived.enqueue()
    assert drain() == {}
    assert "no job or sweep named 'short_lived' is declared in this project" in caplog.text


def test_a_call_that_an_old_worker_does_not_know_is_kept_for_a_new_one(queued, redis, caplog):
    """In the middle of a deploy, both are there."""
    done: list[int] = []
    with registry.sandbox():

        def brand_new(number):
            done.append(number)

        job(queue="urgent")(brand_new).enqueue(7)
    assert drain() == {}
    pass_time(70)
    assert queued(URGENT_LIST) == []
    assert len(caplog.records) == 1
    with registry.sandbox():
        job(queue="urgent")(brand_new)
        pass_time(140)
        assert drain() == {"done": 1}
    assert done == [7]
    assert leftovers(redis) == set()


def test_a_queue_that_was_taken_out_of_the_settings_says_so(settings, declaring):
    @job(queue="urgent")
    def urgent():
        pass

    del settings.RQ_QUEUES["urgent"]
    with pytest.raises(Exception, match="There is no queue 'urgent' in RQ_QUEUES; add it there") as refusal:
        urgent.enqueue()
    assert not isinstance(refusal.value, QueueUnavailable)
