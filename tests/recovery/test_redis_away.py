"""Redis stops, hangs, or is not there yet."""

from collections.abc import Callable

import pytest
from django.contrib.auth import get_user_model
from django.test import Client
from django.urls import reverse

from databases.models import Database
from jobs import QueueUnavailable
from jobs.models import Schedule
from tests.cast.jobs import do_task, touch_file
from tests.cast.models import Task
from tests.machine import within
from tests.recovery.conftest import Stack

# About Redis.
pytestmark = pytest.mark.any_database

AWAY = {"refusing": lambda redis: redis.kill(), "hanging": lambda redis: redis.freeze()}


@pytest.fixture(params=AWAY)
def take_away(request: pytest.FixtureRequest, stack: Stack) -> Callable[[], None]:
    return lambda: AWAY[request.param](stack.redis)


def bring_back_empty(stack: Stack) -> None:
    stack.redis.kill()
    stack.redis.start()


@pytest.fixture
def operator(stack: Stack) -> Client:
    client = Client()
    client.force_login(get_user_model().objects.create_superuser("operator"))
    return client


def test_stopped_and_started_empty_with_a_job_running(stack: Stack, take_away) -> None:
    task = Task.objects.create(seconds=3)
    stack.scheduler()
    stack.worker()
    before = [stack.pid("scheduler"), stack.pid("worker")]
    stack.child_at_work(task)
    take_away()
    # The job does not need Redis, neither for its work nor for writing down how it ended.
    stack.wait_until_done(task)
    later = Task.objects.create()
    bring_back_empty(stack)
    stack.wait_until_done(later)
    assert stack.runs(task) == ["done"]
    assert stack.exits == []
    assert [stack.pid("scheduler"), stack.pid("worker")] == before


def test_stopped_for_a_while_with_nobody_at_work(stack: Stack) -> None:
    stack.scheduler()
    stack.worker()
    stack.wait_for_sweeps(1)
    stack.redis.kill()
    stack.wait_for(lambda: "Redis does not answer" in stack.log("worker"), "the worker has noticed")
    stack.wait_for(lambda: "A tick failed" in stack.log("scheduler"), "the scheduler has noticed")
    task = Task.objects.create()
    do_task.enqueue(task)
    assert stack.state(task) == "pending"
    stack.redis.start()
    stack.wait_until_done(task)
    assert stack.runs(task) == ["done"]
    assert stack.exits == []


def test_started_before_redis_is_there(stack: Stack) -> None:
    stack.redis.kill()
    task = Task.objects.create()
    stack.scheduler()
    stack.worker()
    stack.wait_for(lambda: "Redis does not answer" in stack.log("worker"), "the worker waits")
    stack.wait_for(lambda: "A tick failed" in stack.log("scheduler"), "the scheduler waits")
    stack.redis.start()
    stack.wait_until_done(task)
    assert stack.runs(task) == ["done"]
    assert stack.exits == []


def test_requests_that_create_rows(stack: Stack, operator: Client, take_away) -> None:
    Schedule.objects.filter(name="schedule_databases").update(cron="* * * * * */2")
    stack.scheduler()
    stack.worker()
    stack.wait_for_sweeps(1)
    owner = get_user_model().objects.get().pk
    take_away()
    for number in range(5):
        with within(1):
            answer = operator.post(
                reverse("admin:databases_database_add"),
                {"name": f"asked_for_{number}", "owner": owner, "engine": "sqlite"},
            )
        assert answer.status_code == 302
    task = Task.objects.create()
    with within(1):
        do_task.enqueue(task)
    assert set(Database.objects.values_list("state", flat=True)) == {"pending"}
    bring_back_empty(stack)
    stack.wait_for(lambda: Database.objects.filter(state="ready").count() == 5, "5 databases ready")
    stack.wait_until_done(task)
    assert stack.exits == []


def test_pages_of_the_admin(stack: Stack, operator: Client, take_away) -> None:
    task = Task.objects.create(behaviour="always_raise")
    stack.scheduler()
    stack.worker()
    stack.wait_for(lambda: stack.runs(task), "something to show")
    take_away()
    for page in ("schedule", "claim", "run"):
        with within(1):
            answer = operator.get(reverse(f"admin:selfheal_{page}_changelist"))
        assert answer.status_code == 200
        assert answer.context["cl"].result_count > 0
    with within(1):
        assert operator.get(reverse("admin:index")).status_code == 200


def test_a_plain_job_says_so_within_a_second(stack: Stack, tmp_path, take_away) -> None:
    file = tmp_path / "touched"
    take_away()
    with within(1), pytest.raises(QueueUnavailable):
        touch_file.enqueue(str(file))
    bring_back_empty(stack)
    stack.worker()
    touch_file.enqueue(str(file))
    stack.wait_for(file.exists, "a call that was accepted")
