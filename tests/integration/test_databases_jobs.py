"""The jobs of the databases app, done as a worker does them, on real files."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from django.contrib.auth import get_user_model
from django.utils import timezone

from databases.jobs import (
    SchemaDiffers,
    change,
    check_deployment_status,
    create_branch,
    create_database,
    delete_database,
    deploy,
    schedule_branches,
    schedule_database_deletions,
    schedule_databases,
    schedule_deploys,
)
from databases.models import Database, DeployRequest
from databases.provisioners import Refused, get_provisioner
from databases.provisioners.sqlite import SQLiteProvisioner
from databases.requests import request_branch, request_deploy, request_withdrawal
from jobs.models import Claim
from jobs.testing import perform
from tests.engines import password_of
from tests.integration.conftest import URGENT_LIST

pytestmark = pytest.mark.django_db
State, Deploying = Database.State, DeployRequest.State


@pytest.fixture(autouse=True)
def folder(tmp_path, settings) -> Path:
    settings.DATABASES_FOLDER = tmp_path / "databases"
    return settings.DATABASES_FOLDER


@pytest.fixture
def database(folder) -> Database:
    owner = get_user_model().objects.create_user("ada")
    return Database.objects.create(name="shop", owner=owner)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_a_pending_database_becomes_ready(database, folder):
    assert perform(create_database, database) == "done"

    database.refresh_from_db()
    assert database.state == State.READY
    assert Path(database.path) == folder / "shop.sqlite3"
    assert database.size == Path(database.path).stat().st_size
    assert database.ready_at is not None


def test_one_that_is_ready_needs_nothing(database):
    perform(create_database, database)
    assert perform(create_database, database) == "not_needed"


def test_a_database_that_is_to_be_deleted_is_gone(database, folder):
    perform(create_database, database)
    database.request_deletion()

    assert perform(delete_database, database) == "done"

    database.refresh_from_db()
    assert (database.state, database.path, database.size) == (State.DELETED, "", None)
    assert files(folder) == []


def test_one_that_was_never_made_can_be_deleted(database):
    database.request_deletion()
    assert perform(create_database, database) == "not_needed"
    assert perform(delete_database, database) == "done"


class AskedToDeleteMeanwhile(SQLiteProvisioner):
    """The real engine, while a user changes their mind: before the file is there, and after."""

    moment = "before"

    def create(self, name, password=""):
        if self.moment == "before":
            Database.objects.get(name=name).request_deletion()
        made = super().create(name)
        if self.moment == "after":
            Database.objects.get(name=name).request_deletion()
        return made


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_deletion_that_arrives_during_the_creation_wins(database, folder, settings, monkeypatch, moment):
    monkeypatch.setattr(AskedToDeleteMeanwhile, "moment", moment)
    settings.DATABASES_PROVISIONERS = {"sqlite": f"{__name__}.AskedToDeleteMeanwhile"}

    perform(create_database, database)

    database.refresh_from_db()
    assert database.state == State.DELETING
    assert list(schedule_database_deletions()) == [database]
    assert perform(delete_database, database) == "done"
    database.refresh_from_db()
    assert database.state == State.DELETED
    assert files(folder) == []


def test_what_fails_stays_pending_and_is_made_once_the_reason_is_gone(database, folder):
    folder.mkdir(mode=0o755)
    folder.chmod(0o755)
    assert perform(create_database, database) == "failed"
    assert list(schedule_databases()) == [database]

    folder.chmod(0o700)
    create_database(database)

    database.refresh_from_db()
    assert database.state == State.READY


# --- Branches ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def make(engine, database) -> Callable[..., Database]:
    """A database of the engine in turn, which is ready and full."""

    def make(name: str, state: str = State.READY, parent: Database | None = None, **fields) -> Database:
        made = Database.objects.create(
            name=name, owner=database.owner, engine=engine.name, password=password_of(name), parent=parent, **fields
        )
        if state == State.READY:
            perform(create_database, made)
            engine.deploy(name, engine.kind.orders, "filled")
        else:
            Database.objects.filter(pk=made.pk).update(state=state)
        made.refresh_from_db()
        return made

    return make


@pytest.fixture
def branch_of(engine, database) -> Callable[..., Database]:
    def branch_of(parent: Database, name: str = "branch", **fields) -> Database:
        branch = Database(name=name, owner=database.owner, parent=parent, password=password_of(name), **fields)
        request_branch(branch)
        return branch

    return branch_of


def test_a_branch_becomes_a_copy_of_its_parent_that_outlives_it(engine, make, branch_of):
    parent = make("parent")
    branch = branch_of(parent)
    assert branch.engine == engine.name

    assert perform(create_branch, branch) == "done"
    parent.request_deletion()
    assert perform(delete_database, parent) == "done"

    branch.refresh_from_db()
    assert branch.state == State.READY
    assert branch.password not in (branch.path, str(branch), repr(branch))
    assert engine.ask("branch", "SELECT count(*) FROM orders") == [(3,)]
    branch.request_deletion()
    assert perform(delete_database, branch) == "done"
    assert engine.everything() == set()


def test_a_branch_of_what_is_gone_fails_and_says_so(engine, make, branch_of):
    parent = make("parent")
    branch = branch_of(parent)
    before = engine.everything()
    for state in (State.DELETING, State.DELETED, State.FAILED):
        Database.objects.filter(pk=parent.pk).update(state=state)
        Database.objects.filter(pk=branch.pk).update(state=State.PENDING)
        # What a killed attempt had made.
        engine.copy("parent", "branch")

        assert perform(create_branch, branch) == "done"

        branch.refresh_from_db()
        assert branch.state == State.FAILED
        assert branch.error == f"The database parent cannot be used any more: it is {state}."
        assert engine.everything() == before
        assert list(schedule_branches()) == []


def test_a_branch_waits_until_its_parent_is_made(engine, make, branch_of):
    branch = branch_of(make("parent", state=State.PENDING))
    assert list(schedule_branches()) == []
    perform(create_database, branch.parent)
    assert list(schedule_branches()) == [branch]
    assert list(schedule_databases()) == [Database.objects.get(name="shop")]


def test_a_branch_that_is_deleted_while_it_is_made_is_deleted(engine, make, branch_of, monkeypatch):
    branch = branch_of(make("parent"))
    kind = type(get_provisioner(engine.name))
    copy = kind.copy

    def changing_their_mind(self, *arguments):
        made = copy(self, *arguments)
        branch.request_deletion()
        return made

    monkeypatch.setattr(kind, "copy", changing_their_mind)
    perform(create_branch, branch)
    branch.refresh_from_db()
    assert branch.state == State.DELETING
    assert perform(delete_database, branch) == "done"
    assert not any("branch" in name for name in engine.everything())


def test_a_late_refusal_does_not_remove_what_another_process_has_made(engine, make, branch_of, monkeypatch):
    """This one was frozen past its lease, and its successor was done before the parent was deleted."""
    branch = branch_of(make("parent"))
    kind = type(get_provisioner(engine.name))
    copy = kind.copy

    def overtaken(self, *arguments):
        Database.objects.get(pk=branch.pk).become_ready(copy(self, *arguments))
        raise Refused("There is nothing to copy any more.")

    monkeypatch.setattr(kind, "copy", overtaken)
    perform(create_branch, branch)
    branch.refresh_from_db()
    assert branch.state == State.READY
    assert any("branch" in name for name in engine.everything())


def test_a_parent_in_use_is_waited_for_and_after_ten_minutes_no_longer(postgres, make_postgres):
    parent, branch = make_postgres
    with psycopg.connect(postgres.info.dsn, password=postgres.info.password, dbname=parent.name) as user:
        # Not those from when it was asked for: all workers may have been away.
        Database.objects.filter(pk=branch.pk).update(created_at=timezone.now() - timedelta(minutes=11))
        for _ in range(2):
            user.execute("SELECT 1")
            assert perform(create_branch, branch) == "failed"
            claim = Claim.objects.get(job="create_branch")
            assert "in use by a session of postgres" in claim.last_error
            claim.delete()
        branch.refresh_from_db()
        first_refused_at = branch.sessions_end_at - timedelta(minutes=10)
        assert abs(first_refused_at - timezone.now()) < timedelta(minutes=1)
        user.execute("SELECT 1")

        Database.objects.filter(pk=branch.pk).update(sessions_end_at=timezone.now())
        assert perform(create_branch, branch) == "done"
        with pytest.raises(psycopg.OperationalError):
            user.execute("SELECT 1")
    branch.refresh_from_db()
    assert branch.state == State.READY
    assert "a session of postgres" in branch.ended_sessions


def test_when_sessions_end_is_said_once_and_not_again_at_each_attempt(postgres, make_postgres):
    parent, branch = make_postgres
    due = timezone.now() + timedelta(minutes=1)
    Database.objects.filter(pk=branch.pk).update(sessions_end_at=due)
    with psycopg.connect(postgres.info.dsn, password=postgres.info.password, dbname=parent.name):
        assert perform(create_branch, branch) == "failed"
    branch.refresh_from_db()
    assert branch.sessions_end_at == due


@pytest.fixture
def make_postgres(postgres, database) -> tuple[Database, Database]:
    parent = Database.objects.create(name="parent", owner=database.owner, engine="postgresql")
    perform(create_database, parent)
    branch = Database(name="branch", owner=database.owner, parent=parent)
    request_branch(branch)
    return parent, branch


def test_a_name_that_others_have_on_the_server_fails_and_says_so(postgres, database):
    postgres.execute("CREATE DATABASE theirs")
    asked = Database.objects.create(name="theirs", owner=database.owner, engine="postgresql")
    assert perform(create_database, asked) == "done"
    asked.refresh_from_db()
    assert asked.state == State.FAILED
    assert "was not made here. Choose another" in asked.error
    asked.request_deletion()
    assert perform(delete_database, asked) == "done"
    assert postgres.execute("SELECT 1 FROM pg_database WHERE datname = 'theirs'").fetchone()


# --- Deploys ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def ask(make, database) -> Callable[..., DeployRequest]:
    """Ask for a deploy from a branch into a target, both of which are made when they are not there."""

    def ask(sql: str = "CREATE TABLE visits (id integer)", branch: str = "branch", target: str = "target"):
        def get(name: str) -> Database:
            return Database.objects.filter(name=name).first() or make(name)

        request = DeployRequest(branch=get(branch), target=get(target), sql=sql, requested_by=database.owner)
        request.full_clean()
        request_deploy(request)
        return request

    return ask


def test_a_deploy_is_tried_then_made_then_confirmed(engine, ask, queued, django_capture_on_commit_callbacks):
    request = ask()
    with django_capture_on_commit_callbacks(execute=True):
        assert perform(deploy, request) == "done"

    request.refresh_from_db()
    assert request.state == Deploying.DEPLOYED
    assert request.schema == get_provisioner(engine.name).schema("target")
    assert engine.has("branch", "visits")
    assert engine.has("target", "visits")
    assert len(queued(URGENT_LIST)) == 1
    check_deployment_status(request.pk)
    request.refresh_from_db()
    assert request.confirmed_at
    assert perform(deploy, request) == "not_needed"


@pytest.mark.django_db(transaction=True)
def test_a_deploy_is_made_all_the_same_when_nobody_can_be_told_to_confirm_it(engine, ask, refusing_redis, caplog):
    request = ask()
    deploy(request)
    request.refresh_from_db()
    assert request.state == Deploying.DEPLOYED
    assert f"Nobody looks again at the schema of target after {request}" in caplog.text


def test_what_fails_on_the_branch_never_comes_to_the_target(engine, ask):
    request = ask("CREATE TABLE visits (id integer); ALTER TABLE no_such ADD COLUMN x integer")
    assert perform(deploy, request) == "done"
    request.refresh_from_db()
    assert request.state == Deploying.FAILED
    assert request.error.startswith("In branch: ")
    assert "no_such" in request.error
    assert not engine.has("branch", "visits")
    assert not engine.has("target", "visits")


def test_what_fails_in_the_target_has_changed_nothing_there(engine, ask):
    request = ask("CREATE TABLE more (id integer); CREATE TABLE visits (id integer)")
    engine.do("target", "CREATE TABLE visits (id integer)")
    assert perform(deploy, request) == "done"
    request.refresh_from_db()
    assert request.state == Deploying.FAILED
    assert request.error.startswith("In target: ")
    assert engine.has("branch", "more")
    assert not engine.has("target", "more")


@pytest.mark.parametrize("gone", ["branch", "target"])
def test_a_deploy_with_a_database_that_is_gone_fails_and_says_so(engine, ask, gone):
    requests = request, other = ask(), ask("CREATE TABLE more (id integer)")
    for state in (State.DELETING, State.DELETED, State.FAILED):
        DeployRequest.objects.update(state=Deploying.PENDING)
        Database.objects.filter(name=gone).update(state=state)
        assert list(schedule_deploys()) == [request]
        assert perform(deploy, request) == "done"
        assert perform(deploy, other) == "done"
        for each in requests:
            each.refresh_from_db()
            assert each.state == Deploying.FAILED
            assert each.error == f"The database {gone} cannot be used any more: it is {state}."
        assert list(schedule_deploys()) == []


def test_a_deploy_that_was_tried_already_needs_its_branch_no_longer(engine, ask):
    request = ask()
    DeployRequest.objects.filter(pk=request.pk).update(state=Deploying.DEPLOYING)
    Database.objects.filter(name="branch").update(state=State.DELETED)
    assert perform(deploy, request) == "done"
    request.refresh_from_db()
    assert request.state == Deploying.DEPLOYED


def test_deploys_into_one_database_are_made_in_the_order_asked(
    engine, ask, make, redis, django_capture_on_commit_callbacks
):
    first, second, elsewhere = (
        ask("CREATE TABLE a (id integer)"),
        ask("CREATE TABLE b (id integer)"),
        ask(target="other"),
    )
    assert list(schedule_deploys()) == [first, elsewhere]
    assert perform(deploy, second) == "not_needed"
    redis.flushall()
    with django_capture_on_commit_callbacks(execute=True):
        assert perform(deploy, first) == "done"
    assert list(schedule_deploys()) == [second, elsewhere]
    # Without a sweep, and no other one.
    assert redis.lrange("rq:queue:default", 0, -1) == [f"deploy-{second.pk}".encode()]


def test_one_that_is_withdrawn_is_not_made_and_the_next_one_is(engine, ask, redis, django_capture_on_commit_callbacks):
    first, second = ask("CREATE TABLE a (id integer)"), ask("CREATE TABLE b (id integer)")
    redis.flushall()
    with django_capture_on_commit_callbacks(execute=True):
        assert request_withdrawal(first)
    assert redis.lrange("rq:queue:default", 0, -1) == [f"deploy-{second.pk}".encode()]
    assert list(schedule_deploys()) == [second]
    assert perform(deploy, first) == "not_needed"
    assert perform(deploy, second) == "done"
    assert not engine.has("branch", "a")
    assert not request_withdrawal(second)
    second.refresh_from_db()
    assert second.state == Deploying.DEPLOYED


def test_one_that_is_withdrawn_when_it_is_about_to_begin_is_made_nowhere(engine, ask, monkeypatch):
    request = ask()
    monkeypatch.setattr("databases.jobs.require", lambda database: request_withdrawal(request))
    assert perform(deploy, request) == "not_needed"
    request.refresh_from_db()
    assert request.state == Deploying.WITHDRAWN
    assert not engine.has("branch", "visits")


def test_one_that_has_begun_is_not_withdrawn_at_the_same_moment(engine, ask, monkeypatch):
    request = ask()

    def change_meanwhile(*change_of: Any) -> str:
        assert not request_withdrawal(request)
        return change(*change_of)

    monkeypatch.setattr("databases.jobs.change", change_meanwhile)
    assert perform(deploy, request) == "done"
    request.refresh_from_db()
    assert request.state == Deploying.DEPLOYED
    assert engine.has("target", "visits")


def test_a_deploy_waits_until_both_databases_are_made(engine, ask, make):
    make("later", state=State.PENDING)
    request, other = ask(target="later"), ask(branch="later", target="target")
    assert list(schedule_deploys()) == []
    assert perform(deploy, request) == "not_needed"
    perform(create_database, Database.objects.get(name="later"))
    assert list(schedule_deploys()) == [request, other]


def test_a_target_that_is_a_copy_of_the_branch_on_which_it_was_tried(engine, ask, make):
    """It has what the branch had, the marker of the trial too, and is still to be changed."""
    request = ask("INSERT INTO untouched VALUES (1)", target="elsewhere")
    perform(deploy, request)
    copy = make("copy", state=State.PENDING, parent=request.branch)
    engine.copy("branch", "copy")
    Database.objects.filter(pk=copy.pk).update(state=State.READY)
    DeployRequest.objects.filter(pk=request.pk).update(target=copy, state=Deploying.DEPLOYING)
    perform(deploy, request)
    assert engine.ask("copy", "SELECT count(*) FROM untouched") == [(2,)]


def test_a_schema_that_somebody_else_has_changed_is_not_confirmed(engine, ask):
    request = ask()
    deploy(request)
    engine.do("target", "DROP TABLE visits")
    with pytest.raises(SchemaDiffers, match="is not the one that deploy"):
        check_deployment_status(request.pk)
    request.refresh_from_db()
    assert request.confirmed_at is None
    assert request.state == Deploying.DEPLOYED
    assert "is not the one that deploy" in request.error
    # They may think better of it.
    engine.do("target", request.sql)
    check_deployment_status(request.pk)
    request.refresh_from_db()
    assert (request.confirmed_at is None, request.error) == (False, "")
    DeployRequest.objects.filter(pk=request.pk).update(confirmed_at=None)
    # Once another deploy has changed it nobody can tell.
    deploy(ask("CREATE TABLE later (id integer)"))
    check_deployment_status(request.pk)
    request.refresh_from_db()
    assert request.confirmed_at is None
