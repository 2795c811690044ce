"""SQLite databases: one file each in the folder `DATABASES_FOLDER`, readable by their owner only."""

import hashlib
import logging
import os
import re
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import timedelta
from pathlib import Path

from django.conf import settings

from databases.provisioners.base import (
    NAME_PATTERN,
    Contents,
    Provisioned,
    ProvisioningError,
    Refused,
    count_and_sum,
)

logger = logging.getLogger(__name__)

SIDE_FILES = ("-wal", "-shm", "-journal")
BUSY_SECONDS = 20
HARMLESS_PRAGMAS = {
    "application_id",
    # Those that SQLite itself asks for: to make a full-text index, to add a column with a CHECK, to make an R-tree.
    "data_version",
    "quick_check",
    "page_size",
    "defer_foreign_keys",
    "foreign_key_check",
    "foreign_key_list",
    "index_info",
    "index_list",
    "index_xinfo",
    "table_info",
    "table_list",
    "table_xinfo",
    "user_version",
}


class Damaged(Exception):
    """A file is not a sound SQLite database."""


class SQLiteProvisioner:
    """Makes and deletes SQLite files.

    A file gets its name only when it is finished, checked and on disk: it is made as `.<name>.making`, then linked. A
    link never replaces a file, so a `create` that froze and wakes up late cannot overwrite a database that is in use.
    """

    def __init__(self) -> None:
        self.folder = Path(settings.DATABASES_FOLDER)

    def create(self, name: str, password: str = "") -> Provisioned:
        with self._explained("create", name):
            return self._have(name, lambda making: make_first_table(making, name))

    def copy(self, source: str, name: str, password: str = "", end_sessions: bool = False) -> Provisioned:
        """Copy it as it is at one moment; nobody who uses it has to wait."""

        def copy(making: Path) -> None:
            with self._opened(source) as connection:
                back_up(connection, making)

        with self._explained("copy", name):
            return self._have(name, copy)

    def schema(self, name: str) -> str:
        with self._explained("look at", name), self._opened(name) as connection:
            return digest(connection)

    def deploy(self, name: str, password: str, marker: str, sql: str, timeout: timedelta) -> str:
        with self._explained("change", name), self._opened(name) as connection:
            return change(connection, marker, split(sql), timeout)

    def dump(self, name: str, to: Path) -> Contents:
        with self._explained("dump", name):
            remove(to)
            make_private(to)
            with self._opened(name) as connection:
                # What is copied and what is counted are of the same moment: the one at which this begins to read.
                connection.execute("BEGIN")
                found = contents(connection)
                back_up(connection, to)
            with opened(to) as connection:
                # Then all of it is in one file.
                connection.execute("PRAGMA journal_mode = DELETE")
            sync(to)
            return found

    def load(self, name: str, dump: Path, password: str = "") -> Contents:
        with self._explained("load", name):
            self._have(name, lambda making: restore(dump, making))
            with self._opened(name) as connection:
                return contents(connection)

    def try_load(self, dump: Path, scratch: str) -> Contents:
        with self._explained("try to load", scratch):
            tried = self._tried(scratch)
            self._make_folder()
            remove(tried)
            try:
                make_private(tried)
                restore(dump, tried)
                check(tried)
                with opened(tried) as connection:
                    return contents(connection)
            finally:
                remove(tried)

    def discard(self, scratch: str) -> None:
        with self._explained("discard", scratch):
            remove(self._tried(scratch))

    def delete(self, name: str) -> None:
        with self._explained("delete", name):
            path = self._path(name)
            if self.folder.exists():
                # The one being made first: a late `create` finds nothing to link.
                for file in (self._making(name), path, self._damaged(name)):
                    remove(file)
                sync(self.folder)

    def _path(self, name: str) -> Path:
        if not re.match(NAME_PATTERN, name):
            raise ProvisioningError(
                f"{name!r} cannot be the name of a database. Use lower-case letters, digits and underscores, "
                "at most 63 of them, and begin with a letter."
            )
        return self.folder / f"{name}.sqlite3"

    def _making(self, name: str) -> Path:
        return self.folder / f".{name}.making"

    def _damaged(self, name: str) -> Path:
        return self.folder / f".{name}.damaged"

    def _tried(self, scratch: str) -> Path:
        return self._path(scratch).with_name(f".{scratch}.trying")

    @contextmanager
    def _opened(self, name: str) -> Iterator[sqlite3.Connection]:
        """Open a database that was made here. Raises Refused when there is none."""
        path = self._path(name)
        if not path.exists():
            raise Refused(f"There is no database {name!r} any more.")
        with opened(path) as connection:
            yield connection

    def _have(self, name: str, fill: Callable[[Path], None]) -> Provisioned:
        """Have a database of this name: the one that is there and whole, or a new one that `fill` fills."""
        path = self._path(name)
        self._make_folder()
        remove(self._making(name))
        if path.exists():
            self._keep_or_replace(name, fill)
        else:
            self._make(name, fill)
        return Provisioned(path=str(path), size=path.stat().st_size)

    def _make_folder(self) -> None:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self.folder.stat().st_mode & 0o077:
            raise ProvisioningError(
                f"Others than its owner can enter the folder {self.folder}. Run `chmod 700` on it, or name another "
                "folder in DATABASES_FOLDER."
            )

    def _make(self, name: str, fill: Callable[[Path], None]) -> None:
        making, path = self._making(name), self._path(name)
        make_private(making)
        fill(making)
        log_ahead(making)
        check(making)
        sync(making)
        # Never leave the write-ahead log of an earlier file beside a new one: SQLite would replay it.
        for file in side_files(path):
            file.unlink(missing_ok=True)
        os.link(making, path)
        remove(making)
        sync(self.folder)

    def _keep_or_replace(self, name: str, fill: Callable[[Path], None]) -> None:
        """See that a file which is there already is whole; set one that is damaged aside, and make a new one."""
        path, damaged = self._path(name), self._damaged(name)
        try:
            for file in (path, *side_files(path)):
                if file.exists():
                    file.chmod(0o600)
            check(path)
        except Damaged as damage:
            logger.warning("%s. It is kept as %s, and a new one is made.", damage, damaged)
            remove(damaged)
            for file, aside in zip((path, *side_files(path)), (damaged, *side_files(damaged)), strict=True):
                if file.exists():
                    file.rename(aside)
            self._make(name, fill)

    @contextmanager
    def _explained(self, verb: str, name: str) -> Iterator[None]:
        try:
            yield
        except (OSError, sqlite3.Error, Damaged) as error:
            raise ProvisioningError(
                f"Could not {verb} the database {name!r} in {self.folder}: {error}. "
                "Mend that, and it is done at the next attempt."
            ) from error


@contextmanager
def opened(path: Path) -> Iterator[sqlite3.Connection]:
    """Open a file that exists. Raises Damaged when SQLite finds that it is no database or a broken one."""
    try:
        uri = f"{path.absolute().as_uri()}?mode=rw"
        with closing(sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS, isolation_level=None)) as connection:
            yield connection
    except sqlite3.DatabaseError as error:
        # The low byte is the primary code; extended ones, as SQLITE_CORRUPT_INDEX, keep it.
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}:
            raise Damaged(f"{path} is damaged: {error}") from error
        raise


def make_private(path: Path) -> None:
    """Make an empty file that its owner alone can read. SQLite gives its side files the mode of the file itself."""
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))


def make_first_table(path: Path, name: str) -> None:
    with opened(path) as connection:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("CREATE TABLE about (name TEXT NOT NULL, created_at TEXT NOT NULL)")
        connection.execute("INSERT INTO about VALUES (?, datetime('now'))", [name])
        connection.execute("COMMIT")


def log_ahead(path: Path) -> None:
    """Switch to write-ahead logging, which the file remembers: then nobody who reads keeps others from writing."""
    with opened(path) as connection:
        connection.execute("PRAGMA journal_mode = WAL")


def check(path: Path) -> None:
    """Open the file again and have SQLite check all of it. Raises Damaged."""
    if not path.stat().st_size:
        # For SQLite that is a database without tables.
        raise Damaged(f"{path} is empty")
    with opened(path) as connection:
        found = [row[0] for row in connection.execute("PRAGMA integrity_check(3)")]
        if found != ["ok"]:
            raise Damaged(f"{path} is damaged: {'; '.join(found)}")


def back_up(connection: sqlite3.Connection, to: Path) -> None:
    """Copy all of a database into a file, as of one moment."""
    with closing(sqlite3.connect(to, timeout=BUSY_SECONDS)) as copy:
        connection.backup(copy)


def restore(dump: Path, to: Path) -> None:
    """Copy a dump into a file. Raises Refused when it is not whole."""
    if not dump.exists():
        raise ProvisioningError(f"There is no file {dump}.")
    try:
        check(dump)
        with opened(dump) as connection:
            back_up(connection, to)
    except Damaged as damage:
        raise Refused(f"This is no whole dump of a SQLite database: {damage}.") from damage


def contents(connection: sqlite3.Connection) -> Contents:
    """Return what is in all tables, those apart that keep their rows in other ones."""
    # Not every text is text, as far as SQLite is concerned.
    connection.text_factory = lambda value: value.decode(errors="surrogateescape")
    tables = connection.execute(
        "SELECT name FROM sqlite_master WHERE type = 'table' AND rootpage AND name NOT LIKE 'sqlite!_%' ESCAPE '!'"
    ).fetchall()
    # Its owner's own words may call what SQLite itself holds for harmless, and nothing else.
    connection.execute("PRAGMA trusted_schema = OFF")
    return {
        name: count_and_sum(repr(row).encode() for row in connection.execute(f"SELECT * FROM {quoted(name)}"))
        for (name,) in tables
    }


def quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def digest(connection: sqlite3.Connection) -> str:
    """Return a digest of the schema; the table of the markers is no part of it."""
    rows = connection.execute(
        "SELECT type, name, tbl_name, sql FROM sqlite_master "
        "WHERE tbl_name <> 'selfheal_deploys' AND name NOT LIKE 'sqlite!_%' ESCAPE '!' ORDER BY type, name"
    )
    return hashlib.sha256(repr(rows.fetchall()).encode()).hexdigest()


def split(text: str) -> list[str]:
    """Return the statements of a change; SQLite says where one ends, and that a trigger's are not the end of it."""
    statements, begun = [], ""
    for piece in re.split(r"(?<=;)", text):
        begun += piece
        if sqlite3.complete_statement(begun):
            statements.append(begun)
            begun = ""
    return [*statements, begun]


def change(connection: sqlite3.Connection, marker: str, statements: list[str], timeout: timedelta) -> str:
    """Make a change and leave its marker, in one transaction; return a digest of the schema. Raises Refused."""
    seconds = timeout.total_seconds()
    deadline = time.monotonic() + seconds
    forbidden: list[str] = []

    def allow(action: int, what: str | None, more: str | None, database: str | None, by: str | None) -> int:
        if action in {sqlite3.SQLITE_TRANSACTION, sqlite3.SQLITE_SAVEPOINT}:
            forbidden.append(f"A change is made in one transaction, which {what} would disturb.")
        elif action in {sqlite3.SQLITE_ATTACH, sqlite3.SQLITE_DETACH}:
            forbidden.append("A change is made in one database, and reaches no other file.")
        elif action == sqlite3.SQLITE_PRAGMA and (what or "").lower() not in HARMLESS_PRAGMAS:
            forbidden.append(f"PRAGMA {what} is not for a change of the schema.")
        else:
            return sqlite3.SQLITE_OK
        return sqlite3.SQLITE_DENY

    try:
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute(f"PRAGMA busy_timeout = {int(min(seconds, BUSY_SECONDS) * 1_000)}")
        connection.execute("BEGIN IMMEDIATE")
        if (deployed := find_marker(connection, marker)) is not None:
            return deployed
        connection.set_progress_handler(lambda: time.monotonic() > deadline, 10_000)
        connection.set_authorizer(allow)
        for statement in statements:
            for _ in connection.execute(statement):
                pass
            if not connection.in_transaction:
                raise Refused("A change is made in one transaction, and one of its statements has ended that.")
        connection.set_authorizer(None)
        # The change itself may have dropped it.
        connection.execute(
            "CREATE TABLE IF NOT EXISTS selfheal_deploys (marker TEXT PRIMARY KEY, schema TEXT NOT NULL, "
            "deployed_at TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP)"
        )
        schema = digest(connection)
        connection.execute("INSERT INTO selfheal_deploys (marker, schema) VALUES (?, ?)", [marker, schema])
        connection.set_progress_handler(None, 0)
        connection.execute("COMMIT")
        return schema
    except (sqlite3.Error, sqlite3.Warning) as error:
        if forbidden:
            raise Refused(f"{forbidden[0]} Leave the statement out.") from error
        match getattr(error, "sqlite_errorcode", 0) & 0xFF:
            case sqlite3.SQLITE_BUSY:
                # Who it is nobody can say. It may be a frozen attempt at this very change, which makes it yet.
                raise ProvisioningError(
                    f"It waited {min(seconds, BUSY_SECONDS):g} seconds for somebody who writes into the database, and "
                    "was given up for now."
                ) from error
            case sqlite3.SQLITE_INTERRUPT:
                raise Refused(
                    f"It took longer than {seconds:g} seconds, and was given up. Nothing was changed."
                ) from error
            case sqlite3.SQLITE_FULL | sqlite3.SQLITE_IOERR | sqlite3.SQLITE_CANTOPEN | sqlite3.SQLITE_NOMEM:
                # Which it may be able to do later.
                raise
            case _:
                raise Refused(str(error)) from error


def find_marker(connection: sqlite3.Connection, marker: str) -> str | None:
    """Return the digest that was taken when this change was made, or None when it has not been made."""
    if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'selfheal_deploys'").fetchone():
        return None
    found = connection.execute("SELECT schema FROM selfheal_deploys WHERE marker = ?", [marker]).fetchone()
    return found[0] if found else None


def remove(path: Path) -> None:
    """Remove a SQLite file and its side files; fine when there is none."""
    for file in (path, *side_files(path)):
        file.unlink(missing_ok=True)


def side_files(path: Path) -> list[Path]:
    """The files that SQLite may keep beside this one."""
    return [path.with_name(path.name + suffix) for suffix in SIDE_FILES]


def sync(path: Path) -> None:
    """Have the kernel write a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
