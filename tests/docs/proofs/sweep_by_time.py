"""What the page says of time: due rows are found, by their index, once; and what a day of downtime does."""

from datetime import timedelta

import pytest
from django.db import connection
from django.db.models import F
from django.db.models.functions import Now
from django.utils import timezone
from reports.jobs import make_report, schedule_reports
from reports.models import Policy, Report
from subscriptions.jobs import end_trials, renew, schedule_renewals
from subscriptions.models import PERIOD, Subscription
from subscriptions.payments import CHARGES

from jobs.testing import drain, perform, tick

State = Subscription.State
EVERY = timedelta(hours=4)


@pytest.fixture
def subscription(db):
    CHARGES.clear()
    return Subscription.objects.create(email="ada@example.com", state=State.RUNNING, renews_at=timezone.now())


@pytest.fixture
def policy(db):
    return Policy.objects.create(merchant="Ada", every=EVERY, next_run_at=timezone.now() - timedelta(minutes=1))


def test_a_subscription_is_renewed_when_it_is_due(subscription):
    before = subscription.renews_at
    assert perform(renew, subscription) == "done"
    subscription.refresh_from_db()
    assert subscription.renews_at == before + PERIOD
    assert perform(renew, subscription) == "not_needed"
    assert set(CHARGES.values()) == {1}


def test_one_that_is_not_due_or_not_running_is_not(subscription):
    Subscription.objects.update(renews_at=Now() + timedelta(minutes=1))
    assert perform(renew, subscription) == "not_needed"
    Subscription.objects.update(renews_at=Now(), state=State.ENDED)
    assert perform(renew, subscription) == "not_needed"


def test_a_customer_who_pauses_meanwhile_wins(subscription, monkeypatch):
    paused = timezone.now() + timedelta(days=7)

    def pause(*args, **kwargs):
        Subscription.objects.update(renews_at=paused)

    monkeypatch.setattr("subscriptions.jobs.charge", pause)
    assert perform(renew, subscription) == "not_needed"
    subscription.refresh_from_db()
    assert subscription.renews_at == paused


def test_missed_periods_are_charged_one_after_the_other(subscription):
    Subscription.objects.update(renews_at=Now() - 2 * PERIOD - timedelta(days=1))
    for _ in range(3):
        assert schedule_renewals.sweep().enqueued == 1
        assert drain() == {"done": 1}
    assert schedule_renewals.sweep().matched == 0
    assert list(CHARGES.values()) == [1, 1, 1]


@pytest.mark.django_db
def test_the_partial_index_finds_what_is_due():
    Subscription.objects.bulk_create(
        Subscription(email="ada@example.com", state=State.RUNNING, renews_at=timezone.now() + n * PERIOD)
        for n in range(1, 5000)
    )
    with connection.cursor() as cursor:
        cursor.execute("ANALYZE")
    assert "subscriptions_due" in Subscription.objects.due().explain()


def test_a_report_is_made_once_for_its_period_and_in_step(policy):
    before = policy.next_run_at
    assert perform(make_report, policy) == "done"
    policy.refresh_from_db()
    assert policy.next_run_at == before + EVERY
    assert perform(make_report, policy) == "not_needed"
    Policy.objects.update(next_run_at=before)
    assert perform(make_report, policy) == "done"
    assert Report.objects.count() == 1


def test_after_a_day_of_downtime_it_is_made_once_and_stays_in_step(policy):
    Policy.objects.update(next_run_at=F("next_run_at") - 6 * EVERY)
    before = policy.next_run_at
    assert perform(make_report, policy) == "done"
    policy.refresh_from_db()
    assert policy.next_run_at == before + EVERY
    assert Report.objects.count() == 1


@pytest.mark.django_db(transaction=True)
def test_the_jitter_of_a_sweep_holds_its_jobs_back(policy):
    assert schedule_reports.sweep().enqueued == 1
    assert drain() == {}
    assert schedule_reports.sweep() == (1, 0, 1, 0)
    tick(timezone.now() + timedelta(minutes=5))
    assert drain()["done"] >= 1
    assert Report.objects.count() == 1


@pytest.mark.django_db(transaction=True)
def test_a_schedule_that_was_due_a_day_long_is_due_once():
    tick()
    drain()
    tomorrow = timezone.now() + timedelta(days=1)
    names = tick(tomorrow)
    assert names.count("schedule_renewals") == 1
    assert drain() == {"done": len(names)}
    assert tick(tomorrow) == []


def test_trials_end(subscription):
    Subscription.objects.update(state=State.TRIAL)
    end_trials()
    subscription.refresh_from_db()
    assert subscription.state == State.ENDED
