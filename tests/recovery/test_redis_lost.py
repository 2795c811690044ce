"""Redis is emptied, wholly or in part."""

from tests.cast.models import Task
from tests.recovery.conftest import Stack


def test_emptied_before_a_job_runs(stack: Stack) -> None:
    tasks = [Task.objects.create() for _ in range(5)]
    from tests.cast.jobs import do_task

    do_task.enqueue_many(tasks)
    stack.redis.flush()
    stack.scheduler()
    stack.worker()
    stack.wait_until_done(*tasks)


def test_emptied_while_a_job_runs(stack: Stack) -> None:
    task = Task.objects.create(seconds=4)
    stack.scheduler()
    stack.worker()
    stack.worker("second")
    stack.child_at_work(task)
    stack.redis.flush()
    later = Task.objects.create()
    stack.wait_until_done(task, later)
    assert len(stack.intervals(task)) == 1


def test_worker_and_child_killed(stack: Stack) -> None:
    task = Task.objects.create(seconds=3)
    stack.scheduler()
    stack.worker()
    child = stack.child_at_work(task)
    stack.kill(stack.supervisor.pid("worker"), child.pid)
    stack.wait_until_done(task)
    assert not stack.at_once(task)
