"""The bad things, each really done, and how long the rows that it hit were out of work.

A disaster is a generator: it does its worst and yields the seconds until it wants to go on, while the stage plays on.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import psutil
from waffle.models import Switch

from config.stack import StackError
from demo.ledger import Event, Process
from demo.rows import MODELS, Row, Snapshot, clock, read_queue, row_of, rows_of
from jobs.models import Claim

if TYPE_CHECKING:
    from demo.stage import Stage

Disaster = Iterator[float]

PATIENCE = 120.0
"""How many seconds a disaster waits for its moment."""
SCHEDULER_AWAY = 20.0
REDIS_HANGS = 15.0
SWITCHED_OFF = 10.0


@dataclass
class Strike:
    """One disaster that struck: whom it hit, and when each of them was seen queued, running or finished again."""

    name: str
    at: float
    over: float | None = None
    hit: dict[Row, str] = field(default_factory=dict)
    """Each row, with the token of the claim that the disaster broke, if it broke one."""
    back: dict[Row, float] = field(default_factory=dict)

    def add(self, rows: Iterable[Row]) -> None:
        for row in rows:
            self.hit.setdefault(row, "")

    def look(self, snapshot: Snapshot) -> None:
        for row in self.hit.keys() - self.back.keys():
            if snapshot.is_moving(row, apart_from=self.hit[row]):
                self.back[row] = snapshot.at

    @property
    def out_of_work_for(self) -> float | None:
        """Seconds from the strike until the last of the rows was back; None while one is not."""
        if self.hit.keys() - self.back.keys():
            return None
        return max((at - self.at for at in self.back.values()), default=0.0)


class Missed(Exception):
    """The moment for a disaster never came."""


TOO_LATE = "all rows were finished before"


class Victim(NamedTuple):
    """A child that works on a row under a claim, and the worker that it belongs to."""

    worker: int
    child: Process
    row: Row
    token: str


def redis_emptied(stage: Stage) -> Disaster:
    strike = stage.strike("Redis emptied", "FLUSHALL")
    with stage.redis.pipeline(transaction=True) as pipeline:
        read_queue(pipeline)
        pipeline.flushall()
        *lists, _ = pipeline.execute()
    strike.add(rows_of(lists))
    stage.over(strike)
    yield 0


def worker_and_child_killed(stage: Stage) -> Disaster:
    victim = yield from a_working_child(stage)
    strike = stage.strike("worker and its child killed", f"processes {victim.worker} and {victim.child.pid}")
    stage.kill(victim.worker)
    kill_child(stage, victim, strike)
    stage.over(strike)


def worker_killed(stage: Stage) -> Disaster:
    victim = yield from a_working_child(stage)
    strike = stage.strike("worker killed, its child left", f"process {victim.worker}")
    strike.hit[victim.row] = victim.token
    # In this order: a stopped child whose parent dies gets a SIGHUP from the kernel, and dies of it.
    os.kill(victim.child.pid, signal.SIGCONT)
    stage.kill(victim.worker)
    stage.over(strike)


def child_killed(stage: Stage) -> Disaster:
    victim = yield from a_working_child(stage)
    strike = stage.strike("child killed, its worker left", f"process {victim.child.pid}")
    kill_child(stage, victim, strike)
    stage.over(strike)


def scheduler_killed(stage: Stage) -> Disaster:
    if (pid := stage.stack.pid("scheduler")) is None:
        raise Missed("there was no scheduler to kill")
    strike = stage.strike("scheduler killed", f"process {pid}; the next one in {SCHEDULER_AWAY:.0f} s")
    stage.stack.hold("scheduler")
    stage.kill(pid)
    yield from leaving_rows_stranded(stage, strike, SCHEDULER_AWAY)
    stage.stack.release("scheduler")
    stage.over(strike)


def redis_hung_and_replaced(stage: Stage) -> Disaster:
    strike = stage.strike("Redis hung, then started empty", f"SIGSTOP for {REDIS_HANGS:.0f} s, then SIGKILL")
    with stage.redis.pipeline(transaction=True) as pipeline:
        read_queue(pipeline)
        strike.add(rows_of(pipeline.execute()))
    stage.redis_answers = False
    stage.server.freeze()
    yield REDIS_HANGS
    # And whatever the user asked for meanwhile: nobody could tell the queue of it.
    strike.add(stage.look().stranded)
    stage.server.kill()
    stage.server.start()
    stage.redis_answers = True
    stage.over(strike)


def job_switched_off(stage: Stage) -> Disaster:
    strike = stage.strike("create_database switched off", f"for {SWITCHED_OFF:.0f} s")
    flip("disable_create_database", on=True)
    yield from leaving_rows_stranded(stage, strike, SWITCHED_OFF)
    flip("disable_create_database", on=False)
    stage.over(strike)


class Planned(NamedTuple):
    """A disaster, and when it is due: so many seconds after the one before."""

    do: Callable[[Stage], Disaster]
    pause: float
    busy: float | None = None
    """If given, not before the queue has been filled for so many seconds: it is the queue that this one is about."""


# Redis hangs while the user still creates, and the scheduler dies when every row waits for its sweep. Whatever empties
# the queue leaves the workers idle until then, so the later ones wait until some work was done in between.
DISASTERS: dict[str, Planned] = {
    "redis-emptied": Planned(redis_emptied, pause=3, busy=0),
    "child-killed": Planned(child_killed, pause=3),
    "redis-hung": Planned(redis_hung_and_replaced, pause=3, busy=0),
    "worker-and-child-killed": Planned(worker_and_child_killed, pause=5),
    "worker-killed": Planned(worker_killed, pause=5),
    "switched-off": Planned(job_switched_off, pause=5, busy=15),
    "redis-emptied-again": Planned(redis_emptied, pause=5, busy=15),
    "scheduler-killed": Planned(scheduler_killed, pause=1),
}


def perform(stage: Stage, plan: Sequence[str]) -> Disaster:
    """All disasters of the plan, one after the other, each when it is due."""
    for name in plan:
        try:
            yield from when_due(stage, DISASTERS[name])
        except Missed as why:
            stage.missed.append(f"{name}: {why}")


def when_due(stage: Stage, planned: Planned) -> Disaster:
    yield planned.pause * stage.random.uniform(0.8, 1.2)
    if (busy := planned.busy) is not None:
        yield from until(stage, lambda: stage.is_busy_for(busy))
    if stage.is_finished:
        raise Missed(TOO_LATE)
    yield from planned.do(stage)


def read_plan(names: str) -> list[str]:
    """Read a list of names with commas between. Raises StackError for one that there is not."""
    if names == "all":
        return list(DISASTERS)
    plan = [name.strip() for name in names.split(",") if name.strip() not in {"", "none"}]
    if unknown := set(plan) - DISASTERS.keys():
        raise StackError(
            f"There is no disaster {', '.join(sorted(unknown))}. There are {', '.join(DISASTERS)}, and none."
        )
    return plan


# --- How they find their moment ---------------------------------------------------------------------------------------


def until(stage: Stage, is_time: Callable[[], bool]) -> Disaster:
    """Wait until it is time. Raises Missed when that will not come."""
    deadline = clock() + PATIENCE
    while not is_time():
        if stage.is_finished:
            raise Missed(TOO_LATE)
        if clock() > deadline:
            raise Missed(f"its moment did not come within {PATIENCE:.0f} s")
        yield 0.05


def a_working_child(stage: Stage) -> Generator[float, None, Victim]:
    """Wait for a worker whose child holds a claim, and return both, the child stopped: it cannot finish meanwhile.

    Not one at a row that is to be deleted: the deletion is queued already, so one could not see that work came back.
    """
    found: list[Victim] = []

    def find() -> bool:
        wanted = stage.user.wanted
        working = [each for each in stage.watch.working().items() if wanted.get(each[1].row) != "deleted"]
        if working:
            found.extend(stop(stage, *stage.random.choice(working)))
        return bool(found)

    yield from until(stage, find)
    return found[0]


def stop(stage: Stage, child: Process, start: Event) -> list[Victim]:
    """Stop the child, then look again: had it ended its work by then, or has it no claim or no worker, let it go on."""
    try:
        worker = psutil.Process(child.pid).ppid()
        if worker not in stage.workers:
            return []
        os.kill(child.pid, signal.SIGSTOP)
    except (psutil.NoSuchProcess, ProcessLookupError):
        return []
    stage.watch.look()
    claim = Claim.objects.filter(holder__endswith=f":{child.pid}", lease_key__isnull=False, job__in=MODELS).first()
    if stage.watch.working().get(child) == start and claim:
        return [Victim(worker, child, row_of(claim.job, claim.object_pk), claim.token)]
    os.kill(child.pid, signal.SIGCONT)
    return []


def kill_child(stage: Stage, victim: Victim, strike: Strike) -> None:
    strike.hit[victim.row] = victim.token
    stage.watch.died(victim.child, at=clock())
    stage.kill(victim.child.pid)


def leaving_rows_stranded(stage: Stage, strike: Strike, seconds: float) -> Disaster:
    """Wait so long, and count as hit the rows that nothing is about to work on, at two looks in a row."""
    deadline, before = clock() + seconds, set[Row]()
    while clock() < deadline:
        stranded = stage.look().stranded
        strike.add(stranded & before)
        before = stranded
        yield 0.5


def flip(name: str, on: bool) -> None:
    switch = Switch.objects.get(name=name)
    switch.active = on
    switch.save()
