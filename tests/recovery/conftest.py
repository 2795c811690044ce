"""Real processes over a real Redis and a real database, with intervals of seconds, for doing bad things to them.

`stack` gives a test stock commands to start and to kill. The test's own database is theirs too: it makes rows, strikes,
waits for a condition, and looks at the row last.
"""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from django.db import connection, connections
from django.db.models import F
from redis import Redis

from config.servers import RedisServer
from config.stack import Death, Supervisor, manage
from jobs.clock import timestamp
from jobs.models import Claim, Run, Schedule
from tests import database
from tests.cast.models import Task
from tests.recovery.forked import ForkingSupervisor, Zygote
from tests.recovery.traps import Trap

# One second of a lease here stands for ten in production.
INTERVALS = {"LEASE": 6, "HEARTBEAT": 1, "TICK": 0.5}
LEASE = INTERVALS["LEASE"]
PATIENCE = 40
# For `TEST_JOBS`: nobody has the patience to wait for this lease, so what is done did not wait for it.
A_LONG_LEASE = json.dumps({**INTERVALS, "LEASE": 10 * PATIENCE})
# One sweep interval (two seconds), one tick, and what a busy machine adds. For tests in which there is no lease that
# could run out: what is found again this soon was found by a sweep, or by a tick.
SOON = 15


def wait_for(condition: Callable[[], Any], what: str, seconds: float = PATIENCE) -> Any:
    """Return the condition's first true value; fail, naming it, when there is none in time."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > deadline:
            pytest.fail(f"{what}: not within {seconds} seconds")
        time.sleep(0.05)
    return value


def is_gone(pid: int) -> bool:
    """Whether a process has ended, also when nobody has asked how."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@dataclass
class Interval:
    """One process at work on one row, as the ledger has it. `end` is None when it never said that it had finished."""

    task: int
    job: str
    pid: int
    start: float
    end: float | None = None


@dataclass
class Stack:
    """A deployment on this machine, for one test."""

    folder: Path
    redis: RedisServer
    supervisor: Supervisor
    client: Redis
    # When each process died that this test killed, or saw dead.
    deaths: dict[int, float] = field(default_factory=dict)
    # The ends of commands that the supervisor saw, in their order.
    exits: list[Death] = field(default_factory=list)

    @property
    def ledger_path(self) -> Path:
        return self.folder / "ledger"

    # --- Processes ----------------------------------------------------------------------------------------------------

    def scheduler(self, name: str = "scheduler", trap: Trap | None = None, **environment: str) -> None:
        self._start(name, ["rqscheduler"], trap, environment)

    def worker(
        self, name: str = "worker", *queues: str, trap: Trap | None = None, ticks: bool = False, **environment: str
    ) -> None:
        """Start a worker. Unless it `ticks`, it does not stand in for a scheduler: what heals is the test's doing."""
        if not ticks:
            environment = {"TEST_JOBS": json.dumps(INTERVALS | {"TICK": 3600}), **environment}
        self._start(name, ["rqworker", *(queues or ("urgent", "background", "default"))], trap, environment)

    def _start(self, name: str, command: list[str], trap: Trap | None, environment: dict[str, str]) -> None:
        laid = trap.environment(self.folder) if trap else {}
        self.supervisor.start(name, manage(*command), {**environment, **laid})

    def pid(self, name: str = "worker") -> int:
        pid = self.supervisor.pid(name)
        assert pid
        return pid

    def log(self, name: str) -> str:
        path = self.supervisor.logs / f"{name}.log"
        return path.read_text() if path.exists() else ""

    def wait_until_up(self, *names: str) -> None:
        for name in names:
            self.wait_for(lambda name=name: "started with PID" in self.log(name), f"{name} up")

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

    def freeze(self, *pids: int) -> None:
        """SIGSTOP these processes, and wait until they stand still."""
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        for pid in pids:
            self.wait_until_frozen(pid)

    def wait_until_frozen(self, pid: int) -> None:
        self.wait_for(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED, f"{pid} frozen")

    def thaw(self, *pids: int) -> None:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)

    def wait_until_gone(self, pid: int, seconds: float = PATIENCE) -> float:
        """Wait until a process has ended, and return when it was seen to have."""
        self.wait_for(lambda: is_gone(pid), f"{pid} gone", seconds)
        return self.deaths.setdefault(pid, time.monotonic())

    def wait_until_sprung(self, trap: Trap) -> tuple[int, int]:
        """Wait until somebody was struck; return the pids of the process and of its parent."""
        path = trap.sprung(self.folder)
        said = self.wait_for(lambda: path.exists() and path.read_text(), f"{trap}")
        pid, parent = map(int, said.split())
        if trap.how == "SIGKILL":
            self.deaths.setdefault(pid, time.monotonic())
        return pid, parent

    # --- Waiting ------------------------------------------------------------------------------------------------------

    def poll(self) -> None:
        for death in self.supervisor.poll():
            self.exits.append(death)
            self.deaths.setdefault(death.pid, time.monotonic())

    def wait_for(self, condition: Callable[[], Any], what: str, seconds: float = PATIENCE) -> Any:
        """Wait for a condition while the supervisor replaces what dies."""

        def look() -> Any:
            self.poll()
            return condition()

        return wait_for(look, what, seconds)

    def wait_until_done(self, *tasks: Task, state: str = "done", seconds: float = PATIENCE) -> None:
        """Wait until these rows say so, and nothing about them is left to be settled."""
        pks = [task.pk for task in tasks]
        rows, claims = Task.objects.filter(pk__in=pks), Claim.objects.filter(object_pk__in=map(str, pks))
        self.wait_for(
            lambda: not rows.exclude(state=state).exists() and not claims.all().exists(),
            f"tasks {pks} {state}",
            seconds,
        )

    def wait_until_drained(self, queue: str = "default") -> None:
        self.wait_for(lambda: not self.queued(queue), f"{queue} drained")

    def wait_for_sweeps(self, count: int = 2, name: str = "schedule_tasks") -> None:
        """Wait until this many runs of a sweep have begun and ended from now on."""
        for _ in range(count):
            later = Schedule.objects.filter(
                name=name,
                last_started_at__gt=Schedule.objects.get(name=name).last_started_at or "1970-01-01T00:00Z",
                last_finished_at__gte=F("last_started_at"),
            )
            self.wait_for(later.all().exists, f"another run of {name}")

    # --- Looking ------------------------------------------------------------------------------------------------------

    def queued(self, queue: str = "default") -> list[str]:
        """Return the messages in one queue's list."""
        return [message.decode() for message in self.client.lrange(f"rq:queue:{queue}", 0, -1)]

    def delayed(self) -> dict[str, float]:
        """Return the messages in the delayed set, with the seconds until each is due."""
        found = self.client.zrange("rq:scheduler:scheduled_jobs", 0, -1, withscores=True)
        return {message.decode(): score - timestamp() for message, score in found}

    def state(self, task: Task) -> str:
        return Task.objects.values_list("state", flat=True).get(pk=task.pk)

    def writes(self, task: Task) -> int:
        return Task.objects.values_list("writes", flat=True).get(pk=task.pk)

    def runs(self, task: Task, job: str = "do_task") -> list[str]:
        """Return how the attempts at a row ended, by the library's own history, oldest first."""
        return list(
            Run.objects.filter(job=job, object_pk=str(task.pk)).order_by("pk").values_list("outcome", flat=True)
        )

    def events(self) -> list[dict[str, Any]]:
        if not self.ledger_path.exists():
            return []
        # A process that was killed while it wrote may have left half a line.
        return [json.loads(line) for line in self.ledger_path.read_text().splitlines() if line.endswith("}")]

    def intervals(self, task: Task) -> list[Interval]:
        """Return who worked on the task, and when, from the ledger alone."""
        found: list[Interval] = []
        for event in self.events():
            if event["task"] != task.pk:
                continue
            if event["event"] == "start":
                found.append(Interval(task.pk, event["job"], event["pid"], event["at"]))
            elif event["event"] == "end":
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


@contextmanager
def missing_database(stack: Stack) -> Iterator[None]:
    """Take the database away from the processes: they cannot open it. The test still can."""
    if connection.vendor == "postgresql":
        with database.closed():
            yield
        return
    way = stack.folder / "database"
    way.rename(stack.folder / "somewhere else")
    yield
    (stack.folder / "somewhere else").rename(way)


@contextmanager
def locked_database() -> Iterator[None]:
    """Keep everybody from writing."""
    with database.locked():
        yield


def way_to_the_database(folder: Path) -> str:
    """Return the URL by which the processes find the test's database; SQLite's way can be taken from them."""
    if connection.vendor == "postgresql":
        return database.url()
    file = Path(connection.settings_dict["NAME"])
    way = folder / "database"
    way.symlink_to(file.parent)
    return database.url(NAME=way / file.name)


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """A folder for a demo or a soak, of which no process may remember anything when it has ended."""
    home = tmp_path / "home"
    yield home
    left_behind = [process for process in psutil.process_iter() if remembers(process, home)]
    for process in left_behind:
        process.kill()
    assert left_behind == []


def remembers(process: psutil.Process, home: Path) -> bool:
    try:
        return str(home) in process.environ().get("SELFHEAL_HOME", "") or str(home) in " ".join(process.cmdline())
    except psutil.Error:
        return False


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    zygote = Zygote()
    yield zygote
    zygote.end()


@pytest.fixture
def stack(transactional_db: None, tmp_path: Path, settings, monkeypatch, zygote: Zygote) -> Iterator[Stack]:
    """Its Redis runs; its processes are up to the test. None of them outlives it."""
    redis = RedisServer(tmp_path / "redis")
    environment = {
        "DJANGO_SETTINGS_MODULE": "tests.recovery.settings",
        "DATABASE_URL": way_to_the_database(tmp_path),
        "REDIS_URL": redis.url,
        "SELFHEAL_HOME": str(tmp_path / "home"),
        "TEST_JOBS": json.dumps(INTERVALS),
        "CAST_LEDGER": str(tmp_path / "ledger"),
    }
    settings.RQ_QUEUES = {name: {**queue, "URL": redis.url} for name, queue in settings.RQ_QUEUES.items()}
    monkeypatch.setenv("CAST_LEDGER", environment["CAST_LEDGER"])
    with redis, Redis.from_url(redis.url) as client, ForkingSupervisor(tmp_path, environment, zygote) as supervisor:
        yield Stack(tmp_path, redis, supervisor, client)
        # No test is about how they end now.
        supervisor.stop(grace=0)
        redis.thaw()
    connections.close_all()
