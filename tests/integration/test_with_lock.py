"""The short transaction at the end of a job: the row locked, freshly read, still matching, and still ours."""

import contextvars
import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import pytest
from django.db import OperationalError, connection, connections, transaction
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from jobs import LeaseLost, NoLongerNeeded, claims, job, sweep, with_lock
from jobs.claims import Attempt
from jobs.conf import conf
from jobs.job import Job
from jobs.models import Claim, Run
from jobs.testing import drain, perform
from tests import database
from tests.cast.models import Task, Ticket
from tests.integration.test_enqueue import ReadsFromReplica
from tests.machine import within

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def doing(declaring: None) -> Callable[[Callable[[Task], Any]], Job]:
    """Make a job of a function, fed by the tasks that are pending."""

    def doing(function: Callable[[Task], Any]) -> Job:
        made = job(name="work")(function)
        sweep(made, cron="0 0 1 1 *", name="schedule_work")(Task.objects.pending)
        return made

    return doing


def of(task: Task) -> Any:
    return Task.objects.filter(pk=task.pk)


def steal(task: Task) -> None:
    """Work on the row as somebody else, after its lease has run out."""
    Claim.objects.update(lease_expires_at=timezone.now() - timedelta(minutes=1))
    claim = claims.take(Attempt(Job(lambda: None, name="thief"), "cast.task", str(task.pk), worker="thief"))
    assert isinstance(claim, Claim)


# --- Inside a job -----------------------------------------------------------------------------------------------------


def test_the_row_is_read_again_into_the_instance_that_was_passed(task, doing):
    seen = []

    def work(row: Task) -> None:
        of(task).update(name="changed meanwhile")
        with with_lock(row) as locked:
            seen.append((locked is row, row.name))
            row.state = "done"
            row.save(update_fields=["state"])

    assert perform(doing(work), task) == "done"
    assert seen == [(True, "changed meanwhile")]
    assert of(task).get().state == "done"


def test_what_the_job_had_set_on_the_instance_is_read_over(task, doing):
    def work(row: Task) -> None:
        row.name = "from before the lock"
        with with_lock(row):
            row.save()

    perform(doing(work), task)
    assert of(task).get().name == ""


@pytest.mark.parametrize("change", ["changed", "deleted"])
def test_a_users_change_during_the_job_wins(task, doing, change):
    def work(row: Task) -> None:
        if change == "changed":
            of(task).update(state="deleting")
        else:
            of(task).delete()
        with with_lock(row):
            pytest.fail("the block was entered")

    assert perform(doing(work), task) == "not_needed"
    assert [each.state for each in of(task)] == (["deleting"] if change == "changed" else [])
    # The worker ends quietly: nothing unsettled, nothing that failed.
    assert not Claim.objects.exists()
    assert not Run.objects.exists()


def test_what_the_block_raises_rolls_back(task, doing):
    def work(row: Task) -> None:
        with with_lock(row):
            row.state = "done"
            row.save()
            raise RuntimeError("on second thoughts")

    assert perform(doing(work), task) == "failed"
    assert of(task).get().state == "pending"
    assert "on second thoughts" in Claim.objects.get().last_error


def test_a_lost_lease_is_noticed_before_anything_is_committed(task, doing):
    def work(row: Task) -> None:
        steal(task)
        with with_lock(row):
            row.state = "done"
            row.save()

    assert perform(doing(work), task) == "busy"
    assert of(task).get().state == "pending"
    assert Claim.objects.get(job="thief").lease_key is not None
    assert [run.outcome for run in Run.objects.order_by("pk")] == ["crashed", "lost"]


def test_the_lease_is_renewed_with_the_lock(task, doing):
    seen = []

    def work(row: Task) -> None:
        almost_over = timezone.now() + timedelta(seconds=1)
        Claim.objects.update(lease_expires_at=almost_over)
        with with_lock(row):
            pass
        seen.append(Claim.objects.get().lease_expires_at - almost_over)

    perform(doing(work), task)
    assert seen[0] > conf.LEASE / 2


def test_nobody_takes_the_row_while_it_is_locked(task, doing):
    """Even though the lease is over: the claim itself is locked until the block ends."""
    results: list[Any] = []

    def work(row: Task) -> None:
        with with_lock(row):
            Claim.objects.update(lease_expires_at=timezone.now() - timedelta(minutes=1))

            def thief() -> None:
                try:
                    results.append(claims.take(Attempt(Job(lambda: None, name="thief"), "cast.task", str(task.pk))))
                finally:
                    connections.close_all()

            results.append(threading.Thread(target=thief))
            results[0].start()
            results[0].join(0.2)
            assert len(results) == 1
            row.state = "done"
            row.save()
            claims.renew(Claim.objects.get().token)
        results[0].join(20)

    assert perform(doing(work), task) == "done"
    assert results[1] == "busy"
    assert of(task).get().state == "done"


def test_a_users_change_waits_for_the_lock_and_is_not_overwritten(task, doing):
    """Whichever comes first, the user's state is what remains."""
    users: list[threading.Thread] = []

    def user() -> None:
        try:
            of(task).update(state="deleting")
        finally:
            connections.close_all()

    def work(row: Task) -> None:
        with with_lock(row):
            users.append(threading.Thread(target=user))
            users[0].start()
            row.state = "done"
            row.save(update_fields=["state"])
        users[0].join(20)

    assert perform(doing(work), task) == "done"
    assert of(task).get().state == "deleting"


def test_another_row_is_locked_and_read_and_need_not_match(task, doing):
    other = Task.objects.create(state="done")
    ticket = Ticket.objects.create()

    def work(row: Task) -> None:
        of(other).update(name="changed meanwhile")
        with with_lock(other):
            other.writes += 1
            other.save()
        with with_lock(ticket):
            ticket.state = "done"
            ticket.save()

    assert perform(doing(work), task) == "done"
    assert (of(other).get().name, of(other).get().writes) == ("changed meanwhile", 1)
    assert Ticket.objects.get().state == "done"


def test_another_row_is_only_locked_while_the_claim_is_ours(task, doing):
    other = Task.objects.create(state="done")

    def work(row: Task) -> None:
        steal(task)
        with with_lock(other):
            other.writes += 1
            other.save()

    assert perform(doing(work), task) == "busy"
    assert of(other).get().writes == 0


def test_nested_it_is_a_savepoint(task, doing):
    other = Task.objects.create(state="done")

    def work(row: Task) -> None:
        with with_lock(row):
            row.name = "outer"
            row.save()
            try:
                with with_lock(other):
                    other.name = "inner"
                    other.save()
                    raise RuntimeError
            except RuntimeError:
                pass
            with with_lock(row):
                assert row.name == "outer"
                row.state = "done"
                row.save()

    assert perform(doing(work), task) == "done"
    assert (of(task).get().name, of(task).get().state) == ("outer", "done")
    assert of(other).get().name == ""


def test_nested_a_row_that_the_job_has_just_finished_is_still_its_own(task, doing):
    def work(row: Task) -> None:
        with with_lock(row):
            row.state = "done"
            row.save()
            with with_lock(row):
                row.name = "by a helper"
                row.save()
            with with_lock(of(task).get()) as same:
                assert (same.state, same.name) == ("done", "by a helper")

    assert perform(doing(work), task) == "done"
    assert (of(task).get().state, of(task).get().name) == ("done", "by a helper")


def test_after_the_jobs_own_first_write_the_row_need_not_match_any_more(task, doing):
    """The job has finished it, and has something more to write: also in a thread of its own."""

    def add(row: Task) -> None:
        try:
            with with_lock(row):
                row.writes += 1
                row.save()
        finally:
            connections.close_all()

    def work(row: Task) -> None:
        with with_lock(row):
            row.state = "done"
            row.save()
        thread = threading.Thread(target=contextvars.copy_context().run, args=[add, of(task).get()])
        thread.start()
        thread.join(30)
        with with_lock(row):
            row.writes += 1
            row.save()

    assert perform(doing(work), task) == "done"
    assert (of(task).get().state, of(task).get().writes) == ("done", 2)


def test_what_was_taken_back_was_no_first_write(task, doing):
    def work(row: Task) -> None:
        with suppress(RuntimeError), with_lock(row):
            raise RuntimeError
        of(task).update(state="deleting")
        with with_lock(row):
            pytest.fail("the block was entered")

    assert perform(doing(work), task) == "not_needed"


@pytest.mark.parametrize("how", ["in a savepoint", "by the commit"])
def test_what_was_rolled_back_was_no_first_write(task, doing, how, monkeypatch):
    """It is rolled back after the block, which itself has gone well."""
    other = Task.objects.create()

    def work(row: Task) -> None:
        with suppress(RuntimeError), with_lock(other):
            with suppress(RuntimeError), with_lock(other):
                with with_lock(row):
                    row.state = "done"
                    row.save()
                if how == "in a savepoint":
                    raise RuntimeError
            if how == "by the commit":
                # As for a foreign key that is looked at then.
                raise RuntimeError
        of(task).update(state="deleting")
        with with_lock(row):
            pytest.fail("the block was entered")

    assert perform(doing(work), task) == "not_needed"
    assert of(task).get().state == "deleting"


def test_a_row_that_is_gone_is_gone_after_the_first_write_too(task, doing):
    def work(row: Task) -> None:
        with with_lock(row):
            row.state = "done"
            row.save()
        of(task).delete()
        with with_lock(row):
            pytest.fail("the block was entered")

    assert perform(doing(work), task) == "not_needed"


@pytest.mark.parametrize("row", [None, 5, "7", Task])
def test_what_is_no_row_is_refused(row):
    with pytest.raises(TypeError, match="with_lock takes a row, not "), with_lock(row):
        pytest.fail("the block was entered")


def begin() -> None:
    with connection.cursor() as cursor:
        cursor.execute("BEGIN")


@pytest.mark.parametrize("how", ["atomic", "BEGIN", "no autocommit"])
def test_in_a_transaction_of_the_jobs_own_it_says_that_it_must_not_be(task, doing, how):
    def work(row: Task) -> None:
        if how == "atomic":
            with transaction.atomic(), with_lock(row):
                pytest.fail("the block was entered")
        if how == "BEGIN":
            begin()
        else:
            transaction.set_autocommit(False)
        try:
            with with_lock(row):
                pytest.fail("the block was entered")
        finally:
            connection.close()

    assert perform(doing(work), task) == "failed"
    assert of(task).get().state == "pending"
    assert "opens with_lock inside a transaction of its own" in Run.objects.get().error


def test_several_locks_one_after_the_other(task, doing):
    def work(row: Task) -> None:
        for _ in range(3):
            with with_lock(row):
                row.writes += 1
                row.save(update_fields=["writes"])

    assert perform(doing(work), task) == "done"
    assert of(task).get().writes == 3


def test_another_instance_of_the_jobs_row_is_the_jobs_row(task, doing):
    def work(row: Task) -> None:
        of(task).update(state="deleting")
        with with_lock(of(task).get()):
            pytest.fail("the block was entered")

    assert perform(doing(work), task) == "not_needed"


def test_the_row_is_locked_first_and_the_claim_last(task, doing):
    statements: list[str] = []

    def work(row: Task) -> None:
        with CaptureQueriesContext(connection) as captured, with_lock(row):
            row.save()
        statements.extend(each["sql"] for each in captured)

    perform(doing(work), task)
    touched = [
        table
        for sql in statements
        for table in ("selfheal_claim", "cast_task")
        if f'"{table}"' in sql.split("WHERE")[0]
    ]
    assert touched[-1] == "selfheal_claim"
    assert set(touched[:-1]) == {"cast_task"}


@pytest.mark.postgres
def test_while_it_waits_for_a_row_the_claim_is_free(task, doing):
    """So that its heartbeat, and whoever takes over from a process that died here, wait for nobody."""

    def work(row: Task) -> None:
        with database.locking(of(task)):
            with connection.cursor() as cursor:
                cursor.execute("SET lock_timeout = '200ms'")
            with suppress(OperationalError), with_lock(row):
                pytest.fail("the block was entered")
            with within(0.1):
                assert claims.renew(Claim.objects.get().token)
            with connection.cursor() as cursor:
                cursor.execute("RESET lock_timeout")

    assert perform(doing(work), task) == "done"


# --- Outside of one ---------------------------------------------------------------------------------------------------


def test_outside_a_job_it_is_a_row_lock(task):
    of(task).update(name="changed meanwhile", state="done")
    with with_lock(task) as locked:
        assert locked is task
        assert connection.in_atomic_block
        assert task.name == "changed meanwhile"
        task.writes = 1
        task.save()
    assert not connection.in_atomic_block
    assert of(task).get().writes == 1
    assert not Claim.objects.exists()


def test_a_row_that_was_read_from_a_replica_is_locked_on_the_primary(task, settings):
    settings.DATABASE_ROUTERS = [ReadsFromReplica()]
    Task.objects.using("default").update(name="changed meanwhile")
    task._state.db = "replica"
    with with_lock(task):
        assert connection.in_atomic_block
        assert task.name == "changed meanwhile"


def test_outside_a_job_a_row_that_is_gone_is_djangos_affair(task):
    of(task).delete()
    with pytest.raises(Task.DoesNotExist), with_lock(task):
        pytest.fail("the block was entered")


def test_a_bare_call_needs_no_claim(task, doing):
    def work(row: Task) -> None:
        with with_lock(row):
            row.state = "done"
            row.save()

    doing(work)(task)
    assert of(task).get().state == "done"
    assert not Run.objects.exists()


def test_outside_a_job_two_who_add_up_lose_nothing(task, race):
    def add() -> None:
        mine = of(task).get()
        for _ in range(5):
            with with_lock(mine):
                mine.writes += 1
                mine.save()

    race(*[add] * 4)
    assert of(task).get().writes == 20


def test_after_a_job_there_is_no_attempt_left(task, doing):
    def work(row: Task) -> None:
        with with_lock(row):
            row.state = "done"
            row.save()

    perform(doing(work), task)
    # The claim is gone. Would the attempt linger, this were a lease that was lost.
    with with_lock(task):
        pass


def test_inside_a_plain_job_it_is_a_row_lock(declaring, task):
    @job
    def plain(pk):
        row = Task.objects.get(pk=pk)
        with with_lock(row):
            row.state = "done"
            row.save()

    plain.enqueue(task.pk)
    assert drain() == {"done": 1}
    assert of(task).get().state == "done"


def test_both_errors_may_be_caught_by_name(task, doing):
    """Let them pass; but who must clean up can."""
    seen: list[type[Exception]] = []

    def work(row: Task) -> None:
        of(task).update(state="deleting")
        try:
            with with_lock(row):
                pass
        except (NoLongerNeeded, LeaseLost) as error:
            seen.append(type(error))
            raise

    perform(doing(work), task)
    assert seen == [NoLongerNeeded]
