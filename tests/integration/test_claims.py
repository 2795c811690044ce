"""The right to work on one row: one holder, whatever races for it, and nothing written by whoever lost it."""

import copy
import os
import pickle
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from django.db import OperationalError, connection, transaction
from django.test.utils import isolate_apps
from django.utils import timezone

from jobs import Backoff, LeaseLost, NoLongerNeeded, QueueUnavailable, claims, clock, job, sweep
from jobs.claims import Attempt, Heartbeat
from jobs.conf import conf
from jobs.job import Declared, Job
from jobs.message import label
from jobs.models import Claim, Run
from tests.cast.jobs import delete_task, do_keyed, do_task, schedule_tasks
from tests.cast.models import Task

pytestmark = pytest.mark.django_db(transaction=True)

NOON = datetime(2026, 5, 1, 12, tzinfo=UTC)
A_MINUTE = timedelta(minutes=1)


def attempt(task: Task, job: Declared = do_task) -> Attempt:
    return Attempt(job, "cast.task", str(task.pk), worker="w1")


def take(task: Task, job: Declared = do_task) -> Claim | str:
    return claims.take(attempt(task, job))


def taken(task: Task, job: Declared = do_task) -> Attempt:
    """Take a row that is free."""
    made = attempt(task, job)
    assert isinstance(claims.take(made), Claim)
    return made


def age(**values: Any) -> None:
    """Move the only claim, not the clock."""
    assert Claim.objects.update(**values) == 1


def let_expire() -> None:
    past = timezone.now() - A_MINUTE
    assert Claim.objects.filter(lease_key__isnull=False).update(lease_expires_at=past, leased_at=past - A_MINUTE) == 1


@pytest.fixture
def thrice(declaring: None) -> Job:
    """A job that may raise three times."""

    @job(max_attempts=3, backoff=Backoff(first=timedelta(seconds=10), cap=timedelta(seconds=15)))
    def work_thrice(task):
        pass

    sweep(work_thrice, cron="0 0 1 1 *", name="schedule_thrice")(Task.objects.pending)
    return work_thrice


# --- Taking -----------------------------------------------------------------------------------------------------------


def test_a_free_row_is_taken(task):
    with clock.fixed(NOON):
        made = taken(task)
    claim = Claim.objects.get()
    assert (claim.job, claim.model, claim.object_pk) == ("do_task", "cast.task", str(task.pk))
    assert (claim.lease_key, claim.token) == (f"cast.task:{task.pk}", made.token)
    assert (claim.leased_at, claim.first_claimed_at) == (NOON, NOON)
    assert claim.lease_expires_at == NOON + conf.LEASE
    assert claim.holder == f"w1@{socket.gethostname()}:{os.getpid()}"
    assert (claim.attempts, claim.crashes, claim.next_attempt_at, claim.quarantined_at) == (0, 0, None, None)


def test_a_row_is_held_by_one_whichever_job_it_is(task):
    taken(task)
    assert take(task) == "busy"
    assert take(task, delete_task) == "busy"
    assert Claim.objects.filter(lease_key__isnull=False).count() == 1


def test_another_row_is_free(task):
    taken(task)
    taken(Task.objects.create())
    assert Claim.objects.filter(lease_key__isnull=False).count() == 2


def test_each_taking_has_a_token_of_its_own(task):
    first = taken(task)
    claims.release(first)
    assert taken(task).token != first.token


def test_the_lease_is_on_the_row_and_the_counts_are_the_jobs(task):
    claims.fail(taken(task), "RuntimeError: no")
    assert take(task) == "waiting"

    other = taken(task, delete_task)
    claims.fail(other, "RuntimeError: no", needed=False)
    assert Claim.objects.get().job == "do_task"


def test_a_job_in_quarantine_does_not_block_another(task):
    taken(task)
    age(**claims.UNHELD, quarantined_at=timezone.now())
    assert take(task) == "quarantined"
    claims.settle(taken(task, delete_task), {})


@pytest.mark.parametrize(
    ("values", "refusal"),
    [
        ({"next_attempt_at": NOON + A_MINUTE}, "waiting"),
        ({"quarantined_at": NOON - A_MINUTE}, "quarantined"),
        ({"quarantined_at": NOON - A_MINUTE, "next_attempt_at": NOON + A_MINUTE}, "quarantined"),
    ],
    ids=str,
)
def test_a_refusal_says_why(task, values, refusal):
    taken(task)
    age(**claims.UNHELD, **values)
    before = Claim.objects.values().get()
    with clock.fixed(NOON):
        assert take(task) == refusal
    assert Claim.objects.values().get() == before


def test_a_row_whose_backing_off_is_over_is_taken_with_what_was_counted(task):
    with clock.fixed(NOON):
        claims.fail(taken(task), "RuntimeError: no")
        again_at = Claim.objects.get().next_attempt_at
    with clock.fixed(again_at - timedelta(microseconds=1)):
        assert take(task) == "waiting"
    with clock.fixed(again_at):
        taken(task)
    claim = Claim.objects.get()
    assert (claim.attempts, claim.first_claimed_at) == (1, NOON)


def test_a_long_key_has_a_lease_of_its_own(db):
    keys = ["x" * 499 + "y", "x" * 499 + "z", "ü" * 500]
    attempts = [Attempt(do_keyed, "cast.keyed", key) for key in keys]
    assert all(isinstance(claims.take(each), Claim) for each in attempts)
    assert len({each.lease_key for each in attempts}) == 3
    assert all(len(each.lease_key) <= 250 for each in attempts)
    assert claims.take(Attempt(do_keyed, "cast.keyed", keys[0])) == "busy"


@isolate_apps("tests.cast")
def test_a_proxy_is_the_same_row():
    class Proxy(Task):
        class Meta:
            app_label = "cast"
            proxy = True

    assert label(Proxy) == label(Task) == "cast.task"


def test_times_are_the_clocks_that_was_asked(task):
    with clock.fixed(NOON):
        claims.fail(taken(task), "RuntimeError: no")
        run = Run.objects.get()
        assert (run.started_at, run.finished_at) == (NOON, NOON)
    with clock.fixed(NOON + A_MINUTE):
        made = taken(task)
        claims.record_death(made, 7, "Killed.")
        assert Claim.objects.get().next_attempt_at > NOON + A_MINUTE


# --- Raced for --------------------------------------------------------------------------------------------------------


def one_winner(results: list[Any], others: set[str]) -> None:
    assert len([result for result in results if isinstance(result, Claim)]) == 1
    assert {result for result in results if not isinstance(result, Claim)} <= others


def test_of_many_who_race_for_a_free_row_one_gets_it(race):
    for _ in range(5):
        task = Task.objects.create()
        one_winner(race(*[lambda task=task: take(task)] * 8), {"busy"})
    assert Claim.objects.count() == 5


def test_of_two_jobs_that_race_for_a_row_one_gets_it(race):
    for _ in range(5):
        task = Task.objects.create()
        one_winner(race(*[lambda task=task: take(task), lambda task=task: take(task, delete_task)] * 4), {"busy"})
    assert Claim.objects.filter(lease_key__isnull=False).count() == 5


def test_of_many_who_race_for_a_row_that_was_given_back_one_gets_it(race):
    for _ in range(5):
        task = Task.objects.create()
        claims.release(taken(task))
        one_winner(race(*[lambda task=task: take(task)] * 8), {"busy"})


def test_of_many_who_race_to_take_over_one_gets_it_and_one_crash_is_counted(race):
    for _ in range(5):
        task = Task.objects.create()
        taken(task)
        past = timezone.now() - A_MINUTE
        Claim.objects.filter(object_pk=str(task.pk)).update(lease_expires_at=past)
        results = race(*[lambda task=task: take(task), lambda task=task: take(task, delete_task)] * 4)
        one_winner(results, {"busy"})
        assert Claim.objects.get(job="do_task", object_pk=str(task.pk)).crashes == 1
        assert Run.objects.filter(object_pk=str(task.pk)).count() == 1


def test_the_holder_and_a_thief_cannot_both_have_it(race):
    """A settle and a take-over at the moment when the lease runs out."""
    for _ in range(8):
        task = Task.objects.create()
        holder = taken(task)
        Claim.objects.filter(object_pk=str(task.pk)).update(lease_expires_at=timezone.now())

        def settle(holder: Attempt = holder) -> str:
            try:
                claims.settle(holder, {})
            except LeaseLost:
                return "lost"
            return "settled"

        settled, thief = race(settle, lambda task=task: take(task))
        crashed = Run.objects.filter(object_pk=str(task.pk), outcome="crashed").count()
        assert (settled == "lost") == (crashed == 1)
        assert isinstance(thief, Claim) or settled == "settled"


@pytest.mark.parametrize("lost_at", ["insert", "update"])
def test_a_lost_race_does_not_break_the_transaction_around_it(task, lost_at):
    if lost_at == "update":
        # Its own claim is there, and the row's lease is another job's: the unique key refuses the update.
        claims.release(taken(task))
    taken(task, delete_task)
    with transaction.atomic():
        Task.objects.create(name="written before")
        assert take(task) == "busy"
        Task.objects.create(name="written after")
    assert Task.objects.filter(name__startswith="written").count() == 2


def test_a_rolled_back_transaction_takes_the_lease_along(task):
    with suppress(ZeroDivisionError), transaction.atomic():
        taken(task)
        raise ZeroDivisionError
    assert not Claim.objects.exists()
    taken(task)


# --- Taken over -------------------------------------------------------------------------------------------------------


def test_a_lease_that_has_expired_is_taken_over_and_a_crash_is_counted(task, caplog):
    first = taken(task)
    let_expire()
    last_renewed = Claim.objects.get().lease_expires_at - conf.LEASE

    second = taken(task)

    claim = Claim.objects.get()
    assert (claim.token, claim.crashes, claim.deaths, claim.attempts) == (second.token, 1, 0, 0)
    assert claim.lease_expires_at > timezone.now()
    [run] = Run.objects.all()
    assert (run.job, run.outcome, run.worker, run.pid) == ("do_task", "crashed", "w1", os.getpid())
    assert f"Last renewed at {last_renewed}, by w1@" in run.error
    assert run.started_at is not None
    assert claims.renew(first.token) is False
    assert "stopped renewing" in caplog.text


def test_a_lease_that_has_not_expired_is_not(task):
    with clock.fixed(NOON):
        taken(task)
    with clock.fixed(NOON + conf.LEASE - timedelta(microseconds=1)):
        assert take(task) == "busy"
    with clock.fixed(NOON + conf.LEASE):
        taken(task)


def test_one_that_was_renewed_at_the_last_moment_is_not_taken_over(task):
    """Between the look at an expired lease and the statement that ends it."""
    made = taken(task)
    let_expire()
    seen = Claim.objects.get()
    claims.renew(made.token)
    claims.expire(seen)
    assert Claim.objects.get().token == made.token
    assert not Run.objects.exists()


def test_a_process_that_is_killed_after_its_worker_was_told_to_stop_counts_nothing(task):
    """A deploy that loses patience. Twenty of them during one long job say nothing about the row."""
    for _ in range(20):
        claims.note_stop(taken(task))
        let_expire()
    taken(task)
    claim = Claim.objects.get()
    assert (claim.crashes, claim.deaths, claim.attempts, claim.stopping_since) == (0, 0, 0, None)
    assert [run.outcome for run in Run.objects.all()] == ["interrupted"] * 20
    assert "Its worker was told to stop at 20" in Run.objects.first().error


def test_nor_does_one_whose_worker_sees_it_end(task):
    made = taken(task)
    claims.interrupt(made, 123, "Its process was killed by SIGKILL.")
    assert Claim.objects.filter(crashes=0, deaths=0, lease_key=None, next_attempt_at=None).exists()
    run = Run.objects.get()
    assert (run.outcome, run.pid) == ("interrupted", 123)
    assert run.error == "Its process was killed by SIGKILL. Its worker had been told to stop."
    # Over already, or somebody else's: nothing.
    claims.interrupt(made, 123, "Its process was killed by SIGKILL.")
    assert Run.objects.count() == 1


def test_nor_is_one_that_runs_out_between_two_statements(task, monkeypatch):
    """It is taken over by whoever comes next, and its crash is counted then."""
    made = taken(task)
    let_expire()
    with monkeypatch.context() as patch:
        patch.setattr(claims, "expire", lambda claim: None)
        assert take(task) == "busy"
    assert Claim.objects.get().token == made.token
    taken(task)
    assert Claim.objects.get().crashes == 1


def test_another_job_takes_over_and_the_crash_is_counted_where_it_happened(task):
    taken(task)
    let_expire()
    taken(task, delete_task)
    dead, alive = Claim.objects.get(job="do_task"), Claim.objects.get(job="delete_task")
    assert (dead.crashes, dead.lease_key, dead.token) == (1, None, "")
    assert (alive.crashes, alive.lease_key) == (0, f"cast.task:{task.pk}")
    assert Run.objects.get().job == "do_task"


def test_ten_deaths_that_nobody_saw_put_the_row_in_quarantine(task, caplog):
    taken(task)
    for crashes in range(1, 10):
        let_expire()
        taken(task)
        assert Claim.objects.get().crashes == crashes
    let_expire()
    assert take(task) == "quarantined"
    claim = Claim.objects.get()
    assert (claim.crashes, claim.lease_key) == (10, None)
    assert claim.quarantined_at is not None
    assert "stopped renewing" in claim.last_error
    assert f"do_task of cast.task {task.pk} is quarantined until somebody releases it" in caplog.text
    assert take(task) == "quarantined"
    assert Run.objects.filter(outcome="crashed").count() == 10


def test_a_schedule_is_never_quarantined(db):
    made = Attempt(schedule_tasks, "selfheal.schedule", "schedule_tasks")
    claims.take(made)
    age(crashes=50)
    let_expire()
    assert isinstance(claims.take(Attempt(schedule_tasks, "selfheal.schedule", "schedule_tasks")), Claim)


def test_released_from_quarantine_a_row_starts_anew(task):
    taken(task)
    age(**claims.UNHELD, quarantined_at=timezone.now(), crashes=10, deaths=3, attempts=5)
    assert Claim.objects.all().release() == 1
    taken(task)
    claim = Claim.objects.get()
    assert (claim.attempts, claim.crashes, claim.deaths) == (0, 0, 0)


def test_queue_now_ends_a_backing_off_and_no_quarantine(task):
    other = Task.objects.create()
    claims.fail(taken(task), "RuntimeError: no")
    taken(other)
    Claim.objects.filter(object_pk=str(other.pk)).update(
        **claims.UNHELD, quarantined_at=NOON, next_attempt_at=timezone.now() + A_MINUTE
    )
    assert Claim.objects.all().queue_now() == 1
    taken(task)
    assert take(other) == "quarantined"


# --- Settled and failed -----------------------------------------------------------------------------------------------


def test_success_deletes_the_claim_and_writes_a_run(task):
    with clock.fixed(NOON):
        made = taken(task)
    with clock.fixed(NOON + A_MINUTE):
        claims.settle(made, {})
    assert not Claim.objects.exists()
    [run] = Run.objects.all()
    assert (run.job, run.model, run.object_pk, run.outcome) == ("do_task", "cast.task", str(task.pk), "done")
    assert (run.worker, run.host, run.pid) == ("w1", socket.gethostname(), os.getpid())
    assert (run.started_at, run.finished_at) == (NOON, NOON + A_MINUTE)


def test_an_exception_is_counted_and_the_row_backs_off(task, thrice):
    for number, longest in [(1, 10), (2, 15)]:
        with clock.fixed(NOON):
            claims.fail(taken(task, thrice), "RuntimeError: no", "Traceback: no")
        claim = Claim.objects.get()
        assert (claim.attempts, claim.lease_key, claim.token, claim.holder) == (number, None, "", "")
        assert (claim.last_error, claim.quarantined_at) == ("RuntimeError: no", None)
        wait = claim.next_attempt_at - NOON
        assert longest / 2 <= wait.total_seconds() <= longest
        run = Run.objects.latest("pk")
        assert (run.outcome, run.error, run.traceback) == ("failed", "RuntimeError: no", "Traceback: no")
        age(next_attempt_at=None)


def test_the_last_exception_puts_the_row_in_quarantine(task, thrice, caplog):
    for _ in range(3):
        claims.fail(taken(task, thrice), "RuntimeError: no")
        Claim.objects.update(next_attempt_at=None)
    claim = Claim.objects.get()
    assert claim.attempts == 3
    assert claim.quarantined_at is not None
    assert take(task, thrice) == "quarantined"
    assert caplog.text.count("is quarantined until somebody releases it: RuntimeError: no") == 1


def test_a_job_without_an_end_is_never_quarantined_for_exceptions(task):
    taken(task)
    age(**claims.UNHELD, attempts=100_000)
    claims.fail(taken(task), "RuntimeError: no")
    claim = Claim.objects.get()
    assert (claim.attempts, claim.quarantined_at) == (100_001, None)


def test_a_failure_whose_row_needs_nothing_any_more_is_settled(task):
    claims.fail(taken(task), "RuntimeError: no", needed=False)
    assert not Claim.objects.exists()
    assert Run.objects.get().outcome == "failed"


def test_a_row_that_needs_nothing_leaves_no_history(task):
    made = attempt(task)
    claim = claims.take(made)
    claims.drop(made, claim)
    assert not Claim.objects.exists()
    assert not Run.objects.exists()


def test_unless_earlier_attempts_left_some(task):
    claims.fail(taken(task), "RuntimeError: no")
    age(next_attempt_at=None)
    made = attempt(task)
    claim = claims.take(made)
    claims.drop(made, claim)
    assert not Claim.objects.exists()
    run = Run.objects.latest("pk")
    assert (run.outcome, run.error) == ("resolved", "RuntimeError: no")


def test_a_warm_shutdown_counts_nothing(task):
    claims.release(taken(task))
    claim = Claim.objects.get()
    assert (claim.attempts, claim.crashes, claim.deaths, claim.next_attempt_at) == (0, 0, 0, None)
    assert not Run.objects.exists()
    taken(task)


def test_three_deaths_that_the_worker_saw_put_the_row_in_quarantine(task, caplog):
    for number in range(1, 4):
        with clock.fixed(NOON):
            claims.record_death(taken(task), 4711, "Its process was killed by SIGKILL.")
        claim = Claim.objects.get()
        assert (claim.deaths, claim.crashes, claim.attempts, claim.lease_key) == (number, number, 0, None)
        assert claim.next_attempt_at > NOON
        assert (claim.quarantined_at is not None) == (number == 3)
        run = Run.objects.latest("pk")
        assert (run.outcome, run.pid) == ("crashed", 4711)
        assert run.error.startswith("Its process was killed by SIGKILL. Last renewed at 2026-05-01 12:00:00+00:00, by ")
        Claim.objects.update(next_attempt_at=None)
    assert take(task) == "quarantined"
    assert "is quarantined until somebody releases it: Its process was killed by SIGKILL." in caplog.text


def test_seen_and_unseen_deaths_together_are_ten(task):
    taken(task)
    age(**claims.UNHELD, crashes=9)
    claims.record_death(taken(task), 7, "Killed.")
    claim = Claim.objects.get()
    assert (claim.deaths, claim.crashes) == (1, 10)
    assert claim.quarantined_at is not None


def test_a_process_that_had_stopped_renewing_was_ended_by_its_watchdog_which_is_not_the_rows_doing(task):
    for number in range(1, 5):
        made = taken(task)
        age(lease_expires_at=timezone.now() + conf.lease_margin / 2)
        claims.record_death(made, 7, "Killed.")
        claim = Claim.objects.get()
        assert (claim.deaths, claim.crashes, claim.quarantined_at) == (0, number, None)
        assert claim.last_error.startswith("It could not renew its lease in time. Killed. Last renewed at 20")
        Claim.objects.update(next_attempt_at=None)


def test_a_death_after_the_end_is_no_death(task):
    made = taken(task)
    claims.settle(made, {})
    claims.record_death(made, 7, "Killed.")
    assert not Claim.objects.exists()
    assert [run.outcome for run in Run.objects.all()] == ["done"]


# --- Lost -------------------------------------------------------------------------------------------------------------

ENDS: dict[str, Callable[[Attempt], None]] = {
    "settle": lambda made: claims.settle(made, {}),
    "fail": lambda made: claims.fail(made, "RuntimeError: no"),
    "fail, not needed": lambda made: claims.fail(made, "RuntimeError: no", needed=False),
    "drop": lambda made: claims.drop(made, Claim.objects.get()),
}


@pytest.fixture
def robbed(task: Task) -> Attempt:
    """An attempt that was frozen for longer than its lease, and whose row somebody else works on by now."""
    made = taken(task)
    let_expire()
    taken(task)
    return made


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS.keys())
def test_whoever_lost_the_lease_writes_nothing(robbed, end):
    claims_before, runs_before = list(Claim.objects.values()), list(Run.objects.values())
    with pytest.raises(LeaseLost, match=r"The lease on do_task of cast\.task \d+ is lost"):
        end(robbed)
    assert list(Claim.objects.values()) == claims_before
    assert list(Run.objects.values()) == runs_before


def test_whoever_lost_the_lease_can_neither_renew_nor_give_it_back(robbed):
    before = list(Claim.objects.values())
    assert claims.renew(robbed.token) is False
    claims.release(robbed)
    claims.record_death(robbed, 7, "Killed.")
    assert list(Claim.objects.values()) == before


def test_whoever_lost_the_lease_gets_no_lock(robbed, task):
    with claims.current(robbed), pytest.raises(LeaseLost), claims.with_lock(task):
        Task.objects.update(state="done")
    assert Task.objects.get().state == "pending"


def test_once_settled_nothing_can_be_settled_again(task):
    made = taken(task)
    claims.settle(made, {})
    for end in (ENDS["settle"], ENDS["fail"]):
        with pytest.raises(LeaseLost):
            end(made)
    assert Run.objects.count() == 1


def test_that_an_attempt_lost_its_lease_is_written_down(robbed):
    claims.record_loss(robbed, "The lease is lost.")
    run = Run.objects.latest("pk")
    assert (run.outcome, run.error) == ("lost", "The lease is lost.")


def test_the_errors_are_sentences():
    assert str(LeaseLost.on("do_task of cast.task 7")).startswith("The lease on do_task of cast.task 7 is lost: ")
    assert str(NoLongerNeeded.of("do_task of cast.task 7")) == (
        "do_task of cast.task 7 no longer needs this work: its row was deleted or changed meanwhile."
    )


@pytest.mark.parametrize("error", [LeaseLost.on("7"), NoLongerNeeded.of("7"), QueueUnavailable.of("ping", OSError())])
def test_the_errors_come_through_to_another_process_as_they_are(error):
    assert str(pickle.loads(pickle.dumps(error))) == str(copy.copy(error)) == str(error)


# --- The heartbeat ----------------------------------------------------------------------------------------------------


@pytest.fixture
def quick_heartbeat(settings: Any) -> None:
    settings.JOBS = {**settings.JOBS, "HEARTBEAT": timedelta(milliseconds=30)}


class Watched(Heartbeat):
    """A heartbeat that says why and how it would end the process, instead of doing so."""

    def __init__(self, attempt: Attempt) -> None:
        super().__init__(attempt)
        self.reasons: list[str] = []
        self.signals: list[int | None] = []
        self.armed: list[float] = []

    def _arm(self, renewed_at: float) -> None:  # type: ignore[override]
        self.armed.append(renewed_at)

    def _end_process(self, reason: str, how: int | None = None) -> None:  # type: ignore[override]
        self.reasons.append(reason)
        self.signals.append(how)
        self.ended.set()


def eventually(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 40
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_renewing_extends_the_lease_from_now(task):
    with clock.fixed(NOON):
        made = taken(task)
    with clock.fixed(NOON + timedelta(seconds=50)):
        assert claims.renew(made.token) is True
    assert Claim.objects.get().lease_expires_at == NOON + timedelta(seconds=50) + conf.LEASE


@pytest.mark.usefixtures("quick_heartbeat")
def test_while_a_job_runs_its_lease_is_renewed_again_and_again(task):
    with Watched(taken(task)) as heartbeat:
        for _ in range(3):
            before = Claim.objects.get().lease_expires_at
            eventually(lambda before=before: Claim.objects.get().lease_expires_at > before)
    assert not heartbeat.is_alive()
    assert heartbeat.reasons == []
    # And each time the watchdog, which ends a process whose threads cannot.
    assert len(heartbeat.armed) >= 4
    assert heartbeat.armed == sorted(heartbeat.armed)


@pytest.mark.usefixtures("quick_heartbeat")
def test_a_process_whose_token_is_gone_ends_itself(task, robbed):
    # Not so long ago that it would not even begin, however slow this machine is.
    robbed.taken_at = time.monotonic() + 60
    with Watched(robbed) as heartbeat:
        eventually(lambda: heartbeat.reasons)
    assert heartbeat.reasons == [f"do_task of cast.task {task.pk} has lost its lease"]


def test_a_process_that_was_frozen_before_it_began_does_not_begin(robbed):
    robbed.taken_at = time.monotonic() - conf.HEARTBEAT.total_seconds() - 1
    with pytest.raises(LeaseLost), Watched(robbed):
        pytest.fail("the job began")


def test_one_that_was_slow_but_still_has_its_lease_renews_it_and_begins(task):
    made = taken(task)
    Claim.objects.update(lease_expires_at=timezone.now() + timedelta(seconds=1))
    made.taken_at = time.monotonic() - conf.HEARTBEAT.total_seconds() - 1
    with Watched(made) as heartbeat:
        assert Claim.objects.get().lease_expires_at > timezone.now() + conf.LEASE / 2
    assert heartbeat.armed[0] > time.monotonic() - conf.HEARTBEAT.total_seconds()


@pytest.mark.usefixtures("quick_heartbeat")
def test_a_process_whose_job_runs_away_is_killed(task, monkeypatch):
    monkeypatch.setattr(claims, "RUNAWAY_AFTER", timedelta(seconds=-do_task.timeout_seconds))
    with Watched(taken(task)) as heartbeat:
        eventually(lambda: heartbeat.reasons)
    assert "past its time limit" in heartbeat.reasons[0]
    assert heartbeat.signals == [signal.SIGKILL]


@pytest.mark.usefixtures("quick_heartbeat")
def test_a_process_that_could_not_renew_in_time_ends_itself(task, settings, monkeypatch):
    tried: list[str] = []

    def renew(token: str) -> bool:
        tried.append(token)
        raise OperationalError("the database is away")

    with Watched(taken(task)) as heartbeat:
        monkeypatch.setattr(claims, "renew", renew)
        eventually(lambda: tried)
        # Short only now: before, a renewal on a slow machine might have taken that long.
        settings.JOBS = {**settings.JOBS, "LEASE": timedelta(milliseconds=600)}
        eventually(lambda: heartbeat.reasons)
        ended_at = time.monotonic()
    assert heartbeat.reasons == [f"do_task of cast.task {task.pk} could not renew its lease in time"]
    # It went on trying until a sixth of the lease was left, as 10 of 60 seconds are.
    assert ended_at - heartbeat.armed[-1] >= 0.5


@pytest.mark.usefixtures("quick_heartbeat")
def test_a_database_that_is_away_for_a_moment_is_survived(task, monkeypatch):
    renew, failures = claims.renew, [OperationalError("away"), OperationalError("away")]

    def renew_at_last(token: str) -> bool:
        if failures:
            raise failures.pop()
        return renew(token)

    made = taken(task)
    # Not so long ago that it would have to be renewed before the job begins, however slow this machine is.
    made.taken_at = time.monotonic() + 60
    monkeypatch.setattr(claims, "renew", renew_at_last)
    before = Claim.objects.get().lease_expires_at
    with Watched(made) as heartbeat:
        eventually(lambda: Claim.objects.get().lease_expires_at > before)
    assert failures == []
    assert heartbeat.reasons == []


def test_ten_seconds_of_the_default_lease_are_kept_in_reserve(settings):
    del settings.JOBS
    assert conf.LEASE - conf.lease_margin == timedelta(seconds=50)
    assert timedelta(seconds=30) == claims.RUNAWAY_AFTER


# --- The table --------------------------------------------------------------------------------------------------------


def test_the_database_itself_keeps_leases_apart():
    constraints = {constraint.fields for constraint in Claim._meta.constraints}
    assert constraints == {("job", "model", "object_pk"), ("lease_key",)}
    assert Claim._meta.get_field("lease_key").null


def test_it_has_no_index_too_many():
    """Every attempt writes this table twice. On a unique text PostgreSQL would have a second index, for LIKE."""
    with connection.cursor() as cursor:
        found = connection.introspection.get_constraints(cursor, Claim._meta.db_table).values()
    indexes = [each for each in found if (each["index"] or each["unique"]) and not each["primary_key"]]
    assert sorted((*each["columns"], each["unique"]) for each in indexes) == [
        ("job", "model", "object_pk", True),
        ("job", "next_attempt_at", False),
        ("lease_key", True),
        ("model", "object_pk", False),
        ("token", False),
    ]
