"""The files of backups: written where nobody looks, stored, and read back.

Only Django's storage API is used, so that `STORAGES["backups"]` may be a folder or a bucket. Nothing is ever held in
memory as a whole. (That of django-storages for S3 reads into memory what is larger than its `max_memory_size` allows;
set that.)
"""

import gzip
import hashlib
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from django.conf import settings
from django.core.files import File
from django.core.files.storage import Storage, storages

from backups.models import Backup
from databases.models import Database
from databases.provisioners import ProvisioningError

CHUNK = 1024 * 1024
LEFT_BEHIND = 24 * 3600
"""Seconds after which what lies in scratch is nobody's: much longer than any of the jobs may take."""


class Damaged(Exception):
    """The file of a backup is not what was stored, or not what was taken. The message says how that shows."""


@dataclass(frozen=True)
class Stored:
    """A file in the storage."""

    file: str
    size: int
    sha256: str


def storage() -> Storage:
    return storages["backups"]


def file_name(backup: Backup) -> str:
    """Return the name of a backup's file, the same one at each attempt, so that none is ever lost sight of."""
    kind = {Database.Engine.SQLITE: "sqlite3.gz", Database.Engine.POSTGRESQL: "dump"}
    return backup.file or f"{backup.database.name}-{backup.pk}.{kind[Database.Engine(backup.database.engine)]}"


def scratch_name(backup: Backup) -> str:
    """Return what a backup's traces are called while it is taken: its folder in scratch, and where it is loaded."""
    return f"backup_{backup.pk}"


@contextmanager
def scratch(name: str) -> Iterator[Path]:
    """Make an empty folder that only we can read, and remove it afterwards with all that is in it.

    A process that was killed leaves its own; the next attempt starts with that, or `empty_scratch` does away with it.
    If they are on other machines, the next job there does, a day later.
    """
    folder = Path(settings.BACKUPS_SCRATCH) / name
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    for other in folder.parent.iterdir():
        with suppress(FileNotFoundError):
            if other.stat().st_mtime < time.time() - LEFT_BEHIND:
                shutil.rmtree(other, ignore_errors=True)
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def empty_scratch(backup: Backup) -> None:
    """Remove what killed processes left in scratch when they took a backup, or restored it."""
    name = scratch_name(backup)
    folder = Path(settings.BACKUPS_SCRATCH)
    for left in [folder / name, *folder.glob(f"{name}_*")]:
        if left.exists():
            shutil.rmtree(left)


def pack(dump: Path, file: str) -> Path:
    """Turn a dump into the file that is stored, and return that: compressed, unless the dump is already."""
    if not file.endswith(".gz"):
        return dump
    packed = dump.with_name("packed")
    with dump.open("rb") as plain, packed.open("wb") as raw, gzip.GzipFile("", "wb", 6, raw, mtime=0) as compressed:
        shutil.copyfileobj(plain, compressed, CHUNK)
    # A large one would otherwise lie there twice while it is verified.
    dump.unlink()
    return packed


def store(packed: Path, file: str) -> Stored:
    """Put a file into the storage under this name, where there must be none, and return what was put there."""
    with packed.open("rb") as content:
        sha256 = hashlib.file_digest(content, "sha256").hexdigest()
        saved = storage().save(file, File(content))
    if saved != file:
        storage().delete(saved)
        raise FileExistsError(f"There is a {file} in the storage already, put there by somebody else meanwhile.")
    return Stored(file, packed.stat().st_size, sha256)


def fetch(stored: Stored, to: Path) -> None:
    """Read a file back from the storage, and write the dump that is in it. Raises Damaged when it is another one.

    Raises ProvisioningError while there is none.
    """
    packed = to.with_name("fetched")
    digest, size = hashlib.sha256(), 0
    try:
        with storage().open(stored.file, "rb") as content, packed.open("wb") as copy:
            for chunk in content.chunks(CHUNK):
                digest.update(chunk)
                size += copy.write(chunk)
    except FileNotFoundError as error:
        # It may be back when whatever the storage is on is there again, and a backup that was only out of reach must
        # never be taken for one that is no good.
        raise ProvisioningError(
            f"The file {stored.file} is not in the storage. Bring it back, or see that the storage is the right one."
        ) from error
    if size != stored.size:
        raise Damaged(f"Its file {stored.file} has {size} bytes now; {stored.size} were stored.")
    if digest.hexdigest() != stored.sha256:
        raise Damaged(f"Its file {stored.file} is not what was stored: its checksum is another one.")
    # Not before its checksum is known to be right: nothing else is ever unpacked.
    if stored.file.endswith(".gz"):
        with gzip.open(packed) as compressed, to.open("wb") as plain:
            shutil.copyfileobj(compressed, plain, CHUNK)
        packed.unlink()
    else:
        packed.rename(to)


def remove(backup: Backup) -> None:
    """Remove a backup's file from the storage, half written or whole; fine when there is none."""
    storage().delete(file_name(backup))
