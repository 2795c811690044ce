"""Backups of real databases on both engines: taken, verified, restored, cleaned up, and killed at every step."""

import hashlib
import pkgutil
import re
import resource
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from django.core.exceptions import ValidationError
from django.core.files.storage import FileSystemStorage, InMemoryStorage, storages
from django.utils import timezone

from backups import snapshots
from backups.jobs import clean_up_backup, restore_backup, schedule_backups, take_backup
from backups.models import Backup, BackupPolicy, Restore
from backups.requests import request_backup, request_backup_deletion, request_restore
from databases.jobs import create_database, delete_database
from databases.models import Database
from databases.provisioners.sqlite import SQLiteProvisioner
from jobs.models import Claim, Run
from jobs.testing import perform
from tests.engines import ON_ITS_OWN, Engine, password_of
from tests.integration.killing import in_a_child, killed

pytestmark = pytest.mark.django_db(transaction=True)
State = Backup.State

ENGINES = {
    "sqlite": "databases.provisioners.sqlite.SQLiteProvisioner",
    "postgresql": "databases.provisioners.postgresql.PostgreSQLProvisioner",
}
# Where a dump has been loaded, and neither looked at nor removed.
LOADED = {
    "sqlite": "databases.provisioners.sqlite.restore",
    "postgresql": "databases.provisioners.postgresql.PostgreSQLProvisioner._restore",
}
on_sqlite = pytest.mark.parametrize("engine", ["sqlite"], indirect=True)
on_its_own = pytest.mark.parametrize("engine", ON_ITS_OWN, indirect=True)


@dataclass
class Shop:
    """A database that is in use, and all that a look from outside finds beside it."""

    database: Database
    engine: Engine
    scratch: Path

    def orders(self, name: str = "shop") -> list[tuple]:
        return self.engine.ask(name, "SELECT * FROM orders ORDER BY id")

    def back_up(self) -> Backup:
        backup = request_backup(self.database)
        assert perform(take_backup, backup) == "done", Run.objects.values_list("error", flat=True).last()
        backup.refresh_from_db()
        assert backup.state == State.READY, backup.error
        return backup

    def ask_for(self, backup: Backup, name: str = "again") -> Database:
        branch = request_restore(backup, name, self.database.owner)
        Database.objects.filter(pk=branch.pk).update(password=password_of(name))
        return branch

    def nothing_is_left_behind(self) -> bool:
        """Whether each file that is stored is known, and nothing is in scratch or tried out on the engine."""
        assert stored() == sorted(Backup.objects.exclude(file="").values_list("file", flat=True))
        assert not self.scratch.exists() or list(self.scratch.iterdir()) == []
        names = Database.objects.exclude(state="deleted").values_list("name", flat=True)
        kinds = ["{}.sqlite3"] if self.engine.name == "sqlite" else ["database {}", "role {}"]
        assert self.engine.everything() == {kind.format(name) for name in names for kind in kinds}
        return True


def stored() -> list[str]:
    return sorted(storages["backups"].listdir("")[1])


@pytest.fixture
def shop(engine, tmp_path, settings, django_user_model) -> Shop:
    settings.BACKUPS_SCRATCH = tmp_path / "scratch"
    (tmp_path / "stored").mkdir()
    backups = {"BACKEND": "django.core.files.storage.FileSystemStorage", "OPTIONS": {"location": tmp_path / "stored"}}
    settings.STORAGES = {**settings.STORAGES, "backups": backups}
    owner, password = django_user_model.objects.create_user("ada"), password_of("shop")
    database = Database.objects.create(name="shop", owner=owner, engine=engine.name, password=password)
    create_database(database)
    engine.fill("shop")
    return Shop(database, engine, settings.BACKUPS_SCRATCH)


@pytest.fixture
def kill(engine, tmp_path) -> Callable[..., None]:
    """Have a process of its own do the work, killed there; its lease is over then."""

    def kill(when: str, function: str, job: Any, row: Any) -> None:
        function = function.replace("ENGINE", ENGINES[engine.name]).replace("LOADED", LOADED[engine.name])
        assert killed(tmp_path, when, function, perform, job, row)
        Claim.objects.update(lease_expires_at=timezone.now() - timedelta(hours=1))

    return kill


# --- Taking -----------------------------------------------------------------------------------------------------------


def test_a_backup_is_stored_and_verified_and_says_what_is_in_it(shop):
    before = timezone.now()
    backup = shop.back_up()

    with storages["backups"].open(backup.file) as stored:
        content = stored.read()
    assert (backup.size, backup.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert backup.contents["orders"][0] == 3
    assert before < backup.taken_at < backup.verified_at
    assert backup.keep_until is None
    assert not schedule_backups().exists()
    assert shop.nothing_is_left_behind()


def test_only_the_storage_api_is_used(shop, settings):
    """Where a storage keeps its files is nobody's business; a bucket has no paths."""
    settings.STORAGES = {**settings.STORAGES, "backups": {"BACKEND": "django.core.files.storage.InMemoryStorage"}}
    assert isinstance(storages["backups"], InMemoryStorage)
    branch = shop.ask_for(shop.back_up())
    assert perform(restore_backup, branch) == "done"
    branch.refresh_from_db()
    assert shop.orders(branch.name) == shop.orders()
    assert shop.nothing_is_left_behind()


@on_sqlite
def test_one_of_a_database_that_is_not_made_yet_waits_for_it(shop):
    Database.objects.update(state=Database.State.PENDING)
    backup = request_backup(shop.database)
    assert perform(take_backup, backup) == "not_needed"
    Database.objects.update(state=Database.State.READY)
    assert perform(take_backup, backup) == "done"


@on_sqlite
@pytest.mark.parametrize("state", ["deleting", "deleted", "failed"])
def test_one_of_a_database_that_is_gone_fails_in_words_and_leaves_nothing(shop, kill, state):
    backup = request_backup(shop.database)
    kill("after", "LOADED", take_backup, backup)
    shop.engine.provisioner.delete("shop")
    Database.objects.update(state=state)
    assert perform(take_backup, backup) == "done"
    backup.refresh_from_db()
    assert backup.state == State.FAILED
    assert backup.error.startswith("The database shop ")
    Database.objects.update(state="deleted")
    assert shop.nothing_is_left_behind()


@on_its_own
def test_one_whose_database_was_lost_by_its_engine_fails_in_words_and_leaves_nothing(shop, kill):
    backup = request_backup(shop.database)
    kill("after", "LOADED", take_backup, backup)
    shop.engine.provisioner.delete("shop")
    assert perform(take_backup, backup) == "done"
    backup.refresh_from_db()
    assert (backup.state, backup.error) == (State.FAILED, "There is no database 'shop' any more.")
    Database.objects.update(state="deleted")
    assert shop.nothing_is_left_behind()


@on_sqlite
def test_the_time_that_it_is_kept_begins_when_it_is_taken(shop):
    asked, days = timezone.now() - timedelta(days=5), timedelta(days=3)
    backup = Backup.objects.create(database=shop.database, created_at=asked, keep_until=asked + days)
    perform(take_backup, backup)
    backup.refresh_from_db()
    assert backup.keep_until == backup.taken_at + days


class Spoiling(FileSystemStorage):
    """A storage that says it has stored everything, and has not."""

    def _save(self, name, content):
        content.seek(0)
        data = content.read()
        name = super()._save(name, content)
        Path(self.path(name)).write_bytes(self.spoil(data))
        return name

    @staticmethod
    def spoil(data: bytes) -> bytes:
        return data[:-1]


class Renaming(FileSystemStorage):
    """A storage that gives files names of its own."""

    def get_available_name(self, name, max_length=None):
        return f"mine-{name}"


@on_sqlite
@pytest.mark.parametrize("storage", [Spoiling, Renaming])
def test_what_the_storage_does_not_keep_as_it_is_never_becomes_ready(shop, settings, storage):
    backend = f"{__name__}.{storage.__name__}"
    options = settings.STORAGES["backups"]["OPTIONS"]
    kept = settings.STORAGES
    settings.STORAGES = {**kept, "backups": {"BACKEND": backend, "OPTIONS": options}}
    backup = request_backup(shop.database)
    assert perform(take_backup, backup) == "failed"
    backup.refresh_from_db()
    assert backup.state == State.PENDING
    assert shop.nothing_is_left_behind()

    settings.STORAGES = kept
    Claim.objects.update(next_attempt_at=None)
    assert perform(take_backup, backup) == "done"


class Forgetful(SQLiteProvisioner):
    """An engine that loses a row when it loads a dump."""

    def try_load(self, dump, scratch):
        contents = super().try_load(dump, scratch)
        contents["orders"][0] -= 1
        return contents


@on_sqlite
def test_one_that_does_not_load_as_it_was_never_becomes_ready(shop, settings):
    settings.DATABASES_PROVISIONERS = {"sqlite": f"{__name__}.Forgetful"}
    backup = request_backup(shop.database)
    assert perform(take_backup, backup) == "failed"
    backup.refresh_from_db()
    assert backup.state == State.PENDING
    assert "not all that was taken was in it" in Run.objects.get().error
    assert shop.nothing_is_left_behind()


def test_a_deletion_that_arrives_while_it_is_taken_wins(shop, monkeypatch):
    backup = request_backup(shop.database)
    fetch = snapshots.fetch

    def ask_meanwhile(*arguments):
        request_backup_deletion(backup)
        fetch(*arguments)

    monkeypatch.setattr(snapshots, "fetch", ask_meanwhile)
    assert perform(take_backup, backup) == "not_needed"
    assert perform(clean_up_backup, backup) == "done"
    assert not Backup.objects.exists()
    assert shop.nothing_is_left_behind()


@on_sqlite
def test_a_process_that_lost_its_lease_leaves_the_file_of_the_next_one_alone(shop, monkeypatch):
    """Frozen before it stores its file, and thawed when another one has done all of it."""
    backup = request_backup(shop.database)
    pack = snapshots.pack

    def freeze(*arguments):
        monkeypatch.setattr(snapshots, "pack", pack)
        Claim.objects.update(lease_expires_at=timezone.now() - timedelta(hours=1))
        assert perform(take_backup, backup) == "done"
        return arguments[0]

    monkeypatch.setattr(snapshots, "pack", freeze)
    assert perform(take_backup, backup) == "busy"
    assert perform(restore_backup, shop.ask_for(backup)) == "done"
    assert shop.nothing_is_left_behind()


# --- Restoring --------------------------------------------------------------------------------------------------------


def test_a_restored_branch_has_all_that_was_in_it_and_nothing_of_later(shop):
    backup = shop.back_up()
    before = shop.orders()
    shop.engine.do("shop", "INSERT INTO orders (id, item) VALUES (4, 'sold later')")
    branch = shop.ask_for(backup)
    assert (branch.parent, branch.origin, branch.engine) == (shop.database, "backup", shop.database.engine)

    assert perform(restore_backup, branch) == "done"

    branch.refresh_from_db()
    assert branch.state == Database.State.READY
    assert shop.orders(branch.name) == before
    assert shop.engine.ask("again", "SELECT * FROM teapots") == [("a teapot; blue",)]
    assert branch.size
    shop.engine.do("again", "INSERT INTO orders (id, item) VALUES (9, 'of the branch')")
    assert len(shop.orders()) == 4
    assert shop.nothing_is_left_behind()


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def empty(file: Path) -> None:
    file.write_bytes(b"")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (truncate, "bytes now; "),
        (empty, "has 0 bytes now; "),
        (flip_a_bit, "its checksum is another one"),
    ],
)
def test_a_spoiled_file_is_refused_marked_and_not_loaded(shop, spoil, words, tmp_path):
    backup = shop.back_up()
    spoil(tmp_path / "stored" / backup.file)
    branch = shop.ask_for(backup)

    assert perform(restore_backup, branch) == "done"

    branch.refresh_from_db()
    backup.refresh_from_db()
    assert backup.state == State.DAMAGED
    assert f"Its file {backup.file} " in backup.error
    assert words in backup.error
    assert branch.state == Database.State.FAILED
    assert branch.error == f"The {backup} is damaged. {backup.error}"
    assert perform(restore_backup, branch) == "not_needed"
    with pytest.raises(ValidationError, match="Only a backup that is ready"):
        shop.ask_for(backup, "once_more")
    assert not Database.objects.filter(name="once_more").exists()
    assert not any("again" in name for name in shop.engine.everything())


@on_sqlite
def test_a_file_that_is_out_of_reach_is_not_taken_for_a_damaged_one(shop, tmp_path):
    backup = shop.back_up()
    file = tmp_path / "stored" / backup.file
    file.rename(tmp_path / "away")
    branch = shop.ask_for(backup)
    assert perform(restore_backup, branch) == "failed"
    assert f"The file {backup.file} is not in the storage." in Claim.objects.get().last_error
    backup.refresh_from_db()
    assert backup.state == State.READY

    (tmp_path / "away").rename(file)
    Claim.objects.update(next_attempt_at=None)
    assert perform(restore_backup, branch) == "done"
    branch.refresh_from_db()
    assert branch.state == Database.State.READY


@on_sqlite
def test_a_branch_that_lacks_something_fails_in_words(shop):
    backup = shop.back_up()
    backup.contents["orders"][0] += 1
    backup.save()
    branch = shop.ask_for(backup)
    perform(restore_backup, branch)
    branch.refresh_from_db()
    assert branch.state == Database.State.FAILED
    assert branch.error.startswith("Not all that was in the backup")


@on_sqlite
def test_a_restore_is_asked_for_by_a_name_that_was_never_used(shop):
    backup = shop.back_up()
    with pytest.raises(ValidationError, match="Names are not used twice"):
        shop.ask_for(backup, "shop")
    assert not Restore.objects.exists()


# --- Cleaning up ------------------------------------------------------------------------------------------------------


def over(*backups: Backup) -> None:
    """Back-date them: their time is over."""
    Backup.objects.filter(pk__in=[backup.pk for backup in backups]).update(keep_until=timezone.now())


def unwanted() -> list[Backup]:
    return list(Backup.objects.needs_clean_up())


def test_an_old_one_goes_file_and_row_once_there_is_a_newer_one(shop):
    old = shop.back_up()
    over(old)
    assert unwanted() == []
    new = shop.back_up()
    assert unwanted() == [old]

    assert perform(clean_up_backup, old) == "done"

    assert list(Backup.objects.all()) == [new]
    assert stored() == [new.file]
    over(new)
    assert unwanted() == []
    assert shop.nothing_is_left_behind()


@on_sqlite
def test_a_newer_one_that_is_no_good_does_not_count(shop):
    good, *others = (shop.back_up() for _ in range(3))
    over(good, *others)
    for other, state in zip(others, (State.DAMAGED, State.DELETING), strict=True):
        Backup.objects.filter(pk=other.pk).update(state=state)
    assert unwanted() == others
    for other in others:
        assert perform(clean_up_backup, other) == "done"
    assert perform(clean_up_backup, good) == "not_needed"
    assert stored() == [good.file]


@on_sqlite
def test_that_of_another_database_does_not_count(shop):
    old = shop.back_up()
    other = Database.objects.create(name="other", owner=shop.database.owner)
    create_database(other)
    perform(take_backup, request_backup(other))
    over(old)
    assert unwanted() == []


@on_sqlite
def test_one_that_is_being_restored_stays_until_that_is_done(shop):
    old = shop.back_up()
    shop.back_up()
    branch = shop.ask_for(old)
    over(old)
    request_backup_deletion(old)
    assert unwanted() == []
    assert perform(clean_up_backup, old) == "not_needed"
    assert perform(restore_backup, branch) == "done"
    assert perform(clean_up_backup, old) == "done"
    branch.refresh_from_db()
    assert branch.restore.backup is None
    assert shop.nothing_is_left_behind()


@on_sqlite
def test_nobody_can_ask_for_one_whose_file_is_going(shop, monkeypatch):
    old, new = shop.back_up(), shop.back_up()
    over(old)
    refused = []

    def ask_meanwhile(backup: Backup) -> None:
        with pytest.raises(ValidationError, match="Only a backup that is ready") as error:
            shop.ask_for(old)
        refused.append(error)

    monkeypatch.setattr(snapshots, "empty_scratch", ask_meanwhile)
    assert perform(clean_up_backup, old) == "done"
    assert len(refused) == 1
    assert list(Backup.objects.all()) == [new]
    assert not Database.objects.filter(name="again").exists()


@on_sqlite
def test_its_policy_may_be_deleted_before(shop):
    policy = BackupPolicy.objects.create(database=shop.database, every=timedelta(hours=1))
    backup = shop.back_up()
    Backup.objects.update(policy=policy)
    policy.delete()
    request_backup_deletion(backup)
    assert perform(clean_up_backup, backup) == "done"


# --- Killed -----------------------------------------------------------------------------------------------------------

SETTLE = ("before", "jobs.claims.settle")
"""The row says so, and the claim is still there."""

TAKING = [
    ("before", "ENGINE.dump"),
    ("after", "ENGINE.dump"),
    ("after", "backups.snapshots.pack"),
    # The file has its name in the storage, and nothing is in it.
    ("after", "django.core.files.locks.lock"),
    ("after", "backups.snapshots.store"),
    ("after", "backups.snapshots.fetch"),
    ("after", "LOADED"),
    ("after", "ENGINE.try_load"),
    ("after", "backups.models.Backup.become_ready"),
    SETTLE,
]
RESTORING = [
    ("before", "backups.snapshots.fetch"),
    ("after", "backups.snapshots.fetch"),
    ("after", "LOADED"),
    ("after", "ENGINE.load"),
    ("after", "ENGINE.create"),
    ("after", "databases.models.Database.become_ready"),
    SETTLE,
]
CLEANING_UP = [
    ("after", "backups.models.Backup.become_deleting"),
    ("before", "backups.snapshots.remove"),
    ("after", "backups.snapshots.remove"),
    ("before", "ENGINE.discard"),
    ("after", "ENGINE.discard"),
    ("after", "backups.models.Backup.delete"),
    SETTLE,
]


@on_its_own
@pytest.mark.parametrize(("when", "function"), TAKING, ids=str)
def test_taking_killed_at_any_step(shop, kill, when, function):
    taken_again, deleted = request_backup(shop.database), request_backup(shop.database)
    for backup in (taken_again, deleted):
        kill(when, function, take_backup, backup)
        backup.refresh_from_db()
        assert backup.state == (State.READY if (when, function) == SETTLE else State.PENDING)

    assert perform(take_backup, taken_again) == ("not_needed" if (when, function) == SETTLE else "done")
    request_backup_deletion(deleted)
    assert perform(clean_up_backup, deleted) == "done"

    assert Backup.objects.get().state == State.READY
    assert shop.nothing_is_left_behind()


@on_its_own
@pytest.mark.parametrize(("when", "function"), RESTORING, ids=str)
def test_restoring_killed_at_any_step(shop, kill, when, function):
    backup = shop.back_up()
    made_again, deleted = (shop.ask_for(backup, name) for name in ("made_again", "deleted"))
    for branch in (made_again, deleted):
        kill(when, function, restore_backup, branch)
        branch.refresh_from_db()
        assert branch.state == ("ready" if (when, function) == SETTLE else "pending")

    assert perform(restore_backup, made_again) == ("not_needed" if (when, function) == SETTLE else "done")
    deleted.request_deletion()
    assert perform(delete_database, deleted) == "done"
    made_again.refresh_from_db()
    assert shop.orders(made_again.name) == shop.orders()
    # What the one that was deleted has left in scratch goes with the backup, if not before.
    request_backup_deletion(backup)
    assert perform(clean_up_backup, backup) == "done"
    assert shop.nothing_is_left_behind()


@on_its_own
@pytest.mark.parametrize(("when", "function"), CLEANING_UP, ids=str)
def test_cleaning_up_killed_at_any_step(shop, kill, when, function):
    old, new = shop.back_up(), shop.back_up()
    over(old)
    kill(when, function, clean_up_backup, old)

    # Its row goes last: for as long as there is anything of it, there is somebody who knows.
    assert Backup.objects.filter(pk=old.pk).exists() or stored() == [new.file]
    assert perform(clean_up_backup, old) == ("not_needed" if (when, function) == SETTLE else "done")
    assert list(Backup.objects.all()) == [new]
    assert shop.nothing_is_left_behind()


# --- Limits -----------------------------------------------------------------------------------------------------------


@on_sqlite
@pytest.mark.parametrize("function", ["ENGINE.dump", "backups.snapshots.store", "backups.snapshots.fetch", "LOADED"])
def test_a_full_disk_leaves_nothing_behind_and_heals(shop, function):
    """Full to this function, really: no file of its process may be larger than this, and each write ends early."""
    many = "WITH RECURSIVE n(i) AS (SELECT 9 UNION ALL SELECT i + 1 FROM n WHERE i < 500) SELECT i, randomblob(999), ''"
    shop.engine.do("shop", f"INSERT INTO orders (id, photo, item) {many} FROM n")
    backup = request_backup(shop.database)
    place, _, name = function.replace("ENGINE", ENGINES["sqlite"]).replace("LOADED", LOADED["sqlite"]).rpartition(".")
    original = getattr(pkgutil.resolve_name(place), name)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(*arguments: Any) -> Any:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
        try:
            return original(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    def take() -> None:
        setattr(pkgutil.resolve_name(place), name, full)
        assert perform(take_backup, backup) == "failed"

    assert in_a_child(take) == 0
    backup.refresh_from_db()
    assert backup.state == State.PENDING
    assert re.search("too large|full|I/O", Run.objects.get().error), Run.objects.get().error
    assert shop.nothing_is_left_behind()

    Claim.objects.update(next_attempt_at=None)
    assert perform(take_backup, backup) == "done"
    assert shop.nothing_is_left_behind()


@on_sqlite
def test_neither_taking_nor_restoring_takes_memory_for_what_is_in_it(shop, tmp_path):
    megabytes = 24
    many = f"WITH RECURSIVE n(i) AS (SELECT 9 UNION ALL SELECT i + 1 FROM n WHERE i < {megabytes * 256})"
    shop.engine.do("shop", f"INSERT INTO orders (id, photo, item) {many} SELECT i, randomblob(4096), '' FROM n")
    said = tmp_path / "said"

    def most() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    def take_and_restore() -> None:
        before = most()
        assert perform(restore_backup, shop.ask_for(shop.back_up())) == "done"
        said.write_text(str(most() - before))

    assert in_a_child(take_and_restore) == 0
    assert float(said.read_text()) < megabytes / 2
