"""Hosts whose clocks are wrong by minutes: what the protocol decides, it decides by the clock of the database."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import datetime, timedelta

import pytest
from django.utils import timezone

from jobs import claims, clock, job
from jobs.claims import Attempt
from jobs.conf import conf
from jobs.models import Claim, Run, Schedule
from jobs.testing import drain, perform, tick
from tests.cast.jobs import do_task, schedule_tasks
from tests.cast.models import Task

pytestmark = [pytest.mark.postgres, pytest.mark.django_db(transaction=True)]

MINUTES = timedelta(minutes=7)


@pytest.fixture(params=[MINUTES, -MINUTES], ids=["fast", "slow"])
def wrong_clock(request) -> Callable[[], AbstractContextManager[None]]:
    """Work on a host whose clock is wrong. Outside, it is the time of the test, which is that of the database."""
    right_now, right_time = timezone.now, time.time

    @contextmanager
    def wrong_clock() -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(timezone, "now", lambda: right_now() + request.param)
            patch.setattr(time, "time", lambda: right_time() + request.param.total_seconds())
            yield

    return wrong_clock


def attempt(task: Task) -> Attempt:
    return Attempt(do_task, "cast.task", str(task.pk), worker="w")


def soon(moment: datetime, within: timedelta) -> bool:
    return timedelta(0) < moment - timezone.now() <= within


def test_a_lease_that_a_host_with_the_right_time_holds_is_not_taken_from_it(task, wrong_clock):
    held = attempt(task)
    claims.take(held)
    Task.objects.create()
    with wrong_clock():
        assert claims.take(attempt(task)) == "busy"
        assert schedule_tasks.sweep() == (2, 1, 0, 1)
    assert claims.renew(held.token)
    assert not Run.objects.exists()


def test_a_lease_that_it_takes_or_renews_runs_out_in_time(task, wrong_clock):
    made = attempt(task)
    with wrong_clock():
        claims.take(made)
    assert soon(Claim.objects.get().lease_expires_at, conf.LEASE)
    with wrong_clock():
        claims.renew(made.token)
    assert soon(Claim.objects.get().lease_expires_at, conf.LEASE)
    Claim.objects.update(lease_expires_at=timezone.now() - timedelta(seconds=1))
    with wrong_clock():
        assert isinstance(claims.take(attempt(task)), Claim)


def test_what_backs_off_waits_no_longer_and_no_less(task, wrong_clock):
    Task.objects.update(behaviour="always_raise")
    with wrong_clock():
        assert perform(do_task, task) == "failed"
    assert soon(Claim.objects.get().next_attempt_at, do_task.backoff.cap)
    with wrong_clock():
        assert perform(do_task, task) == "waiting"
        Claim.objects.update(next_attempt_at=clock.now())
        assert perform(do_task, task) == "failed"


def test_a_schedule_comes_due_when_the_database_says_so(nothing_else, wrong_clock):
    @job(cron="0 0 1 1 *")
    def new_year():
        pass

    tick()
    new_years = Schedule.objects.filter(name="new_year")
    for due_in, pushed in ((timedelta(minutes=1), []), (-timedelta(minutes=1), ["new_year"])):
        new_years.update(next_run_at=timezone.now() + due_in)
        with wrong_clock():
            assert tick() == pushed
    with wrong_clock():
        assert drain() == {"done": 1}
    assert abs(new_years.get().last_finished_at - timezone.now()) < timedelta(seconds=30)
