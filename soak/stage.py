"""Everything in play: servers, the networks to them, processes, a user; for the disasters to act on."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from random import Random
from typing import NamedTuple

import psutil
from redis import Redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from config.stack import Supervisor
from demo.ledger import Process
from demo.rows import clock
from demo.screen import Screen
from demo.watch import Watch, is_alive
from jobs.conf import conf
from soak.disasters import DISASTERS, Disaster, Missed
from soak.observer import Observer
from soak.servers import Servers
from soak.user import User

TICK = 0.1
SPARED = ("scheduler-1", "worker-1")
"""Never killed, so that one can see whether they grow. They are frozen and cut off like any other."""


class Victim(NamedTuple):
    """A child at work, and the worker that it belongs to."""

    name: str
    worker: int
    child: Process


@dataclass
class Stage:
    """Times in it are seconds of the ledger's clock."""

    servers: Servers
    stack: Supervisor
    watch: Watch
    observer: Observer
    user: User
    screen: Screen
    random: Random
    every: float = 5.0
    began: float = field(default_factory=clock)
    struck: Counter[str] = field(default_factory=Counter)
    troubles: list[tuple[float, float]] = field(default_factory=list)
    """When something was wrong with the database or the network to it."""
    frozen_for: dict[Process, float] = field(default_factory=dict)
    """The longest time for which each child was frozen."""
    unasked: list[str] = field(default_factory=list)
    """Commands that ended and that nobody had killed or told to end."""
    _taken: set[str] = field(default_factory=set)
    _told: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.redis = Redis.from_url(
            self.servers.redis.url, socket_timeout=10, socket_connect_timeout=10, retry=Retry(NoBackoff(), 0)
        )

    # --- The play -----------------------------------------------------------------------------------------------------

    def play(self, kinds: Sequence[str], until: float) -> None:
        """Let the user ask and disasters strike until then; then undo all that is still wrong."""
        waiting: deque[str] = deque()
        going: list[tuple[float, Disaster]] = []
        strike_at = clock()
        while clock() < until:
            self.user.play()
            self.turn()
            if kinds and clock() >= strike_at:
                if not waiting:
                    # Every kind once, in an order of chance, before any comes again.
                    waiting.extend(self.random.sample(kinds, len(kinds)))
                going += self._strike(waiting)
                strike_at = clock() + self.every * self.random.uniform(0.4, 1.6)
            going = list(self._go_on(going))
            time.sleep(TICK)
        self.user.finish()
        while going:
            # One may wait for what another undoes.
            going = [(0.0, disaster) for _, disaster in self._go_on([(0.0, disaster) for _, disaster in going])]

    def settle(self, deadline: float) -> None:
        """Wait until all requests are answered and every row has ended."""
        answered_at = clock()
        while clock() < deadline and not self.observer.is_settled(since=answered_at):
            if self.user.waiting:
                answered_at = clock()
            self.turn()
            time.sleep(TICK)

    def turn(self) -> None:
        """Look at the processes, replace those that died, and show how it goes."""
        self.watch.look()
        for death in self.stack.poll():
            if death.pid not in self._told:
                self.unasked.append(f"{death.name} ({death.pid}) ended by itself with code {death.code}")
                self.tell(f"{self.unasked[-1]}; it is replaced")
        self.screen.progress(f"{self._time()}   {self.observer.progress()}   working {len(self.watch.working())}")

    def _strike(self, waiting: deque[str]) -> Iterator[tuple[float, Disaster]]:
        """Have the first of them strike that can; the others stay in line before any new one."""
        for name in list(waiting):
            disaster = DISASTERS[name](self)
            try:
                wait = next(disaster, None)
            except Missed:
                continue
            waiting.remove(name)
            self.struck[name] += 1
            if wait is not None:
                yield clock() + wait, disaster
            return

    def _go_on(self, going: Sequence[tuple[float, Disaster]]) -> Iterator[tuple[float, Disaster]]:
        for at, disaster in going:
            if clock() < at:
                yield at, disaster
            elif (wait := next(disaster, None)) is not None:
                yield clock() + wait, disaster

    # --- For the disasters --------------------------------------------------------------------------------------------

    @contextmanager
    def using(self, *things: str) -> Iterator[None]:
        """Keep other disasters from the same server, network or process. Raises Missed when one has it already."""
        if self._taken.intersection(things):
            raise Missed
        self._taken.update(things)
        since = clock()
        try:
            yield
        finally:
            self._taken.difference_update(things)
            if any(thing.startswith("postgres") for thing in things):
                self.troubles.append((since, clock()))

    def is_free(self, thing: str) -> bool:
        return thing not in self._taken

    def tell(self, what: str) -> None:
        self.screen.say(f"{self._time()}   {what}")

    def seconds(self, least: float, most: float) -> float:
        """Return a random time from `least` to `most` seconds: of production, where a lease takes sixty."""
        return self.random.uniform(least, most) * conf.LEASE.total_seconds() / 60

    def pid(self, name: str) -> int:
        """Return the process id of a command that runs and that no disaster has. Raises Missed."""
        if (pid := self.stack.pid(name)) is None or not self.is_free(name):
            raise Missed
        return pid

    def victim(self, may_die: bool = True) -> Victim:
        """Return a child at work. Raises Missed when there is none, or other disasters have all of them."""
        workers = {
            pid: name
            for name in self.stack.names
            if name.startswith("worker") and self.is_free(name) and not (may_die and name in SPARED)
            if (pid := self.stack.pid(name))
        }
        found = [
            Victim(workers[parent], parent, child)
            for child in self.watch.working()
            if (parent := parent_of(child)) in workers
        ]
        if not found:
            raise Missed
        return self.random.choice(found)

    def kill(self, pid: int) -> None:
        self._send(pid, signal.SIGKILL)

    def ask_to_end(self, pid: int) -> None:
        self._send(pid, signal.SIGTERM)

    def kill_child(self, child: Process) -> None:
        self.watch.died(child, at=clock())
        self.kill(child.pid)

    def _send(self, pid: int, number: signal.Signals) -> None:
        self._told.add(pid)
        with suppress(ProcessLookupError):
            os.kill(pid, number)

    @contextmanager
    def frozen(self, *pids: int, child: Process | None = None) -> Iterator[None]:
        """Stop commands, and a child of theirs, and let them go on at the end."""
        since = clock()
        everybody = [*pids, *([child.pid] if child else [])]
        for pid in everybody:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            if child:
                self.frozen_for[child] = max(clock() - since, self.frozen_for.get(child, 0.0))
            for pid in reversed(everybody):
                # Somebody else may have its id by now, unless it is the supervisor's own.
                if child is None or pid != child.pid or is_alive(child):
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGCONT)

    def _time(self) -> str:
        return f"{clock() - self.began:7.1f} s"


def parent_of(process: Process) -> int | None:
    try:
        return int(psutil.Process(process.pid).ppid())
    except psutil.NoSuchProcess:
        return None
