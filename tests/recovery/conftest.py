"""Real processes over a real Redis and a real database, with intervals of seconds, for doing bad things to them.

`stack` gives a test stock commands to start and to kill. The test's own database is theirs too: it makes rows, strikes,
waits for a condition, and looks at the row last.
"""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from django.db import connections

from config.servers import RedisServer
from config.stack import Supervisor, manage
from jobs.models import Claim
from tests.cast.models import Task

# One second of a lease here stands for ten in production.
INTERVALS = {"LEASE": 6, "HEARTBEAT": 1, "TICK": 0.5}
PATIENCE = 40


def wait_for(condition: Callable[[], Any], what: str, seconds: float = PATIENCE) -> Any:
    """Return the condition's first true value; fail, naming it, when there is none in time."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > deadline:
            pytest.fail(f"{what}: not within {seconds} seconds")
        time.sleep(0.05)
    return value


@dataclass
class Interval:
    """One process at work on one row, as the ledger has it. `end` is None when it never said that it had finished."""

    task: int
    pid: int
    start: float
    end: float | None = None


@dataclass
class Stack:
    """A deployment on this machine, for one test."""

    folder: Path
    redis: RedisServer
    supervisor: Supervisor
    deaths: dict[int, float] = field(default_factory=dict)

    @property
    def ledger_path(self) -> Path:
        return self.folder / "ledger"

    def scheduler(self, name: str = "scheduler") -> None:
        self.supervisor.start(name, manage("rqscheduler"))

    def worker(self, name: str = "worker", *queues: str) -> None:
        self.supervisor.start(name, manage("rqworker", *(queues or ("urgent", "background", "default"))))

    def wait_for(self, condition: Callable[[], Any], what: str, seconds: float = PATIENCE) -> Any:
        """Wait for a condition while the supervisor replaces what dies."""

        def look() -> Any:
            self.supervisor.poll()
            return condition()

        return wait_for(look, what, seconds)

    def child_of(self, name: str = "worker") -> psutil.Process | None:
        """Return the process in which a worker performs a message, while it does."""
        pid = self.supervisor.pid(name)
        with suppress(psutil.NoSuchProcess):
            return next(iter(psutil.Process(pid).children()), None) if pid else None
        return None

    def child_at_work(self, task: Task) -> psutil.Process:
        """Wait until a process holds the task's claim and has begun; return the process."""

        def look() -> psutil.Process | None:
            holders = Claim.objects.filter(object_pk=str(task.pk), lease_key__isnull=False).values_list(
                "holder", flat=True
            )
            begun = {interval.pid for interval in self.intervals(task) if interval.end is None}
            pids = [int(holder.rpartition(":")[2]) for holder in holders]
            return psutil.Process(pids[0]) if pids and pids[0] in begun else None

        return self.wait_for(look, f"somebody at work on {task}")

    def kill(self, *pids: int | None) -> None:
        """SIGKILL these processes, and remember when."""
        for pid in filter(None, pids):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            self.deaths[pid] = time.monotonic()

    def events(self) -> list[dict[str, Any]]:
        if not self.ledger_path.exists():
            return []
        return [json.loads(line) for line in self.ledger_path.read_text().splitlines()]

    def intervals(self, task: Task) -> list[Interval]:
        """Return who worked on the task, and when, from the ledger alone."""
        found: list[Interval] = []
        for event in self.events():
            if event["task"] != task.pk:
                continue
            if event["event"] == "start":
                found.append(Interval(task.pk, event["pid"], event["at"]))
            else:
                next(each for each in reversed(found) if each.pid == event["pid"]).end = event["at"]
        return found

    def at_once(self, task: Task) -> list[tuple[Interval, Interval]]:
        """Return the pairs that worked on the task at the same time. One without an end ends when it was killed."""
        intervals = sorted(self.intervals(task), key=lambda each: each.start)
        ends = [each.end or self.deaths.get(each.pid) or float("inf") for each in intervals]
        return [
            (one, two)
            for i, one in enumerate(intervals)
            for two in intervals[i + 1 :]
            if one.pid != two.pid and two.start < ends[i]
        ]

    def state(self, task: Task) -> str:
        return Task.objects.values_list("state", flat=True).get(pk=task.pk)

    def wait_until_done(self, *tasks: Task, seconds: float = PATIENCE) -> None:
        pks = [task.pk for task in tasks]
        self.wait_for(
            lambda: not Task.objects.filter(pk__in=pks).exclude(state="done").exists(), f"tasks {pks} done", seconds
        )

    def log(self, name: str) -> str:
        path = self.supervisor.logs / f"{name}.log"
        return path.read_text() if path.exists() else ""


@pytest.fixture
def stack(transactional_db: None, tmp_path: Path, settings) -> Iterator[Stack]:
    """Its Redis runs; its processes are up to the test. None of them outlives it."""
    redis = RedisServer(tmp_path / "redis")
    environment = {
        "DJANGO_SETTINGS_MODULE": "tests.settings",
        "DATABASE_URL": f"sqlite:///{connections['default'].settings_dict['NAME']}",
        "REDIS_URL": redis.url,
        "SELFHEAL_HOME": str(tmp_path / "home"),
        "TEST_JOBS": json.dumps(INTERVALS),
        "CAST_LEDGER": str(tmp_path / "ledger"),
    }
    settings.RQ_QUEUES = {name: {**queue, "URL": redis.url} for name, queue in settings.RQ_QUEUES.items()}
    os.environ["CAST_LEDGER"] = environment["CAST_LEDGER"]
    with redis, Supervisor(tmp_path, environment) as supervisor:
        stack = Stack(tmp_path, redis, supervisor)
        yield stack
        redis.thaw()
    connections.close_all()
