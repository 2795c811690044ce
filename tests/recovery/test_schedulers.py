"""Schedulers are killed, frozen, missing, or two."""

from datetime import timedelta

import pytest
from django.db.models import Q
from django.utils import timezone
from waffle.models import Switch

from jobs import clock
from jobs.models import Run, Schedule
from tests.cast.jobs import do_task
from tests.cast.models import Task
from tests.recovery.conftest import Stack
from tests.recovery.traps import Trap

pytestmark = pytest.mark.long_on_sqlite


def come_due(name: str = "nightly") -> None:
    """Make a schedule due now. It is due again tomorrow, so no later run can hide that this one was lost."""
    Schedule.objects.filter(name=name).update(next_run_at=timezone.now() - timedelta(minutes=1))


def nights() -> list[str]:
    return list(Run.objects.filter(job="nightly").values_list("outcome", flat=True))


def is_over(name: str = "nightly") -> bool:
    """Whether the run that was due has ended, and the next is to come."""
    return (
        Schedule.objects.filter(name=name, next_run_at__gt=clock.now())
        .exclude(Q(last_enqueued_at__isnull=True) | Q(pk__in=Schedule.objects.owed()))
        .exists()
    )


@pytest.mark.parametrize(
    "trap",
    [
        Trap("before", "jobs.scheduler._take_due", with_parent=True),
        # Looked at, and not taken.
        Trap("before", "jobs.scheduler._advance", with_parent=True),
        # Taken, and not pushed.
        Trap("before", "jobs.scheduler._push_owed", with_parent=True),
        Trap("before", "jobs.enqueue.push_id", with_parent=True),
        # Pushed.
        Trap("after", "jobs.enqueue.push_id", with_parent=True),
        Trap("after", "jobs.scheduler._push_claims", with_parent=True),
    ],
    ids=str,
)
def test_killed_at_a_step(stack: Stack, trap: Trap) -> None:
    come_due()
    stack.scheduler(trap=trap)
    stack.worker()
    stack.wait_until_sprung(trap)
    stack.wait_for(is_over, "the run that was due")
    task = Task.objects.create()
    stack.wait_until_done(task)
    assert nights() == ["done"]
    assert [death.code for death in stack.exits] == [-9]


def test_a_tick_that_is_killed_is_made_again(stack: Stack) -> None:
    trap = Trap("before", "jobs.enqueue.push_id")
    come_due()
    stack.scheduler(trap=trap)
    stack.worker()
    stack.wait_until_sprung(trap)
    stack.wait_for(is_over, "the run that was due")
    assert nights() == ["done"]
    assert stack.exits == []


def test_killed_between_two_loads_of_what_is_due(stack: Stack) -> None:
    """Due entries move a thousand at a time. Here the first thousand has two good ones, and more than it can hold."""
    trap = Trap("before", "jobs.enqueue.logger.warning")
    tasks = [Task.objects.create() for _ in range(4)]
    ids = [f"do_task-{tasks[0].pk}", f"do_task-{tasks[1].pk}", *(f"nobody-{number}" for number in range(1000))]
    ids += [f"do_task-{tasks[2].pk}", f"do_task-{tasks[3].pk}"]
    stack.client.zadd("rq:scheduler:scheduled_jobs", {id: number for number, id in enumerate(ids)})
    stack.scheduler(trap=trap)
    stack.wait_until_sprung(trap)
    # What has left the delayed set is in the list, and the rest is where it was.
    assert stack.queued() == ids[:2]
    assert list(stack.delayed()) == ids[1000:]
    stack.wait_for(lambda: not stack.delayed(), "the rest moved")
    assert stack.queued() == ids[:2] + ids[-2:]
    stack.worker()
    stack.wait_until_done(*tasks)
    assert [len(stack.intervals(task)) for task in tasks] == [1] * 4


def test_killed_while_it_queues_what_backed_off(stack: Stack) -> None:
    # Nor can a sweep hide what the ticks forget.
    Switch.objects.filter(name="disable_schedule_tasks").update(active=True)
    trap = Trap("before", "jobs.scheduler._push_claims_of")
    task = Task.objects.create(behaviour="raise_once")
    do_task.enqueue(task)
    stack.worker()
    stack.wait_for(lambda: stack.runs(task) == ["failed"], "the first attempt has failed")
    stack.scheduler(trap=trap)
    stack.wait_until_sprung(trap)
    stack.wait_until_done(task)
    assert stack.runs(task) == ["failed", "done"]


def test_killed_again_and_again(stack: Stack) -> None:
    stack.scheduler()
    stack.worker()
    tasks = []
    for _ in range(3):
        stack.kill(stack.pid("scheduler"))
        tasks.append(Task.objects.create())
        stack.wait_until_done(*tasks)
    assert [stack.writes(task) for task in tasks] == [1, 1, 1]
    assert {death.name for death in stack.exits} == {"scheduler"}


def test_frozen_before_the_take(stack: Stack) -> None:
    trap = Trap("before", "jobs.scheduler._advance", how="SIGSTOP")
    come_due()
    stack.scheduler("one", trap=trap)
    frozen, one = stack.wait_until_sprung(trap)
    stack.wait_until_frozen(frozen)
    stack.worker()
    stack.scheduler("two")
    stack.wait_for(is_over, "the run that was due")
    taken_at = Schedule.objects.get(name="nightly").last_enqueued_at
    stack.kill(stack.pid("two"))
    stack.supervisor.hold("two")
    # It still believes that the run is due, and finds that it is taken.
    stack.thaw(frozen)
    stack.wait_for_sweeps(2)
    assert Schedule.objects.get(name="nightly").last_enqueued_at == taken_at
    assert nights() == ["done"]
    assert stack.pid("one") == one


def test_frozen_between_the_take_and_the_push(stack: Stack) -> None:
    trap = Trap("before", "jobs.enqueue.push_id", how="SIGSTOP")
    come_due()
    stack.scheduler("one", trap=trap)
    frozen, one = stack.wait_until_sprung(trap)
    stack.wait_until_frozen(frozen)
    stack.worker()
    stack.scheduler("two")
    stack.wait_for(is_over, "the run that was due")
    stack.kill(stack.pid("two"))
    stack.supervisor.hold("two")
    # It goes on with a push that is out of date, and then it is as good as any other.
    stack.thaw(frozen)
    task = Task.objects.create()
    stack.wait_until_done(task)
    stack.wait_for_sweeps(1)
    assert nights() == ["done"]
    assert stack.pid("one") == one


def test_two_at_once(stack: Stack) -> None:
    for number in range(2):
        stack.scheduler(f"scheduler-{number}", TEST_JOBS='{"LEASE": 6, "HEARTBEAT": 1, "TICK": 0.1}')
        stack.worker(f"worker-{number}")
    stack.wait_until_up("scheduler-0", "scheduler-1", "worker-0", "worker-1")
    rounds = 8
    for number in range(rounds):
        come_due()
        stack.wait_for(lambda number=number: is_over() and len(nights()) > number, f"night {number}")
    # A sweep that comes due only once, too.
    Schedule.objects.filter(name="schedule_tasks").update(cron="0 0 1 1 *")
    once = Schedule.objects.filter(name="schedule_tasks", next_run_at__gt=timezone.now() + timedelta(minutes=1))
    stack.wait_for(lambda: once.exists() and not Schedule.objects.owed().exists(), "everything over")
    # Made only now: what an earlier sweep had queued of it could be between the queue and its claim.
    task = Task.objects.create(behaviour="leave_pending")
    come_due("schedule_tasks")
    stack.wait_for(lambda: is_over("schedule_tasks") and stack.runs(task), "the sweep, and what it queued")
    for queue in ("background", "default"):
        stack.wait_until_drained(queue)
    stack.wait_for_sweeps(2, "schedule_task_deletions")
    # One run for each time that it was due, although two took it, and one attempt at the row for one sweep.
    assert nights() == ["done"] * rounds
    assert stack.runs(task) == ["done"]


def test_none_for_a_while(stack: Stack) -> None:
    stack.scheduler()
    stack.worker()
    stack.wait_for_sweeps(1)
    stack.supervisor.hold("scheduler")
    stack.kill(stack.pid("scheduler"))
    stack.wait_for(lambda: not stack.supervisor.pid("scheduler"), "the scheduler down")
    stack.wait_until_drained("background")
    forgotten, asked_for = Task.objects.create(), Task.objects.create()
    # The fast path needs no scheduler. What nobody queued waits for one.
    do_task.enqueue(asked_for)
    stack.wait_until_done(asked_for)
    come_due()
    assert stack.state(forgotten) == "pending"
    stack.supervisor.release("scheduler")
    stack.wait_until_done(forgotten)
    stack.wait_for(is_over, "the run that came due meanwhile")
    assert nights() == ["done"]
