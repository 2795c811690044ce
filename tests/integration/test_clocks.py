"""Hosts whose clocks are wrong by minutes: what the protocol decides, it decides by the clock of the database."""

import time
from datetime import datetime, timedelta

import pytest
from django.utils import timezone

from jobs import claims, clock, job, scheduler
from jobs.claims import Attempt
from jobs.conf import conf
from jobs.models import Claim, Run, Schedule
from jobs.testing import drain, perform, tick
from tests.cast.jobs import do_task, schedule_tasks
from tests.cast.models import Task

pytestmark = [pytest.mark.postgres, pytest.mark.django_db(transaction=True)]

MINUTES = timedelta(minutes=7)


@pytest.fixture(params=[MINUTES, -MINUTES], ids=["fast", "slow"])
def wrong_clock(request, monkeypatch) -> timedelta:
    """From now on this host's clock is wrong. Returns by how much."""
    by: timedelta = request.param
    right_now, right_time = timezone.now, time.time
    monkeypatch.setattr(timezone, "now", lambda: right_now() + by)
    monkeypatch.setattr(time, "time", lambda: right_time() + by.total_seconds())
    return by


def attempt(task: Task) -> Attempt:
    return Attempt(do_task, "cast.task", str(task.pk), worker="w")


def test_a_lease_that_a_host_with_the_right_time_holds_is_not_taken_from_it(task, wrong_clock):
    held = attempt(task)
    claims.take(held)
    assert claims.take(attempt(task)) == "busy"
    assert claims.renew(held.token)
    Task.objects.create()
    assert schedule_tasks.sweep() == (2, 1, 0, 1)
    assert not Run.objects.exists()


def test_a_lease_that_it_takes_runs_out_in_time(task, wrong_clock):
    claims.take(attempt(task))
    claim = Claim.objects.get()
    assert timedelta(0) < claim.lease_expires_at - clock.read() <= conf.LEASE
    Claim.objects.update(lease_expires_at=clock.now(-timedelta(seconds=1)))
    assert isinstance(claims.take(attempt(task)), Claim)


def test_what_backs_off_waits_no_longer_and_no_less(task, wrong_clock):
    Task.objects.update(behaviour="always_raise")
    assert perform(do_task, task) == "failed"
    assert perform(do_task, task) == "waiting"
    assert timedelta(0) < Claim.objects.get().next_attempt_at - clock.read() <= do_task.backoff.cap


def test_a_schedule_comes_due_when_the_database_says_so(nothing_else, wrong_clock):
    @job(cron="0 0 1 1 *")
    def new_year():
        pass

    tick()
    name = {"name": "new_year"}
    Schedule.objects.filter(**name).update(next_run_at=clock.read() + timedelta(minutes=1))
    tick()
    assert not Schedule.objects.owed().exists()
    Schedule.objects.filter(**name).update(next_run_at=clock.read() - timedelta(minutes=1))
    assert tick() == ["new_year"]
    assert drain() == {"done": 1}
    run: datetime = Schedule.objects.get(**name).last_finished_at
    assert abs(run - clock.read()) < timedelta(seconds=30)
    assert scheduler.tick() == []
