"""The admin pages of backups and their policies, asked as a browser asks."""

from datetime import timedelta

import pytest
from django.contrib.admin.models import LogEntry
from django.contrib.auth.models import Permission
from django.urls import reverse
from django.utils import timezone

from backups.models import Backup, BackupPolicy, Restore
from databases.models import Database

pytestmark = pytest.mark.django_db
State = Backup.State


@pytest.fixture
def database(admin_user) -> Database:
    return Database.objects.create(name="shop", owner=admin_user, state=Database.State.READY)


@pytest.fixture
def policy(database) -> BackupPolicy:
    return BackupPolicy.objects.create(database=database, every=timedelta(hours=1))


def page(name: str, *arguments: int) -> str:
    return reverse(f"admin:backups_{name}", args=arguments)


def test_every_page_opens(admin_client, admin_user, policy):
    backup = Backup.objects.create(database=policy.database, policy=policy, size=2048)
    restore = Restore.objects.create(database=policy.database, backup=backup, requested_by=admin_user)
    for model, row in (("backuppolicy", policy), ("backup", backup), ("restore", restore)):
        for url in (page(f"{model}_changelist"), page(f"{model}_change", row.pk)):
            assert admin_client.get(url).status_code == 200
    assert "2.0" in admin_client.get(page("backup_change", backup.pk)).content.decode()


def test_to_add_a_backup_is_to_have_one_taken(admin_client, database, redis, django_capture_on_commit_callbacks):
    with django_capture_on_commit_callbacks(execute=True):
        response = admin_client.post(page("backup_add"), {"database": database.pk})
    assert response.status_code == 302
    backup = Backup.objects.get()
    assert (backup.database, backup.state, backup.keep_until) == (database, State.PENDING, None)
    assert redis.lrange("rq:queue:default", 0, -1) == [f"take_backup-{backup.pk}".encode()]


def test_a_policy_of_every_zero_minutes_is_refused_at_its_field(admin_client, database):
    form = {"database": database.pk, "every": "0", "keep_for": "7 00:00:00", "next_run_at_0": "2026-01-01"}
    response = admin_client.post(page("backuppolicy_add"), {**form, "next_run_at_1": "00:00:00"})
    assert response.context["adminform"].form.errors == {
        "every": ["A policy runs at most every five minutes. Choose five minutes or more."]
    }


def test_an_edit_leaves_alone_what_a_job_has_moved_meanwhile(admin_client, policy):
    url = page("backuppolicy_change", policy.pk)
    form = admin_client.get(url).context["adminform"].form
    fields = {name: form[name].value() for name in ("every", "cron", "keep_for")}
    due = timezone.localtime(policy.next_run_at).replace(microsecond=0)
    moved = policy.next_run_at + timedelta(hours=1)
    BackupPolicy.objects.update(next_run_at=moved)
    at = {"next_run_at_0": due.date(), "next_run_at_1": due.time()}
    shown = {**at, **{f"initial-{name}": value for name, value in at.items()}}
    sent = {**fields, **shown, "is_enabled": "on", "keep_for": "1 00:00:00"}
    assert admin_client.post(url, sent).status_code == 302
    policy.refresh_from_db()
    assert (policy.keep_for, policy.next_run_at) == (timedelta(days=1), moved)


@pytest.mark.parametrize("is_said_when", [False, True])
def test_another_rhythm_begins_now_unless_it_is_said_when(admin_client, policy, is_said_when):
    policy.every = timedelta(days=30)
    policy.next_run_at = timezone.now().replace(microsecond=0) + timedelta(days=29)
    policy.save()
    shown = timezone.localtime(policy.next_run_at)
    due = shown - timedelta(days=1) if is_said_when else shown
    sent = {"every": "00:05:00", "cron": "", "keep_for": "7 00:00:00", "is_enabled": "on"}
    sent |= {"initial-next_run_at_0": shown.date(), "initial-next_run_at_1": shown.time()}
    sent |= {"next_run_at_0": due.date(), "next_run_at_1": due.time()}
    assert admin_client.post(page("backuppolicy_change", policy.pk), sent).status_code == 302
    policy.refresh_from_db()
    assert policy.every == timedelta(minutes=5)
    assert policy.next_run_at == due if is_said_when else policy.next_run_at <= timezone.now()


@pytest.mark.parametrize("days", [10_000, 100_000_000, 999_999_999])
def test_a_policy_for_longer_than_anything_lasts_is_refused_at_its_fields(admin_client, database, days):
    form = {"database": database.pk, "next_run_at_0": "2026-01-01", "next_run_at_1": "00:00:00"}
    for field, other in (("every", "keep_for"), ("keep_for", "every")):
        sent = {**form, field: f"{days} 00:00:00", other: "9999 00:00:00"}
        errors = admin_client.post(page("backuppolicy_add"), sent).context["adminform"].form.errors
        assert errors == {field: ["Choose 9,999 days or less."]}


def test_policies_are_disabled_and_enabled_and_that_is_logged(admin_client, policy):
    for action, is_enabled in (("disable", False), ("enable", True)):
        admin_client.post(page("backuppolicy_changelist"), {"action": action, "_selected_action": policy.pk})
        policy.refresh_from_db()
        assert policy.is_enabled == is_enabled
    assert list(LogEntry.objects.order_by("pk").values_list("change_message", flat=True)) == ["Disabled.", "Enabled."]


def test_chosen_backups_are_to_be_deleted_once_that_is_confirmed_and_no_row_is(admin_client, database):
    backup, kept = (Backup.objects.create(database=database, state=State.READY) for _ in range(2))
    sent = {"action": "delete_chosen", "_selected_action": backup.pk}
    asked = admin_client.post(page("backup_changelist"), sent).content.decode()
    assert "These backups, files and rows, will be deleted. This cannot be undone." in asked
    assert str(backup) in asked
    assert str(kept) not in asked
    backup.refresh_from_db()
    assert backup.state == State.READY
    admin_client.post(page("backup_changelist"), {**sent, "confirmed": "yes"})
    backup.refresh_from_db()
    kept.refresh_from_db()
    assert kept.state == State.READY
    assert backup.state == State.DELETING
    assert LogEntry.objects.get().change_message == "Asked for its deletion."
    assert admin_client.post(page("backup_delete", backup.pk), {"post": "yes"}).status_code == 403


def test_whoever_may_only_view_may_do_nothing(client, django_user_model, database):
    user = django_user_model.objects.create_user("viewer", is_staff=True)
    user.user_permissions.add(*Permission.objects.filter(codename__in=["view_backup", "view_backuppolicy"]))
    client.force_login(user)
    backup = Backup.objects.create(database=database, state=State.READY)
    sent = {"action": "delete_chosen", "_selected_action": backup.pk, "confirmed": "yes"}
    client.post(page("backup_changelist"), sent)
    assert client.post(page("backup_add"), {"database": database.pk}).status_code == 403
    backup.refresh_from_db()
    assert backup.state == State.READY
    assert Backup.objects.count() == 1
