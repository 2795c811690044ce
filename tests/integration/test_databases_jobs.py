"""The jobs of the databases app, done as a worker does them, on real files."""

from pathlib import Path

import pytest
from django.contrib.auth import get_user_model

from databases.jobs import create_database, delete_database, schedule_database_deletions, schedule_databases
from databases.models import Database
from databases.provisioners.sqlite import SQLiteProvisioner
from jobs.testing import perform

pytestmark = pytest.mark.django_db
State = Database.State


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

    def create(self, name):
        if self.moment == "before":
            Database.objects.get(name=name).request_deletion()
        made = super().create(name)
        if self.moment == "after":
            Database.objects.get(name=name).request_deletion()
        return made


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_deletion_that_arrives_during_the_creation_wins(database, folder, settings, monkeypatch, moment):
    monkeypatch.setattr(AskedToDeleteMeanwhile, "moment", moment)
    settings.DATABASES_PROVISIONER = f"{__name__}.AskedToDeleteMeanwhile"

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
