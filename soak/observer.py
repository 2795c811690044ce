"""What can be seen from outside while it goes on: rows out of work, memory, connections, keys."""

from __future__ import annotations

import re
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import NamedTuple

import psutil
from django.db import DatabaseError, connection, connections
from django.db.models import Max, Q
from django.utils import timezone
from redis import Redis
from redis.exceptions import RedisError
from rq.utils import as_text

from databases.models import Database
from demo import rows
from demo.rows import MODELS, Row, Snapshot, row_of
from jobs.models import Claim

LOOK = 0.5
MEASURE = 5.0


class Heals:
    """How long rows were out of work: unfinished, and neither queued, nor leased, nor backing off.

    What a single look finds so may just have been popped; it counts when two looks in a row do.
    """

    def __init__(self) -> None:
        self.spans: list[float] = []
        self._since: dict[Row, float] = {}
        self._at_first_look: set[Row] = set()
        self._queued: frozenset[Row] = frozenset()

    def look(self, snapshot: Snapshot, resting: set[Row]) -> None:
        # While Redis does not answer, nobody knows that what it had is lost.
        self._queued = self._queued if snapshot.queued is None else snapshot.queued
        stranded = snapshot.unfinished - self._queued - snapshot.running.keys() - resting
        for row in self._since.keys() - stranded:
            since = self._since.pop(row)
            if row not in self._at_first_look:
                self.spans.append(snapshot.at - since)
        self._at_first_look = stranded - self._since.keys()
        self._since.update(dict.fromkeys(self._at_first_look, snapshot.at))

    @property
    def stranded(self) -> int:
        return len(self._since)


class Measured(NamedTuple):
    """How much there was of something: the most ever, and at the last look."""

    most: int = 0
    last: int = 0

    def then(self, value: int) -> Measured:
        return Measured(max(self.most, value), value)


class Observer(threading.Thread):
    """Looks twice a second, through connections that no disaster strikes; only a server that is down keeps it waiting.

    `pids` says which process each command has just now.
    """

    def __init__(self, redis_url: str, pids: Callable[[], Mapping[str, int]]) -> None:
        super().__init__(name="observer", daemon=True)
        self.snapshot = Snapshot()
        self.heals = Heals()
        self.quarantined: set[str] = set()
        self.memory: dict[str, list[float]] = defaultdict(list)
        """Megabytes of each command, one figure every few seconds."""
        self.sessions = Measured()
        self.clients = Measured()
        self._redis = Redis.from_url(redis_url, socket_timeout=2, socket_connect_timeout=2)
        self._pids = pids
        self._ended = threading.Event()
        self._looked_at = 0.0
        self._measured_at = 0.0

    def run(self) -> None:
        while not self._ended.wait(LOOK):
            try:
                self.look()
            except (DatabaseError, RedisError):
                # Down, and said so by whoever took it down.
                connections.close_all()
        connections.close_all()

    def end(self) -> None:
        self._ended.set()
        self.join(timeout=10)

    def look(self) -> None:
        snapshot = rows.look(self._redis)
        ours = Claim.objects.filter(job__in=MODELS)
        self.quarantined |= set(ours.filter(quarantined_at__isnull=False).values_list("object_pk", flat=True))
        resting = ours.filter(Q(next_attempt_at__gt=timezone.now()) | Q(quarantined_at__isnull=False))
        self.heals.look(snapshot, {row_of(*each) for each in resting.values_list("job", "object_pk")})
        self.snapshot = snapshot
        if rows.clock() >= self._measured_at + MEASURE:
            self._measured_at = rows.clock()
            self.measure()

    def measure(self) -> None:
        for name, pid in self._pids().items():
            try:
                self.memory[name].append(psutil.Process(pid).memory_info().rss / 2**20)
            except psutil.NoSuchProcess:
                continue
        with connection.cursor() as cursor:
            cursor.execute("SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'")
            self.sessions = self.sessions.then(cursor.fetchone()[0])
        self.clients = self.clients.then(self._redis.info("clients")["connected_clients"])

    def keys(self) -> dict[str, tuple[int, int, int]]:
        """Return what is in Redis: each group of keys with how many they are, their entries, and how many never expire.

        Names that differ in an id only are one group.
        """
        groups: dict[str, tuple[int, int, int]] = {}
        size = {"list": "LLEN", "set": "SCARD", "zset": "ZCARD", "hash": "HLEN"}
        for key in self._redis.scan_iter(count=1000):
            command = size.get(as_text(self._redis.type(key)))
            entries = int(self._redis.execute_command(command, key)) if command else 1
            group = group_of(key.decode(errors="replace"))
            keys, before, lasting = groups.get(group, (0, 0, 0))
            groups[group] = (keys + 1, before + entries, lasting + (self._redis.ttl(key) == -1))
        return dict(sorted(groups.items()))

    def longest_backoff(self) -> float:
        """Return the seconds until the last of the rows that are backing off may be attempted again."""
        last = Claim.objects.filter(job__in=MODELS).aggregate(Max("next_attempt_at"))["next_attempt_at__max"]
        return max(0.0, (last - timezone.now()).total_seconds()) if last else 0.0

    def is_settled(self, since: float) -> bool:
        """Whether every row has ended, as of a look that was taken later than this."""
        return self.snapshot.at > since and not self.snapshot.unfinished

    def progress(self) -> str:
        states, queued = list(self.snapshot.states.values()), self.snapshot.queued
        counts = "  ".join(f"{state} {states.count(state)}" for state in Database.State.values)
        return f"{counts}  queued {'?' if queued is None else len(queued)}  stranded {self.heals.stranded}"


def group_of(key: str) -> str:
    """Return a key's name with `*` for the ids in it: rq's workers have names of hexadecimal digits."""
    return re.sub(r"[0-9a-f]{32}|(?<=-)\d+", "*", key)
