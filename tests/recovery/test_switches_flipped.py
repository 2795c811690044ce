"""A job type or its sweep is switched off in an incident, and on again."""

import pytest
from waffle.models import Switch

from tests.cast.jobs import do_task
from tests.cast.models import Task
from tests.recovery.conftest import Stack

pytestmark = pytest.mark.any_database


def switch(name: str, on: bool) -> None:
    assert Switch.objects.filter(name=name).update(active=on) == 1


def test_a_job_switched_off_while_its_rows_are_queued(stack: Stack) -> None:
    at_work = Task.objects.create(seconds=2)
    queued = [Task.objects.create() for _ in range(5)]
    stack.worker()
    do_task.enqueue(at_work)
    stack.child_at_work(at_work)
    do_task.enqueue_many(queued)
    assert len(stack.queued()) == 5
    stack.scheduler()
    switch("disable_do_task", on=True)
    # What was at work finishes. What is queued is dropped.
    stack.wait_until_done(at_work)
    stack.wait_until_drained()
    later = Task.objects.create()
    do_task.enqueue(later)
    do_task.enqueue_many([later])
    # Sweeps of others go on, its own does not.
    stack.wait_for_sweeps(2, "schedule_task_deletions")
    assert stack.queued() == []
    assert {event["task"] for event in stack.events()} == {at_work.pk}
    switch("disable_do_task", on=False)
    stack.wait_until_done(later, *queued)
    assert [stack.runs(task) for task in (at_work, later, *queued)] == [["done"]] * 7


def test_a_sweep_switched_off(stack: Stack) -> None:
    stack.scheduler()
    stack.worker()
    stack.wait_for_sweeps(1)
    switch("disable_schedule_tasks", on=True)
    # One that had been pushed before may still end.
    stack.wait_for_sweeps(1, "schedule_task_deletions")
    found, asked_for = Task.objects.create(), Task.objects.create()
    do_task.enqueue(asked_for)
    stack.wait_until_done(asked_for)
    stack.wait_for_sweeps(2, "schedule_task_deletions")
    assert stack.state(found) == "pending"
    assert not stack.intervals(found)
    switch("disable_schedule_tasks", on=False)
    stack.wait_until_done(found)


def test_a_job_switched_off_while_a_row_backs_off(stack: Stack) -> None:
    task = Task.objects.create(behaviour="raise_once")
    stack.scheduler()
    stack.worker()
    stack.wait_for(lambda: stack.runs(task) == ["failed"], "the first attempt has failed")
    switch("disable_do_task", on=True)
    stack.wait_for_sweeps(2, "schedule_task_deletions")
    stack.wait_until_drained()
    assert stack.runs(task) == ["failed"]
    switch("disable_do_task", on=False)
    stack.wait_until_done(task)
    assert stack.runs(task) == ["failed", "done"]
