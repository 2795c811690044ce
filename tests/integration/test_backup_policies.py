"""Policies become backups: one for each due time, whatever is killed, and one for a day that nobody was there."""

from datetime import UTC, datetime, timedelta

import pytest
from django.core.exceptions import ValidationError
from django.utils import timezone

from backups.jobs import run_backup_policy, schedule_backup_policies
from backups.models import Backup, BackupPolicy
from databases.models import Database
from jobs.models import Claim
from jobs.testing import perform
from tests.integration.killing import killed

pytestmark = pytest.mark.django_db
HOUR = timedelta(hours=1)


@pytest.fixture
def database(django_user_model) -> Database:
    owner = django_user_model.objects.create_user("ada")
    return Database.objects.create(name="shop", owner=owner, state=Database.State.READY)


@pytest.fixture
def policy(database) -> BackupPolicy:
    """One that has been due for ten minutes."""
    due = timezone.now() - timedelta(minutes=10)
    return BackupPolicy.objects.create(database=database, every=HOUR, keep_for=timedelta(days=3), next_run_at=due)


def taken(backup: Backup) -> None:
    Backup.objects.filter(pk=backup.pk).update(state=Backup.State.READY)


@pytest.mark.django_db(transaction=True)
def test_one_that_is_due_asks_for_a_backup_and_moves_on(policy, queued):
    assert perform(run_backup_policy, policy) == "done"

    backup = Backup.objects.get()
    assert (backup.database, backup.policy, backup.state) == (policy.database, policy, Backup.State.PENDING)
    assert backup.keep_until == backup.created_at + timedelta(days=3)
    assert queued() == [f"take_backup-{backup.pk}"]
    due = policy.next_run_at
    policy.refresh_from_db()
    assert policy.next_run_at == due + HOUR
    assert perform(run_backup_policy, policy) == "not_needed"


def test_a_day_without_anybody_costs_one_backup_and_the_beat_goes_on(policy):
    policy.next_run_at -= timedelta(days=1)
    policy.save()
    perform(run_backup_policy, policy)
    perform(run_backup_policy, policy)
    assert Backup.objects.count() == 1
    missed = policy.next_run_at
    policy.refresh_from_db()
    assert timezone.now() < policy.next_run_at <= timezone.now() + HOUR
    assert (policy.next_run_at - missed) % HOUR == timedelta(0)


def test_a_storage_that_is_away_for_a_day_costs_one_backup_too(policy):
    for _ in range(3):
        assert perform(run_backup_policy, policy) == "done"
        BackupPolicy.objects.update(next_run_at=timezone.now())
    backup = Backup.objects.get()
    taken(backup)
    assert perform(run_backup_policy, policy) == "done"
    assert Backup.objects.count() == 2


@pytest.mark.parametrize("change", ["disabled", "later", "database deleting", "database not ready"])
def test_one_that_needs_nothing_asks_for_nothing(policy, change):
    if change == "disabled":
        BackupPolicy.objects.update(is_enabled=False)
    elif change == "later":
        BackupPolicy.objects.update(next_run_at=timezone.now() + HOUR)
    else:
        Database.objects.update(state=change.removeprefix("database ").replace("not ready", "pending"))
    assert perform(run_backup_policy, policy) == "not_needed"
    assert not schedule_backup_policies().exists()
    assert not Backup.objects.exists()


@pytest.mark.parametrize("state", ["deleted", "failed"])
def test_one_whose_database_is_gone_is_disabled_and_looked_at_no_more(policy, state):
    Database.objects.update(state=state)
    assert list(schedule_backup_policies()) == [policy]
    assert perform(run_backup_policy, policy) == "done"
    policy.refresh_from_db()
    assert not policy.is_enabled
    assert not schedule_backup_policies().exists()
    assert not Backup.objects.exists()


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize(
    ("when", "function"),
    [
        ("before", "backups.models.BackupPolicy.next_after"),
        ("after", "backups.models.BackupPolicy.next_after"),
        # Both are written, and nothing is committed.
        ("before", "jobs.job.Job.enqueue"),
        ("after", "jobs.job.Job.enqueue"),
        # Committed; the hint is not sent, or the claim not settled.
        ("before", "jobs.enqueue.push_id"),
        ("before", "jobs.claims.settle"),
    ],
    ids=str,
)
def test_killed_at_any_step_it_neither_skips_one_nor_doubles_one(policy, when, function, tmp_path):
    due = policy.next_run_at
    assert killed(tmp_path, when, function, perform, run_backup_policy, policy)

    committed = function in ("jobs.enqueue.push_id", "jobs.claims.settle")
    assert Backup.objects.count() == committed
    Claim.objects.update(lease_expires_at=timezone.now() - HOUR)
    assert perform(run_backup_policy, policy) == ("not_needed" if committed else "done")
    assert Backup.objects.count() == 1
    policy.refresh_from_db()
    assert policy.next_run_at == due + HOUR


@pytest.mark.parametrize(
    ("said", "field"),
    [
        ({"every": timedelta(0)}, "every"),
        ({"every": timedelta(minutes=-5)}, "every"),
        ({"every": timedelta(minutes=4, seconds=59)}, "every"),
        ({"cron": "15 3 *"}, "cron"),
        ({"cron": "15 3 * * * *"}, "cron"),
        ({"cron": "at noon on a day"}, "cron"),
        ({"cron": "0 0 30 2 *"}, "cron"),
        ({"every": HOUR, "keep_for": timedelta(0)}, "keep_for"),
        ({"every": timedelta(days=10_000)}, "every"),
        ({"every": HOUR, "keep_for": timedelta(days=10_000)}, "keep_for"),
        ({"every": HOUR, "cron": "15 3 * * *"}, "every"),
        ({}, "every"),
    ],
    ids=str,
)
def test_what_no_policy_can_be_is_refused_in_words(database, said, field):
    with pytest.raises(ValidationError) as refused:
        BackupPolicy(database=database, **said).full_clean()
    assert list(refused.value.message_dict) == [field]


def test_the_shortest_and_a_daily_one_are_accepted(database):
    BackupPolicy(database=database, every=timedelta(minutes=5)).full_clean()
    BackupPolicy(database=database, cron="15 3 * * *").full_clean()


def test_a_daily_one_runs_at_that_time_where_the_site_is(database, settings):
    settings.TIME_ZONE = "Europe/Berlin"
    policy = BackupPolicy(database=database, cron="15 3 * * *")
    assert policy.next_after(datetime(2026, 7, 1, 12, tzinfo=UTC)) == datetime(2026, 7, 2, 1, 15, tzinfo=UTC)
    assert policy.next_after(datetime(2026, 12, 1, 12, tzinfo=UTC)) == datetime(2026, 12, 2, 2, 15, tzinfo=UTC)


def test_a_row_that_no_form_would_take_does_not_stop_the_others(policy):
    broken = BackupPolicy.objects.create(database=policy.database, every=timedelta(0))
    assert perform(run_backup_policy, broken) == "failed"
    assert perform(run_backup_policy, policy) == "done"
    assert Backup.objects.get().policy == policy


@pytest.mark.django_db(transaction=True)
def test_a_thousand_in_one_second_are_spread_out_and_each_asks_once(policy, delayed):
    BackupPolicy.objects.bulk_create([BackupPolicy(database=policy.database, every=HOUR) for _ in range(999)])
    assert schedule_backup_policies.sweep().enqueued == 1000
    assert schedule_backup_policies.sweep().enqueued == 0
    times = sorted(delayed().values())
    assert len(times) == 1000
    assert 60 < times[-1] - times[0] <= 120
