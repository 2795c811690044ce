"""Rows in another database than the claims on them: one fence around both."""

import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from typing import Any

import pytest
from django.db import Error as DatabaseError
from django.db import connection, connections, transaction
from django.test import override_settings
from django.utils import timezone

from jobs import claims, job, sweep, with_lock
from jobs.claims import Attempt
from jobs.job import Job
from jobs.models import Claim, Run
from jobs.testing import drain, perform
from tests.cast.jobs import do_task, schedule_tasks
from tests.cast.models import Task

pytestmark = pytest.mark.django_db(transaction=True, databases="__all__")


class TasksAreInTheSecond:
    def db_for_read(self, model: Any, **hints: Any) -> str | None:
        return "second" if model is Task else None

    db_for_write = db_for_read

    def allow_migrate(self, db: str, app_label: str, **hints: Any) -> bool | None:
        return app_label == "cast" if db == "second" else None


@pytest.fixture(autouse=True, scope="module")
def second(django_db_setup: None, django_db_blocker: Any, tmp_path_factory: Any) -> Iterator[None]:
    """Move the tasks to a database of their own."""
    first = connections.settings["default"]
    is_postgres = connection.vendor == "postgresql"
    name = f"{first['NAME']}_second" if is_postgres else str(tmp_path_factory.mktemp("second") / "second.sqlite3")

    def execute(statement: str) -> None:
        with django_db_blocker.unblock(), connection.cursor() as cursor:
            cursor.execute(statement)

    if is_postgres:
        execute(f'CREATE DATABASE "{name}"')
    connections.settings["second"] = {**first, "NAME": name}
    with django_db_blocker.unblock(), connections["second"].schema_editor() as editor:
        editor.create_model(Task)
    with override_settings(DATABASE_ROUTERS=[TasksAreInTheSecond()]):
        yield
    connections["second"].close()
    del connections["second"], connections.settings["second"]
    if is_postgres:
        execute(f'DROP DATABASE "{name}" WITH (FORCE)')


@pytest.fixture
def task(db: None) -> Task:
    return Task.objects.create()


@pytest.fixture
def doing(declaring: None) -> Callable[[Callable[[Task], Any]], Job]:
    def doing(function: Callable[[Task], Any]) -> Job:
        made = job(name="work")(function)
        sweep(made, cron="0 0 1 1 *", name="schedule_work")(Task.objects.pending)
        return made

    return doing


def finish(row: Task) -> None:
    row.state = "done"
    row.save()


def in_another_session(function: Callable[[], Any]) -> Any:
    """Return what a function returns, or the database's error, with connections of its own."""
    answer: list[Any] = []

    def ask() -> None:
        try:
            answer.append(function())
        except DatabaseError as error:
            answer.append(error)
        finally:
            connections.close_all()

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join(30)
    return answer[0]


def test_the_tasks_are_there_and_the_claims_are_not(task):
    assert Task.objects.using("second").count() == 1
    assert Task.objects.using("default").count() == 0
    assert Claim.objects.db == "default"


def test_from_the_sweep_to_the_end(task, queued):
    assert schedule_tasks.sweep() == (1, 1, 0, 0)
    assert queued() == [f"do_task-{task.pk}"]
    assert drain() == {"done": 1}
    task.refresh_from_db()
    assert (task.state, task.writes) == ("done", 1)
    assert [run.outcome for run in Run.objects.all()] == ["done"]
    assert not Claim.objects.exists()


def test_pushed_when_the_rows_database_commits(task, queued):
    with transaction.atomic(), transaction.atomic("second"):
        do_task.enqueue(task)
        do_task.enqueue_many([Task.objects.create()])
        assert queued() == []
    assert len(queued()) == 2


def test_the_sweep_may_name_the_database_where_no_router_does(declaring, queued):
    work = job(name="work")(finish)
    sweep(work, cron="0 0 1 1 *", name="schedule_work")(Task.objects.using("second").pending)

    def enqueue_in_every_way() -> None:
        rows = [Task.objects.using("second").create() for _ in range(5)]
        work.enqueue(rows[0])
        work.enqueue(rows[1].pk)
        work.enqueue_many([rows[2]])
        work.enqueue_many([rows[3].pk])
        work.enqueue_many(Task.objects.using("second").filter(pk=rows[4].pk))
        work.enqueue_with_jitter(rows[0].pk, max_wait=timedelta(days=1))
        assert queued() == []

    with override_settings(DATABASE_ROUTERS=[]):
        with suppress(ZeroDivisionError), transaction.atomic("second"):
            enqueue_in_every_way()
            raise ZeroDivisionError
        assert queued() == []
        with transaction.atomic("second"):
            enqueue_in_every_way()
        assert len(queued()) == 5
        assert drain() == {"done": 5}


def test_not_pushed_when_it_rolls_back(task, queued):
    with suppress(ZeroDivisionError), transaction.atomic("second"):
        do_task.enqueue(task)
        raise ZeroDivisionError
    assert queued() == []


def test_what_the_block_raises_rolls_the_row_back_and_keeps_the_claim(task, doing):
    def work(row: Task) -> None:
        with with_lock(row):
            finish(row)
            raise RuntimeError("on second thoughts")

    assert perform(doing(work), task) == "failed"
    task.refresh_from_db()
    assert task.state == "pending"
    assert "on second thoughts" in Claim.objects.get().last_error


def test_a_lost_lease_is_noticed_before_anything_is_written(task, doing):
    def work(row: Task) -> None:
        Claim.objects.update(lease_expires_at=timezone.now() - timedelta(minutes=1))
        thief = Attempt(Job(lambda: None, name="thief"), "cast.task", str(task.pk))
        assert isinstance(claims.take(thief), Claim)
        with with_lock(row):
            pytest.fail("the block was entered")

    assert perform(doing(work), task) == "busy"
    task.refresh_from_db()
    assert task.state == "pending"


def test_a_users_change_during_the_job_wins(task, doing):
    def work(row: Task) -> None:
        Task.objects.filter(pk=row.pk).update(state="deleting")
        with with_lock(row):
            pytest.fail("the block was entered")

    assert perform(doing(work), task) == "not_needed"
    task.refresh_from_db()
    assert task.state == "deleting"


@pytest.mark.postgres
def test_the_claim_stays_locked_until_the_row_is_committed(task, doing):
    """Between the two commits nobody can take the row over: the later one is the claim's."""
    seen = []

    def take_over() -> Any:
        with connection.cursor() as cursor:
            cursor.execute("SET lock_timeout = '300ms'")
        Claim.objects.update(lease_expires_at=timezone.now() - timedelta(minutes=1))

    def look() -> None:
        # The row's transaction has just been committed.
        state = in_another_session(lambda: Task.objects.get().state)
        seen.append((state, type(in_another_session(take_over)).__name__))

    def work(row: Task) -> None:
        with with_lock(row):
            finish(row)
            transaction.on_commit(look, using="second")

    assert perform(doing(work), task) == "done"
    assert seen == [("done", "OperationalError")]


def test_a_commit_of_the_claim_that_fails_leaves_the_row_done_and_the_claim_to_be_settled(task, doing):
    def work(row: Task) -> None:
        with with_lock(row):
            finish(row)
            transaction.on_commit(lambda: transaction.set_rollback(True), using="second")

    # The lease was not renewed by this; it still is ours.
    assert perform(doing(work), task) == "done"
    task.refresh_from_db()
    assert task.state == "done"
    assert not Claim.objects.exists()
