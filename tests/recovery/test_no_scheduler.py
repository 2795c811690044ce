"""Workers alone: nobody runs rqscheduler, or it hangs, and everything heals all the same."""

from datetime import timedelta

import pytest

from tests.cast.jobs import do_task
from tests.cast.models import Task
from tests.recovery.conftest import Stack
from tests.recovery.test_schedulers import come_due, is_over, nights

# About processes.
pytestmark = pytest.mark.any_database


def stood_in(stack: Stack, *workers: str) -> int:
    """Return how often the workers ticked and found something to push."""
    return sum(stack.log(worker).count(": a tick: ") for worker in workers)


def test_everything_heals(stack: Stack) -> None:
    for name in ("one", "two"):
        stack.worker(name, ticks=True)
    come_due()
    forgotten, failing, spread = (
        Task.objects.create(),
        Task.objects.create(behaviour="raise_once"),
        Task.objects.create(),
    )
    do_task.enqueue_with_jitter(spread, max_wait=timedelta(seconds=1))
    stack.wait_until_done(forgotten, failing, spread)
    stack.client.flushall()
    lost = Task.objects.create()
    stack.wait_until_done(lost)
    stack.wait_for(is_over, "the run that was due")
    assert nights() == ["done"]
    assert [stack.writes(task) for task in (forgotten, failing, spread, lost)] == [1] * 4
    assert stood_in(stack, "one", "two")


def test_one_that_works_all_the_time_ticks_between_two_messages(stack: Stack) -> None:
    stack.worker("alone", "background", "default", ticks=True)
    do_task.enqueue_many([Task.objects.create(seconds=0.3) for _ in range(30)])
    stack.wait_for(lambda: len(stack.queued()) < 30, "at work")
    come_due()
    stack.wait_for(lambda: "nightly" in stack.queued(), "the run that was due")
    assert len(stack.queued()) > 1, "it was idle when it ticked"


def test_a_scheduler_that_hangs_is_stood_in_for_until_it_goes_on(stack: Stack) -> None:
    stack.scheduler()
    stack.worker(ticks=True)
    stack.wait_for_sweeps(2)
    assert not stood_in(stack, "worker")
    stack.freeze(stack.pid("scheduler"))
    stack.wait_for_sweeps(2)
    assert stood_in(stack, "worker")
    stack.thaw(stack.pid("scheduler"))
    # Once it has ticked again, it is left to it.
    task = Task.objects.create()
    stack.wait_until_done(task)
    stack.wait_for_sweeps(2)
    before = stood_in(stack, "worker")
    stack.wait_for_sweeps(3)
    assert stood_in(stack, "worker") == before


def test_workers_that_die_in_a_tick_lose_nothing(stack: Stack) -> None:
    from tests.recovery.traps import Trap

    trap = Trap("before", "jobs.scheduler._push_owed")
    come_due()
    stack.worker(ticks=True, trap=trap)
    stack.wait_until_sprung(trap)
    stack.wait_for(is_over, "the run that was due")
    assert nights() == ["done"]
    # It was the tick that died, and not its worker.
    assert stack.exits == []
    assert "a tick was killed by SIGKILL" in stack.log("worker")
