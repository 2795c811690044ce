"""Rows that a stranger keeps locked, with a data migration or a transaction that somebody has forgotten."""

import os
import signal

import pytest
from django.db import connection

from jobs.models import Claim, Run
from tests import database
from tests.cast.jobs import delete_task, do_task
from tests.cast.models import Task
from tests.recovery.conftest import SOON, Stack
from tests.recovery.test_signals import wait_for_exit

# SQLite has one lock for all.
pytestmark = pytest.mark.postgres


def waiting() -> int:
    """How many of the stack's sessions wait for a lock."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
        )
        return int(cursor.fetchone()[0])


def test_they_hold_up_nobody_else(stack: Stack) -> None:
    locked = [Task.objects.create() for _ in range(4)]
    others = [Task.objects.create(state="deleting") for _ in range(4)]
    stack.scheduler()
    with database.locking(Task.objects.filter(pk__in=[task.pk for task in locked])):
        do_task.enqueue_many(locked)
        delete_task.enqueue_many(others)
        for name in ("one", "two"):
            stack.worker(name)
        stack.wait_until_done(*others, state="deleted", seconds=SOON)
        stack.wait_for(lambda: all("failed" in stack.runs(task) for task in locked), "each has failed, and backs off")
        # Who is told to end does so.
        for name in ("one", "two"):
            stack.supervisor.hold(name)
            os.kill(stack.pid(name), signal.SIGTERM)
        for name in ("one", "two"):
            assert wait_for_exit(stack, name, seconds=10) == 0
    stack.worker("three")
    stack.wait_until_done(*locked)
    # Nobody has died of it.
    assert set(Run.objects.values_list("outcome", flat=True)) == {"failed", "done"}


def test_who_is_killed_while_it_waits_for_one_waits_no_longer(stack: Stack) -> None:
    """PostgreSQL would go on waiting in its place, and do what it was told once the row is free."""
    task = Task.objects.create()
    with database.locking(Task.objects.filter(pk=task.pk)):
        do_task.enqueue(task)
        # So long that only its end can end its wait.
        stack.worker(TEST_JOBS='{"LEASE": 60, "HEARTBEAT": 6, "TICK": 3600}')
        child = stack.child_at_work(task)
        stack.wait_for(lambda: waiting() == 1, "it waits")
        stack.kill(child.pid)
        stack.wait_for(lambda: waiting() == 0, "nobody waits", seconds=5)
        stack.wait_for(lambda: stack.runs(task) == ["crashed"], "its death written down")
        assert Claim.objects.get().lease_key is None
