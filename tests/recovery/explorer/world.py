"""The world: processes, their actors, the baton that lets one of them run, and virtual time."""

from __future__ import annotations

import random
import threading
import traceback
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from django.db import connections
from rq.timeouts import JobTimeoutException

from jobs import clock, enqueue
from jobs.conf import conf

if TYPE_CHECKING:
    from tests.recovery.explorer.chooser import Chooser
    from tests.recovery.explorer.invariants import Invariants

EPOCH = datetime(2030, 1, 1, 11, 56, tzinfo=UTC)
# How much a cut costs in virtual time, so that no two of them are at the same moment.
STEP = 0.001
# The decisions end after so much virtual time, however few cuts there were.
LONGEST_CHAOS = 900.0
# Then everything runs fairly, and has to be at rest within this: several leases, backoffs and sweeps one after another,
# besides the work itself.
BOUND = 600.0
# More cuts than that in the fair part mean that somebody goes round in circles.
MOST_CUTS = 60_000

_here = threading.local()


def current() -> Actor | None:
    """Return the actor that runs in this thread, or None outside the model."""
    return getattr(_here, "actor", None)


class Killed(BaseException):
    """What the code of a process meets once the process is dead. Nothing may catch it and go on."""


class Violation(Exception):
    """Something that must never be."""


class Process:
    """What is killed and frozen as one: an actor for its main thread, and perhaps one for its heartbeat."""

    def __init__(self, world: World, name: str, kind: str, body: Callable[[], int | None]) -> None:
        self.world, self.name, self.kind = world, name, kind
        self.pid = world.next_pid()
        # Of the code. What is forked has that of whoever forks it.
        forker = current() if kind == "child" else None
        self.version = forker.process.version if forker else world.roster.version
        self.exit_code: int | None = None
        self.frozen_until = 0.0
        # Frozen until somebody else is at work on its row.
        self.thaws_when_overtaken = False
        # When the interpreter's watchdog ends it, and how many cuts it may come after it was resumed too late.
        self.watchdog_at: float | None = None
        self.grace = 0
        # When its job meets its time limit.
        self.limit_at: float | None = None
        # When it was last resumed, or met a clock that had jumped; and when it has last renewed its lease.
        self.excused_at = 0.0
        self.renewed_at = 0.0
        # Of a child: the attempt, and the worker that forked it. Of a worker: the rq object.
        self.attempt: Any = None
        self.worker: Any = None
        # Of a child that writes down how the one before it died: that one.
        self.dead_sibling: Process | None = None
        self.actors: list[Actor] = []
        world.processes.append(self)
        self.main = self.spawn(name, body)

    def __repr__(self) -> str:
        return self.name

    @property
    def is_alive(self) -> bool:
        return self.exit_code is None

    @property
    def is_frozen(self) -> bool:
        return self.frozen_until > self.world.monotonic

    @property
    def is_excused(self) -> bool:
        """Whether it may be at work without a lease: it stood still, or the lease ran out in a jump of the clock."""
        return self.excused_at > self.renewed_at

    @property
    def is_overdue(self) -> bool:
        """Whether its watchdog has to end it."""
        return self.watchdog_at is not None and self.watchdog_at < self.world.monotonic and not self.is_frozen

    def thaw(self) -> None:
        self.thaws_when_overtaken = False
        self.frozen_until = min(self.frozen_until, self.world.monotonic)
        self.excused_at = min(self.excused_at, self.world.monotonic)

    def spawn(self, name: str, body: Callable[[], int | None]) -> Actor:
        actor = Actor(self, name, body)
        self.actors.append(actor)
        return actor

    def end(self, code: int) -> None:
        """End it here and now: its transactions are rolled back, and its threads write nothing more. -9 is SIGKILL."""
        if not self.is_alive:
            return
        self.exit_code = code
        for actor in self.actors:
            self.world.seams.roll_back(actor)
        for actor in self.actors:
            actor.unwind()
        self.world.processes.remove(self)


class Actor:
    """A thread of a process, which runs while it holds the baton."""

    def __init__(self, process: Process, name: str, body: Callable[[], int | None]) -> None:
        self.process, self.world, self.name, self.body = process, process.world, name, body
        self.cuts = 0
        self.last_ran = 0
        self.is_waiting = False
        self.wakes_at = 0.0
        self.until: Callable[[], bool] | None = None
        # Left in the middle of a statement that waits for a lock of PostgreSQL.
        self.is_stuck = False
        self.stuck_at = 0.0
        # Its transaction is lost with its connection, whatever it goes on to do in it.
        self.is_doomed = False
        self.has_ended = False
        self.connection: Any = None
        self.turn = threading.Lock()
        self.turn.acquire()
        self.thread = threading.Thread(target=self._main, name=name, daemon=True)
        self.thread.start()

    def __repr__(self) -> str:
        return self.name

    def _main(self) -> None:
        self.turn.acquire()
        _here.actor = self
        code: int | None = None
        try:
            if self.process.is_alive:
                self._set_clock()
                self.world.seams.open_database(self)
                code = self.body() or 0
                self.cut("other", "exit")
        except Killed:
            code = None
        except BaseException:
            # One that dies may end with any error, such as that of a session that was taken from it.
            if self.process.is_alive:
                self.world.fail(f"{self} ended with an error nobody caught:\n{traceback.format_exc()}")
        finally:
            self.world.seams.close_database(self)
            self.has_ended = True
        if code is not None and self is self.process.main:
            self.process.end(code)
        if self.world.running is self:
            self.world.baton.release()

    def unwind(self) -> None:
        """Let a thread of a dead process run into `Killed` and end, while whoever calls this keeps the baton."""
        if self.thread is threading.current_thread() or self.has_ended:
            return
        if self.is_stuck:
            self.world.seams.end_session(self)
        else:
            self.turn.release()
        self.thread.join()

    def cut(self, kind: str, what: str) -> str | None:
        """Come to where anything may happen. Returns how the coming call is to be lost, if it is."""
        world = self.world
        if not self.process.is_alive:
            raise Killed
        self.cuts += 1
        world.step(self, what)
        lost = world.decide(self, kind, what)
        if not self.process.is_alive:
            raise Killed
        # It may have jumped.
        self._set_clock()
        if world.must_hand_over(self):
            self.park()
        self.obey_time()
        return lost

    def obey_time(self) -> None:
        """Meet what strikes a process by itself: its watchdog when it was resumed too late, its job's time limit."""
        process, now = self.process, self.world.monotonic
        if process.is_overdue:
            process.grace -= 1
            if process.grace < 0:
                self.world.count("watchdog")
                process.end(1)
                raise Killed
        if process.limit_at is not None and process.limit_at < now and self is process.main:
            process.limit_at = None
            self.world.count("time limit")
            raise JobTimeoutException("Task exceeded maximum timeout value")

    def park(self) -> None:
        """Give the baton away, and wait until it comes back."""
        self.world.baton.release()
        self.turn.acquire()
        if not self.process.is_alive:
            raise Killed
        self._set_clock()

    def sleep(self, seconds: float) -> None:
        """Let virtual time pass."""
        self.wait(seconds)

    def wait(self, seconds: float, until: Callable[[], bool] | None = None, what: str = "sleep") -> bool:
        """Wait for a condition, for so long at most. Returns whether it came true."""
        deadline = self.world.monotonic + seconds
        if self.process.limit_at is not None and self is self.process.main:
            deadline = min(deadline, self.process.limit_at + STEP)
        self.cut("other", what)
        if not (until and until()):
            self.is_waiting, self.wakes_at, self.until = True, deadline, until
            self.park()
            self.is_waiting, self.until = False, None
            self.obey_time()
        return until is None or until()

    @property
    def is_ready(self) -> bool:
        if self.has_ended or self.is_stuck or self.process.is_frozen:
            return False
        return not self.is_waiting or self.wakes_at <= self.world.monotonic or bool(self.until and self.until())

    @property
    def gives_up_at(self) -> float:
        """When its statement is cancelled that waits for a lock: in a worker or a tick, and not in a user's request."""
        has_limit = self.is_stuck and self.process.kind in ("scheduler", "worker", "child")
        return self.stuck_at + conf.HEARTBEAT.total_seconds() / 3 if has_limit else 0.0

    def _set_clock(self) -> None:
        clock._fixed.set(self.world.now)


class World:
    """One schedule from its beginning to its end. `run()` raises `Violation` for what must not be."""

    def __init__(self, chooser: Chooser, seams: Any, invariants: type[Invariants], roster: Any, seed: int = 0) -> None:
        self.chooser, self.seams, self.roster = chooser, seams, roster
        # In some worlds nobody has ever started one: the workers stand in for it.
        self.has_schedulers = seed % 4 != 0
        self.monotonic = 1000.0
        self.jumped = 0.0
        self.jumped_back = 0.0
        self.jumps = 0
        self.steps = 0
        self.chance = random.Random(seed)
        self.processes: list[Process] = []
        self.names: Counter[str] = Counter()
        self.baton = threading.Lock()
        self.baton.acquire()
        self.running: Actor | None = None
        self.last: Actor | None = None
        self.next_index: int | None = None
        self.is_calm = False
        self.calm_at = self.work_left = 0.0
        self.failure: str | None = None
        self.log: list[tuple[float, str, str]] = []
        self.struck: Counter[str] = Counter()
        self.cut_at: Counter[tuple[str, str]] = Counter()
        # Until when Redis refuses ("refuse") or does not answer ("hang"), and the database refuses.
        self.redis_away_until = self.database_away_until = 0.0
        self.redis_hangs = False
        # Until when nobody starts processes of these kinds.
        self.down_until: dict[str, float] = {}
        # What happens at a time, or at a step, by itself.
        self.timers: list[tuple[float, Callable[[], None]]] = []
        self.at_step: list[tuple[int, Callable[[], None]]] = []
        # The latest that the clock of the wall has ever shown: a statement may know it from before a jump.
        self.latest_now = EPOCH
        # How often something was pushed, so that workers which wait for a message know when to look.
        self.pushes = 0
        # How many ids faults have put into the queue.
        self.doubled = 0
        self.invariants = invariants(self)

    # --- Time ---------------------------------------------------------------------------------------------------------

    @property
    def now(self) -> datetime:
        """The present by the clock of the wall, which may jump."""
        return EPOCH + timedelta(seconds=self.monotonic - 1000.0 + self.jumped)

    def after(self, seconds: float, call: Callable[[], None]) -> None:
        self.timers.append((self.monotonic + seconds, call))

    def _advance(self) -> None:
        """Nobody can do anything: go to the next moment at which somebody can."""
        moments = [at for at, _ in self.timers]
        for process in self.processes:
            if process.is_frozen:
                moments.append(process.frozen_until)
                continue
            if process.watchdog_at is not None:
                moments.append(process.watchdog_at + STEP)
            moments += [actor.wakes_at for actor in process.actors if actor.is_waiting and not actor.has_ended]
            moments += [actor.gives_up_at for actor in process.actors if actor.gives_up_at > self.monotonic]
        moments += [until for until in self.down_until.values() if until > self.monotonic]
        if not moments:
            raise Violation("Everybody waits for somebody else.")
        passed = max(min(moments) - self.monotonic, STEP)
        self.monotonic += passed
        self.seams.age_redis(self, passed)
        if not self.is_calm and self.monotonic > 1000.0 + LONGEST_CHAOS:
            self._calm_down()

    def _run_timers(self) -> None:
        for timer in [each for each in self.timers if each[0] <= self.monotonic]:
            self.timers.remove(timer)
            timer[1]()
        for process in [each for each in self.processes if each.is_overdue]:
            # One that was frozen may do a little more when it is resumed, see Actor.obey_time.
            if not (process.grace and any(actor.is_ready for actor in process.actors)):
                self.count("watchdog")
                process.end(1)

    # --- Who runs -----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Go through chaos and calm until everything is at rest."""
        try:
            while not (self.is_calm and self.invariants.at_rest()):
                self._go_on()
            # Not with the others: one of them may be in the middle of a transaction.
            self.close()
            self.roster.load("today")
            self.invariants.at_the_end()
        finally:
            self.close()

    def _go_on(self) -> None:
        if self.is_calm:
            if self.monotonic > self.calm_at + BOUND + self.work_left + self.jumped_back:
                raise Violation(f"Not at rest in time: {self.invariants.unrest()}")
            if self.steps > self.chooser.cuts + MOST_CUTS:
                raise Violation(f"Not at rest after {self.steps} cuts: {self.invariants.unrest()}")
        elif self.steps >= self.chooser.cuts:
            self._calm_down()
        self.seams.wait_for_stuck(self)
        self._run_timers()
        self.roster.fill(self)
        actor = self._next()
        if actor is None:
            self._advance()
            return
        self._hand(actor)
        if self.failure:
            raise Violation(self.failure)

    def _hand(self, actor: Actor) -> None:
        self.running = actor
        self.roster.load(actor.process.version)
        actor.last_ran = self.steps
        actor.turn.release()
        self.seams.wait_for_baton(actor)
        self.running, self.last = None, actor

    def _next(self) -> Actor | None:
        ready = [actor for process in self.processes for actor in process.actors if actor.is_ready]
        index, self.next_index = self.next_index, None
        if index is not None and (others := [actor for actor in ready if actor is not self.last]):
            return others[index % len(others)]
        return min(ready, key=lambda actor: actor.last_ran, default=None)

    def must_hand_over(self, actor: Actor) -> bool:
        return (
            self.next_index is not None
            or actor.process.is_frozen
            or self.failure is not None
            or (not self.is_calm and self.steps >= self.chooser.cuts)
            or (self.is_calm and self.steps > self.chooser.cuts + MOST_CUTS)
        )

    def next_pid(self) -> int:
        # No real process has such a high one, so nothing that is sent to it arrives.
        self.names["pid"] += 1
        return 10_000_000 + self.names["pid"]

    def start(self, kind: str, body: Callable[[], int | None], name: str | None = None) -> Process:
        """Start a process. Its name is the same in every replay: by its kind, or by its work, and counted."""
        base = name or kind
        self.names[base] += 1
        return Process(self, f"{base}#{self.names[base]}", kind, body)

    # --- What happens -------------------------------------------------------------------------------------------------

    def step(self, actor: Actor, what: str) -> None:
        self.steps += 1
        self.monotonic += STEP
        self.latest_now = max(self.latest_now, self.now)
        self.log.append((self.monotonic, actor.name, what))
        self.cut_at[actor.process.kind, what] += 1
        for timer in [each for each in self.at_step if each[0] <= self.steps]:
            self.at_step.remove(timer)
            timer[1]()

    def decide(self, actor: Actor, kind: str, what: str) -> str | None:
        if self.is_calm or self.steps >= self.chooser.cuts:
            return None
        decision = self.chooser.at(actor, kind, what)
        return decision.strike(self, actor) if decision is not None else None

    def count(self, what: str) -> None:
        """Count what really struck, and note it in the log."""
        self.struck[what] += 1
        self.log.append((self.monotonic, "*", what))

    def fail(self, what: str) -> None:
        self.failure = self.failure or what

    def _calm_down(self) -> None:
        """End every fault."""
        self.is_calm, self.calm_at, self.work_left = True, self.monotonic, self.invariants.work_left()
        self.log.append((self.monotonic, "*", "calm"))
        self.redis_away_until = self.database_away_until = 0.0
        self.down_until.clear()
        self.timers.clear()
        self.at_step.clear()
        self.next_index = None
        for process in self.processes:
            process.thaw()
        self.roster.restore(self)

    def close(self) -> None:
        """End every process."""
        for process in list(self.processes):
            process.end(-9)
        connections.close_all()
        enqueue._Hint._hanging_until.clear()
