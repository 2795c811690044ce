"""SIGKILL to a worker, to its child, to both, at every step of a message's life."""

import json

import pytest
from django.utils import timezone

from jobs import operations, pauses
from jobs.jobs import selfheal_operate
from jobs.models import Claim, Operation, Run, Schedule
from jobs.testing import perform
from tests.cast.jobs import do_task
from tests.cast.models import Task
from tests.recovery.conftest import A_LONG_LEASE, LEASE, Stack
from tests.recovery.traps import Trap

pytestmark = pytest.mark.long_on_sqlite


def test_worker_and_child_killed(stack: Stack) -> None:
    task = Task.objects.create(seconds=3)
    stack.scheduler()
    stack.worker()
    child = stack.child_at_work(task)
    stack.kill(stack.pid("worker"), child.pid)
    stack.wait_until_done(task)
    assert not stack.at_once(task)
    # Nobody saw it die: it is the lease that ran out.
    assert stack.runs(task) == ["crashed", "done"]
    assert stack.writes(task) == 1


@pytest.mark.postgres
def test_child_killed_in_a_transaction_of_a_pooled_connection(stack: Stack) -> None:
    """Whatever it had written is rolled back, and not committed by whoever uses the pool next."""
    pooled = json.dumps({"OPTIONS": {"pool": True}})
    trap = Trap("after", "tests.cast.models.Task.save")
    # To write down its deaths, the worker itself connects.
    Task.objects.create(behaviour="kill_my_process")
    stack.scheduler(TEST_DATABASE=pooled)
    stack.worker(trap=trap, TEST_DATABASE=pooled)
    stack.wait_for(Claim.objects.filter(quarantined_at__isnull=False).exists, "the first one quarantined")
    task = Task.objects.create()
    do_task.enqueue(task)
    stack.wait_until_sprung(trap)
    stack.wait_until_done(task)
    assert stack.runs(task) == ["crashed", "done"]
    assert stack.writes(task) == 1


def test_worker_killed_and_its_child_left_alive(stack: Stack) -> None:
    # Longer than a lease, so that the orphan has to go on renewing it; and than two sweeps on a machine that is busy.
    task = Task.objects.create(seconds=3 * LEASE)
    stack.scheduler()
    stack.worker()
    stack.worker("second")
    orphan = stack.child_at_work(task)
    parent = orphan.ppid()
    stack.kill(parent)
    # Others come for the row meanwhile, by the sweep and by hints, and leave it.
    for _ in range(2):
        do_task.enqueue(task)
        stack.wait_for_sweeps(1)
    assert stack.intervals(task)[0].end is None
    stack.wait_until_done(task)
    assert [interval.pid for interval in stack.intervals(task)] == [orphan.pid]
    assert stack.runs(task) == ["done"]
    assert stack.writes(task) == 1


def test_child_killed(stack: Stack) -> None:
    task = Task.objects.create(seconds=2)
    stack.scheduler()
    # Its worker sees it, so the row does not wait for the lease.
    stack.worker(TEST_JOBS=A_LONG_LEASE)
    worker = stack.pid()
    child = stack.child_at_work(task)
    stack.kill(child.pid)
    stack.wait_until_done(task)
    assert len(stack.intervals(task)) == 2
    assert not stack.at_once(task)
    assert stack.runs(task) == ["crashed", "done"]
    assert "SIGKILL" in Run.objects.filter(outcome="crashed").get().error
    assert stack.pid() == worker


@pytest.mark.parametrize(
    ("trap", "runs"),
    [
        # Popped, and so in no list; not claimed yet.
        (Trap("before", "jobs.worker.Worker.execute_job"), ["done"]),
        (Trap("before", "jobs.claims.take", with_parent=True), ["done"]),
        (Trap("before", "jobs.claims.take"), ["done"]),
        # Claimed, and the work not begun.
        (Trap("after", "jobs.claims.take", with_parent=True), ["crashed", "done"]),
        (Trap("after", "jobs.claims.take"), ["crashed", "done"]),
        # The row says that it is done; the claim is still there, until a sweep settles it.
        (Trap("before", "jobs.claims.settle", with_parent=True), ["resolved"]),
        (Trap("before", "jobs.claims.settle"), ["crashed", "resolved"]),
        (Trap("after", "jobs.claims.settle", with_parent=True), ["done"]),
        (Trap("after", "jobs.claims.settle"), ["done"]),
    ],
    ids=lambda value: str(value) if isinstance(value, Trap) else "",
)
def test_killed_at_a_step(stack: Stack, trap: Trap, runs: list[str]) -> None:
    task = Task.objects.create()
    do_task.enqueue(task)
    # Without a scheduler there is only one message that can spring the trap.
    stack.worker(trap=trap)
    stack.wait_until_sprung(trap)
    assert stack.queued() == []
    stack.scheduler()
    stack.wait_until_done(task)
    found = stack.runs(task)
    # A worker that a tick sent to the row may come before the sweep; it counts the crash that nobody saw.
    assert found == runs or (runs == ["resolved"] and found == ["crashed", "resolved"])
    assert stack.writes(task) == 1
    assert not stack.at_once(task)


@pytest.mark.parametrize(
    "trap",
    [
        pytest.param(Trap("before", "jobs.enqueue.push_ids", with_parent=True), marks=pytest.mark.long),
        pytest.param(Trap("after", "jobs.enqueue.push_ids", with_parent=True), marks=pytest.mark.long),
        Trap("before", "jobs.enqueue.push_ids"),
    ],
    ids=str,
)
def test_killed_in_the_middle_of_a_sweep(stack: Stack, trap: Trap) -> None:
    tasks = [Task.objects.create() for _ in range(3)]
    stack.scheduler()
    stack.worker(trap=trap)
    stack.wait_until_sprung(trap)
    stack.wait_until_done(*tasks)
    assert [stack.writes(task) for task in tasks] == [1, 1, 1]
    # And it goes on sweeping.
    stack.wait_for_sweeps(1)
    assert Schedule.objects.get(name="schedule_tasks").last_outcome == "done"
    assert not Claim.objects.exclude(crashes=0).exists()


def test_every_worker_killed_again_and_again(stack: Stack) -> None:
    tasks = [Task.objects.create(seconds=0.5) for _ in range(12)]
    stack.scheduler()
    names = ["one", "two", "three"]
    for name in names:
        stack.worker(name)
    for task in (tasks[0], tasks[3], tasks[6]):
        stack.wait_for(lambda task=task: stack.intervals(task), f"{task} begun")
        stack.kill(*(stack.supervisor.pid(name) for name in names))
    stack.wait_until_done(*tasks)
    # The children were left alone, and finished: no death, and nothing done twice.
    assert [stack.runs(task) for task in tasks] == [["done"]] * 12
    assert not any(stack.at_once(task) for task in tasks)
    assert {stack.writes(task) for task in tasks} == {1}


def test_the_worker_of_an_operation_killed_half_way(stack: Stack, monkeypatch) -> None:
    """It goes on where it was: what it had done is not done again, what it had not committed is."""
    now = timezone.now()
    identity = {"job": "do_task", "model": "cast.task", "first_claimed_at": now}
    # Of rows that are there, or their sweep would settle them.
    pks = [task.pk for task in Task.objects.bulk_create([Task() for _ in range(3500)])]
    Claim.objects.bulk_create([Claim(**identity, object_pk=str(pk), quarantined_at=now, attempts=3) for pk in pks])
    pauses.pause("do_task")
    operation = operations.request("release", {"state": "quarantined"})
    with monkeypatch.context() as patch:
        patch.setattr(operations, "ATTEMPT_SECONDS", 0.0)
        patch.setattr(operations, "BATCH", 1500)
        assert perform(selfheal_operate, operation) == "done"
    operation.refresh_from_db()
    assert (operation.changed, operation.finished_at) == (1500, None)
    done = Claim.objects.filter(pk__lte=operation.at_pk)
    # Somebody sets those aside again, which nobody must undo.
    assert done.quarantine() == 1500

    trap = Trap("after", "jobs.operations.apply", with_parent=True)
    stack.worker(trap=trap)
    stack.wait_until_sprung(trap)
    # The claims of its batch were changed, and that was not committed.
    assert Claim.objects.quarantined().count() == 3500
    stack.scheduler()
    stack.wait_for(lambda: Operation.objects.filter(finished_at__isnull=False).exists(), "the operation ended")
    operation.refresh_from_db()
    assert (operation.changed, operation.total) == (3500, 3500)
    assert set(Claim.objects.quarantined().values_list("pk", flat=True)) == set(done.values_list("pk", flat=True))
    runs = Run.objects.filter(job="selfheal_operate").order_by("pk").values_list("outcome", flat=True)
    # The job says that it has ended, and then its worker that the attempt has.
    stack.wait_for(lambda: len(runs.all()) == 3, "three attempts in the history")
    assert list(runs) == ["done", "crashed", "done"]
