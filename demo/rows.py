"""What the database, the queue and the disk say about the rows, seen from outside the library."""

from __future__ import annotations

import re
import sqlite3
import time
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from django.utils import timezone
from redis import Redis
from redis.client import Pipeline
from redis.exceptions import RedisError

from databases.models import Database
from demo.ledger import Ending
from jobs.models import Claim

QUEUES = ("urgent", "background", "default")
DELAYED = "rq:scheduler:scheduled_jobs"
JOBS = ("create_database", "delete_database")
MESSAGE = re.compile(rf"(?:{'|'.join(JOBS)})-(\d+)".encode())
FINISHED = frozenset({Database.State.READY, Database.State.DELETED})


def clock() -> float:
    """Seconds on the clock that the ledger uses."""
    return time.clock_gettime(time.CLOCK_MONOTONIC)


@dataclass(frozen=True)
class Snapshot:
    """All rows at one moment, by primary key. For an instant, a row just popped is neither queued nor running."""

    at: float = field(default_factory=clock)
    states: dict[int, str] = field(default_factory=dict)
    queued: frozenset[int] | None = None
    """None: Redis did not answer."""
    running: dict[int, str] = field(default_factory=dict)
    """Rows under a live lease, each with the token of its claim."""

    @property
    def unfinished(self) -> set[int]:
        return {pk for pk, state in self.states.items() if state not in FINISHED}

    @property
    def stranded(self) -> set[int]:
        """Rows that need work which nothing is about to do: only a sweep can find them."""
        return self.unfinished - (self.queued or frozenset()) - self.running.keys()

    def is_moving(self, pk: int, apart_from: str = "") -> bool:
        """Whether the row is queued, running or finished. A run under the claim `apart_from` does not count."""
        return (
            pk in (self.queued or frozenset())
            or self.running.get(pk, apart_from) != apart_from
            or self.states.get(pk) in FINISHED
        )


def look(redis: Redis | None) -> Snapshot:
    """Look at the queue, then the claims, then the rows: work flows that way, so none slips through between."""
    return Snapshot(queued=queued(redis) if redis else None, running=leases(), states=states())


def states() -> dict[int, str]:
    return dict(Database.objects.values_list("pk", "state"))


def leases() -> dict[int, str]:
    held = Claim.objects.filter(job__in=JOBS, lease_key__isnull=False, lease_expires_at__gt=timezone.now())
    return {int(pk): token for pk, token in held.values_list("object_pk", "token")}


def queued(redis: Redis) -> frozenset[int] | None:
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


def rows_of(lists: Iterable[Iterable[bytes]]) -> frozenset[int]:
    """The primary keys in the messages that `read_queue` returned."""
    return frozenset(int(found[1]) for ids in lists for each in ids if (found := MESSAGE.fullmatch(each)))


def endings(folder: Path) -> dict[str, Ending]:
    """How each row ended, by name: its state, and its real file."""
    return {name: Ending(state, inspect(folder, name)) for name, state in Database.objects.values_list("name", "state")}


def inspect(folder: Path, name: str) -> str:
    """`missing`, `sound`, or what is wrong with the SQLite database of this name."""
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
