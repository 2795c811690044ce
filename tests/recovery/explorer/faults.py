"""What can happen at a cut: somebody else goes first, a fault strikes, or somebody does something.

Each is a function of the world, the actor that is at the cut, and an argument that chance has drawn, so that a trace
can be read and replayed. It counts what it really did; one that finds nothing to strike does nothing.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from jobs import queues
from tests.recovery.explorer import processes

if TYPE_CHECKING:
    from tests.recovery.explorer.world import Actor, Process, World

LIST = "rq:queue:default"
BEHAVIOURS = ("", "", "", "slow", "slow", "steady", "fail", "fail,fail,slow", "die", "slow,die", "endless", "hopeless")


@dataclass(frozen=True)
class Fault:
    strike: Callable[..., str | None]
    draw: Callable[[random.Random], tuple[Any, ...]]
    weight: float
    # The kind of cut that it strikes at; None for any.
    at: str | None


FAULTS: dict[str, Fault] = {}


def fault(weight: float, *draws: Callable[[random.Random], Any], at: str | None = None) -> Callable[[Any], Any]:
    """Declare a fault, how often it strikes beside the others, and how each part of its argument is drawn."""

    def declare(strike: Any) -> Any:
        FAULTS[strike.__name__] = Fault(strike, lambda chance: tuple(draw(chance) for draw in draws), weight, at)
        return strike

    return declare


def index(chance: random.Random) -> int:
    return chance.randrange(100)


def seconds(low: float, high: float) -> Callable[[random.Random], float]:
    return lambda chance: round(chance.uniform(low, high), 1)


def one_of(*values: Any) -> Callable[[random.Random], Any]:
    return lambda chance: chance.choice(values)


# --- Order ------------------------------------------------------------------------------------------------------------


@fault(0, index)
def turn(world: World, actor: Actor, which: int) -> None:
    """Somebody else goes first, and goes on until he waits."""
    world.next_index = which
    world.struck["turn"] += 1


# --- Processes --------------------------------------------------------------------------------------------------------


@fault(6)
def kill(world: World, actor: Actor) -> None:
    """SIGKILL, here."""
    world.count(f"kill {actor.process.kind}")
    actor.process.end(-9)


@fault(3)
def kill_with_worker(world: World, actor: Actor) -> None:
    """Both a child and its worker: nobody sees the death."""
    for process in (_worker_of(world, actor.process), actor.process):
        if process is not None:
            world.count(f"kill {process.kind}")
            process.end(-9)


@fault(3)
def kill_worker(world: World, actor: Actor) -> None:
    """The worker alone: its child works on."""
    process = _worker_of(world, actor.process)
    if process is not None:
        world.count("kill worker of a child")
        process.end(-9)


def _worker_of(world: World, child: Process) -> Process | None:
    if child.attempt is None:
        return None
    return next((each for each in world.processes if each.kind == "worker" and each.worker is child.worker), None)


@fault(8, one_of(20, 65, 80, 100, 240), one_of(0, 2, 5, 10, 20))
def freeze(world: World, actor: Actor, for_seconds: float, grace: int) -> None:
    """SIGSTOP, and SIGCONT later. An overdue watchdog then ends it after so many cuts."""
    world.count(f"freeze {actor.process.kind}")
    actor.process.frozen_until = actor.process.excused_at = world.monotonic + for_seconds
    actor.process.grace = grace


@fault(4, one_of(2, 5, 10, 20))
def freeze_until_overtaken(world: World, actor: Actor, grace: int) -> None:
    """SIGSTOP to who works on a row, and SIGCONT while somebody else does."""
    # Not with a lock that keeps everybody else from it, nor when nobody else is left to take it.
    is_another = any(each.thaws_when_overtaken for each in world.processes)
    holds_lock = any(each.connection is not None and each.connection.in_atomic_block for each in actor.process.actors)
    at_work = any(actor.process in each for each in world.invariants.at_work_on.values())
    if at_work and not holds_lock and not is_another:
        world.count("freeze until overtaken")
        actor.process.thaws_when_overtaken = True
        actor.process.frozen_until = actor.process.excused_at = world.monotonic + 300
        actor.process.grace = grace


@fault(1, one_of("scheduler", "worker"), seconds(20, 240))
def outage(world: World, actor: Actor, kind: str, for_seconds: float) -> None:
    """All processes of a kind die, and nobody starts others."""
    world.count(f"outage of {kind}s")
    world.down_until[kind] = world.monotonic + for_seconds
    for process in [each for each in world.processes if each.kind == kind]:
        process.end(-9)


@fault(
    2,
    one_of("today", "today", "renamed", "without"),
    one_of("SIGTERM", "SIGTERM twice", "SIGKILL", "rolling", "rolling"),
    seconds(20, 200),
)
def deploy(world: World, actor: Actor, version: str, how: str, for_seconds: float) -> None:
    """Other code, for a while: the same once more, one that renames a job, one that has lost some."""
    world.count(f"deploy {version}, by {how}")
    world.roster.restart(world, version, how)
    if version != "today":
        world.after(for_seconds, lambda: world.roster.restart(world, "today", how))


# --- Redis ------------------------------------------------------------------------------------------------------------


@fault(2)
def flush(world: World, actor: Actor) -> None:
    """Everything in Redis is lost."""
    world.count("redis lost everything")
    world.seams.empty_redis()


@fault(3, index)
def lose_keys(world: World, actor: Actor, which: int) -> None:
    """Some keys are lost."""
    keys = sorted(world.seams.redis.keys("*"))
    if lost := [key for place, key in enumerate(keys) if which >> (place % 7) & 1]:
        world.count("redis lost some keys")
        world.seams.redis.delete(*lost)


@fault(2, one_of(5, 15, 40))
def lose_last(world: World, actor: Actor, steps: int) -> None:
    """Redis forgets what happens in the next steps, as one does that is killed before it has saved."""
    redis = world.seams.redis
    saved = {key: (redis.dump(key), max(redis.pttl(key), 0)) for key in redis.keys("*")}

    def restore() -> None:
        world.count("redis lost the last moment")
        redis.flushall()
        for key, (dump, left) in saved.items():
            redis.restore(key, left, dump)
        world.pushes += 1

    world.at_step.append((world.steps + steps, restore))


@fault(4, one_of("before", "after"), at="redis")
def lose_redis_call(world: World, actor: Actor, when: str) -> str:
    return when


@fault(1, seconds(2, 180), one_of(True, False))
def redis_away(world: World, actor: Actor, for_seconds: float, hangs: bool) -> None:
    """Redis refuses, or does not answer."""
    world.count(f"redis away, {'hanging' if hangs else 'refusing'}")
    world.redis_away_until, world.redis_hangs = world.monotonic + for_seconds, hangs


@fault(2, index)
def double(world: World, actor: Actor, which: int) -> None:
    """A message is delivered once more."""
    if ids := world.seams.redis.lrange(LIST, 0, -1):
        world.count("delivery doubled")
        world.doubled += 1
        world.pushes += 1
        world.seams.redis.rpush(LIST, ids[which % len(ids)])


@fault(1, index)
def reorder(world: World, actor: Actor, which: int) -> None:
    """The first message becomes the last."""
    if world.seams.redis.llen(LIST) > 1:
        world.count("deliveries reordered")
        world.seams.redis.lmove(LIST, LIST, "LEFT", "RIGHT")


@fault(2, index, one_of("make", "remove", "make", "remove", "find_pending", "find_deleting"))
def hide(world: World, actor: Actor, which: int, name: str) -> None:
    """A stranger writes that a row or a schedule waits until next year."""
    pk = None if name.startswith("find") else _pk(world, actor, which)
    if pk is None and not name.startswith("find"):
        return
    world.count("hidden until next year")
    world.doubled += 1
    next_year = (world.now + timedelta(days=365)).timestamp()
    world.seams.redis.zadd(queues.DELAYED_KEY, {f"{name}-{pk}" if pk else name: next_year})


@fault(2, index, seconds(1, 300))
def delay(world: World, actor: Actor, which: int, for_seconds: float) -> None:
    """A message is on its way for long, and is delivered when nobody remembers it."""
    ids = world.seams.redis.lrange(LIST, 0, -1)
    if not ids:
        return
    world.count("delivery delayed")
    world.doubled += 1
    id = ids[which % len(ids)]
    world.seams.redis.lrem(LIST, 1, id)

    def deliver() -> None:
        world.seams.redis.rpush(LIST, id)
        world.pushes += 1

    world.after(for_seconds, deliver)


# --- The database and the clock ---------------------------------------------------------------------------------------


@fault(8, one_of("before", "after", "after"), at="database")
def lose_database_call(world: World, actor: Actor, when: str) -> str:
    """A connection is dropped before the statement, or after it is done and before its answer."""
    return when


@fault(1, seconds(2, 120))
def database_away(world: World, actor: Actor, for_seconds: float) -> None:
    world.count("database away")
    world.database_away_until = world.monotonic + for_seconds


@fault(1, one_of(-300, -60, -20, 20, 61, 300))
def jump(world: World, actor: Actor, by: float) -> None:
    """The clock of the wall jumps. That of the processes' own time goes on."""
    world.count(f"clock jumped {'forward' if by > 0 else 'back'}")
    world.jumps += 1
    world.jumped += by
    world.jumped_back += max(-by, 0)
    for process in world.processes:
        process.excused_at = max(process.excused_at, world.monotonic)


# --- People -----------------------------------------------------------------------------------------------------------


@fault(3, one_of(*BEHAVIOURS), one_of(True, True, False), one_of(True, False, False, False))
def create(world: World, actor: Actor, behaviour: str, is_fast: bool, fails: bool) -> None:
    world.struck["create a row"] += 1
    processes.request(world, "creation", lambda: processes.create(behaviour, is_fast, fails))


@fault(4, index, one_of(True, False), one_of(True, False, False, False))
def change(world: World, actor: Actor, which: int, is_fast: bool, fails: bool) -> None:
    """A user changes a row, perhaps under its job."""
    if pk := _pk(world, actor, which):
        world.struck["change a row"] += 1
        processes.request(world, "change", lambda: processes.change(pk, is_fast, fails))


@fault(1, index, one_of(2, 10, 30, 100))
def hold(world: World, actor: Actor, which: int, for_seconds: float) -> None:
    """A stranger's transaction keeps a row locked."""
    if pk := _pk(world, actor, which):
        world.count("a stranger locks a row")
        processes.request(world, "stranger", lambda: processes.hold(pk, for_seconds))


@fault(1, index)
def delete(world: World, actor: Actor, which: int) -> None:
    if pk := _pk(world, actor, which):
        world.struck["delete a row"] += 1
        processes.request(world, "deletion", lambda: processes.delete(pk))


def _pk(world: World, actor: Actor, which: int) -> int | None:
    """The row that the actor works on, mostly; else any."""
    attempt = actor.process.attempt
    if attempt is not None and attempt.model == "cast.task" and which % 4:
        return int(attempt.pk)
    pks = sorted(world.invariants.seen.tasks)
    return pks[which % len(pks)] if pks else None


@fault(1, one_of(0, 10, 60))
def enqueue_all(world: World, actor: Actor, jitter: float) -> None:
    world.struck["enqueue many"] += 1
    processes.request(world, "bulk", lambda: processes.enqueue_all(jitter))


@fault(1, one_of(1, 2, 3))
def ping(world: World, actor: Actor, number: int) -> None:
    world.struck["plain call"] += 1
    processes.request(world, "ping", lambda: processes.ping(number))


@fault(1, one_of("make", "remove", "find_pending", "find_deleting", "report_58"), seconds(10, 200))
def flip(world: World, actor: Actor, name: str, for_seconds: float) -> None:
    world.count("switch flipped")
    processes.request(world, "flip", lambda: processes.flip(name, True))
    world.after(for_seconds, lambda: processes.request(world, "flip", lambda: processes.flip(name, False)))


@fault(
    1, one_of("find_pending", "find_deleting"), one_of("*/3 * * * *", "* * * * * */20", "0 0 1 1 *"), seconds(5, 200)
)
def edit_schedule(world: World, actor: Actor, name: str, cron: str, for_seconds: float) -> None:
    world.count("schedule edited")
    processes.request(world, "edit", lambda: processes.edit(name, cron=cron))
    world.after(for_seconds, lambda: processes.request(world, "edit", lambda: processes.edit(name, cron="")))


@fault(1, one_of("find_pending", "find_deleting"), one_of(1, 2))
def edit_limit(world: World, actor: Actor, name: str, limit: int) -> None:
    world.count("limit edited")
    processes.request(world, "edit", lambda: processes.edit(name, limit=limit))


@fault(1, one_of(True, False))
def send_back(world: World, actor: Actor, release: bool) -> None:
    """An operator releases what is quarantined, or ends the backing off."""
    world.struck["sent back to work"] += 1
    processes.request(world, "operator", lambda: processes.send_back(release))
