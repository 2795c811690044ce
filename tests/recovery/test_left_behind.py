"""Whatever a job leaves behind in its process, how it ended is written down."""

import pytest
from django.db import connection

from jobs.models import Claim, Run
from tests.cast.jobs import LEAVINGS, do_task
from tests.cast.models import Task
from tests.recovery.conftest import Stack

OF_POSTGRES = {"leave_role", "leave_search_path", "leave_timeout"}


@pytest.fixture
def behaviours() -> set[str]:
    if connection.vendor == "sqlite":
        return set(LEAVINGS) - OF_POSTGRES
    with connection.cursor() as cursor:
        # Roles are of the whole server.
        cursor.execute("DO $$ BEGIN CREATE ROLE cast_stranger; EXCEPTION WHEN duplicate_object THEN NULL; END $$")
    return set(LEAVINGS)


def test_its_error_is_kept_and_its_attempt_is_counted(stack: Stack, behaviours: set[str]) -> None:
    tasks = [Task.objects.create(behaviour=behaviour) for behaviour in sorted(behaviours)]
    do_task.enqueue_many(tasks)
    stack.worker()
    for task in tasks:
        stack.wait_for(lambda task=task: stack.runs(task) == ["failed"], f"{task} failed")
        assert "has left something behind" in Run.objects.get(object_pk=str(task.pk)).error
    assert set(Claim.objects.values_list("attempts", "crashes", "deaths")) == {(1, 0, 0)}


def test_with_a_transaction_left_open_it_has_failed_and_is_told_so(stack: Stack) -> None:
    behaviours = ("leave_autocommit_off", "leave_atomic_open", "leave_begun")
    tasks = [Task.objects.create(behaviour=f"{behaviour}_and_return") for behaviour in behaviours]
    do_task.enqueue_many(tasks)
    stack.worker()
    for task in tasks:
        stack.wait_for(lambda task=task: stack.runs(task) == ["failed"], f"{task} failed")
        assert "has left a transaction open on default" in Run.objects.get(object_pk=str(task.pk)).error
