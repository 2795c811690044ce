"""Schedules, claims and runs in the admin: what an operator can do there, and what they cannot overwrite."""

from datetime import timedelta
from typing import Any

import pytest
from django.contrib.admin.models import LogEntry
from django.contrib.auth.models import Permission, User
from django.test import Client
from django.urls import reverse
from django.utils import timezone
from redis import Redis

from config.servers import RedisServer
from jobs.models import Claim, Run, Schedule
from jobs.testing import tick
from tests.cast.models import Task

pytestmark = pytest.mark.django_db(transaction=True)


def claim_of(task: Task, **values: Any) -> Claim:
    identity = {"job": "do_task", "model": "cast.task", "object_pk": str(task.pk)}
    return Claim.objects.create(**identity, first_claimed_at=timezone.now(), **values)


def backing_off(task: Task) -> Claim:
    return claim_of(task, attempts=7, next_attempt_at=timezone.now() + timedelta(hours=1), last_error="No space left")


def quarantined(task: Task) -> Claim:
    return claim_of(task, crashes=3, deaths=3, quarantined_at=timezone.now(), last_error="Killed by SIGKILL")


def change_page(row: Any) -> str:
    return reverse(f"admin:selfheal_{row._meta.model_name}_change", args=[row.pk])


def press(client: Client, claim: Claim, action: str) -> Any:
    """Press a button on the page of a claim."""
    url = reverse("admin:selfheal_claim_steer", args=[claim.pk])
    return client.post(url, {"action": action, "job": claim.job, "next": reverse("admin:selfheal_claim_changelist")})


def test_every_page_can_be_read(admin_client: Client) -> None:
    claim = quarantined(Task.objects.create())
    run = Run.objects.create(
        job="do_task", model="cast.task", object_pk="1", outcome="failed", error="<b>no</b>", finished_at=timezone.now()
    )
    schedule = Schedule.objects.get(name="schedule_tasks")
    for page in ("schedule", "claim", "run"):
        assert admin_client.get(reverse(f"admin:selfheal_{page}_changelist"), {"q": "task"}).status_code == 200
    for state in ("leased", "due", "waiting", "quarantined"):
        page = admin_client.get(reverse("admin:selfheal_claim_changelist"), {"state": state}).content.decode()
        assert ("Killed by SIGKILL" in page) == (state == "quarantined"), state
    for row in (claim, run, schedule):
        assert admin_client.get(change_page(row)).status_code == 200
    assert "<b>no</b>" not in admin_client.get(change_page(run)).content.decode()


def test_queue_now_ends_the_backing_off_and_queues(admin_client: Client, redis: Redis) -> None:
    task = Task.objects.create()
    claim = backing_off(task)
    press(admin_client, claim, "queue_now")
    claim.refresh_from_db()
    assert (claim.next_attempt_at, claim.attempts) == (None, 7)
    assert redis.lrange("rq:queue:default", 0, -1) == [f"do_task-{task.pk}".encode()]
    assert LogEntry.objects.filter(object_id=str(claim.pk)).exists()


def test_release_ends_the_quarantine_and_forgets_what_was_counted(admin_client: Client, redis: Redis) -> None:
    task = Task.objects.create()
    claim = quarantined(task)
    press(admin_client, claim, "release")
    claim.refresh_from_db()
    assert (claim.quarantined_at, claim.crashes, claim.deaths) == (None, 0, 0)
    assert redis.lrange("rq:queue:default", 0, -1) == [f"do_task-{task.pk}".encode()]


def test_actions_reach_only_the_claims_that_they_are_for(admin_client: Client) -> None:
    waiting, aside = backing_off(Task.objects.create()), quarantined(Task.objects.create())
    chosen = {"_selected_action": [waiting.pk, aside.pk]}
    changelist = reverse("admin:selfheal_claim_changelist")
    admin_client.post(changelist, {"action": "queue_now", **chosen})
    aside.refresh_from_db()
    assert aside.quarantined_at is not None
    Claim.objects.filter(pk=waiting.pk).update(next_attempt_at=timezone.now() + timedelta(hours=1))
    admin_client.post(changelist, {"action": "release", **chosen})
    waiting.refresh_from_db()
    aside.refresh_from_db()
    assert (waiting.attempts, aside.quarantined_at) == (7, None)
    assert waiting.next_attempt_at is not None


def test_release_with_redis_away_is_not_lost(admin_client: Client, redis_server: RedisServer, redis: Redis) -> None:
    task = Task.objects.create()
    claim = quarantined(task)
    redis_server.kill()
    assert press(admin_client, claim, "release").status_code == 302
    redis_server.start()
    tick()
    assert redis.lrange("rq:queue:default", 0, -1) == [f"do_task-{task.pk}".encode()]


def test_sending_a_claims_page_writes_nothing_of_it_back(admin_client: Client) -> None:
    claim = backing_off(Task.objects.create())
    form = {"attempts": "0", "holder": "me", "lease_key": "mine", "token": "mine"}
    assert admin_client.post(change_page(claim), form).status_code == 403
    claim.refresh_from_db()
    assert (claim.attempts, claim.holder, claim.lease_key, claim.token) == (7, "", None, "")


def test_a_cron_override_is_checked_and_overwrites_no_more_than_itself(admin_client: Client) -> None:
    schedule = Schedule.objects.get(name="schedule_tasks")
    page = admin_client.post(change_page(schedule), {"cron": "whenever", "limit": ""})
    assert "no cron expression" in page.content.decode()
    # What the tick writes while the page is open stays.
    moment = timezone.now() + timedelta(days=1)
    Schedule.objects.filter(pk=schedule.pk).update(next_run_at=moment)
    admin_client.post(change_page(schedule), {"cron": "*/5 * * * *", "limit": "7"})
    schedule.refresh_from_db()
    assert (schedule.cron, schedule.limit, schedule.next_run_at) == ("*/5 * * * *", 7, moment)


def test_a_limit_that_would_queue_nothing_is_refused_and_says_what_to_do_instead(admin_client: Client) -> None:
    schedule = Schedule.objects.get(name="schedule_tasks")
    page = admin_client.post(change_page(schedule), {"cron": "", "limit": "0"})
    assert "pause it instead" in page.content.decode()
    schedule.refresh_from_db()
    assert schedule.limit is None
    admin_client.post(change_page(schedule), {"cron": "", "limit": "1"})
    schedule.refresh_from_db()
    assert schedule.limit == 1


@pytest.mark.parametrize(
    ("name", "offered"),
    [("schedule_tasks", {"cron", "limit"}), ("nightly", {"cron"}), ("do_task", set()), ("touch_file", set())],
)
def test_only_what_has_a_schedule_can_be_given_another_one(admin_client: Client, name: str, offered: set[str]) -> None:
    schedule, _ = Schedule.objects.get_or_create(name=name)
    page = admin_client.get(change_page(schedule)).content.decode()
    assert {field for field in ("cron", "limit") if f'name="{field}"' in page} == offered
    admin_client.post(change_page(schedule), {"cron": "5 4 * * *", "limit": "7"})
    schedule.refresh_from_db()
    assert {field for field in ("cron", "limit") if getattr(schedule, field)} == offered
    # Nor does one that it was given before stand in the list as if it ran then.
    Schedule.objects.filter(pk=name).update(cron="5 4 * * *")
    page = admin_client.get(reverse("admin:selfheal_schedule_changelist")).content.decode()
    assert page.count("5\N{NO-BREAK SPACE}4") == len(offered & {"cron"})


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        ("schedule", ["q", "o", "p", "name"]),
        ("claim", ["q", "o", "p", "job", "state", "model", "id"]),
        ("run", ["q", "o", "p", "job", "error", "outcome__exact", "finished_at__gte"]),
        ("operation", ["o", "p", "action__exact"]),
        ("failure", ["q", "p", "job", "period"]),
        ("health", ["q"]),
    ],
)
def test_no_parameter_is_too_odd_to_be_answered(admin_client: Client, model: str, parameters: list[str]) -> None:
    admin_client.raise_request_exception = False
    page = reverse(f"admin:selfheal_{model}_changelist")
    for value in ("\0", "disk\0", "9" * 30, "9" * 5000, "-1", "1e999"):
        for parameter in parameters:
            answer = admin_client.get(page, {parameter: value}).status_code
            assert answer in ([400] if "\0" in value else [200, 302]), (parameter, value[:40])
        if model in ("schedule", "claim"):
            for action in ("pause", "dry_run") if model == "schedule" else ("release", "quarantine"):
                answer = admin_client.post(page, {"action": action, "_selected_action": [value]}).status_code
                assert answer in (200, 302, 400), (action, value[:40])
    if model in ("schedule", "claim", "run", "operation"):
        for value in ("%00", "x%00", "9" * 30, "-1"):
            for more in ("change", "history"):
                assert admin_client.get(f"{page}{value}/{more}/").status_code == 302, (value, more)


def test_run_now_owes_a_run_which_the_next_tick_queues(admin_client: Client, redis: Redis) -> None:
    tick()
    # Some come due every other second.
    Schedule.objects.update(next_run_at=timezone.now() + timedelta(hours=1))
    chosen = {"action": "run_now", "_selected_action": ["nightly", "do_task"]}
    admin_client.post(reverse("admin:selfheal_schedule_changelist"), chosen)
    assert tick() == ["nightly"]
    assert redis.lrange("rq:queue:default", 0, -1) == [b"nightly"]


def test_who_may_only_look_can_only_look(client: Client) -> None:
    user = User.objects.create_user("reader", is_staff=True)
    user.user_permissions.set(Permission.objects.filter(codename__in=["view_claim", "view_run", "view_schedule"]))
    client.force_login(user)
    claim = quarantined(Task.objects.create())
    schedule = Schedule.objects.get(name="nightly")
    assert "Release from quarantine" not in client.get(change_page(claim)).content.decode()
    assert press(client, claim, "release").status_code == 403
    assert client.post(change_page(schedule), {"cron": "* * * * *"}).status_code == 403
    changelist = reverse("admin:selfheal_claim_changelist")
    response = client.post(changelist, {"action": "release", "_selected_action": [claim.pk]})
    assert response.status_code == 403
    claim.refresh_from_db()
    assert claim.quarantined_at is not None


def test_nobody_adds_or_deletes_what_the_library_writes(admin_client: Client) -> None:
    claim = backing_off(Task.objects.create())
    for name in ("claim", "run", "schedule"):
        assert admin_client.get(reverse(f"admin:selfheal_{name}_add")).status_code == 403
    assert (
        admin_client.post(reverse("admin:selfheal_claim_delete", args=[claim.pk]), {"post": "yes"}).status_code == 403
    )
    assert Claim.objects.filter(pk=claim.pk).exists()


def test_times_are_shown_with_their_zone_and_how_long_ago_they_were(admin_client):
    finished = timezone.now() - timedelta(minutes=3)
    run = Run.objects.create(
        job="do_task", model="cast.task", object_pk="1", outcome="failed", started_at=finished, finished_at=finished
    )
    Schedule.objects.filter(name="schedule_tasks").update(last_finished_at=finished)
    said = f"{finished:%Y-%m-%d %H:%M:%S} UTC</time> (3\N{NO-BREAK SPACE}minutes ago)"
    for page in (
        reverse("admin:selfheal_run_changelist"),
        change_page(run),
        reverse("admin:selfheal_schedule_changelist"),
        reverse("admin:selfheal_schedule_change", args=["schedule_tasks"]),
    ):
        assert said in admin_client.get(page).content.decode(), page
