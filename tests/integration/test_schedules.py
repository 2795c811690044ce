"""The tick: what is due becomes owed, what is owed is pushed, and neither Redis nor a scheduler can forget it."""

import errno
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import psutil
import pytest
from django.core.management import call_command
from django.utils import timezone
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError
from waffle import get_waffle_switch_model

from config.servers import free_port
from jobs import Backoff, claims, clock, job, queues, registry, scheduler, sweep
from jobs.claims import Attempt
from jobs.exceptions import Misconfigured, NoLongerNeeded
from jobs.job import Declared, Job
from jobs.models import Claim, Run, Schedule
from jobs.testing import drain, tick
from tests import database
from tests.cast.jobs import do_task, nightly, schedule_tasks
from tests.cast.models import Task, Ticket
from tests.integration.conftest import BACKGROUND_LIST, DEFAULT_LIST, URGENT_LIST
from tests.machine import within

pytestmark = pytest.mark.django_db(transaction=True)

NOON = datetime(2026, 5, 1, 12, tzinfo=UTC)
A_MINUTE = timedelta(minutes=1)


@pytest.fixture
def hourly(nothing_else: None) -> Job:
    """The only thing declared: a cron job that is due at each full hour, and fails while `hourly.fails` is true."""

    @job(cron="0 * * * *", max_attempts=3, backoff=Backoff(first=timedelta(seconds=10), cap=A_MINUTE))
    def hourly():
        if hourly.fails:
            raise RuntimeError("no")

    hourly.fails = False
    return hourly


@pytest.fixture
def sweeping(nothing_else: None) -> Any:
    """The only things declared: a job, and its sweep of every minute."""

    @job
    def work(task):
        Task.objects.filter(pk=task.pk).update(state="done")

    @sweep(work, cron="* * * * *")
    def schedule_work():
        return Task.objects.pending()

    return schedule_work


def schedule(declared: Declared | str) -> Schedule:
    return Schedule.objects.get(name=declared if isinstance(declared, str) else declared.name)


def change(declared: Declared, **values: Any) -> None:
    """Move the row, not the clock."""
    Schedule.objects.update_or_create(name=declared.name, defaults=values)


def owe(declared: Declared) -> None:
    change(declared)
    Schedule.objects.filter(name=declared.name).owe()


# --- Due --------------------------------------------------------------------------------------------------------------


def test_a_schedule_that_is_due_is_taken_pushed_and_advanced(hourly, queued):
    change(hourly, next_run_at=NOON)
    assert tick(now=NOON + timedelta(seconds=3)) == ["hourly"]
    assert queued() == ["hourly"]
    row = schedule(hourly)
    assert row.next_run_at == NOON + timedelta(hours=1)
    assert row.last_enqueued_at == NOON + timedelta(seconds=3)


def test_one_that_is_not_due_is_left(hourly, queued):
    change(hourly, next_run_at=NOON)
    assert tick(now=NOON - timedelta(microseconds=1)) == []
    assert queued() == []
    assert schedule(hourly).last_enqueued_at is None


def test_one_that_is_new_waits_for_its_first_time(hourly, queued):
    assert tick(now=NOON + A_MINUTE) == []
    assert schedule(hourly).next_run_at == NOON + timedelta(hours=1)
    assert tick(now=NOON + timedelta(hours=1)) == ["hourly"]


def test_many_times_that_were_missed_are_one_run(hourly, queued):
    """No scheduler ran for a week."""
    change(hourly, next_run_at=NOON)
    assert tick(now=NOON + timedelta(days=7, minutes=1)) == ["hourly"]
    assert queued() == ["hourly"]
    assert schedule(hourly).next_run_at == NOON + timedelta(days=7, hours=1)


@pytest.mark.parametrize(
    ("missed", "late_by", "runs"),
    [
        ("once", timedelta(hours=3, minutes=5), 1),
        ("all", timedelta(hours=3, minutes=5), 4),
        # Nobody was there at twelve, one and two. At three somebody was, half a minute late.
        ("skip", timedelta(hours=3, minutes=5), 0),
        ("skip", timedelta(hours=3, seconds=30), 1),
        ("skip", timedelta(seconds=30), 1),
        ("skip", timedelta(minutes=2), 0),
        ("all", timedelta(days=365), scheduler.CAUGHT_UP),
    ],
    ids=str,
)
def test_what_becomes_of_the_times_that_were_missed(nothing_else, queued, missed, late_by, runs):
    nights = []

    @job(cron="0 * * * *", missed=missed)
    def hourly():
        nights.append(True)

    change(hourly, next_run_at=NOON)
    now = NOON + late_by
    tick(now=now)
    assert schedule(hourly).next_run_at > now
    assert schedule(hourly).due_runs == runs
    for number in range(min(runs, 10)):
        with clock.fixed(now):
            assert drain() == {"done": 1}
        # One run at a time, and each tick brings the next.
        assert len(nights) == number + 1
        tick(now=now)
    assert queued() == (["hourly"] if runs > 10 else [])


def test_of_several_runs_to_be_made_up_for_one_that_fails_for_good_is_one(nothing_else, queued):
    @job(cron="0 * * * *", missed="all", max_attempts=1)
    def hourly():
        raise RuntimeError("no")

    change(hourly, next_run_at=NOON)
    now = NOON + timedelta(hours=2)
    for _ in range(3):
        assert tick(now=now) == ["hourly"]
        with clock.fixed(now):
            assert drain() == {"failed": 1}
    assert tick(now=now) == []


def test_the_time_zone_is_djangos(hourly, settings):
    settings.TIME_ZONE = "Asia/Tokyo"
    change(hourly, cron="0 9 * * *")
    tick(now=NOON)
    assert schedule(hourly).next_run_at == datetime(2026, 5, 2, 0, 0, tzinfo=UTC)


def test_a_sixth_field_is_seconds(nothing_else):
    @job(cron="* * * * * */10")
    def often():
        pass

    tick(now=NOON)
    assert schedule(often).next_run_at == NOON + timedelta(seconds=10)
    assert tick(now=NOON + timedelta(seconds=10)) == ["often"]


def test_an_operators_cron_comes_before_the_codes(hourly):
    tick(now=NOON)
    change(hourly, cron="30 * * * *")
    assert tick(now=NOON + A_MINUTE) == []
    assert schedule(hourly).next_run_at == NOON + timedelta(minutes=30)
    assert tick(now=NOON + timedelta(minutes=30)) == ["hourly"]

    change(hourly, cron="")
    tick(now=NOON + timedelta(minutes=31))
    assert schedule(hourly).next_run_at == NOON + timedelta(hours=1)


def test_a_cron_that_changed_in_the_code_counts_from_the_next_tick(hourly):
    tick(now=NOON)
    hourly.cron = "15 * * * *"
    tick(now=NOON + A_MINUTE)
    assert schedule(hourly).next_run_at == NOON + timedelta(minutes=15)


def test_a_tick_that_changes_nothing_writes_nothing(hourly, django_assert_num_queries):
    tick(now=NOON)
    with django_assert_num_queries(3) as captured:
        tick(now=NOON + A_MINUTE)
    assert not [query for query in captured if not query["sql"].startswith("SELECT")]


def test_what_has_no_cron_is_never_due(declaring, queued):
    change(do_task, next_run_at=NOON, cron="* * * * *")
    change(nightly, next_run_at=NOON)
    assert "do_task" not in tick(now=NOON)
    assert "do_task" not in queued()


def test_an_expression_that_fits_no_more_stops_nobody_else(nothing_else, queued):
    """Written past the form, or readable by another version only."""
    for name in ("first", "second", "third"):
        job(name=name, cron="0 * * * *")(lambda: None)
    for name in ("first", "second", "third"):
        Schedule.objects.update_or_create(name=name, defaults={"next_run_at": NOON})
    Schedule.objects.filter(name="second").update(cron="every full moon")
    with pytest.raises(Misconfigured, match="second cannot be scheduled: 'every full moon' is no cron expression"):
        tick(now=NOON)
    assert queued() == ["first", "third"]


def test_several_errors_come_together(nothing_else):
    for name in ("first", "second"):
        job(name=name, cron="0 * * * *")(lambda: None)
        Schedule.objects.update_or_create(name=name, defaults={"cron": f"{name} rubbish"})
    with pytest.raises(ExceptionGroup, match="Several parts of a tick failed") as raised:
        tick()
    assert len(raised.value.exceptions) == 2


# --- Owed -------------------------------------------------------------------------------------------------------------


def test_while_it_is_queued_it_is_not_pushed_again(sweeping, queued):
    """No worker for thirty minutes: one copy of the sweep, not thirty."""
    tick(now=NOON)
    pushed = [tick(now=NOON + number * A_MINUTE) for number in range(1, 31)]
    assert queued(BACKGROUND_LIST) == ["schedule_work"]
    assert pushed == [["schedule_work"]] + [[]] * 29


def test_what_redis_lost_is_pushed_again_by_the_next_tick(hourly, redis, queued):
    owe(hourly)
    assert tick() == ["hourly"]
    assert tick() == []
    redis.flushall()
    assert tick() == ["hourly"]
    redis.delete(DEFAULT_LIST)
    assert tick() == ["hourly"]
    assert queued() == ["hourly"]


def test_what_a_worker_popped_and_dropped_is_pushed_again(hourly, redis):
    owe(hourly)
    tick()
    redis.lpop(DEFAULT_LIST)
    assert tick() == ["hourly"]


def test_a_scheduler_killed_after_it_took_what_was_due_loses_nothing(hourly, monkeypatch, queued):
    change(hourly, next_run_at=NOON)

    class KilledError(BaseException):
        pass

    def killed(errors: Any) -> None:
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(scheduler, "_push_owed", killed)
        with pytest.raises(KilledError):
            tick(now=NOON)
    assert queued() == []
    assert tick(now=NOON + timedelta(seconds=5)) == ["hourly"]


@pytest.mark.long_on_postgres
def test_many_that_come_due_together_are_spread_over_their_minute_and_stay_a_minute_apart(nothing_else, queued):
    sweeps = []
    for number in range(300):
        made = job(name=f"work_{number}")(lambda row: None)
        sweeps.append(sweep(made, cron="* * * * *", name=f"schedule_work_{number}")(Task.objects.pending))
    tick(now=NOON)
    pushed_at: dict[str, list[int]] = {}
    for seconds in range(60, 240, 5):
        with clock.fixed(NOON + timedelta(seconds=seconds)):
            for name in tick(now=clock.read()):
                pushed_at.setdefault(name, []).append(seconds)
            drain()
    times = [seconds for pushes in pushed_at.values() for seconds in pushes]
    # 300 in the twelve ticks of a minute.
    assert {seconds: times.count(seconds) for seconds in times} == dict.fromkeys(range(60, 240, 5), 25)
    assert all(pushes == [pushes[0] + 60 * number for number in range(3)] for pushes in pushed_at.values())
    assert len(pushed_at) == len(sweeps)


def test_what_comes_due_often_keeps_nobody_waiting(nothing_else):
    for number in range(50):
        job(cron="* * * * * *", name=f"a_{number}")(lambda: None)
    job(cron="* * * * *", name="z")(lambda: None)
    tick(now=NOON)
    pushed = []
    for seconds in range(60, 80, 5):
        with clock.fixed(NOON + timedelta(seconds=seconds)):
            pushed += tick(now=clock.read())
            drain()
    assert pushed.count("z") == 1


def test_what_is_being_worked_on_is_not_pushed(hourly, queued):
    owe(hourly)
    claims.take(Attempt(hourly, "selfheal.schedule", "hourly"))
    assert tick() == []
    assert queued() == []


def test_what_died_at_work_is_pushed_again_when_its_lease_is_over(hourly, queued):
    owe(hourly)
    claims.take(Attempt(hourly, "selfheal.schedule", "hourly"))
    Claim.objects.update(lease_expires_at=timezone.now() - A_MINUTE)
    tick()
    assert queued() == ["hourly"]
    assert drain() == {"done": 1}
    assert [run.outcome for run in Run.objects.order_by("pk")] == ["crashed", "done"]


def test_what_has_ended_is_not_owed(hourly, queued):
    owe(hourly)
    tick()
    assert drain() == {"done": 1}
    assert tick() == []
    row = schedule(hourly)
    assert row.last_outcome == "done"
    assert row.last_enqueued_at <= row.last_started_at <= row.last_finished_at


def test_what_comes_due_while_a_run_is_at_work_is_another_run(nothing_else, queued):
    runs: list[int] = []

    @job(cron="0 0 1 1 *")
    def busy():
        runs.append(1)
        if len(runs) == 1:
            owe(busy)
            owe(busy)
            assert tick() == []

    owe(busy)
    tick()
    assert drain() == {"done": 1}
    # What came due meanwhile is one run.
    assert tick() == ["busy"]
    assert drain() == {"done": 1}
    assert tick() == []
    assert len(runs) == 2


def test_a_late_copy_of_a_run_that_has_ended_is_not_needed(hourly, redis):
    owe(hourly)
    tick()
    redis.rpush(DEFAULT_LIST, "hourly", "hourly")
    assert drain() == {"done": 1, "not_needed": 2}


def test_a_run_that_nobody_owes_is_not_needed(hourly, redis):
    change(hourly)
    redis.rpush(DEFAULT_LIST, "hourly")
    assert drain() == {"not_needed": 1}


def test_of_two_ticks_at_once_one_takes_what_is_due(sweeping, race, queued):
    moment = timezone.now().replace(second=30, microsecond=0)
    for number in range(4):
        due = moment + number * A_MINUTE
        change(sweeping, next_run_at=due)
        taken = race(*[lambda due=due: tick(now=due + timedelta(seconds=1))] * 4)
        assert [names for names in taken if names] == [["schedule_work"]]
        assert queued(BACKGROUND_LIST) == ["schedule_work"]
        assert schedule(sweeping).due_runs == number + 1
        assert drain()["done"] == 1


def test_a_tick_may_be_given_its_time(hourly):
    assert tick(now=NOON) == []
    assert tick(now=NOON + timedelta(hours=1)) == ["hourly"]
    assert clock.read() > NOON + timedelta(days=1)


# --- A cron job that fails --------------------------------------------------------------------------------------------


def test_a_failed_run_backs_off_and_is_pushed_again_by_the_tick(hourly, queued):
    hourly.fails = True
    owe(hourly)
    tick()
    assert drain() == {"failed": 1}
    claim = Claim.objects.get()
    assert (claim.job, claim.model, claim.object_pk, claim.attempts) == ("hourly", "selfheal.schedule", "hourly", 1)
    assert tick() == []
    assert queued() == []
    hourly.fails = False
    # At once would be too soon, and after the backoff it is the same run, not the next one.
    tick(now=claim.next_attempt_at)
    assert queued() == ["hourly"]
    Claim.objects.update(next_attempt_at=None)
    assert drain() == {"done": 1}
    assert not Claim.objects.exists()
    assert schedule(hourly).last_outcome == "done"


def test_a_run_that_fails_for_the_last_time_has_ended_and_the_next_one_starts_anew(hourly, queued):
    hourly.fails = True
    owe(hourly)
    for number in (1, 2, 3):
        tick()
        assert drain() == {"failed": 1}, number
        Claim.objects.update(next_attempt_at=None)
    assert not Claim.objects.exists()
    assert schedule(hourly).last_outcome == "failed"
    assert tick() == []
    assert [run.outcome for run in Run.objects.all()] == ["failed"] * 3

    owe(hourly)
    tick()
    drain()
    claim = Claim.objects.get()
    assert (claim.attempts, claim.quarantined_at) == (1, None)


def test_a_run_that_fails_and_is_tried_again_says_so_on_its_schedule(hourly, queued):
    hourly.fails = True
    owe(hourly)
    tick()
    assert drain() == {"failed": 1}
    assert schedule(hourly).last_outcome == "failed"
    assert schedule(hourly).last_finished_at
    assert (schedule(hourly).due_runs, schedule(hourly).settled_runs) == (1, 0)
    hourly.fails = False
    again_at = Claim.objects.get().next_attempt_at
    assert drain(again_at) == {}
    tick(again_at)
    assert drain(again_at) == {"done": 1}
    assert schedule(hourly).last_outcome == "done"


def test_a_run_whose_process_dies_three_times_has_ended(hourly):
    owe(hourly)
    for _ in range(3):
        made = Attempt(hourly, "selfheal.schedule", "hourly")
        assert isinstance(claims.take(made), Claim)
        claims.record_death(made, 7, "Killed.")
        Claim.objects.update(next_attempt_at=None)
    assert not Claim.objects.exists()
    assert schedule(hourly).last_outcome == "crashed"


def test_a_sweep_that_fails_comes_due_again_and_does_not_back_off(nothing_else, queued):
    @job
    def work(task):
        pass

    broken: list[bool] = []

    @sweep(work, cron="* * * * *")
    def schedule_work():
        if broken:
            raise ZeroDivisionError("the query is broken")
        return Task.objects.pending()

    broken.append(True)
    for _ in range(3):
        owe(schedule_work)
        assert tick() == ["schedule_work"]
        assert drain() == {"failed": 1}
        assert not Claim.objects.exists()
        assert schedule(schedule_work).last_outcome == "failed"
    assert {run.error for run in Run.objects.all()} == {"ZeroDivisionError: the query is broken"}
    broken.clear()
    owe(schedule_work)
    tick()
    assert drain() == {"done": 1}


def test_a_sweep_that_fails_does_not_stop_the_others(nothing_else):
    Task.objects.create()
    Ticket.objects.create()
    done: list[Any] = []
    broken, works = job(name="broken")(done.append), job(name="works")(done.append)
    sweep(broken, cron="* * * * *", name="schedule_broken")(lambda: Task.objects.filter(colour="red"))
    sweep(works, cron="* * * * *", name="schedule_works")(Ticket.objects.all)
    for name in ("schedule_broken", "schedule_works"):
        owe(registry.get(name))
    tick()
    assert drain() == {"failed": 1, "done": 2}
    assert len(done) == 1


# --- Claims whose time has come ---------------------------------------------------------------------------------------


def claim(task: Task, job: str = "do_task", **values: Any) -> Claim:
    identity = {"job": job, "model": "cast.task", "object_pk": str(task.pk)}
    return Claim.objects.create(first_claimed_at=timezone.now(), **identity, **values)


def test_a_row_whose_backing_off_is_over_is_queued_by_the_tick(task, queued):
    claim(task, attempts=1, next_attempt_at=timezone.now() - A_MINUTE)
    tick()
    tick()
    assert queued() == [f"do_task-{task.pk}"]


def test_a_row_whose_process_died_is_queued_by_the_tick(task, queued):
    made = Attempt(do_task, "cast.task", str(task.pk))
    claims.take(made)
    Claim.objects.update(lease_expires_at=timezone.now() - A_MINUTE)
    tick()
    assert queued() == [f"do_task-{task.pk}"]


@pytest.mark.parametrize(
    "values",
    [
        {"next_attempt_at": timezone.now() + timedelta(days=1)},
        {"quarantined_at": timezone.now()},
        {"quarantined_at": timezone.now(), "next_attempt_at": timezone.now() - A_MINUTE},
        {"lease_key": "x", "lease_expires_at": timezone.now() + timedelta(days=1)},
    ],
    ids=["backing off", "quarantined", "quarantined and past its backing off", "leased"],
)
def test_one_whose_time_has_not_come_is_not(task, queued, values):
    claim(task, **values)
    tick()
    assert queued() == []


def test_a_claim_of_a_job_that_is_gone_or_switched_off_is_left(task, queued, switch):
    claim(task, job="no_such_job")
    claim(task)
    switch("do_task")
    tick()
    assert queued() == []
    switch("do_task", on=False)
    tick()
    assert queued() == [f"do_task-{task.pk}"]


def test_the_ones_that_wait_longest_come_first_and_the_limit_holds(declaring, queued):
    @job
    def work(task):
        pass

    sweep(work, cron="0 0 1 1 *", limit=3, name="schedule_work")(Task.objects.pending)
    tasks = Task.objects.bulk_create([Task() for _ in range(6)])
    for minutes, task in enumerate(tasks):
        claim(task, job="work", attempts=1, next_attempt_at=timezone.now() - timedelta(hours=1) - minutes * A_MINUTE)
    # What others have queued takes no room.
    do_task.enqueue_many(range(1000, 1010))
    work.enqueue(tasks[0])
    tick()
    assert queued()[10:] == [f"work-{tasks[i].pk}" for i in (0, 5, 4)]


# --- Switches ---------------------------------------------------------------------------------------------------------


def test_switched_off_what_comes_due_is_owed_and_caught_up_once(hourly, switch, queued):
    change(hourly, next_run_at=NOON)
    switch("hourly")
    for hours in range(3):
        assert tick(now=NOON + timedelta(hours=hours)) == []
    assert schedule(hourly).next_run_at == NOON + timedelta(hours=3)
    assert queued() == []
    switch("hourly", on=False)
    assert tick(now=NOON + timedelta(hours=2) + A_MINUTE) == ["hourly"]
    assert drain() == {"done": 1}
    assert tick(now=NOON + timedelta(hours=2) + 2 * A_MINUTE) == []


@pytest.mark.parametrize("name", ["work", "schedule_work"])
def test_a_sweep_is_not_pushed_while_its_switch_or_its_jobs_is_on(sweeping, switch, queued, name):
    change(sweeping, next_run_at=NOON)
    switch(name)
    assert tick(now=NOON) == []
    assert queued(BACKGROUND_LIST) == []


def test_what_was_owed_before_is_made_up_for_afterwards(hourly, switch, queued):
    owe(hourly)
    switch("hourly")
    assert tick() == []
    switch("hourly", on=False)
    assert tick() == ["hourly"]


def test_a_copy_that_was_queued_before_is_dropped_when_it_is_popped_and_owed_still(hourly, switch, queued):
    owe(hourly)
    tick()
    switch("hourly")
    assert drain() == {"disabled": 1}
    assert queued() == []
    switch("hourly", on=False)
    assert tick() == ["hourly"]
    assert drain() == {"done": 1}


def test_a_cron_job_that_finds_nothing_to_do_has_done_its_run(nothing_else):
    @job(cron="0 * * * *")
    def hourly():
        raise NoLongerNeeded("of no use today")

    owe(hourly)
    tick()
    assert drain() == {"done": 1}
    assert tick() == []
    assert schedule(hourly).last_outcome == "done"


# --- The rows of the schedules ----------------------------------------------------------------------------------------


def test_migrate_makes_a_schedule_for_each_that_is_declared():
    Schedule.objects.all().delete()
    call_command("migrate", verbosity=0)
    assert set(Schedule.objects.values_list("name", flat=True)) == {each.name for each in registry.declared()}


def test_migrate_leaves_what_operators_set():
    change(schedule_tasks, cron="*/5 * * * *", limit=7, next_run_at=NOON, matched=3)
    before = Schedule.objects.filter(name="schedule_tasks").values().get()
    call_command("migrate", verbosity=0)
    assert Schedule.objects.filter(name="schedule_tasks").values().get() == before


def test_a_schedule_that_was_deleted_is_back_with_the_next_tick(hourly):
    Schedule.objects.all().delete()
    tick(now=NOON)
    assert schedule(hourly).next_run_at == NOON + timedelta(hours=1)
    assert tick(now=NOON + timedelta(hours=1)) == ["hourly"]


def test_a_schedule_of_something_that_is_no_longer_declared_is_kept_and_does_nothing(hourly, queued):
    Schedule.objects.create(name="taken_out", next_run_at=NOON, due_runs=1)
    assert tick(now=NOON) == []
    assert Schedule.objects.filter(name="taken_out").exists()


def test_redis_holds_no_schedule(hourly, redis):
    tick(now=NOON)
    assert redis.keys() == []


# --- Around it --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [DEFAULT_LIST, BACKGROUND_LIST, URGENT_LIST, queues.DELAYED_KEY, "rq:queues"])
def test_a_key_of_the_wrong_type_stops_no_schedule(sweeping, redis, queued, key):
    redis.set(key, "rubbish")
    owe(sweeping)
    for _ in range(2):
        with suppress(ResponseError, ExceptionGroup):
            tick()
    assert queued(BACKGROUND_LIST) == ["schedule_work"]
    Task.objects.create()
    assert drain() == {"done": 2}


@pytest.fixture
def ticking(redis: Redis, settings, monkeypatch, tmp_path) -> Iterator[Callable[..., int]]:
    """Run the process with these ticks, one after another, and stop it after them; return how often it ticked."""
    settings.JOBS = {**settings.JOBS, "TICK": timedelta(milliseconds=10)}
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    made = tmp_path / "ticks"
    made.touch()

    def run(*ticks: Callable[[], None]) -> int:
        def tick_in_turn() -> None:
            with made.open("a") as file:
                file.write(".")
            if (turn := len(made.read_text())) == len(ticks):
                os.kill(os.getppid(), signal.SIGTERM)
            ticks[turn - 1]()

        process = scheduler.Scheduler(connection=redis)
        monkeypatch.setattr(process, "enqueue_jobs", tick_in_turn)
        process.run()
        return len(made.read_text())

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def fail(error: str) -> Callable[[], None]:
    def fails() -> None:
        raise RuntimeError(error)

    return fails


def test_the_process_ticks_whatever_the_others_do(ticking, caplog):
    """A tick that fails is one line, and the next one is tried."""
    assert ticking(fail("no"), fail("no"), fail("still not"), lambda: None) == 4
    assert caplog.text.count("A tick failed") == 2


def test_a_tick_that_hangs_or_dies_costs_one_tick(ticking, monkeypatch, caplog):
    monkeypatch.setattr(scheduler, "TICK_SECONDS", 0.3)
    with within(3):
        assert ticking(lambda: time.sleep(600), lambda: os._exit(7), lambda: None) == 3
    assert "It ended with exit code -9." in caplog.text
    assert "It ended with exit code 7." in caplog.text


def test_where_no_process_can_be_started_it_goes_on(ticking, monkeypatch, caplog):
    fork, refused = os.fork, iter([True, True])

    def full() -> int:
        if next(refused, False):
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        return fork()

    monkeypatch.setattr(os, "fork", full)
    files = psutil.Process().num_fds()
    assert ticking(lambda: None) == 1
    assert caplog.text.count("A tick failed") == 1
    assert psutil.Process().num_fds() <= files


def test_a_redis_that_is_away_holds_up_nothing_on_another(nothing_else, task, redis, settings):
    """Neither what is owed nor the rows whose time has come."""
    nowhere = f"redis://127.0.0.1:{free_port()}/0"
    settings.RQ_QUEUES = {**settings.RQ_QUEUES, "urgent": {**settings.RQ_QUEUES["urgent"], "URL": nowhere}}
    for name, queue in (("a", "urgent"), ("b", "urgent"), ("c", "default")):
        made = job(name=name, queue=queue)(lambda row: None)
        sweep(made, cron="* * * * *", name=f"schedule_{name}", queue=queue)(Task.objects.pending)
        owe(registry.get(f"schedule_{name}"))
        Claim.objects.create(
            job=name, model="cast.task", object_pk=str(task.pk), first_claimed_at=NOON, next_attempt_at=NOON
        )
    # It is asked once: what is met more often comes as a group.
    with pytest.raises(RedisConnectionError):
        tick()
    assert redis.lrange("rq:queue:default", 0, -1) == [b"schedule_c", b"c-%d" % task.pk]


@pytest.mark.postgres
def test_a_schedule_that_somebody_keeps_locked_holds_up_no_other(sweeping, queued):
    @job(cron="* * * * *")
    def another() -> None:
        pass

    for declared in (sweeping, another):
        change(declared, next_run_at=NOON)
    with database.locking(Schedule.objects.filter(name="another")), within(1):
        assert tick(now=NOON) == ["schedule_work"]
    assert tick(now=NOON) == ["another"]


def test_with_burst_the_process_ticks_once(hourly, redis, queued, monkeypatch):
    owe(hourly)
    process = scheduler.Scheduler(connection=redis, interval=60)
    monkeypatch.setattr(process, "_install_signal_handlers", lambda: None)
    process.run(burst=True)
    assert queued() == ["hourly"]


def test_the_switches_of_what_is_declared_are_there_before_the_first_tick():
    Switch = get_waffle_switch_model()
    Switch.objects.all().delete()
    call_command("migrate", verbosity=0)
    assert Switch.objects.filter(name="disable_schedule_tasks", active=False).exists()
