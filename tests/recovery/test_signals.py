"""A deploy: processes are asked to end."""

import os
import signal

import pytest

from jobs.models import Claim, Run
from tests.cast.jobs import do_task
from tests.cast.models import Task
from tests.machine import within
from tests.recovery.conftest import A_LONG_LEASE, PATIENCE, Stack, is_gone

# About processes.
pytestmark = pytest.mark.any_database


def wait_for_exit(stack: Stack, name: str, seconds: float = PATIENCE) -> int:
    """Return the exit code of a command that was asked to end."""
    stack.wait_for(lambda: any(death.name == name for death in stack.exits), f"{name} has ended", seconds)
    return next(death.code for death in stack.exits if death.name == name)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_busy_worker_finishes_first(stack: Stack, number: signal.Signals) -> None:
    task, behind = Task.objects.create(seconds=3), Task.objects.create()
    stack.worker()
    do_task.enqueue_many([task, behind])
    child = stack.child_at_work(task)
    stack.supervisor.hold("worker")
    # To both: some supervisors signal whatever they find.
    os.kill(stack.pid(), number)
    os.kill(child.pid, number)
    assert wait_for_exit(stack, "worker") == 0
    # It has finished this one and not begun the next.
    assert stack.state(task) == "done"
    assert stack.runs(task) == ["done"]
    assert stack.queued() == [f"do_task-{behind.pk}"]
    assert not Run.objects.exclude(outcome="done").exists()
    assert stack.client.keys("rq:workers*") == []


def test_a_worker_that_was_started_with_sigchld_ignored_sees_its_child_die(stack: Stack) -> None:
    task = Task.objects.create(seconds=PATIENCE)
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        stack.worker()
    finally:
        signal.signal(signal.SIGCHLD, before)
    do_task.enqueue(task)
    stack.kill(stack.child_at_work(task).pid)
    stack.wait_for(lambda: stack.runs(task) == ["crashed"], "the death written down")
    assert "was killed by SIGKILL" in Run.objects.get().error
    assert Claim.objects.get().deaths == 1


def test_an_impatient_operator_stops_a_busy_worker_at_once(stack: Stack) -> None:
    # Longer than anybody waits here, as the lease is: the work is cut off, and the row is given back.
    task = Task.objects.create(seconds=PATIENCE + 10)
    stack.scheduler()
    stack.worker(TEST_JOBS=A_LONG_LEASE)
    child = stack.child_at_work(task)
    Task.objects.filter(pk=task.pk).update(seconds=0)
    worker = stack.pid()
    stack.supervisor.hold("worker")

    def insist() -> bool:
        if is_gone(child.pid):
            return True
        os.kill(worker, signal.SIGTERM)
        return False

    stack.wait_for(insist, "the child ended")
    assert wait_for_exit(stack, "worker") == 0
    stack.wait_until_gone(child.pid)
    stack.worker("second")
    stack.wait_until_done(task)
    # Nothing was counted.
    assert stack.runs(task) == ["done"]
    assert stack.writes(task) == 1


@pytest.mark.parametrize("first", ["worker", "child"])
def test_a_deploy_that_loses_patience_counts_nothing(stack: Stack, first: str) -> None:
    """SIGTERM, and SIGKILL soon after, to the worker and its child, in either order."""
    task = Task.objects.create(seconds=60)
    stack.scheduler()
    stack.worker()
    child, worker = stack.child_at_work(task), stack.pid()
    stack.supervisor.hold("worker")
    os.kill(worker, signal.SIGTERM)
    stack.wait_for(lambda: Claim.objects.filter(stopping_since__isnull=False).exists(), "the stop written down")
    Task.objects.update(seconds=0)
    for pid in (worker, child.pid) if first == "worker" else (child.pid, worker):
        stack.kill(pid)
        stack.wait_until_gone(pid)
        if first == "child":
            wait_for_exit(stack, "worker", seconds=10)
    stack.worker("second")
    stack.wait_until_done(task)
    assert stack.runs(task) == ["interrupted", "done"]
    assert stack.at_once(task) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_worker_and_a_scheduler_end_quickly(stack: Stack, number: signal.Signals) -> None:
    stack.scheduler()
    stack.worker()
    stack.wait_until_up("scheduler", "worker")
    for name in ("scheduler", "worker"):
        stack.supervisor.hold(name)
        with within(4):
            os.kill(stack.pid(name), number)
            assert wait_for_exit(stack, name) == 0


@pytest.mark.parametrize("name", ["scheduler", "worker"])
def test_they_end_while_redis_is_away(stack: Stack, name: str) -> None:
    stack.redis.kill()
    getattr(stack, name)()
    noticed = {"scheduler": "A tick failed", "worker": "Redis does not answer"}[name]
    stack.wait_for(lambda: noticed in stack.log(name), f"the {name} has noticed")
    stack.supervisor.hold(name)
    os.kill(stack.pid(name), signal.SIGTERM)
    assert wait_for_exit(stack, name) == 0


def test_a_rolling_deploy_loses_and_doubles_nothing(stack: Stack) -> None:
    tasks = [Task.objects.create(seconds=0.5) for _ in range(10)]
    stack.scheduler()
    names = ["one", "two", "three"]
    for name in names:
        stack.worker(name)
    stack.child_at_work(tasks[0])
    for name in ("scheduler", *names):
        ended = len(stack.exits)
        os.kill(stack.pid(name), signal.SIGTERM)
        stack.wait_for(lambda ended=ended: len(stack.exits) > ended, f"{name} has ended")
    stack.wait_until_done(*tasks)
    assert [stack.runs(task) for task in tasks] == [["done"]] * 10
    assert {death.code for death in stack.exits} == {0}
