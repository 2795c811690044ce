"""The stage: servers, processes, a user and what can be seen of them, for the disasters to act on."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

from redis import Redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from config.servers import RedisServer
from config.stack import Supervisor
from databases.models import Database
from demo import rows
from demo.disasters import Strike, perform
from demo.rows import Snapshot, clock
from demo.screen import Screen
from demo.user import User
from demo.watch import Watch

TICK = 0.05
LOOK = 0.5
FILLED = 20
"""So many rows in the queue are enough to be worth losing; in a smaller demo, a tenth of all."""
State = Database.State


@dataclass
class Stage:
    """Everything in play. Times in it are seconds of the ledger's clock."""

    server: RedisServer
    stack: Supervisor
    watch: Watch
    user: User
    screen: Screen
    random: Random
    began: float = field(default_factory=clock)
    strikes: list[Strike] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)
    """Disasters that never struck, and why. They prove nothing."""
    snapshot: Snapshot = field(default_factory=Snapshot)
    is_finished: bool = False
    """Whether the user has asked for everything, and every row is where it should end."""
    idle_at: float = 0.0
    """When the queue was last seen with less in it than is worth losing."""
    redis_answers: bool = True
    killed: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.redis = Redis.from_url(
            self.server.url, socket_timeout=2, socket_connect_timeout=2, retry=Retry(NoBackoff(), 0)
        )

    def play(self, plan: Sequence[str], deadline: float) -> None:
        """Let the user create while disasters strike, until both have ended and no row is unfinished, or time is up."""
        disasters, wake_at, look_at = perform(self, plan), self.began, self.began
        is_over = False
        while clock() < deadline and not (is_over and self.is_finished):
            self.watch.look()
            self.tell_deaths()
            self.user.play(self.watch.events)
            if clock() >= look_at:
                look_at = clock() + LOOK
                self.look()
                self.screen.progress(self.progress())
            if clock() >= wake_at and not is_over:
                wait = next(disasters, None)
                is_over = wait is None
                wake_at = clock() + (wait or 0)
            time.sleep(TICK)
        self.look()
        self.screen.progress(self.progress())

    def look(self) -> Snapshot:
        """Look at all rows, and see which of those that were hit are back."""
        # In this order: a request that is answered is in what we look at.
        asked_for_all = self.user.is_done
        self.snapshot = rows.look(self.redis if self.redis_answers else None)
        self.is_finished = asked_for_all and not self.snapshot.unfinished
        if not self.queue_is_filled:
            self.idle_at = self.snapshot.at
        for strike in self.strikes:
            strike.look(self.snapshot)
        return self.snapshot

    def progress(self) -> str:
        states, queued = list(self.snapshot.states.values()), self.snapshot.queued
        return (
            f"{self.seconds(self.snapshot.at):6.1f} s   pending {len(self.snapshot.unfinished):3}   "
            f"queued {'  ?' if queued is None else f'{len(queued):3}'}   running {len(self.watch.working())}   "
            f"ready {states.count(State.READY):3}   deleted {states.count(State.DELETED):2}"
        )

    def strike(self, name: str, detail: str = "") -> Strike:
        """Announce a disaster, and start its clock."""
        strike = Strike(name, at=clock())
        self.strikes.append(strike)
        self.tell(f"⚡ {name}{detail and f' ({detail})'}")
        return strike

    def over(self, strike: Strike) -> None:
        strike.over = clock()

    def tell(self, what: str) -> None:
        self.screen.say(f"{self.seconds(clock()):6.1f} s   {what}")

    def seconds(self, at: float) -> float:
        return at - self.began

    @property
    def queue_is_filled(self) -> bool:
        """Whether enough is queued that losing it would hurt."""
        enough = min(FILLED, max(1, len(self.user.names) // 10))
        return len(self.snapshot.queued or ()) >= enough

    def is_busy_for(self, seconds: float) -> bool:
        """Whether the queue is filled, and has been for so long."""
        return self.queue_is_filled and self.snapshot.at - self.idle_at >= seconds

    @property
    def workers(self) -> set[int]:
        """The process ids of the workers; their children are others."""
        pids = (self.stack.pid(name) for name in self.stack.names if name.startswith("worker"))
        return {pid for pid in pids if pid}

    def kill(self, pid: int) -> None:
        self.killed.add(pid)
        os.kill(pid, signal.SIGKILL)

    def tell_deaths(self) -> None:
        """Replace what died, and say so when it was none of our doing."""
        for death in self.stack.poll():
            if death.pid not in self.killed:
                self.tell(f"{death.name} ({death.pid}) ended by itself with code {death.code}; it is replaced")
