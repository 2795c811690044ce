"""The console, asked as a browser asks: whom it lets in, what it refuses and in which words, and what it never does."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from django.apps import apps
from django.contrib.auth.models import User
from django.template.loader import render_to_string
from django.test import Client
from django.utils import timezone

from backups.forms import PolicyForm
from backups.models import Backup, BackupPolicy
from backups.requests import request_restore
from config.servers import RedisServer
from databases.forms import NameForm
from databases.models import Database, DeployRequest
from databases.requests import request_creation
from tests.console import State, everything

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("backups_folder")]

# What a form of each page is sent with, so that it does something.
DOES = {
    "new_database": {"name": "another", "engine": "sqlite"},
    "connection": {},
    "new_branch": {"name": "another"},
    "delete_database": {"typed": "shop"},
    "withdraw_deploy": {"typed": "shop"},
    "backups": {},
    "new_policy": {"every_number": "1", "every_unit": "hours", "keep_for_number": "7", "keep_for_unit": "days"},
    "policy": {"every_number": "1", "every_unit": "hours", "keep_for_number": "7", "keep_for_unit": "days"},
    "restore": {"name": "another"},
    "delete_backup": {"typed": "shop"},
}
OF_NOBODY = {"databases", "deleted", "new_database", "deploys", "new_deploy"}


@pytest.fixture
def owner() -> User:
    return User.objects.create_user("olga", password="of olga")


@pytest.fixture
def rows(owner):
    return everything(owner)


@pytest.fixture
def client(owner) -> Client:
    """Of the owner."""
    client = Client()
    client.force_login(owner)
    return client


@pytest.fixture
def other() -> Client:
    client = Client()
    client.force_login(User.objects.create_user("otto"))
    return client


@pytest.fixture
def shop(owner) -> Database:
    return Database.objects.create(name="shop", owner=owner, state=State.READY)


@pytest.fixture
def trial(owner, shop) -> Database:
    return Database.objects.create(name="shop_trial", owner=owner, state=State.READY, parent=shop)


@pytest.fixture
def sent(redis, django_capture_on_commit_callbacks) -> Callable[..., tuple[Any, list[str]]]:
    """Send a form, and return the answer and what was queued."""

    def sent(client: Client, path: str, **data: str) -> tuple[Any, list[str]]:
        with django_capture_on_commit_callbacks(execute=True):
            response = client.post(path, data)
        queues = ("default", "background")
        return response, [id.decode() for name in queues for id in redis.lrange(f"rq:queue:{name}", 0, -1)]

    return sent


def everything_there_is() -> dict[str, list[Any]]:
    models = [
        model for label in ("databases", "backups", "selfheal") for model in apps.get_app_config(label).get_models()
    ]
    return {model._meta.label: list(model._default_manager.order_by("pk").values()) for model in models}


def errors(response: Any) -> dict[str, list[str]]:
    assert response.status_code == 200
    return {name: list(said) for name, said in response.context["form"].errors.items()}


# --- Whom it lets in --------------------------------------------------------------------------------------------------


def test_nobody_sees_or_does_anything_without_logging_in(rows, redis):
    before = everything_there_is()
    client = Client()
    paths = [*rows.pages.values(), f"/backups/{rows.backup.pk}/download/"]
    for path in paths:
        assert client.get(path).headers["Location"].startswith("/login/?next=/"), path
    for name, data in DOES.items():
        assert client.post(rows.pages[name], data).headers["Location"].startswith("/login/?next=/"), name
    assert everything_there_is() == before


def test_after_logging_in_one_is_where_one_wanted_to_be(owner):
    client = Client()
    response = client.get("/deploys/", follow=True)
    assert "Log in" in response.content.decode()
    response = client.post(response.request["PATH_INFO"] + "?next=/deploys/", {"username": "olga", "password": "no"})
    assert "correct username and password" in errors(response)["__all__"][0]
    response = client.post("/login/", {"username": "olga", "password": "of olga", "next": "/deploys/"})
    assert response.headers["Location"] == "/deploys/"
    assert client.get("/login/").headers["Location"] == "/"
    assert client.post("/logout/").headers["Location"] == "/login/"
    assert client.get("/").status_code == 302


def test_the_owner_sees_every_page_and_looking_changes_nothing(rows, client, redis):
    before = everything_there_is()
    for name, path in rows.pages.items():
        response = client.get(path)
        assert response.status_code == 200, name
        assert rows.shop.password not in response.content.decode(), name
        assert "a/secret/place" not in response.content.decode(), name
    assert everything_there_is() == before
    assert redis.keys("rq:queue:*") == []


def test_somebody_else_sees_and_does_nothing_of_it(rows, other):
    before = everything_there_is()
    for name, path in rows.pages.items():
        response = other.get(path)
        assert response.status_code == (200 if name in OF_NOBODY else 404), name
        assert rows.shop.name not in response.content.decode(), name
    for name, data in DOES.items():
        if name not in OF_NOBODY:
            assert other.post(rows.pages[name], data).status_code == 404, name
    assert other.get(f"/backups/{rows.backup.pk}/download/").status_code == 404
    deploy = {"branch": rows.trial.pk, "target": rows.shop.pk, "sql": "SELECT 1"}
    assert errors(other.post("/deploys/new/", deploy)).keys() == {"branch", "target"}
    assert everything_there_is() == before


def test_a_form_from_elsewhere_does_nothing(rows, owner):
    before = everything_there_is()
    client = Client(enforce_csrf_checks=True)
    client.force_login(owner)
    for name, data in DOES.items():
        assert client.post(rows.pages[name], data).status_code == 403, name
    assert everything_there_is() == before


def test_every_page_has_one_title_its_headings_in_order_and_no_style_or_script_within(rows, client):
    for name, path in rows.pages.items():
        page = client.get(path).content.decode()
        assert page.count("<h1") == 1, name
        assert "style=" not in page, name
        assert "<script>" not in page, name


def test_what_is_not_there_and_what_went_wrong_is_said_in_the_same_voice(client):
    assert "There is nothing here" in client.get("/databases/shop/").content.decode()
    # Nothing of the request is known to it.
    assert "Something went wrong here" in render_to_string("500.html")


# --- Databases --------------------------------------------------------------------------------------------------------


def test_a_database_is_asked_for(client, owner, sent):
    response, queued = sent(client, "/new/", name="shop", engine="sqlite")
    database = Database.objects.get()
    assert response.headers["Location"] == "/databases/shop/"
    assert (database.owner, database.state, database.engine) == (owner, State.PENDING, "sqlite")
    assert queued == [f"create_database-{database.pk}"]


@pytest.mark.parametrize("outage", ["freeze", "kill"])
def test_it_is_asked_for_while_redis_is_away(client, sent, tmp_path, settings, outage):
    # A server of its own: after one has hung, pushes to it are not tried for a moment, in any test.
    with RedisServer(tmp_path) as server:
        settings.RQ_QUEUES = {name: {"URL": server.url} for name in settings.RQ_QUEUES}
        getattr(server, outage)()
        response, _ = sent(client, "/new/", name="shop", engine="sqlite")
        assert response.status_code == 302
        assert Database.objects.pending().count() == 1
        assert client.get("/databases/shop/").status_code == 200


def test_what_is_wrong_with_a_name_stands_at_it(client, owner, shop):
    Database.objects.create(name="gone", owner=owner, state=State.DELETED)
    for name, sentence in (
        ("", "This field is required."),
        ("../shop", "Use lower-case letters, digits and underscores, and begin with a letter."),
        ("gone", "There is or was a database of this name. Names are not used twice; choose another."),
    ):
        for path in ("/new/", "/databases/shop/branch/"):
            assert errors(client.post(path, {"name": name, "engine": "sqlite"})) == {"name": [sentence]}
    assert Database.objects.count() == 2


def test_a_name_that_somebody_takes_at_the_same_moment_is_refused_as_well(owner):
    form = NameForm({"name": "shop"}, instance=Database(owner=owner))
    assert form.is_valid()
    Database.objects.create(name="shop", owner=owner)
    assert not form.ask(request_creation)
    assert "Names are not used twice" in form.errors["name"][0]


def test_a_name_that_the_engine_keeps_for_itself_is_refused_for_branches_and_restores_too(rows, client):
    for name in ("new_branch", "restore"):
        said = errors(client.post(rows.pages[name], {"name": "postgres"}))
        assert said == {"name": ["PostgreSQL keeps this name for itself. Choose another."]}


def test_postgresql_is_offered_where_there_is_a_server(client, settings, sent):
    settings.DATABASES_POSTGRES_URL = ""
    assert "PostgreSQL" not in client.get("/new/").content.decode()
    assert errors(client.post("/new/", {"name": "shop", "engine": "postgresql"})).keys() == {"engine"}
    settings.DATABASES_POSTGRES_URL = "postgresql://somewhere/postgres"
    assert "PostgreSQL" in client.get("/new/").content.decode()
    sent(client, "/new/", name="shop", engine="postgresql")
    assert Database.objects.get().engine == "postgresql"


def test_a_branch_is_asked_for(client, shop, sent):
    response, queued = sent(client, "/databases/shop/branch/", name="shop_trial")
    branch = Database.objects.get(name="shop_trial")
    assert response.headers["Location"] == "/databases/shop_trial/"
    assert (branch.parent, branch.origin, branch.state) == (shop, "copy", State.PENDING)
    assert queued == [f"create_branch-{branch.pk}"]


@pytest.mark.parametrize("state", [state for state in State if state != State.READY])
def test_what_is_not_ready_has_no_branches_backups_or_password(client, shop, state):
    Database.objects.update(state=state)
    for path in ("branch/", "backups/"):
        response = client.post(f"/databases/shop/{path}", {"name": "shop_trial"}, follow=True)
        assert "shop is not ready" in response.content.decode()
    assert client.post("/databases/shop/connection/").headers["Location"] == "/databases/shop/"
    assert Database.objects.count() == 1
    assert not Backup.objects.exists()


def test_a_database_is_deleted_by_typing_its_name(client, shop, sent):
    path = "/databases/shop/delete/"
    assert errors(client.post(path)) == {"typed": ["If you mean it, type shop here."]}
    assert "This is not the name" in errors(client.post(path, {"typed": "Shop"}))["typed"][0]
    assert Database.objects.get().state == State.READY
    response, queued = sent(client, path, typed="shop")
    assert response.headers["Location"] == "/databases/shop/"
    assert Database.objects.get().state == State.DELETING
    assert queued == [f"delete_database-{shop.pk}"]
    # And once is enough.
    assert client.get(path).headers["Location"] == "/databases/shop/"


def test_the_password_is_in_one_answer_which_nobody_keeps(rows, client):
    response = client.post(rows.pages["connection"])
    assert f"postgresql://shop:{rows.shop.password}@127.0.0.1:5432/shop" in response.content.decode()
    assert "no-store" in response.headers["Cache-Control"]


def test_a_row_that_has_failed_says_why_when_that_is_for_its_owner(rows, client):
    waiting = client.get(rows.pages["database_waiting"]).content.decode()
    assert "InUse" not in waiting
    assert "it is in use by psql of shop from" in waiting
    assert "The sessions in shop are ended" in waiting
    assert "in 8\N{NO-BREAK SPACE}minutes" in waiting
    Database.objects.filter(name="shop_waiting").update(sessions_end_at=timezone.now())
    waiting = client.get(rows.pages["database_waiting"]).content.decode()
    assert "At the next attempt the sessions that are still in shop are ended." in waiting
    copied = client.get(rows.pages["database_copied"]).content.decode()
    assert "the sessions that were still in shop were ended: psql of shop from 127.0.0.1 since" in copied
    assert "The last attempt failed" in client.get(rows.pages["backup_taking"]).content.decode()


def test_a_long_list_has_pages_and_asks_no_more_than_a_short_one(client, owner, django_assert_max_num_queries):
    # The session, the user, the count, and the rows with their parents.
    for count in (1, 21):
        parent = None
        for number in range(count):
            parent = Database.objects.create(name=f"n{count}_{number}", owner=owner, parent=parent)
        with django_assert_max_num_queries(4):
            first = client.get("/").content.decode()
    assert "Page 1 of 2" in first
    assert "n1_0" not in first
    assert "n1_0" in client.get("/?page=2").content.decode()


@pytest.mark.parametrize("name", ["database", "deploys", "backups", "backup"])
def test_no_page_asks_for_each_of_its_rows(rows, client, owner, django_assert_max_num_queries, name):
    for number in range(10):
        database = Database.objects.create(name=f"n{number}", owner=owner, parent=rows.shop, state=State.READY)
        DeployRequest.objects.create(branch=database, target=rows.shop, requested_by=owner, sql="SELECT 1")
        Backup.objects.create(database=rows.shop, policy=rows.policy)
    with django_assert_max_num_queries(7):
        assert client.get(rows.pages[name]).status_code == 200


# --- Deploys ----------------------------------------------------------------------------------------------------------


def test_a_deploy_is_asked_for(client, owner, shop, trial, sent):
    form = client.get("/deploys/new/?branch=shop_trial").context["form"]
    assert (form["branch"].initial, form["target"].initial) == (trial, shop.pk)
    sql = "CREATE TABLE orders (id integer)"
    response, queued = sent(client, "/deploys/new/", branch=trial.pk, target=shop.pk, sql=sql)
    deploy = DeployRequest.objects.get()
    assert response.headers["Location"] == f"/deploys/{deploy.pk}/"
    assert (deploy.branch, deploy.target, deploy.sql, deploy.requested_by) == (trial, shop, sql, owner)
    assert queued == [f"deploy-{deploy.pk}"]


def test_what_is_wrong_with_a_deploy_stands_at_its_field(client, shop, trial):
    def asked(**data: object) -> dict[str, list[str]]:
        return errors(client.post("/deploys/new/", {"branch": trial.pk, "target": shop.pk, "sql": "SELECT 1", **data}))

    required = ["This field is required."]
    assert errors(client.post("/deploys/new/")) == {"branch": required, "target": required, "sql": required}
    assert asked(target=trial.pk) == {"target": ["Choose another database than the branch on which it is tried."]}
    for nonsense in ("9" * 5_000, "\0", "-1", "\u00b2"):
        assert asked(target=nonsense, sql="DROP TABLE x").keys() == {"target"}
    assert asked(target=10**30) == {"target": ["Choose one of your databases that is ready."]}
    assert asked(target="DROP", sql="DROP TABLE x") == {"target": ["Choose one of your databases that is ready."]}
    assert "at most 100000 characters" in asked(sql="x" * 100_001)["sql"][0]
    Database.objects.filter(pk=shop.pk).update(engine="postgresql")
    assert asked() == {"target": ["The branch and the target must be of the same engine."]}
    Database.objects.filter(pk=trial.pk).update(state=State.DELETING)
    assert asked().keys() == {"branch"}
    assert not DeployRequest.objects.exists()


def test_a_change_that_destroys_something_needs_the_name_of_its_target(client, shop, trial, sent):
    change = {"branch": trial.pk, "target": shop.pk, "sql": "DROP TABLE orders; TRUNCATE customers"}
    response = client.post("/deploys/new/", change)
    assert errors(response) == {"typed": ["If you mean it, type shop here."]}
    assert "This change has DROP TABLE, TRUNCATE in it." in response.content.decode()
    assert errors(client.post("/deploys/new/", {**change, "typed": "shop_trial"})).keys() == {"typed"}
    assert not DeployRequest.objects.exists()
    sent(client, "/deploys/new/", **change, typed="shop")
    assert DeployRequest.objects.get().sql == change["sql"]


@pytest.mark.parametrize("sql", ["""INSERT INTO t VALUES ('{"text": "one\\ntwo"}')""", r'CREATE TABLE "a\b" (id int)'])
def test_a_backslash_in_a_change_is_no_reason_to_ask(client, shop, trial, sql):
    client.post("/deploys/new/", {"branch": trial.pk, "target": shop.pk, "sql": sql})
    assert DeployRequest.objects.get().sql == sql


@pytest.mark.parametrize("branch", ["\0", "nothing", "9" * 5_000])
def test_a_link_to_a_branch_that_is_none_is_an_empty_form(client, shop, trial, branch):
    assert client.get("/deploys/new/", {"branch": branch}).context["form"]["branch"].initial is None


def test_a_deploy_says_which_one_it_waits_for(rows, client):
    page = client.get(rows.pages["deploy_queued"]).content.decode()
    assert f'It waits for <a href="/deploys/{rows.deploy.pk}/">' in page


def test_a_deploy_that_waits_is_withdrawn_by_typing_the_name_of_its_target(rows, client, sent):
    path, page = rows.pages["withdraw_deploy"], rows.pages["deploy_queued"]
    assert f'href="{path}"' in client.get(page).content.decode()
    assert errors(client.post(path, {"typed": "yes"})).keys() == {"typed"}
    DeployRequest.objects.filter(pk=rows.deploy.pk).update(state="deployed")
    behind = DeployRequest.objects.create(branch=rows.trial, target=rows.shop, requested_by=rows.shop.owner, sql=" ")
    response, queued = sent(client, path, typed="shop")
    assert response.headers["Location"] == page
    assert "It was withdrawn before it began: shop is as it was." in client.get(page).content.decode()
    # The next one in line need not wait for the sweep.
    assert queued == [f"deploy-{behind.pk}"]
    assert path not in client.get(page).content.decode()


@pytest.mark.parametrize("state", ["checking", "deploying", "deployed", "failed", "withdrawn"])
def test_a_deploy_that_has_begun_is_not_withdrawn(rows, client, sent, state):
    path = rows.pages["withdraw_deploy"]
    queued = DeployRequest.objects.filter(sql__contains="phone")
    queued.update(state=state)
    for response in (client.get(path, follow=True), client.post(path, {"typed": "shop"}, follow=True)):
        assert "Only a deploy that has not begun can be withdrawn." in response.content.decode()
    assert queued.get().state == state


def test_a_deploy_into_what_somebody_else_has_changed_says_so(rows, client):
    page = client.get(rows.pages["deploy_differs"]).content.decode()
    assert "It is in shop, once; but somebody has changed the schema since." in page
    assert "notice good" not in page


# --- Backups ----------------------------------------------------------------------------------------------------------


def test_a_backup_is_taken_at_once(client, shop, sent):
    response, queued = sent(client, "/databases/shop/backups/")
    backup = Backup.objects.get()
    assert response.headers["Location"] == "/databases/shop/backups/"
    assert (backup.database, backup.state, backup.keep_until) == (shop, Backup.State.PENDING, None)
    assert queued == [f"take_backup-{backup.pk}"]


def test_a_backup_is_downloaded_as_it_is_stored(rows, client):
    response = client.get(f"/backups/{rows.backup.pk}/download/")
    assert b"".join(response.streaming_content) == b"what was in it\n" * 10_000
    assert response.headers["Content-Disposition"].startswith('attachment; filename="shop-20')
    assert response.headers["Content-Disposition"].endswith('.dump"')


def test_what_is_not_ready_or_not_there_is_not_downloaded(rows, client, backups_folder):
    for backup in Backup.objects.exclude(state="ready"):
        assert client.get(f"/backups/{backup.pk}/download/").status_code == 404
    for file in backups_folder.iterdir():
        file.unlink()
    response = client.get(f"/backups/{rows.backup.pk}/download/", follow=True)
    assert "The file cannot be read just now." in response.content.decode()


def test_a_backup_is_restored_into_a_new_branch(rows, client, sent):
    path = rows.pages["restore"]
    assert "Names are not used twice" in errors(client.post(path, {"name": "shop"}))["name"][0]
    response, queued = sent(client, path, name="as_it_was")
    restored = Database.objects.get(name="as_it_was")
    assert response.headers["Location"] == "/databases/as_it_was/"
    assert (restored.parent, restored.origin, restored.restore.backup) == (rows.shop, "backup", rows.backup)
    assert queued == [f"restore_backup-{restored.pk}"]


def test_only_a_backup_that_is_ready_is_restored(rows, client):
    Backup.objects.filter(pk=rows.backup.pk).update(state="damaged")
    response = client.post(rows.pages["restore"], {"name": "as_it_was"}, follow=True)
    assert "Only a backup that is ready can be restored." in response.content.decode()
    assert not Database.objects.filter(name="as_it_was").exists()


def test_a_backup_that_goes_at_the_same_moment_is_not_restored(rows, owner):
    form = NameForm({"name": "as_it_was"}, instance=Database(owner=owner, engine="postgresql"))
    assert form.is_valid()
    Backup.objects.update(state="deleting")
    assert not form.ask(lambda database: request_restore(rows.backup, database.name, owner))
    assert form.errors == {"__all__": ["Only a backup that is ready can be restored."]}


def test_a_backup_is_deleted_by_typing_the_name_of_its_database(rows, client, sent):
    path = rows.pages["delete_backup"]
    assert errors(client.post(path, {"typed": "yes"})).keys() == {"typed"}
    response, queued = sent(client, path, typed="shop")
    assert response.headers["Location"] == rows.pages["backups"]
    assert Backup.objects.get(pk=rows.backup.pk).state == Backup.State.DELETING
    assert queued == [f"clean_up_backup-{rows.backup.pk}"]
    assert client.get(path).headers["Location"] == rows.pages["backup"]


WEEK = {"keep_for_number": "7", "keep_for_unit": "days", "is_enabled": "on"}


def test_a_policy_says_how_often_or_when(client, shop):
    path = "/databases/shop/backups/policy/"
    now = timezone.now()
    client.post(path, {**WEEK, "every_number": "6", "every_unit": "hours"})
    client.post(path, {**WEEK, "every_unit": "hours", "cron": "15 3 * * *"})
    often, nightly = BackupPolicy.objects.order_by("pk")
    assert (often.database, often.every, often.keep_for) == (shop, timedelta(hours=6), timedelta(days=7))
    assert abs(often.next_run_at - now) < timedelta(minutes=1)
    # The first time is one of those that were said.
    assert nightly.every is None
    assert timezone.localtime(nightly.next_run_at).strftime("%H:%M") == "03:15"
    assert nightly.next_run_at > now
    shown = client.get("/databases/shop/backups/").content.decode()
    assert "Every 6 hours" in shown
    assert "At <code>15 3 * * *</code>" in shown
    assert ">7 days<" in shown


@pytest.mark.parametrize(
    ("said", "field", "sentence"),
    [
        ({}, "every", "Say either how often, or when"),
        ({"every_number": "6", "cron": "15 3 * * *"}, "every", "Say either how often, or when"),
        ({"every_number": "0"}, "every", "Choose five minutes or more."),
        ({"every_number": "4", "every_unit": "minutes"}, "every", "Choose five minutes or more."),
        ({"every_number": "often"}, "every", "Enter a whole number."),
        ({"every_number": "10" * 20}, "every", "less than or equal to 9999"),
        ({"every_number": "6", "every_unit": "moons"}, "every", "Select a valid choice"),
        ({"every_number": "6", "every_unit": ""}, "every", "Choose a unit."),
        ({"cron": "at night"}, "cron", "This is no schedule of five fields that ever comes due."),
        ({"cron": "* * * * * *"}, "cron", "This is no schedule of five fields that ever comes due."),
        ({"cron": "0 0 30 2 *"}, "cron", "This is no schedule of five fields that ever comes due."),
        ({"every_number": "6", "keep_for_number": ""}, "keep_for", "This field is required."),
        ({"every_number": "6", "keep_for_number": "0"}, "keep_for", "Keep a backup for longer"),
    ],
)
def test_what_is_wrong_with_a_policy_stands_at_its_field(client, shop, said, field, sentence):
    response = client.post("/databases/shop/backups/policy/", {**WEEK, "every_unit": "hours", **said})
    assert sentence in " ".join(errors(response)[field])
    assert not BackupPolicy.objects.exists()


def test_a_policy_that_is_changed_keeps_its_beat_unless_that_was_changed(rows, client):
    policy, path = rows.policy, rows.pages["policy"]
    due = timezone.now() + timedelta(hours=5)
    BackupPolicy.objects.filter(pk=policy.pk).update(next_run_at=due)
    client.post(path, {**WEEK, "every_number": "6", "every_unit": "hours", "keep_for_number": "9", "is_enabled": ""})
    policy.refresh_from_db()
    assert (policy.keep_for, policy.is_enabled, policy.next_run_at) == (timedelta(days=9), False, due)
    client.post(path, {**WEEK, "every_number": "30", "every_unit": "minutes"})
    policy.refresh_from_db()
    assert (policy.every, policy.is_enabled) == (timedelta(minutes=30), True)
    assert policy.next_run_at <= timezone.now()


def test_a_policy_that_runs_while_it_is_edited_is_not_set_back(rows):
    form = PolicyForm(
        {**WEEK, "every_number": "6", "every_unit": "hours", "keep_for_number": "9"}, instance=rows.policy
    )
    assert form.is_valid()
    due = timezone.now() + timedelta(hours=5)
    BackupPolicy.objects.filter(pk=rows.policy.pk).update(next_run_at=due)
    form.save()
    saved = BackupPolicy.objects.get(pk=rows.policy.pk)
    assert (saved.keep_for, saved.next_run_at) == (timedelta(days=9), due)
