"""One message performed: all the ways in which it can end, and what is written down. With the helpers for projects."""

import logging
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any, get_args

import pytest
from django.db import IntegrityError, OperationalError, connection
from django.db.models import Value
from django.test import TestCase
from django.utils import timezone

from jobs import Backoff, LeaseLost, NoLongerNeeded, claims, job, registry, sweep, with_lock
from jobs import perform as performing
from jobs.claims import Attempt
from jobs.job import Job
from jobs.models import Claim, Run, Schedule
from jobs.perform import Outcome
from jobs.testing import drain, perform, tick
from tests.cast.jobs import delete_task, do_task, nightly, schedule_tasks, touch_file
from tests.cast.models import Task, Ticket

# Not in transactions of their own: `perform` works inside a TestCase.
pytestmark = pytest.mark.django_db

A_MINUTE = timedelta(minutes=1)


@pytest.fixture
def doing(declaring: None) -> Callable[..., Job]:
    """Make a job of a function, fed by the tasks that are pending."""

    def doing(function: Callable[[Any], Any], rows: Callable[[], Any] = Task.objects.pending, **options: Any) -> Job:
        made = job(name="work", **options)(function)
        sweep(made, cron="0 0 1 1 *", name="schedule_work")(rows)
        return made

    return doing


def finish(task: Task) -> None:
    with with_lock(task):
        task.state = "done"
        task.save(update_fields=["state"])


def fail(task: Task) -> None:
    raise RuntimeError("No space left")


def state(task: Task) -> str:
    return Task.objects.get(pk=task.pk).state


# --- The outcomes -----------------------------------------------------------------------------------------------------


def test_there_are_seven():
    assert set(get_args(Outcome)) == {"done", "failed", "not_needed", "busy", "waiting", "quarantined", "disabled"}


def test_done(task):
    assert perform(do_task, task) == "done"
    assert state(task) == "done"
    assert not Claim.objects.exists()
    [run] = Run.objects.all()
    assert (run.job, run.model, run.object_pk, run.outcome, run.error) == (
        "do_task",
        "cast.task",
        str(task.pk),
        "done",
        "",
    )
    assert run.started_at <= run.finished_at


def test_by_its_key_too(task):
    assert perform(do_task, task.pk) == "done"
    assert perform(do_task, str(task.pk)) == "not_needed"


def test_failed(task, doing):
    assert perform(doing(fail), task) == "failed"
    claim = Claim.objects.get()
    assert (claim.attempts, claim.lease_key, claim.last_error) == (1, None, "RuntimeError: No space left")
    assert claim.next_attempt_at > timezone.now()
    [run] = Run.objects.all()
    assert (run.outcome, run.error) == ("failed", "RuntimeError: No space left")
    assert "Traceback (most recent call last)" in run.traceback
    assert 'raise RuntimeError("No space left")' in run.traceback


@pytest.mark.parametrize("why", ["changed", "deleted", "never there", "no key of the model"])
def test_not_needed(task, doing, why):
    called: list[Task] = []
    pk: Any = task.pk
    if why == "changed":
        Task.objects.update(state="done")
    elif why == "deleted":
        task.delete()
    elif why == "never there":
        pk = 10**9
    work = doing(called.append)
    if why == "no key of the model":
        assert performing.perform(Attempt(work, "cast.task", "a/b")) == "not_needed"
    else:
        assert perform(work, pk) == "not_needed"
    assert called == []
    assert not Claim.objects.exists()
    assert not Run.objects.exists()


def test_busy(task, doing):
    work = doing(lambda row: outcomes.append(perform(delete_task, row)))
    outcomes: list[str] = []
    Task.objects.update(state="pending")
    assert perform(work, task) == "done"
    assert outcomes == ["busy"]


def test_waiting_and_its_end(task, doing):
    work = doing(fail)
    perform(work, task)
    assert perform(work, task) == "waiting"
    Claim.objects.update(next_attempt_at=timezone.now())
    assert perform(work, task) == "failed"
    assert Claim.objects.get().attempts == 2


def test_quarantined(task, doing):
    work = doing(fail, max_attempts=1)
    assert perform(work, task) == "failed"
    assert perform(work, task) == "quarantined"
    assert Run.objects.count() == 1


def test_disabled(task, switch):
    switch("do_task")
    assert perform(do_task, task) == "disabled"
    assert state(task) == "pending"
    assert not Claim.objects.exists()
    switch("do_task", on=False)
    assert perform(do_task, task) == "done"


# --- What a job is given ----------------------------------------------------------------------------------------------


def test_a_job_gets_the_row_freshly_read_and_claimed(task, doing):
    seen: list[Any] = []

    def work(row: Task) -> None:
        seen.append((row.name, row is task, Claim.objects.get().lease_key))

    Task.objects.update(name="changed since it was queued")
    perform(doing(work), task)
    assert seen == [("changed since it was queued", False, f"cast.task:{task.pk}")]


def test_it_is_called_outside_of_any_transaction(task, doing, transactional_db):
    seen: list[bool] = []
    perform(doing(lambda row: seen.append(connection.in_atomic_block)), task)
    assert seen == [False]


def test_what_it_returns_is_discarded(task, doing):
    assert perform(doing(lambda row: {"last_outcome": "mine"}), task) == "done"


def test_the_row_is_read_through_the_sweeps_queryset(task, doing):
    seen: list[bool] = []

    def work(row: Task) -> None:
        seen.append(row.is_urgent)

    perform(doing(work, rows=lambda: Task.objects.pending().annotate(is_urgent=Value(True))), task)
    assert seen == [True]


# --- Success, again and again -----------------------------------------------------------------------------------------


def test_a_success_that_leaves_its_row_pending_is_no_failure_and_comes_again(db, queued):
    task = Task.objects.create(behaviour="leave_pending")
    for number in range(1, 4):
        assert perform(do_task, task) == "done"
        assert not Claim.objects.exists()
        assert Run.objects.filter(outcome="done").count() == number
    assert schedule_tasks.sweep().enqueued == 1
    assert queued() == [f"do_task-{task.pk}"]


# --- Failure ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leave", [sys.exit, lambda: sys.exit("no"), lambda: sys.exit(0)])
def test_a_job_that_leaves_the_process_has_failed(task, doing, leave):
    assert perform(doing(lambda row: leave()), task) == "failed"
    assert Claim.objects.get().last_error.startswith("SystemExit")


def test_a_failure_whose_row_needs_nothing_any_more_is_settled(task, doing):
    def work(row: Task) -> None:
        Task.objects.update(state="done")
        raise RuntimeError("too late")

    assert perform(doing(work), task) == "failed"
    assert not Claim.objects.exists()
    assert Run.objects.get().error == "RuntimeError: too late"


def test_a_failure_whose_row_is_deleted_is_settled(task, doing):
    def work(row: Task) -> None:
        Task.objects.all().delete()
        raise RuntimeError("too late")

    assert perform(doing(work), task) == "failed"
    assert not Claim.objects.exists()


def test_a_sweep_that_raises_is_its_jobs_failure(task, doing):
    broken: list[bool] = []

    def rows() -> Any:
        if broken:
            raise ZeroDivisionError("the query is broken")
        return Task.objects.pending()

    work = doing(finish, rows)
    work.identify(task)
    broken.append(True)
    assert perform(work, task) == "failed"
    assert Claim.objects.get().last_error == "ZeroDivisionError: the query is broken"
    assert state(task) == "pending"


def test_a_sweep_that_breaks_while_its_job_fails_does_not_hide_the_failure(task, doing):
    broken: list[bool] = []

    def rows() -> Any:
        if broken:
            raise ZeroDivisionError("the query is broken")
        return Task.objects.pending()

    def work(row: Task) -> None:
        broken.append(True)
        raise RuntimeError("No space left")

    assert perform(doing(work, rows), task) == "failed"
    claim = Claim.objects.get()
    assert (claim.attempts, claim.last_error) == (1, "RuntimeError: No space left")


def test_a_failure_without_words_and_one_with_many(task, doing, caplog):
    # Captured, half a surrogate pair would end the test process itself.
    caplog.set_level(logging.CRITICAL, logger="selfheal")

    class UnspeakableError(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    errors = [
        (ValueError(), "ValueError: "),
        (ValueError("ü\n\x00\ud800"), "ValueError: ü\n\\x00\\ud800"),
        (ValueError("x" * 1_000_000), "ValueError: " + "x" * 9_988),
        (UnspeakableError(), "UnspeakableError: (it cannot be written as text)"),
        (GeneratorExit(), "GeneratorExit: "),
    ]

    raising: list[BaseException] = []

    def work(row: Task) -> None:
        raise raising.pop()

    made = doing(work)
    for error, written in errors:
        raising.append(error)
        assert perform(made, task) == "failed"
        run = Run.objects.latest("pk")
        assert run.error == Claim.objects.get().last_error == written
        assert len(run.traceback) <= 100_000
        Claim.objects.update(next_attempt_at=None)


PASSWORD = "sesame"


def write_secrets(task: Task) -> None:
    raise ConnectionError(f"postgres://app:{PASSWORD}@db:5432/app and https://token:{PASSWORD}@api are away")


def no_sesame(text: str) -> str:
    return text.replace("sesame", "(hidden)")


def fail_to_redact(text: str) -> str:
    raise KeyError("sesame")


@pytest.mark.parametrize(
    ("redact", "error"),
    [
        (None, "ConnectionError: postgres://app:***@db:5432/app and https://token:***@api are away"),
        (no_sesame, "ConnectionError: postgres://app:(hidden)@db:5432/app and https://token:(hidden)@api are away"),
        (f"{__name__}.no_sesame", "ConnectionError: postgres://app:(hidden)@db:5432/app and https://token:(hid"),
        (fail_to_redact, "ConnectionError: (REDACT raised KeyError)"),
    ],
    ids=["by itself", "function", "path", "fails"],
)
def test_no_secret_is_stored_or_logged(task, doing, settings, caplog, redact, error):
    settings.JOBS = settings.JOBS | ({"REDACT": redact} if redact else {})
    assert perform(doing(write_secrets), task) == "failed"
    run, claim = Run.objects.get(), Claim.objects.get()
    assert run.error.startswith(error)
    assert claim.last_error == run.error
    kept = [run.error, run.traceback, claim.last_error, caplog.text]
    assert not any("sesame" in text for text in kept)
    assert "work of cast.task" in caplog.text


def test_what_needs_no_redaction_is_logged_with_its_exception(task, doing, caplog):
    assert perform(doing(fail), task) == "failed"
    [record] = [record for record in caplog.records if record.exc_info]
    assert str(record.exc_info[1]) == "No space left"


@pytest.mark.parametrize("times", [1, 3])
def test_max_attempts_is_how_many_exceptions_there_may_be(task, doing, times):
    work = doing(fail, max_attempts=times, backoff=Backoff(first=timedelta(milliseconds=1), cap=A_MINUTE))
    for number in range(1, times + 1):
        assert Claim.objects.filter(quarantined_at__isnull=False).count() == 0
        assert perform(work, task) == "failed"
        assert Claim.objects.get().attempts == number
        Claim.objects.update(next_attempt_at=None)
    assert perform(work, task) == "quarantined"
    assert work.sweep.sweep().waiting == 1


def test_released_from_quarantine_it_succeeds(task, doing):
    can_fail = [True]

    def work(row: Task) -> None:
        if can_fail:
            raise RuntimeError
        finish(row)

    made = doing(work, max_attempts=1)
    perform(made, task)
    can_fail.clear()
    assert perform(made, task) == "quarantined"
    Claim.objects.all().release()
    assert perform(made, task) == "done"
    assert not Claim.objects.exists()


def test_the_backoff_is_the_jobs(task, doing):
    work = doing(fail, backoff=Backoff(first=timedelta(hours=2), cap=timedelta(hours=3)))
    perform(work, task)
    wait = Claim.objects.get().next_attempt_at - timezone.now()
    assert timedelta(minutes=59) < wait <= timedelta(hours=2)


def test_the_number_of_attempts_is_kept_over_many_days(task, doing):
    """What grows without end must not overflow."""
    work = doing(fail)
    perform(work, task)
    Claim.objects.update(attempts=5_000, next_attempt_at=None)
    assert perform(work, task) == "failed"
    assert Claim.objects.get().next_attempt_at <= timezone.now() + timedelta(hours=1)


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (NoLongerNeeded, "not_needed"),
        (NoLongerNeeded("not today"), "not_needed"),
        (LeaseLost, "busy"),
        (LeaseLost("to another system"), "busy"),
    ],
    ids=repr,
)
def test_a_job_may_say_itself_how_it_ended(task, doing, error, outcome):
    def work(row: Task) -> None:
        raise error

    assert perform(doing(work), task) == outcome
    lost = [run.error for run in Run.objects.all()]
    assert lost == ([] if outcome == "not_needed" else [str(error) if error is not LeaseLost else lost[0]])
    assert all(lost)


def test_a_lease_lost_on_the_way_ends_quietly_and_is_written_down(task, doing):
    def work(row: Task) -> None:
        Claim.objects.update(token="f" * 32)

    assert perform(doing(work), task) == "busy"
    assert Claim.objects.get().token == "f" * 32
    [run] = Run.objects.all()
    assert run.outcome == "lost"
    assert "is lost" in run.error


def test_a_lease_lost_by_a_job_that_fails_too(task, doing):
    def work(row: Task) -> None:
        Claim.objects.update(token="f" * 32)
        raise RuntimeError

    assert perform(doing(work), task) == "busy"
    claim = Claim.objects.get()
    assert (claim.token, claim.attempts, claim.next_attempt_at) == ("f" * 32, 0, None)


def test_a_success_whose_row_still_needs_the_work_says_so(task, doing):
    assert perform(doing(lambda task: None), task) == "done"
    run = Run.objects.get()
    assert (run.outcome, run.error) == ("done", "It succeeded, and its row still needs this work.")


def test_and_is_one_also_if_nobody_can_say_whether_it_does(task, doing):
    rows = Task.objects.pending

    def once_more() -> Any:
        if Task.objects.filter(name="worked on").exists():
            raise RuntimeError("the rows cannot be told")
        return rows()

    assert perform(doing(lambda task: Task.objects.update(name="worked on"), once_more), task) == "done"
    assert (Run.objects.get().outcome, Run.objects.get().error) == ("done", "")


def test_a_database_that_is_away_when_the_end_is_written_down_is_asked_again(
    task, doing, monkeypatch, transactional_db
):
    settle, failures = claims.settle, [OperationalError("away"), OperationalError("still away")]

    def settle_at_last(*arguments: Any) -> None:
        if failures:
            raise failures.pop()
        settle(*arguments)

    monkeypatch.setattr(claims, "settle", settle_at_last)
    monkeypatch.setattr("jobs.perform.time.sleep", lambda seconds: None)
    assert perform(doing(finish), task) == "done"
    assert not Claim.objects.exists()


@pytest.mark.parametrize("error", [RuntimeError("No space left"), NoLongerNeeded("gone")])
def test_a_job_that_ends_in_the_middle_of_a_query_is_written_down_at_once(doing, race, transactional_db, caplog, error):
    """SQLite does not let a session write that is still reading what is older than somebody else's write."""
    first, *others = (Task.objects.create() for _ in range(5))

    def work(row: Task) -> None:
        tasks = Task.objects.iterator(chunk_size=1)
        for _ in tasks:
            race(lambda: Task.objects.filter(pk=others[0].pk).update(writes=7))
            raise error

    perform(doing(work), first)
    assert "could not be written down" not in caplog.text
    assert not Claim.objects.filter(lease_key__isnull=False).exists()


# --- In somebody's TestCase -------------------------------------------------------------------------------------------


class InATestCase(TestCase):
    """As a project would write its tests."""

    def test_every_outcome(self):
        task = Task.objects.create()
        assert perform(do_task, task) == "done"
        assert perform(do_task, task) == "not_needed"
        broken = Task.objects.create(behaviour="always_raise")
        assert perform(do_task, broken) == "failed"
        assert perform(do_task, broken) == "waiting"
        Claim.objects.update(next_attempt_at=None, quarantined_at=timezone.now())
        assert perform(do_task, broken) == "quarantined"
        assert Task.objects.get(pk=task.pk).writes == 1

    def test_what_a_job_enqueues_can_be_captured(self):
        task = Task.objects.create()
        with self.captureOnCommitCallbacks(execute=True) as callbacks:
            do_task.enqueue(task)
        assert len(callbacks) == 1
        assert drain() == {"done": 1}

    def test_an_error_of_the_database_in_a_job(self):
        """Outside a test the statement would have failed alone. Here it is part of the test's transaction."""

        ticket = Ticket.objects.create()

        with registry.sandbox():

            @job(name="work")
            def work(task):
                Task.objects.update(name="written before the error")
                Ticket.objects.create(pk=ticket.pk)

            sweep(work, cron="0 0 1 1 *", name="schedule_work")(Task.objects.pending)
            assert perform(work, Task.objects.create()) == "failed"
            assert "IntegrityError" in Claim.objects.get().last_error
            assert Ticket.objects.count() == 1
            # What the job wrote is taken back with the statement that failed; what the test wrote is not.
            assert Task.objects.get().name == ""


def test_a_plain_job_is_not_performed_but_called_or_drained(task):
    with pytest.raises(TypeError, match=r"No sweep feeds touch_file: call it, or drain\(\) the queue\."):
        perform(touch_file, task)
    with pytest.raises(TypeError, match="No sweep feeds nightly"):
        perform(nightly, task)


def test_a_row_of_another_model_cannot_be_performed(db):
    with pytest.raises(TypeError, match="do_task works on"):
        perform(do_task, Ticket.objects.create())
    with pytest.raises(ValueError, match="is not saved yet"):
        perform(do_task, Task())


# --- drain and tick ---------------------------------------------------------------------------------------------------


@pytest.mark.django_db(transaction=True)
def test_drain_performs_everything_and_what_that_adds(declaring, tmp_path):
    tasks = [Task.objects.create() for _ in range(3)]
    Task.objects.create(behaviour="always_raise")
    touch_file.enqueue(str(tmp_path / "file"))
    Schedule.objects.filter(name="schedule_tasks").owe()
    assert tick() == ["schedule_tasks"]
    # The sweep adds the rows, and the queues before its own are looked at again.
    assert drain() == {"done": 1 + 1 + len(tasks), "failed": 1}
    assert {state(task) for task in tasks} == {"done"}
    assert drain() == {}


@pytest.mark.django_db(transaction=True)
def test_drain_counts_each_outcome(task, switch):
    others = [Task.objects.create(state="done"), Task.objects.create()]
    do_task.enqueue_many([task, *others])
    claims.take(Attempt(do_task, "cast.task", str(others[1].pk)))
    delete_task.enqueue(task)
    switch("delete_task")
    assert drain() == {"done": 1, "not_needed": 1, "busy": 1, "disabled": 1}


def test_an_integrity_error_is_a_failure_outside_a_test_case_too(task, doing, transactional_db):
    ticket = Ticket.objects.create()

    def work(row: Task) -> None:
        Ticket.objects.create(pk=ticket.pk)

    assert perform(doing(work), task) == "failed"
    assert Claim.objects.get().last_error.startswith(IntegrityError.__name__)
