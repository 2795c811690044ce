"""What runs in the world: the library's own scheduler, worker and heartbeat, and the people around them.

Only what cannot be in one process is replaced: to fork, to wait for a child, to be ended by a signal.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

from django.db import DatabaseError, InterfaceError, OperationalError, transaction
from django.db.models import F
from redis import Redis
from waffle import get_waffle_switch_model

from jobs import QueueUnavailable, claims, queues, registry, scheduler, worker
from jobs.conf import conf
from jobs.models import Claim, Schedule
from tests.cast.models import Task
from tests.recovery.explorer.world import Actor, Killed, World, current

QUEUES = ("urgent", "background", "default")


def here() -> Actor:
    actor = current()
    assert actor is not None
    return actor


class Scheduler(scheduler.Scheduler):
    """The real one; it is told by the model when its time is over."""

    def _install_signal_handlers(self) -> None:
        """Nobody sends it a signal."""


class Heartbeat(claims.Heartbeat):
    """The real one, as an actor of its process; the interpreter's watchdog is the world's."""

    def __init__(self, attempt: claims.Attempt) -> None:
        super().__init__(attempt)
        self.process = here().process
        self.ended = Flag()  # type: ignore[assignment]

    def start(self) -> None:
        def body() -> None:
            self.run()

        self.actor = self.process.spawn(f"{self.process.name} heart", body)

    def join(self, timeout: float | None = None) -> None:
        here().wait(timeout or 0, lambda: self.actor.has_ended, "join")

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        self.process.watchdog_at = None

    @staticmethod
    def _arm(renewed_at: float) -> None:
        here().process.renewed_at = renewed_at
        here().process.watchdog_at = renewed_at + (conf.LEASE - conf.lease_margin / 2).total_seconds()

    def _end_process(self, reason: str, how: int | None = None) -> None:
        here().world.count("heartbeat ended its process")
        self.process.end(-how if how is not None else claims.EXIT_LEASE_LOST)
        raise Killed


class Flag:
    """An event that is waited for in virtual time."""

    def __init__(self) -> None:
        self._is_set = False

    def set(self) -> None:
        self._is_set = True

    def is_set(self) -> bool:
        return self._is_set

    def wait(self, seconds: float) -> bool:
        here().wait(seconds, self.is_set, "beat")
        return self._is_set


class Worker(worker.Worker):
    """The real one. Its children are processes of the world."""

    def _install_signal_handlers(self) -> None:
        """Nobody sends it a signal; the operator sets its flags."""

    def register_death(self) -> None:
        """For rq's pages only."""

    def _next_message(self, burst: bool) -> Any:
        """As BLPOP does, come back with the next message that is pushed."""
        world = here().world
        pushes = world.pushes
        popped = queues.Queue.dequeue_any(self._ordered_queues, None, connection=self.connection)
        if popped is None:
            here().wait(30, lambda: world.pushes > pushes or self._stop_requested, "BLPOP")
        return popped

    def kill_horse(self, sig: int = 9) -> None:
        self.child.end(-sig)

    def _pause(self, seconds: float) -> None:
        here().wait(seconds, lambda: self._stop_requested)

    def _in_child(
        self, what: str, work: Callable[[], object], kill_after: float, on_stop: Callable[[], None] = lambda: None
    ) -> tuple[int, int, bool]:
        world = here().world
        child = world.start("child", lambda: self._be_forked(work), what)
        before = getattr(self, "child", None)
        if before is not None and not before.is_alive:
            child.dead_sibling = before
        self.child, child.worker = child, self
        give_up_at = world.monotonic + kill_after
        was_told = was_killed = False

        def wakes_up() -> bool:
            return not child.is_alive or self._kill_requested or (self._stop_requested and not was_told)

        while here().wait(give_up_at - world.monotonic, wakes_up, "child") and child.is_alive and not was_told:
            if self._kill_requested:
                break
            was_told = True
            on_stop()
        if child.is_alive:
            was_killed = self._kill_requested
            if not was_killed:
                world.count("worker killed a runaway child")
            child.end(-9)
        code = child.exit_code or 0
        return child.pid, -code if code < 0 else code << 8, was_killed

    def _be_forked(self, work: Callable[[], object]) -> int:
        """As `_be_child`, whose only other business is with signals and descriptors."""
        try:
            outcome = work()
        except (OperationalError, InterfaceError):
            return worker.EXIT_NO_DATABASE
        except Exception as error:
            # As real code does; what it says is for the reader of the log.
            here().world.count(f"child failed: {type(error).__name__}")
            return 1
        here().world.struck[f"outcome: {outcome}" if isinstance(outcome, str) else "tick by a worker"] += 1
        return 0

    def _perform(self, message: Any, attempt: Any, again_at: float) -> Any:
        here().process.attempt = attempt
        return super()._perform(message, attempt, again_at)

    def _note_stop(self, attempt: Any) -> None:
        """In a process of its own, as in the real one."""

        def body() -> None:
            with contextlib.suppress(DatabaseError):
                claims.note_stop(attempt)

        if attempt is not None:
            here().world.start("request", body, "stop noted")

    @contextlib.contextmanager
    def _guard(self, declared: Any, attempt: Any = None) -> Iterator[None]:
        process = here().process
        with Heartbeat(attempt) if attempt is not None else contextlib.nullcontext():
            process.limit_at = here().world.monotonic + declared.timeout_seconds
            try:
                yield
            finally:
                process.limit_at = None


def tick_for_ever(redis: Redis) -> None:
    ticking = Scheduler(connection=redis)
    while not ticking._stop_requested:
        # In a child of its own, of which this process is only told how it ended.
        with contextlib.suppress(Exception):
            ticking.enqueue_jobs()
        here().sleep(conf.TICK.total_seconds())


def work_for_ever(redis: Redis) -> None:
    process = here().process
    process.worker = Worker(QUEUES, name=process.name, connection=redis)
    process.worker.work()


class Roster:
    """Who must be there, as a supervisor sees to it; and the code that they run."""

    WANTED = ("scheduler", "worker", "worker", "scheduler")

    def __init__(self, versions: dict[str, Any], redis: Redis) -> None:
        self.versions, self.redis = versions, redis
        # What is started next runs this version; and of that which is running now, the registry holds what is declared.
        self.version, self._loaded = "today", ""
        self.bodies = {"scheduler": tick_for_ever, "worker": work_for_ever}

    def fill(self, world: World) -> None:
        """Start what is missing."""
        for kind, body in self.bodies.items():
            if world.down_until.get(kind, 0) > world.monotonic or (kind == "scheduler" and not world.has_schedulers):
                continue
            running = sum(process.kind == kind for process in world.processes)
            # In calm one scheduler is enough, and its ticks take half the time.
            wanted = self.WANTED.count(kind) if not (world.is_calm and kind == "scheduler") else 1
            for _ in range(wanted - running):
                world.start(kind, lambda body=body: body(self.redis))

    def load(self, version: str) -> None:
        """Have the registry hold what a process of this version has declared."""
        if version != self._loaded:
            registry._declared.clear()
            registry._declared.update(self.versions[version])
            self._loaded = version

    def restart(self, world: World, version: str, how: str) -> None:
        """Deploy a version of the code.

        By SIGTERM workers end after the message in work, by two they give it back, and SIGKILL is for all of a machine.
        In a rolling deploy half of them go on for now with the code that they have.
        """
        self.version = version
        running = [each for each in world.processes if each.kind in ("scheduler", "worker", "child")]
        if how == "rolling":
            first = {each.kind: each for each in reversed(running) if each.kind != "child"}
            running = list(first.values())
        for process in running:
            if how == "SIGKILL" or process.kind == "scheduler" or (process.kind == "worker" and not process.worker):
                process.end(-9)
            elif process.kind == "worker":
                process.worker._stop_requested = True
                process.worker._kill_requested = how == "SIGTERM twice"

    def restore(self, world: World) -> None:
        """Put back what operators and deploys have changed, and release what was set aside."""
        if {each.version for each in world.processes} | {self.version} != {"today"}:
            self.restart(world, "today", "SIGTERM")
        schedulers = [each for each in world.processes if each.kind == "scheduler"]
        for process in schedulers[1:]:
            process.end(-9)

        def body() -> None:
            while True:
                with contextlib.suppress(DatabaseError):
                    get_waffle_switch_model().objects.update(active=False)
                    Schedule.objects.update(limit=None, cron="")
                    Claim.objects.all().release()
                here().sleep(30)

        world.start("operator", body)


# --- People -----------------------------------------------------------------------------------------------------------


class RolledBack(Exception):
    """The user's transaction fails after all."""


def job(name: str) -> Any:
    """Return a job of the code that runs, by the name that it has or had."""
    return registry.get(name) or registry.get({"make": "build"}.get(name, ""))


def request(world: World, name: str, act: Callable[[], None]) -> None:
    """Start a web request. Without its database it fails; without Redis it must not, save for a plain call."""

    def body() -> None:
        with contextlib.suppress(DatabaseError, RolledBack):
            act()

    world.start("request", body, name)


def create(behaviour: str, is_fast: bool, fails: bool) -> None:
    with transaction.atomic():
        task = Task.objects.create(behaviour=behaviour)
        if is_fast and (make := job("make")):
            make.enqueue(task)
        if fails:
            raise RolledBack


def change(pk: int, is_fast: bool, fails: bool) -> None:
    """The user wants the row gone, or made again."""
    with transaction.atomic():
        task = Task.objects.select_for_update().filter(pk=pk).first()
        if task is None:
            return
        task.state = {"deleted": "pending", "deleting": "pending"}.get(task.state, "deleting")
        task.save(update_fields=["state"])
        if is_fast and (wanted := job("make" if task.state == "pending" else "remove")):
            wanted.enqueue(task)
        if fails:
            raise RolledBack


def delete(pk: int) -> None:
    Task.objects.filter(pk=pk).delete()


def hold(pk: int, seconds: float) -> None:
    """Keep the row locked, as a data migration does, or a forgotten session. On SQLite, all rows."""
    world = here().world
    with transaction.atomic():
        Task.objects.filter(pk=pk).update(writes=F("writes"))
        here().wait(seconds, lambda: world.is_calm)


def enqueue_all(jitter: float) -> None:
    make = job("make")
    if make is None:
        return
    if not jitter:
        make.enqueue_many(Task.objects.pending())
        return
    for task in Task.objects.pending():
        make.enqueue_with_jitter(task, max_wait=timedelta(seconds=jitter))


def ping(number: int) -> None:
    with contextlib.suppress(QueueUnavailable):
        job("ping").enqueue(number)


def flip(name: str, is_on: bool) -> None:
    get_waffle_switch_model().objects.update_or_create(name=f"disable_{name}", defaults={"active": is_on})


def edit(name: str, **changes: Any) -> None:
    Schedule.objects.filter(pk=name).update(**changes)


def send_back(release: bool) -> None:
    claims = Claim.objects.all()
    claims.release() if release else claims.queue_now()
