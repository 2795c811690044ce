"""What the database, the queue and the disk say about the rows, seen from outside the library."""

from __future__ import annotations

import hashlib
import re
import sqlite3
import time
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import psycopg
from django.conf import settings
from django.core.files.storage import storages
from django.utils import timezone
from psycopg.conninfo import make_conninfo
from redis import Redis
from redis.client import Pipeline
from redis.exceptions import RedisError

from backups.models import Backup
from databases.models import Database, DeployRequest
from demo.ledger import Ending
from jobs.models import Claim

QUEUES = ("urgent", "background", "default")
DELAYED = "rq:scheduler:scheduled_jobs"
MODELS: dict[str, type[Database] | type[DeployRequest] | type[Backup]] = {
    "create_database": Database,
    "create_branch": Database,
    "restore_backup": Database,
    "delete_database": Database,
    "deploy": DeployRequest,
    "take_backup": Backup,
}
"""Of each job that is watched, the model of the rows that it works on."""
MESSAGE = re.compile(rf"({'|'.join(MODELS)})-(\d+)")
FINISHED = frozenset({"ready", "deleted", "deployed", "failed", "damaged"})


class Row(NamedTuple):
    """One row of one of these models."""

    model: str
    pk: int


def row_of(job: str, pk: str) -> Row:
    return Row(MODELS[job].__name__, int(pk))


def clock() -> float:
    """Seconds on the clock that the ledger uses."""
    return time.clock_gettime(time.CLOCK_MONOTONIC)


@dataclass(frozen=True)
class Snapshot:
    """All rows at one moment. For an instant, a row just popped is neither queued nor running."""

    at: float = field(default_factory=clock)
    states: dict[Row, str] = field(default_factory=dict)
    queued: frozenset[Row] | None = None
    """None: Redis did not answer."""
    running: dict[Row, str] = field(default_factory=dict)
    """Rows under a live lease, each with the token of its claim."""

    @property
    def unfinished(self) -> set[Row]:
        return {row for row, state in self.states.items() if state not in FINISHED}

    @property
    def stranded(self) -> set[Row]:
        """Rows that need work which nothing is about to do: only a sweep can find them."""
        return self.unfinished - (self.queued or frozenset()) - self.running.keys()

    def is_moving(self, row: Row, apart_from: str = "") -> bool:
        """Whether the row is queued, running or finished. A run under the claim `apart_from` does not count."""
        return (
            row in (self.queued or frozenset())
            or self.running.get(row, apart_from) != apart_from
            or self.states.get(row) in FINISHED
        )


def look(redis: Redis | None) -> Snapshot:
    """Look at the queue, then the claims, then the rows: work flows that way, so none slips through between."""
    return Snapshot(queued=queued(redis) if redis else None, running=leases(), states=states())


def states() -> dict[Row, str]:
    models = dict.fromkeys(MODELS.values())
    return {
        Row(model.__name__, pk): state for model in models for pk, state in model.objects.values_list("pk", "state")
    }


def leases() -> dict[Row, str]:
    held = Claim.objects.filter(job__in=MODELS, lease_key__isnull=False, lease_expires_at__gt=timezone.now())
    return {row_of(job, pk): token for job, pk, token in held.values_list("job", "object_pk", "token")}


def queued(redis: Redis) -> frozenset[Row] | None:
    try:
        with redis.pipeline(transaction=True) as pipeline:
            read_queue(pipeline)
            return rows_of(pipeline.execute())
    except RedisError:
        return None


def read_queue(pipeline: Pipeline) -> None:
    """Add to the pipeline what reads every message: the lists of the queues and the delayed set."""
    for name in QUEUES:
        pipeline.lrange(f"rq:queue:{name}", 0, -1)
    pipeline.zrange(DELAYED, 0, -1)


def rows_of(lists: Iterable[Iterable[bytes]]) -> frozenset[Row]:
    """The rows in the messages that `read_queue` returned."""
    texts = (each.decode(errors="replace") for ids in lists for each in ids)
    return frozenset(row_of(*found.groups()) for text in texts if (found := MESSAGE.fullmatch(text)))


def endings() -> dict[str, Ending]:
    """How each database ended, by name: its state, and what is really there."""
    return {database.name: Ending(database.state, inspect(database)) for database in Database.objects.order_by("pk")}


def inspect(database: Database) -> str:
    """`missing`, `sound`, or what is wrong with the real database."""
    return inspect_server(database.name) if database.engine == "postgresql" else inspect_folder(database.name)


def inspect_server(name: str) -> str:
    with server() as session:
        found = session.execute("SELECT FROM pg_database WHERE datname = %s", [name]).rowcount
        roles = session.execute("SELECT FROM pg_roles WHERE rolname = %s", [name]).rowcount
    if found != roles:
        return f"{found} databases and {roles} roles"
    if not found:
        return "missing"
    try:
        with server(name) as session:
            session.execute("SELECT 1")
    except psycopg.Error as error:
        return str(error)
    return "sound"


def inspect_folder(name: str) -> str:
    folder = Path(settings.DATABASES_FOLDER)
    path = folder / f"{name}.sqlite3"
    if not path.exists():
        remains = [file.name for pattern in (f"{path.name}*", f".{name}.*") for file in folder.glob(pattern)]
        return f"gone but for {', '.join(remains)}" if remains else "missing"
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as connection:
            [(verdict,), *_] = connection.execute("PRAGMA integrity_check").fetchall()
    except sqlite3.Error as error:
        return str(error)
    return "sound" if verdict == "ok" else str(verdict)


def remains() -> list[str]:
    """What lies about on the disk or the server and belongs to no row that is ready."""
    ready = dict(Database.objects.filter(state=Database.State.READY).values_list("name", "engine"))
    on_disk = {f"{name}.sqlite3{end}" for name in ready for end in ("", "-wal", "-shm")}
    stored = set(Backup.objects.filter(state=Backup.State.READY).values_list("file", flat=True))
    found = [f"the database's file {name}" for name in names_in(settings.DATABASES_FOLDER) - on_disk]
    found += [f"the backup's file {name}" for name in names_in(storages["backups"].path("")) - stored]
    found += [f"in scratch {name}" for name in names_in(settings.BACKUPS_SCRATCH)]
    if settings.DATABASES_POSTGRES_URL:
        with server() as session:
            databases = session.execute("SELECT datname FROM pg_database WHERE NOT datistemplate").fetchall()
            roles = session.execute("SELECT rolname FROM pg_roles WHERE NOT starts_with(rolname, 'pg_')").fetchall()
        found += [f"the database {name}" for (name,) in databases if name not in {"postgres", *ready}]
        found += [f"the role {name}" for (name,) in roles if name not in {"postgres", *ready}]
    return sorted(found)


def names_in(folder: Path | str) -> set[str]:
    return {path.name for path in Path(folder).iterdir()} if Path(folder).exists() else set()


def read(name: str, engine: str) -> dict[str, tuple[int, str]]:
    """What is in a database: of each table how many rows it has, and a checksum of them."""
    if engine == "postgresql":
        with server(name) as session:
            tables = [
                table for (table,) in session.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
            ]
            return {table: checksum(session.execute(f'SELECT * FROM "{table}"'.encode())) for table in tables}
    with closing(sqlite3.connect(Path(settings.DATABASES_FOLDER) / f"{name}.sqlite3")) as connection:
        listed = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        return {table: checksum(connection.execute(f'SELECT * FROM "{table}"')) for (table,) in listed}


def checksum(rows: Iterable[tuple[object, ...]]) -> tuple[int, str]:
    lines = sorted(map(repr, rows))
    return len(lines), hashlib.sha256("\n".join(lines).encode()).hexdigest()


def server(database: str = "") -> psycopg.Connection[tuple[Any, ...]]:
    """Connect to the server of the users' databases, to this one of them if one is named."""
    return psycopg.connect(make_conninfo(settings.DATABASES_POSTGRES_URL, dbname=database or None), autocommit=True)
