"""Steering in the admin: who may do what, where one is afterwards, and what is logged."""

import re
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from django.contrib import admin
from django.contrib.admin.models import LogEntry
from django.contrib.auth.models import Permission, User
from django.contrib.messages import get_messages
from django.db import connection
from django.db.models import BooleanField, Func
from django.http import HttpResponse
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.urls import reverse
from django.utils import timezone

from databases.models import Database
from jobs import job, operations, pauses, registry, sweep
from jobs.admin import ClaimAdmin, ExplainedAdmin, ScheduleAdmin
from jobs.jobs import selfheal_operate
from jobs.models import Claim, Operation, Run, Schedule
from jobs.steering import STEERING
from jobs.sweep import Sweep
from jobs.testing import perform, tick
from tests.cast.jobs import do_task
from tests.cast.models import Task
from tests.machine import within

pytestmark = [pytest.mark.long_on_postgres, pytest.mark.django_db]

SCHEDULES = "/admin/selfheal/schedule/"
CLAIMS = "/admin/selfheal/claim/"
VIEWS = ["view_schedule", "view_claim", "view_run", "view_operation", "view_database"]
ROLES = {
    "nobody": [],
    "reader": VIEWS,
    "pauses": [*VIEWS, "pause_schedule"],
    "runs": [*VIEWS, "run_schedule"],
    "retries": [*VIEWS, "retry_claim"],
    "changes": [*VIEWS, "change_schedule"],
    "acts on what they cannot see": ["pause_schedule", "run_schedule", "retry_claim"],
}


@pytest.fixture
def database(admin_user: User) -> Database:
    return Database.objects.create(name="orders", owner=admin_user)


@pytest.fixture
def waiting(database: Database) -> Claim:
    return claim(database.pk, next_attempt_at=timezone.now() + timedelta(hours=1), attempts=2, last_error="No space")


@pytest.fixture
def aside(admin_user: User) -> Claim:
    database = Database.objects.create(name="invoices", owner=admin_user)
    return claim(database.pk, quarantined_at=timezone.now(), crashes=3, deaths=3, last_error="Killed")


def claim(pk: Any, **values: Any) -> Claim:
    identity = {"job": "create_database", "model": "databases.database", "object_pk": str(pk)}
    return Claim.objects.create(**identity, first_claimed_at=timezone.now(), **values)


def as_role(client: Client, role: str) -> None:
    user = User.objects.create_user(role, is_staff=True)
    user.user_permissions.set(Permission.objects.filter(codename__in=ROLES[role]))
    client.force_login(user)


def on_list(url: str, action: str, *pks: Any, **fields: str) -> Callable[[Client], HttpResponse]:
    return lambda client: client.post(url, {"action": action, "_selected_action": pks, **fields})


def on_page(row: Any, action: str) -> Callable[[Client], HttpResponse]:
    url = reverse(f"admin:{row._meta.app_label}_{row._meta.model_name}_steer", args=[row.pk])
    return lambda client: client.post(url, {"action": action, "job": "create_database", "next": "/admin/"})


def told(response: HttpResponse) -> str:
    """What the page after this one says."""
    return " ".join(str(message) for message in get_messages(response.wsgi_request))


# --- Who may do what --------------------------------------------------------------------------------------------------

# Everything that changes anything, with what it takes.
ACTIONS: dict[str, tuple[str, Callable[..., Callable[[Client], HttpResponse]]]] = {
    "pause": (
        "pause_schedule",
        lambda **_: on_list(SCHEDULES, "pause", "create_database", confirmed="yes", how_long="2h"),
    ),
    "resume": ("pause_schedule", lambda **_: on_list(SCHEDULES, "resume", "delete_database")),
    "run now": ("run_schedule", lambda **_: on_list(SCHEDULES, "run_now", "nightly")),
    "dry run": ("run_schedule", lambda **_: on_list(SCHEDULES, "dry_run", "schedule_databases")),
    "change": (
        "change_schedule",
        lambda **_: lambda client: client.post(f"{SCHEDULES}nightly/change/", {"cron": "1 2 * * *", "limit": ""}),
    ),
    "queue chosen": ("retry_claim", lambda waiting, **_: on_list(CLAIMS, "queue_now", waiting.pk)),
    "release chosen": ("retry_claim", lambda aside, **_: on_list(CLAIMS, "release", aside.pk)),
    "quarantine chosen": (
        "retry_claim",
        lambda waiting, **_: on_list(CLAIMS, "quarantine", waiting.pk, confirmed="yes"),
    ),
    "queue claim": ("retry_claim", lambda waiting, **_: on_page(waiting, "queue_now")),
    "release claim": ("retry_claim", lambda aside, **_: on_page(aside, "release")),
    "quarantine claim": ("retry_claim", lambda waiting, **_: on_page(waiting, "quarantine")),
    "queue row": ("retry_claim", lambda database, **_: on_page(database, "queue_now")),
    "quarantine row": ("retry_claim", lambda database, **_: on_page(database, "quarantine")),
    "run sweep of row": ("run_schedule", lambda database, **_: on_page(database, "run_sweep")),
    "resume job of row": ("pause_schedule", lambda database, **_: on_page(database, "resume")),
}


def everything() -> list[Any]:
    names = ["name", "cron", "limit", "due_runs"]
    return [
        pauses.read(),
        list(Schedule.objects.values_list(*names)),
        list(Claim.objects.values_list("pk", "next_attempt_at", "quarantined_at")),
        LogEntry.objects.count(),
    ]


@pytest.mark.parametrize("role", [*ROLES, "superuser"])
@pytest.mark.parametrize("action", ACTIONS)
def test_each_permission_opens_exactly_its_actions(
    client, admin_client, admin_user, action, role, database, waiting, aside
):
    permission, prepare = ACTIONS[action]
    pauses.pause("delete_database")
    if action == "resume job of row":
        pauses.pause("create_database")
    if role == "superuser":
        client.force_login(admin_user)
    else:
        as_role(client, role)
    before = everything()
    response = prepare(database=database, waiting=waiting, aside=aside)(client)
    may = role == "superuser" or {permission, *VIEWS} <= set(ROLES[role])
    assert response.status_code == (302 if may else 403)
    after = everything()
    assert (after == before) == (not may or action == "dry run")
    # Whoever did something is in the log.
    assert after[-1] - before[-1] == (1 if may and action != "dry run" else 0)
    if action == "dry run" and may:
        assert told(response) == "schedule_databases would queue 0, skip 0 queued, 2 waiting."


@pytest.mark.parametrize("role", ROLES)
def test_what_one_may_not_do_is_not_offered(client, role, database, waiting, aside):
    as_role(client, role)
    pages = [SCHEDULES, f"{SCHEDULES}schedule_databases/change/", CLAIMS]
    pages += [f"{CLAIMS}{each.pk}/change/" for each in (waiting, aside)]
    pages += [f"/admin/databases/database/{database.pk}/change/"]
    shown = "".join(client.get(page).content.decode() for page in pages)
    for action, (permission, _) in STEERING.items():
        if action in ("run_sweep", "resume"):
            continue
        offered = f'value="{action}"' in shown
        assert offered == (permission.partition(".")[2] in ROLES[role] and "view_claim" in ROLES[role]), action


def test_every_action_on_a_page_is_in_the_list_of_what_is_tested():
    assert {*ScheduleAdmin.actions, *ClaimAdmin.actions} <= STEERING.keys()


@pytest.mark.parametrize("action", STEERING)
def test_nothing_is_done_by_a_get(admin_client, action, database, waiting, aside):
    pauses.pause("create_database")
    before = everything()
    for url in (f"/admin/databases/database/{database.pk}/steer/", f"{CLAIMS}{waiting.pk}/steer/"):
        assert admin_client.get(url, {"action": action, "job": "create_database"}).status_code == 405
    for url in (SCHEDULES, CLAIMS):
        admin_client.get(url, {"action": action, "_selected_action": "create_database", "confirmed": "yes"})
    assert everything() == before


# --- Schedules --------------------------------------------------------------------------------------------------------


def test_a_pause_is_asked_about_made_and_shown(admin_client):
    ask = on_list(SCHEDULES, "pause", "do_task", "touch_file", next=f"{SCHEDULES}do_task/change/")(admin_client)
    page = ask.content.decode()
    assert "do_task" in page
    assert 'name="how_long" value="2h"' in page.replace("\n", "")
    assert pauses.read() == {}
    fields = {"confirmed": "yes", "reason": "The <disk> is full.", "how_long": "30m"}
    answer = on_list(SCHEDULES, "pause", "do_task", "touch_file", next=f"{SCHEDULES}do_task/change/", **fields)
    response = answer(admin_client)
    assert response.url == f"{SCHEDULES}do_task/change/"
    pause = pauses.read()["do_task"]
    assert (pause.by, pause.reason) == ("admin", "The <disk> is full.")
    assert timedelta(minutes=29) < pause.until - timezone.now() < timedelta(minutes=31)
    assert "touch_file cannot be paused" in told(response)
    for page in (SCHEDULES, f"{SCHEDULES}do_task/change/"):
        shown = admin_client.get(page).content.decode()
        assert "do_task is paused by admin since" in shown
        assert "Reason: The &lt;disk&gt; is full." in shown
    assert "Reason" in str(LogEntry.objects.get(object_id="do_task").change_message)
    # It stops its sweep too.
    assert "do_task is paused" in admin_client.get(f"{SCHEDULES}schedule_tasks/change/").content.decode()


def test_until_resumed_is_without_an_end_and_an_unknown_time_is_refused(admin_client):
    on_list(SCHEDULES, "pause", "do_task", confirmed="yes", how_long="")(admin_client)
    assert pauses.read()["do_task"].until is None
    response = on_list(SCHEDULES, "pause", "delete_task", confirmed="yes", how_long="9y")(admin_client)
    assert response.status_code == 200
    assert list(pauses.read()) == ["do_task"]


def test_the_list_of_schedules_asks_as_often_for_many_pauses_as_for_none(admin_client):
    admin_client.get(SCHEDULES)
    with CaptureQueriesContext(connection) as none:
        admin_client.get(SCHEDULES)
    for name in ("do_task", "delete_task", "nightly", "schedule_keyed"):
        pauses.pause(name, by="ada")
    with CaptureQueriesContext(connection) as many:
        assert admin_client.get(SCHEDULES).content.decode().count("is paused by ada") == 6
    # One more, for who paused them and why.
    assert len(many) == len(none) + 1


def test_what_cannot_be_done_to_a_schedule_says_why(admin_client):
    assert "nightly was not paused" in told(on_list(SCHEDULES, "resume", "nightly")(admin_client))
    assert "do_task has no schedule" in told(on_list(SCHEDULES, "run_now", "do_task")(admin_client))
    assert "nightly is no sweep" in told(on_list(SCHEDULES, "dry_run", "nightly")(admin_client))
    pauses.pause("do_task")
    assert "begins when the pause ends" in told(on_list(SCHEDULES, "run_now", "schedule_tasks")(admin_client))


def test_a_dry_run_of_all_waits_once_for_a_redis_that_hangs(admin_client, hanging_redis):
    sweeps = [each.name for each in registry.declared() if isinstance(each, Sweep)]
    assert len(sweeps) > 5
    with within(1):
        said = told(on_list(SCHEDULES, "dry_run", *sweeps)(admin_client))
    assert said.count("Redis did not answer") == 1
    assert "was not asked" in said


def test_a_dry_run_with_redis_away_says_so(admin_client, refusing_redis):
    assert "Redis did not answer" in told(on_list(SCHEDULES, "dry_run", "schedule_tasks")(admin_client))


class NeverEnds(Func):
    """A condition on a row that takes a minute, as one does that reads all of another table without an index."""

    template = "pg_sleep(60) IS NOT NULL"
    output_field = BooleanField()

    def as_sqlite(self, compiler: Any, connection: Any, **context: Any) -> Any:
        count = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 300000000) SELECT count(*) FROM n"
        return self.as_sql(compiler, connection, template=f"({count}) > 0", **context)


def test_a_dry_run_of_a_table_that_is_slow_to_read_is_answered_within_a_second(admin_client, task, declaring):
    made = job(name="slow_work")(lambda row: None)
    sweep(made, cron="0 0 1 1 *", name="schedule_slow_work")(lambda: Task.objects.filter(NeverEnds()))
    for name in ("schedule_slow_work", "schedule_tasks"):
        Schedule.objects.get_or_create(name=name)
    with within(1):
        said = told(on_list(SCHEDULES, "dry_run", "schedule_slow_work", "schedule_tasks")(admin_client))
    assert "schedule_slow_work would queue at least 0" in said
    assert "manage.py jobs sweep schedule_slow_work --dry-run" in said
    assert "was not asked" in said
    # Nothing is left of the limit.
    assert "would queue 1," in told(on_list(SCHEDULES, "dry_run", "schedule_tasks")(admin_client))
    if connection.vendor == "postgresql":
        with connection.cursor() as cursor:
            cursor.execute("SHOW statement_timeout")
            assert cursor.fetchone() == ("0",)


@pytest.mark.django_db(transaction=True)
def test_a_dry_run_says_how_far_it_has_come_when_its_time_is_over(admin_client, declaring):
    made = job(name="much_work")(lambda row: None)
    sweep(made, cron="0 0 1 1 *", name="schedule_much_work", batch_size=1)(Task.objects.pending)
    Schedule.objects.create(name="schedule_much_work")
    tasks = Task.objects.bulk_create(Task() for _ in range(20_000))
    # So that each batch asks which of its rows are claimed.
    Claim.objects.create(job="other", model="cast.task", object_pk=tasks[0].pk, first_claimed_at=timezone.now())
    with within(1):
        said = told(on_list(SCHEDULES, "dry_run", "schedule_much_work")(admin_client))
    assert 0 < int(re.findall(r"would queue at least (\d+), skip", said)[0]) < 20_000


# --- Claims -----------------------------------------------------------------------------------------------------------


def test_one_is_back_in_the_same_filtered_list(admin_client, waiting):
    url = f"{CLAIMS}?state=waiting&q=space"
    assert on_list(url, "queue_now", waiting.pk)(admin_client).url == url
    page = admin_client.get(f"{CLAIMS}{waiting.pk}/change/?_changelist_filters=state%3Ddue%26q%3Dspace")
    assert f'name="next" value="{CLAIMS}?state=due&amp;q=space"' in page.content.decode()


def test_nobody_is_led_elsewhere(admin_client, database):
    url = f"/admin/databases/database/{database.pk}/steer/"
    for elsewhere in ("https://evil.example/", "//evil.example/", "javascript:alert(1)"):
        response = admin_client.post(url, {"action": "queue_now", "job": "create_database", "next": elsewhere})
        assert response.url == "/admin/"
        response = on_list(SCHEDULES, "resume", "nightly", next=elsewhere)(admin_client)
        assert response.url == SCHEDULES


def test_quarantining_is_confirmed_first(admin_client, waiting):
    page = on_list(CLAIMS, "quarantine", waiting.pk)(admin_client).content.decode()
    assert "1 row is set aside" in page
    assert f'name="_selected_action" value="{waiting.pk}"' in page
    waiting.refresh_from_db()
    assert waiting.quarantined_at is None
    response = on_list(CLAIMS, "quarantine", waiting.pk, confirmed="yes")(admin_client)
    waiting.refresh_from_db()
    assert waiting.quarantined_at
    assert told(response) == "1 row is quarantined."


def test_what_is_worked_on_is_counted_as_not_changed(admin_client, waiting, database):
    at_work = claim("9", lease_key="x", lease_expires_at=timezone.now() + timedelta(hours=1), token="x")
    response = on_list(CLAIMS, "quarantine", waiting.pk, at_work.pk, confirmed="yes")(admin_client)
    assert told(response).startswith("1 row is quarantined. 1 row stays as it is: it is being worked on")
    at_work.refresh_from_db()
    assert at_work.quarantined_at is None


@pytest.fixture
def many(monkeypatch: pytest.MonkeyPatch) -> None:
    """More claims than are changed in a request."""
    monkeypatch.setattr(operations, "AT_ONCE", 5)
    monkeypatch.setattr(operations, "BATCH", 4)
    for pk in range(12):
        claim(pk, quarantined_at=timezone.now(), last_error="Killed" if pk else "Other")


@pytest.mark.parametrize("action", ["release", "quarantine"])
def test_more_than_a_request_can_bear_is_an_operation(admin_client, many, action):
    state = "quarantined" if action == "release" else "due"
    if action == "quarantine":
        Claim.objects.update(quarantined_at=None)
    url = f"{CLAIMS}?state={state}&q=killed&job=create_database"
    first = str(Claim.objects.first().pk)
    ask = on_list(url, action, first, select_across="1")
    if action == "quarantine":
        page = ask(admin_client).content.decode()
        assert "11 rows are set aside" in page
        assert 'name="select_across" value="1"' in page
        assert not Operation.objects.exists()
        ask = on_list(url, action, first, select_across="1", confirmed="yes")
    response = ask(admin_client)
    assert response.url == url
    operation = Operation.objects.get()
    assert operation.filter == {"job": "create_database", "state": state, "search": "killed"}
    assert (operation.total, operation.requested_by) == (11, "admin")
    assert f"/admin/selfheal/operation/{operation.pk}/change/" in told(response)
    assert LogEntry.objects.get(content_type__model="operation").object_id == str(operation.pk)
    page = admin_client.get(f"/admin/selfheal/operation/{operation.pk}/change/").content.decode()
    assert "0\N{NO-BREAK SPACE}%" in page
    perform(selfheal_operate, operation)
    assert Claim.objects.matching(**operation.filter).count() == 0
    assert Claim.objects.exclude(last_error="Killed").filter(quarantined_at__isnull=action == "quarantine").count() == 1
    page = admin_client.get("/admin/selfheal/operation/").content.decode()
    assert "100\N{NO-BREAK SPACE}%" in page
    assert admin_client.post(f"/admin/selfheal/operation/{operation.pk}/change/", {"total": 1}).status_code == 403


@pytest.mark.parametrize(("query", "across"), [("attempts__gte=0", "1"), ("state=rubbish", "1"), ("", "0")])
def test_an_operation_is_never_for_more_than_was_seen(admin_client, many, query, across):
    """A filter that an operation does not know, or a thousand boxes that somebody ticked by hand."""
    pks = list(Claim.objects.values_list("pk", flat=True))
    response = on_list(f"{CLAIMS}?{query}", "release", *pks, select_across=across)(admin_client)
    assert "filter them by job, state and search only" in told(response)
    assert not Operation.objects.exists()
    assert Claim.objects.quarantined().count() == 12


# --- Any row's page ---------------------------------------------------------------------------------------------------


def section(client: Client, database: Database) -> str:
    page = client.get(f"/admin/databases/database/{database.pk}/change/").content.decode()
    found = re.search(r'<section class="selfheal".*</section>', page, re.DOTALL)
    return found[0] if found else ""


def test_a_rows_page_says_why_and_mends_it(admin_client, database, waiting):
    tick()
    Run.objects.create(
        job="create_database",
        model="databases.database",
        object_pk=str(database.pk),
        outcome="failed",
        error="OSError: <no> space",
        traceback="Traceback: <deep>",
        started_at=timezone.now() - timedelta(seconds=3),
        finished_at=timezone.now(),
    )
    shown = section(admin_client, database)
    assert "It failed, and is attempted again at" in shown
    assert "OSError: &lt;no&gt; space" in shown
    assert "Traceback: &lt;deep&gt;" in shown
    assert "3.0\N{NO-BREAK SPACE}s" in shown
    assert "1 row needs this job now" in shown
    # Both jobs on databases are explained; the other has nothing to do, and is folded.
    assert "<h3>delete_database</h3>" in shown
    assert shown.count("<details open>") == 1
    on_page(database, "queue_now")(admin_client)
    waiting.refresh_from_db()
    assert waiting.next_attempt_at is None
    assert "create_database: Queue now" in LogEntry.objects.get(object_id=str(database.pk)).change_message


def test_who_may_not_see_claims_or_runs_sees_none_of_it(client, database, waiting):
    user = User.objects.create_user("support", is_staff=True)
    user.user_permissions.set(Permission.objects.filter(codename__in=["view_database"]))
    client.force_login(user)
    assert section(client, database) == ""
    user.user_permissions.add(Permission.objects.get(codename="view_claim"))
    perform_fails(database)
    assert "Queue" in section(client, database)
    assert "Traceback" not in section(client, database)
    user.user_permissions.add(Permission.objects.get(codename="view_run"))
    assert "Traceback" in section(client, database)


def perform_fails(database: Database) -> None:
    values = {"job": "create_database", "model": "databases.database", "object_pk": database.pk, "outcome": "failed"}
    Run.objects.create(**values, error="no", traceback="Traceback", finished_at=timezone.now())


def test_the_page_that_adds_a_row_and_a_popup_are_left_alone(admin_client, database):
    assert "selfheal" not in admin_client.get("/admin/databases/database/add/").content.decode().partition("<main")[2]
    popup = admin_client.get(f"/admin/databases/database/{database.pk}/change/?_popup=1").content.decode()
    assert 'class="selfheal"' not in popup


def test_a_strict_content_security_policy_breaks_nothing(admin_client, database, waiting):
    """No script, no style and no handler in the page."""
    ask = on_list(SCHEDULES, "pause", "do_task")(admin_client).content.decode()
    shown = section(admin_client, database) + ask.partition('<div id="content"')[2]
    shown += admin_client.get(f"{SCHEDULES}do_task/change/").content.decode().partition("selfheal-buttons")[2]
    assert "<form" in shown
    assert not re.search(r"<script(?! src)|<style|\sstyle=|\son\w+=", shown.partition("</footer>")[0])


def test_a_row_or_a_job_that_is_gone_is_no_error(admin_client, database, waiting):
    steer = on_page(waiting, "queue_now")
    waiting.delete()
    assert "not there any more" in told(steer(admin_client))
    url = f"/admin/databases/database/{database.pk}/steer/"
    assert admin_client.post(url, {"action": "queue_now", "job": "do_task"}).status_code == 404
    gone = Claim.objects.create(job="taken_out", model="x.y", object_pk="1", first_claimed_at=timezone.now())
    page = admin_client.get(f"{CLAIMS}{gone.pk}/change/").content.decode()
    assert "No job named taken_out is declared any more" in page


@pytest.mark.parametrize("away", ["hanging_redis", "refusing_redis"])
def test_with_redis_away_a_rows_page_answers_within_a_second(request, admin_client, database, away):
    admin_client.get("/admin/")
    request.getfixturevalue(away)
    # Two jobs are explained, and Redis is asked once.
    with within(1):
        assert "Redis does not answer" in section(admin_client, database)


def test_any_model_admin_can_be_explained(admin_user, rf):
    """Also one with a template of its own, of a proxy, on a site without the pages of operators."""
    site = admin.AdminSite("admin")
    task = Task.objects.create()
    request = rf.get("/")
    request.user = admin_user
    shown = list(ExplainedAdmin(Task, site).explanations(task))
    assert [each.job for each in shown] == ["delete_task", "do_task"]
    assert do_task.name in {each.job for each in shown}
