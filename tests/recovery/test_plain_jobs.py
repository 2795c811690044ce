"""Plain jobs and jitter: what lives in Redis alone, and survives everything but the loss of Redis."""

from datetime import timedelta
from pathlib import Path

import pytest
from django.utils import timezone
from waffle.models import Switch

from jobs import clock, enqueue
from jobs.models import Run
from tests.cast.jobs import do_task, touch_file
from tests.cast.models import Task
from tests.recovery.conftest import Stack, missing_database
from tests.recovery.traps import Trap

# About Redis.
pytestmark = pytest.mark.any_database


def attempts(file: Path) -> int:
    return len(file.read_text().splitlines()) if file.exists() else 0


def outcomes() -> list[str]:
    return list(Run.objects.filter(job="touch_file").order_by("pk").values_list("outcome", flat=True))


def wait_until_forgotten(stack: Stack) -> None:
    """Wait until nothing of any plain call is left in Redis."""
    stack.wait_for(
        lambda: not (stack.client.keys("rq:job:*") or stack.delayed() or stack.queued("urgent")), "all calls ended"
    )


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "touched"


def test_fails_twice(stack: Stack, file: Path) -> None:
    stack.scheduler()
    stack.worker()
    touch_file.enqueue(str(file), fail_times=2)
    stack.wait_for(lambda: "done" in outcomes(), "a third attempt")
    wait_until_forgotten(stack)
    assert outcomes() == ["failed", "failed", "done"]
    assert attempts(file) == 3


def test_fails_for_ever(stack: Stack, file: Path) -> None:
    stack.scheduler()
    stack.worker()
    touch_file.enqueue(str(file), fail_times=100)
    stack.wait_for(lambda: len(outcomes()) == 3, "three failures")
    wait_until_forgotten(stack)
    assert outcomes() == ["failed"] * 3
    assert attempts(file) == 3


def test_kills_its_process_for_ever(stack: Stack, file: Path) -> None:
    stack.scheduler()
    stack.worker()
    worker = stack.pid()
    touch_file.enqueue(str(file), kill=True)
    stack.wait_for(outcomes, "given up")
    wait_until_forgotten(stack)
    assert attempts(file) == 3
    assert outcomes() == ["failed"]
    assert "died in each of its 3 attempts" in Run.objects.get(job="touch_file").error
    assert stack.pid() == worker


def test_killed_with_its_worker(stack: Stack, file: Path) -> None:
    stack.scheduler()
    stack.worker()
    touch_file.enqueue(str(file), seconds=2)
    stack.wait_for(file.exists, "somebody at work")
    child = int(file.read_text())
    [(call, due_in)] = stack.delayed().items()
    # When its process must be gone: past its time limit and the worker's patience. Nobody comes for it before that.
    assert due_in > 180
    stack.kill(stack.pid(), child)
    stack.client.zadd("rq:scheduler:scheduled_jobs", {call: 0}, xx=True)
    stack.wait_for(lambda: outcomes() == ["done"], "delivered again")
    wait_until_forgotten(stack)
    assert attempts(file) == 2


@pytest.mark.parametrize(
    "trap",
    [Trap("before", "jobs.worker.Worker.execute_job"), Trap("before", "jobs.enqueue.start_call", with_parent=True)],
    ids=str,
)
def test_worker_killed_before_anybody_starts_it(stack: Stack, file: Path, trap: Trap) -> None:
    """It is in no list any more, and in no other place yet."""
    stack.worker(trap=trap)
    touch_file.enqueue(str(file))
    stack.wait_until_sprung(trap)
    stack.wait_for(lambda: not stack.queued("urgent"), "taken")
    assert stack.delayed() == {}
    with clock.fixed(timezone.now() + timedelta(seconds=enqueue.LOST_AFTER + 1)):
        assert enqueue.find_lost_calls(stack.client) == 1
    stack.wait_for(lambda: outcomes() == ["done"], "found")
    wait_until_forgotten(stack)
    assert attempts(file) == 1


@pytest.mark.parametrize(
    ("trap", "expected"),
    [
        # Popped, and then started: its worker lives and knows of it.
        (Trap("before", "jobs.enqueue.start_call"), (1, ["done"])),
        (Trap("after", "jobs.enqueue.start_call"), (1, ["done"])),
        # The work is done, and the call not forgotten: it is done again.
        (Trap("before", "jobs.enqueue.end_call"), (2, ["done"])),
        # Forgotten, and not in the history.
        (Trap("after", "jobs.enqueue.end_call"), (1, [])),
    ],
    ids=lambda value: str(value) if isinstance(value, Trap) else "",
)
def test_child_killed_at_a_step(stack: Stack, file: Path, trap: Trap, expected: tuple[int, list[str]]) -> None:
    stack.scheduler()
    stack.worker(trap=trap)
    touch_file.enqueue(str(file))
    stack.wait_until_sprung(trap)
    stack.wait_for(lambda: (attempts(file), outcomes()) == expected, "the work done")
    wait_until_forgotten(stack)
    assert (attempts(file), outcomes()) == expected


@pytest.mark.postgres
def test_delivered_while_the_database_is_away(stack: Stack, file: Path) -> None:
    """Three times, and it has three attempts. None of them is begun; SQLite is not asked before the function is."""
    stack.scheduler()
    stack.worker()
    with missing_database(stack):
        touch_file.enqueue(str(file))
        stack.wait_for(lambda: stack.log("worker").count("the database does not answer") >= 3, "delivered three times")
    stack.wait_for(outcomes, "the work done")
    wait_until_forgotten(stack)
    assert (attempts(file), outcomes()) == (1, ["done"])


def test_waits_in_the_delayed_set(stack: Stack) -> None:
    """Jitter needs the scheduler, and no sweep."""
    Switch.objects.filter(name="disable_schedule_tasks").update(active=True)
    stack.scheduler()
    stack.worker()
    stack.wait_for_sweeps(1, "schedule_task_deletions")
    tasks = [Task.objects.create() for _ in range(5)]
    for task in tasks:
        do_task.enqueue_with_jitter(task, min_wait=timedelta(seconds=1), max_wait=timedelta(seconds=3))
    due = stack.delayed()
    assert len(due) == 5
    assert all(0 < seconds <= 3 for seconds in due.values())
    assert stack.queued() == []
    stack.wait_until_done(*tasks)
    assert [stack.runs(task) for task in tasks] == [["done"]] * 5
    assert stack.delayed() == {}
