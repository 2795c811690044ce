"""The SQLite engine: real files, and a real kill before every single thing that it does to them."""

import os
import signal
import sqlite3
import stat
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from databases.provisioners import ProvisioningError, get_provisioner
from databases.provisioners.sqlite import SQLiteProvisioner

pytestmark = pytest.mark.once

# Runs one method of the engine and kills its own process before the n-th thing that it does to the folder: Python
# reports each opening, linking, removal and renaming to an audit hook before it happens, and SQLite each statement.
KILLED_BEFORE = """
import os, signal, sqlite3, sys
from pathlib import Path
from django.conf import settings
folder, method, name, steps = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
settings.configure(DATABASES_FOLDER=folder)
from databases.provisioners.sqlite import SQLiteProvisioner
provisioner = SQLiteProvisioner()

def count_down(what):
    global steps
    steps -= 1
    if steps < 0:
        os.kill(os.getpid(), signal.SIGKILL)

def watch(event, arguments):
    if arguments and folder in str(arguments[0]):
        count_down(event)

def connect(*arguments, **options):
    connection = sqlite3_connect(*arguments, **options)
    connection.set_trace_callback(count_down)
    return connection

sqlite3_connect, sqlite3.connect = sqlite3.connect, connect
sys.addaudithook(watch)
getattr(provisioner, method)(name)
"""


@pytest.fixture
def folder(tmp_path: Path, settings) -> Path:
    settings.DATABASES_FOLDER = tmp_path / "databases"
    return settings.DATABASES_FOLDER


@pytest.fixture
def provisioner(folder: Path) -> SQLiteProvisioner:
    return SQLiteProvisioner()


def run_and_kill(folder: Path, method: str, name: str, steps: int) -> int:
    """Return the exit code: minus SIGKILL, or 0 when the method ended before it came to that step."""
    command = [sys.executable, "-c", KILLED_BEFORE, str(folder), method, name, str(steps)]
    return subprocess.run(command, cwd=Path(__file__).parents[2]).returncode


def execute(path: Path, statement: str) -> list:
    with closing(sqlite3.connect(path)) as connection, connection:
        return connection.execute(statement).fetchall()


def tables(path: Path) -> list[str]:
    return [name for (name,) in execute(path, "SELECT name FROM sqlite_master WHERE type = 'table'")]


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def assert_fresh(path: Path) -> None:
    assert execute(path, "PRAGMA integrity_check") == [("ok",)]
    assert tables(path) == ["about"]
    assert execute(path, "SELECT name FROM about") == [("shop",)]


def test_it_is_what_makes_databases_of_sqlite():
    assert isinstance(get_provisioner("sqlite"), SQLiteProvisioner)


def test_create_makes_a_file_with_a_table_that_only_its_owner_can_read(provisioner, folder):
    made = provisioner.create("shop")

    path = Path(made.path)
    assert path == folder / "shop.sqlite3"
    assert made.size == path.stat().st_size > 0
    assert_fresh(path)
    assert execute(path, "PRAGMA journal_mode") == [("wal",)]
    assert (mode(folder), mode(path)) == (0o700, 0o600)
    assert names(folder) == {"shop.sqlite3"}


def test_the_write_ahead_log_is_the_owners_too(provisioner):
    path = Path(provisioner.create("shop").path)
    previous = os.umask(0)
    try:
        with closing(sqlite3.connect(path)) as connection, connection:
            connection.execute("CREATE TABLE orders (id)")
            modes = {suffix: mode(path.with_name(path.name + suffix)) for suffix in ("-wal", "-shm")}
    finally:
        os.umask(previous)
    assert modes == {"-wal": 0o600, "-shm": 0o600}


def test_create_keeps_a_finished_database_and_what_is_in_it(provisioner):
    path = Path(provisioner.create("shop").path)
    execute(path, "CREATE TABLE orders (id)")
    execute(path, "INSERT INTO orders VALUES (7)")
    execute(path, "DROP TABLE about")

    assert provisioner.create("shop").path == str(path)

    assert tables(path) == ["orders"]
    assert execute(path, "SELECT id FROM orders") == [(7,)]


def test_create_keeps_what_stands_only_in_the_write_ahead_log(provisioner):
    path = Path(provisioner.create("shop").path)
    with closing(sqlite3.connect(path)) as user, user:
        user.execute("PRAGMA wal_autocheckpoint = 0")
        user.execute("CREATE TABLE orders (id)")
        user.commit()

        provisioner.create("shop")

        assert "orders" in tables(path)


@pytest.mark.parametrize("half_made", [b"", b"SQLite format 3\0", b"not a database at all" * 500])
def test_create_finishes_or_replaces_a_half_made_file(provisioner, folder, half_made):
    folder.mkdir(mode=0o700)
    (folder / "shop.sqlite3").write_bytes(half_made)

    path = Path(provisioner.create("shop").path)

    assert_fresh(path)
    assert mode(path) == 0o600


def test_create_sets_a_truncated_database_aside_and_deletes_it_with_the_new_one(provisioner, folder):
    path = Path(provisioner.create("shop").path)
    execute(path, "CREATE TABLE orders (text)")
    execute(path, "INSERT INTO orders VALUES (hex(zeroblob(20000)))")
    truncated = path.read_bytes()[:10_000]
    path.write_bytes(truncated)

    provisioner.create("shop")

    assert_fresh(path)
    assert (folder / ".shop.damaged").read_bytes() == truncated
    provisioner.delete("shop")
    assert names(folder) == set()


def test_create_ignores_the_write_ahead_log_of_an_earlier_file(provisioner, folder):
    path = Path(provisioner.create("shop").path)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE ghost (id)")
        connection.commit()
        log = path.with_name("shop.sqlite3-wal").read_bytes()
    path.unlink()
    path.with_name("shop.sqlite3-wal").write_bytes(log)

    provisioner.create("shop")

    assert_fresh(path)


def test_delete_removes_every_file_of_one_database_and_of_no_other(provisioner, folder):
    for name in ("shop", "shop_2", "sho"):
        provisioner.create(name)
    for name in ("shop.sqlite3-wal", "shop.sqlite3-shm", ".shop.making", ".shop.making-wal", ".shop.damaged"):
        (folder / name).touch()

    provisioner.delete("shop")

    assert names(folder) == {"shop_2.sqlite3", "sho.sqlite3"}


def test_delete_is_fine_when_there_is_nothing(provisioner, folder):
    provisioner.delete("shop")
    folder.mkdir(mode=0o700)
    provisioner.delete("shop")


@pytest.mark.parametrize("name", ["", "../shop", "/etc/shop", "Shop", "1shop", "shop\n", "shop.x", "shöp", "s" * 64])
@pytest.mark.parametrize("method", ["create", "delete"])
def test_a_name_that_is_none_touches_nothing(provisioner, folder, method, name):
    with pytest.raises(ProvisioningError, match="Use lower-case letters"):
        getattr(provisioner, method)(name)
    assert not folder.exists()


def test_a_folder_that_others_can_enter_is_refused(provisioner, folder):
    folder.mkdir()
    folder.chmod(0o755)
    with pytest.raises(ProvisioningError, match="chmod 700"):
        provisioner.create("shop")
    assert names(folder) == set()


def test_an_error_says_what_could_not_be_done_and_where(provisioner, folder):
    folder.parent.mkdir(exist_ok=True)
    folder.write_text("a file where the folder should be")
    with pytest.raises(ProvisioningError, match=rf"Could not create the database 'shop' in {folder}"):
        provisioner.create("shop")


def test_a_late_create_does_not_overwrite_a_database_in_use(provisioner, folder, monkeypatch):
    """A process that froze just before the last step, and wakes up when another has finished its work."""
    link = os.link

    def wake_up_late(source, target):
        monkeypatch.setattr(os, "link", link)
        path = Path(SQLiteProvisioner().create("shop").path)
        execute(path, "CREATE TABLE orders (id)")
        link(source, target)

    monkeypatch.setattr(os, "link", wake_up_late)
    with pytest.raises(ProvisioningError):
        provisioner.create("shop")

    assert "orders" in tables(folder / "shop.sqlite3")


def test_a_late_create_does_not_bring_a_deleted_database_back(provisioner, folder, monkeypatch):
    link = os.link

    def wake_up_late(source, target):
        SQLiteProvisioner().delete("shop")
        link(source, target)

    monkeypatch.setattr(os, "link", wake_up_late)
    with pytest.raises(ProvisioningError):
        provisioner.create("shop")

    assert names(folder) == set()


def test_killed_at_any_step_of_its_creation_it_is_created_the_next_time(tmp_path, settings):
    for steps in range(100):
        settings.DATABASES_FOLDER = folder = tmp_path / str(steps)
        code = run_and_kill(folder, "create", "shop", steps)
        assert code in {0, -signal.SIGKILL}

        made = SQLiteProvisioner().create("shop")

        assert_fresh(Path(made.path))
        assert names(folder) == {"shop.sqlite3"}
        if code == 0:
            break
    assert steps > 20


def test_killed_at_any_step_of_its_deletion_it_is_deleted_the_next_time(tmp_path, settings):
    for steps in range(100):
        settings.DATABASES_FOLDER = folder = tmp_path / str(steps)
        SQLiteProvisioner().create("shop")
        for leftover in (".shop.making", ".shop.damaged", "shop.sqlite3-wal"):
            (folder / leftover).touch()
        code = run_and_kill(folder, "delete", "shop", steps)
        assert code in {0, -signal.SIGKILL}

        SQLiteProvisioner().delete("shop")

        assert names(folder) == set()
        if code == 0:
            break
    assert steps > 5
