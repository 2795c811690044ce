"""The admin pages of databases, asked as a browser asks; what they push is looked at in a real Redis."""

import re
from collections.abc import Callable

import pytest
from django.contrib.admin.models import LogEntry
from django.contrib.auth import get_user_model
from django.contrib.auth.models import Permission
from django.contrib.messages import get_messages
from django.urls import reverse

from config.servers import RedisServer
from databases.models import Database, DeployRequest
from databases.provisioners import Provisioned
from tests.console import everything

pytestmark = pytest.mark.django_db
State = Database.State

CHANGELIST = "admin:databases_database_changelist"
ADD = "admin:databases_database_add"


@pytest.fixture
def queue(redis) -> Callable[[], list[str]]:
    """What is in the queue, by its ids."""
    return lambda: [id.decode() for id in redis.lrange("rq:queue:default", 0, -1)]


@pytest.fixture
def make(admin_user):
    def make(name: str = "shop", state: str = State.PENDING) -> Database:
        return Database.objects.create(name=name, owner=admin_user, state=state)

    return make


@pytest.fixture
def committing(django_capture_on_commit_callbacks):
    return lambda: django_capture_on_commit_callbacks(execute=True)


def state_of(database: Database) -> str:
    return Database.objects.values_list("state", flat=True).get(pk=database.pk)


def said(response) -> list[str]:
    return [str(message) for message in get_messages(response.wsgi_request)]


def page(name: str, database: Database) -> str:
    return reverse(f"admin:databases_database_{name}", args=[database.pk])


def test_the_owner_is_the_user_unless_another_is_chosen(admin_client, admin_user):
    form = admin_client.get(reverse(ADD)).context["adminform"].form
    assert form.initial["owner"] == admin_user.pk
    assert set(form.fields) == {"name", "owner", "engine"}


def test_adding_one_saves_a_pending_row_and_queues_its_creation(admin_client, admin_user, committing, queue):
    with committing():
        response = admin_client.post(
            reverse(ADD), {"name": "shop", "owner": admin_user.pk, "engine": "sqlite", "state": "ready"}
        )

    assert response.status_code == 302
    database = Database.objects.get()
    assert (database.name, database.owner, database.state) == ("shop", admin_user, State.PENDING)
    assert queue() == [f"create_database-{database.pk}"]


def test_a_bad_or_used_name_is_refused_on_the_page(admin_client, admin_user, make, queue):
    make("gone", State.DELETED)
    for name, sentence in (("../shop", "Use lower-case letters"), ("gone", "Names are not used twice")):
        response = admin_client.post(reverse(ADD), {"name": name, "owner": admin_user.pk, "engine": "sqlite"})
        assert response.status_code == 200
        assert sentence in response.content.decode()
    assert Database.objects.count() == 1
    assert queue() == []


@pytest.mark.parametrize("outage", ["freeze", "kill"])
def test_adding_one_succeeds_while_redis_is_away(admin_client, admin_user, committing, tmp_path, settings, outage):
    # A server of its own: after one has hung, pushes to it are not tried for a moment, in any test.
    with RedisServer(tmp_path) as server, committing():
        settings.RQ_QUEUES = {name: {"URL": server.url} for name in settings.RQ_QUEUES}
        getattr(server, outage)()
        response = admin_client.post(reverse(ADD), {"name": "shop", "owner": admin_user.pk, "engine": "sqlite"})
    assert response.status_code == 302
    assert Database.objects.pending().count() == 1


def test_saving_a_row_does_not_undo_what_a_job_wrote_meanwhile(admin_client, make, django_user_model, monkeypatch):
    database = make()
    other = django_user_model.objects.create_user("ada")
    save = Database.save

    def save_after_a_job(self, *arguments, **options):
        monkeypatch.setattr(Database, "save", save)
        Database.objects.get(pk=self.pk).become_ready(Provisioned("/somewhere", 1))
        save(self, *arguments, **options)

    monkeypatch.setattr(Database, "save", save_after_a_job)
    admin_client.post(page("change", database), {"owner": other.pk})

    database.refresh_from_db()
    assert (database.owner, database.state) == (other, State.READY)


def test_a_row_shows_its_state_and_only_its_owner_can_be_edited(admin_client, make):
    database = make()
    database.become_ready(Provisioned("/somewhere/shop.sqlite3", 8192))

    response = admin_client.get(page("change", database))

    content = response.content.decode()
    assert list(response.context["adminform"].form.fields) == ["owner"]
    for shown in ("shop", "Ready", "/somewhere/shop.sqlite3", "8.0\xa0KB"):
        assert shown in content


def test_the_list_is_filtered_searched_and_read_in_few_queries(admin_client, make, django_assert_max_num_queries):
    for state in State:
        make(f"{state}_shop", state)
        make(f"{state}_blog", state)
    with django_assert_max_num_queries(8):
        response = admin_client.get(reverse(CHANGELIST), {"state__exact": "ready", "q": "shop"})
    assert [row.name for row in response.context["cl"].result_list] == ["ready_shop"]


def test_no_row_can_be_deleted(admin_client, make):
    database = make()
    assert admin_client.post(page("delete", database), {"post": "yes"}).status_code == 403
    content = admin_client.get(reverse(CHANGELIST)).content.decode()
    assert "Delete chosen databases" in content
    assert "delete_selected" not in content


def test_the_button_of_one_database_asks_and_then_has_it_deleted(admin_client, make, queue, committing):
    database = make(state=State.READY)
    assert page("delete_database", database) in admin_client.get(page("change", database)).content.decode()

    assert "shop (Ready)" in admin_client.get(page("delete_database", database)).content.decode()
    assert state_of(database) == State.READY

    with committing():
        response = admin_client.post(page("delete_database", database))

    assert response.url == page("change", database)
    assert said(response) == ["Will be deleted: shop."]
    assert state_of(database) == State.DELETING
    assert queue() == [f"delete_database-{database.pk}"]
    assert LogEntry.objects.get().change_message == "Asked for its deletion."
    assert page("delete_database", database) not in admin_client.get(page("change", database)).content.decode()


@pytest.mark.parametrize(
    ("state", "sentence"), [(State.DELETING, "Being deleted already: shop."), (State.DELETED, "Deleted already: shop.")]
)
def test_deleting_one_twice_says_so(admin_client, make, queue, state, sentence):
    database = make(state=state)
    response = admin_client.post(page("delete_database", database))
    assert said(response) == [sentence]
    assert state_of(database) == state
    assert queue() == []
    assert not LogEntry.objects.exists()


def test_chosen_databases_are_deleted_once_that_is_confirmed(admin_client, make, queue, committing):
    rows = {state: make(state, state) for state in State}
    kept = make("kept", State.READY)
    chosen = {"action": "delete_chosen", "_selected_action": [row.pk for row in rows.values()]}

    asked = admin_client.post(reverse(CHANGELIST), chosen)
    assert "This cannot be undone" in asked.content.decode()
    assert state_of(rows[State.READY]) == State.READY

    with committing():
        response = admin_client.post(reverse(CHANGELIST), {**chosen, "confirmed": "yes"})

    assert said(response) == [
        "Will be deleted: pending, ready, failed.",
        "Being deleted already: deleting.",
        "Deleted already: deleted.",
    ]
    assert sorted(queue()) == sorted(f"delete_database-{rows[state].pk}" for state in Database.DELETABLE)
    assert state_of(kept) == State.READY
    assert state_of(rows[State.DELETED]) == State.DELETED


def test_chosen_databases_are_deleted_on_a_list_filtered_by_their_state(admin_client, make, queue, committing):
    database = make()
    chosen = {"action": "delete_chosen", "_selected_action": [database.pk], "confirmed": "yes"}
    with committing():
        admin_client.post(f"{reverse(CHANGELIST)}?state__exact=pending", chosen)
    assert state_of(database) == State.DELETING
    assert queue() == [f"delete_database-{database.pk}"]


def test_only_who_may_delete_can_have_databases_deleted(client, make):
    database = make()
    user = get_user_model().objects.create_user("ada", is_staff=True)
    user.user_permissions.set(Permission.objects.filter(codename__in=["view_database", "change_database"]))
    client.force_login(user)
    chosen = {"action": "delete_chosen", "_selected_action": [database.pk], "confirmed": "yes"}

    assert page("delete_database", database) not in client.get(page("change", database)).content.decode()
    assert client.post(page("delete_database", database)).status_code == 403
    client.post(reverse(CHANGELIST), chosen)
    assert state_of(database) == State.PENDING

    user.user_permissions.add(Permission.objects.get(codename="delete_database"))
    client.post(page("delete_database", database))
    assert state_of(database) == State.DELETING


def test_a_database_that_is_not_there_is_not_found(admin_client):
    assert admin_client.post(reverse("admin:databases_database_delete_database", args=[7])).status_code == 404


@pytest.mark.usefixtures("backups_folder")
def test_times_are_shown_with_their_zone_and_how_long_ago_they_were(admin_client, client, admin_user):
    rows = everything(admin_user)
    said = re.compile(r">\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC</time> \((?:in )?\d+")
    reader = get_user_model().objects.create_user("reader", is_staff=True)
    reader.user_permissions.set(Permission.objects.filter(codename="view_backuppolicy"))
    client.force_login(reader)
    for row in (rows.shop, rows.deploy, rows.policy, rows.backup):
        urls = f"admin:{row._meta.app_label}_{row._meta.model_name}"
        change = reverse(f"{urls}_change", args=[row.pk])
        assert said.search(admin_client.get(reverse(f"{urls}_changelist")).content.decode()), row
        # The one time of a policy can be edited, by whoever may.
        whose = client if row == rows.policy else admin_client
        assert said.search(whose.get(change).content.decode()), row
    edited = admin_client.get(reverse("admin:backups_backuppolicy_change", args=[rows.policy.pk]))
    assert 'name="next_run_at_0"' in edited.content.decode()


@pytest.mark.parametrize("name", ["postgres", "template1", "public", "pg_shop"])
def test_names_that_postgresql_keeps_for_itself_are_refused_with_a_sentence(admin_client, admin_user, name):
    asked = {"name": name, "owner": admin_user.pk, "engine": "postgresql"}
    response = admin_client.post(reverse(ADD), asked)
    assert "PostgreSQL keeps this name for itself" in response.content.decode()
    assert not Database.objects.exists()
    admin_client.post(reverse(ADD), {**asked, "engine": "sqlite"})
    assert Database.objects.get().name == name


def test_no_page_shows_a_password(admin_client, make):
    database = make(state=State.READY)
    for url in (reverse(CHANGELIST), page("change", database), page("delete_database", database)):
        response = admin_client.get(url)
        assert response.status_code == 200
        assert database.password not in response.content.decode()


def test_a_deploy_is_shown_with_its_error_and_can_be_neither_edited_nor_deleted(admin_client, admin_user, make):
    request = DeployRequest.objects.create(
        branch=make("branch"),
        target=make("target"),
        sql="ALTER TABLE x",
        requested_by=admin_user,
        error="no such table",
    )
    change = reverse("admin:databases_deployrequest_change", args=[request.pk])
    shown = admin_client.get(change).content.decode()
    assert "ALTER TABLE x" in shown
    assert "no such table" in shown
    assert 'name="_save"' not in shown
    assert admin_client.post(change, {"sql": "DROP TABLE x"}).status_code == 403
    assert admin_client.get(reverse("admin:databases_deployrequest_add")).status_code == 403
    assert admin_client.get(reverse("admin:databases_deployrequest_delete", args=[request.pk])).status_code == 403
    assert admin_client.get(reverse("admin:databases_deployrequest_changelist")).status_code == 200
