"""SQLite databases: one file each in the folder `DATABASES_FOLDER`, readable by their owner only."""

import logging
import os
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from django.conf import settings

from databases.provisioners.base import NAME_PATTERN, Provisioned, ProvisioningError

logger = logging.getLogger(__name__)

SIDE_FILES = ("-wal", "-shm", "-journal")
BUSY_SECONDS = 20


class Damaged(Exception):
    """A file is not a sound SQLite database."""


class SQLiteProvisioner:
    """Makes and deletes SQLite files.

    A file gets its name only when it is finished, checked and on disk: it is made as `.<name>.making`, then linked. A
    link never replaces a file, so a `create` that froze and wakes up late cannot overwrite a database that is in use.
    """

    def __init__(self) -> None:
        self.folder = Path(settings.DATABASES_FOLDER)

    def create(self, name: str) -> Provisioned:
        with self._explained("create", name):
            path = self._path(name)
            self._make_folder()
            remove(self._making(name))
            if path.exists():
                self._finish_existing(name)
            else:
                self._make(name)
            return Provisioned(path=str(path), size=path.stat().st_size)

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

    def _make_folder(self) -> None:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self.folder.stat().st_mode & 0o077:
            raise ProvisioningError(
                f"Others than its owner can enter the folder {self.folder}. Run `chmod 700` on it, or name another "
                "folder in DATABASES_FOLDER."
            )

    def _make(self, name: str) -> None:
        making, path = self._making(name), self._path(name)
        # SQLite gives its side files the mode of the file itself.
        os.close(os.open(making, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        finish(making, name)
        check(making)
        sync(making)
        # Never leave the write-ahead log of an earlier file beside a new one: SQLite would replay it.
        for file in side_files(path):
            file.unlink(missing_ok=True)
        os.link(making, path)
        remove(making)
        sync(self.folder)

    def _finish_existing(self, name: str) -> None:
        """See that a file which is there already is whole; set one that is damaged aside, and make a new one."""
        path, damaged = self._path(name), self._damaged(name)
        try:
            for file in (path, *side_files(path)):
                if file.exists():
                    file.chmod(0o600)
            finish(path, name)
            check(path)
        except Damaged as damage:
            logger.warning("%s. It is kept as %s, and a new one is made.", damage, damaged)
            remove(damaged)
            for file, aside in zip((path, *side_files(path)), (damaged, *side_files(damaged)), strict=True):
                if file.exists():
                    file.rename(aside)
            self._make(name)

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


def finish(path: Path, name: str) -> None:
    """Switch to write-ahead logging, and make the first table unless the file has tables already."""
    with opened(path) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("BEGIN IMMEDIATE")
        if connection.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,):
            connection.execute("CREATE TABLE about (name TEXT NOT NULL, created_at TEXT NOT NULL)")
            connection.execute("INSERT INTO about VALUES (?, datetime('now'))", [name])
        connection.execute("COMMIT")


def check(path: Path) -> None:
    """Open the file again and have SQLite check all of it. Raises Damaged."""
    with opened(path) as connection:
        found = [row[0] for row in connection.execute("PRAGMA integrity_check(3)")]
        if found != ["ok"]:
            raise Damaged(f"{path} is damaged: {'; '.join(found)}")


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
