"""The bad things, each really done.

A disaster is a generator: it strikes, yields the seconds until it wants to go on, and undoes what it did. Meanwhile
others strike elsewhere. It raises Missed before it has struck when its moment is not now.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from django.db import connection, connections
from rq.utils import as_text

from config.stack import StackError
from demo.disasters import flip
from demo.rows import DELAYED, QUEUES
from jobs.message import row_id
from soak.user import JOBS

if TYPE_CHECKING:
    from soak.proxy import Proxy
    from soak.stage import Stage

Disaster = Iterator[float]

COPIES = 100
DISASTERS: dict[str, Callable[[Stage], Disaster]] = {}


class Missed(Exception):
    """The moment for a disaster is not now."""


def disaster(function: Callable[[Stage], Disaster]) -> Callable[[Stage], Disaster]:
    DISASTERS[function.__name__.replace("_", " ")] = function
    return function


# --- Redis ------------------------------------------------------------------------------------------------------------


@disaster
def redis_emptied(stage: Stage) -> Disaster:
    with stage.using("redis"):
        stage.tell("⚡ Redis emptied (FLUSHALL)")
        stage.redis.flushall()
    yield 0


@disaster
def redis_restarted_with_data(stage: Stage) -> Disaster:
    with stage.using("redis"):
        stage.tell("⚡ Redis restarted with its data")
        stage.redis.save()
        stage.servers.redis.kill()
        stage.servers.redis.start()
        (stage.servers.redis.folder / "dump.rdb").unlink()
    yield 0


@disaster
def redis_restarted_empty(stage: Stage) -> Disaster:
    with stage.using("redis"):
        stage.tell("⚡ Redis killed, and started empty at once")
        stage.servers.redis.kill()
        stage.servers.redis.start()
    yield 0


@disaster
def redis_down(stage: Stage) -> Disaster:
    with stage.using("redis"):
        seconds = stage.seconds(3, 15)
        stage.tell(f"⚡ Redis killed, and started empty in {seconds:.0f} s")
        stage.servers.redis.kill()
        yield seconds
        stage.servers.redis.start()


@disaster
def redis_frozen(stage: Stage) -> Disaster:
    with stage.using("redis"):
        seconds = stage.seconds(1, 20)
        stage.tell(f"⚡ Redis frozen for {seconds:.0f} s")
        stage.servers.redis.freeze()
        yield seconds
        stage.servers.redis.thaw()


@disaster
def redis_full(stage: Stage) -> Disaster:
    with stage.using("redis"):
        seconds = stage.seconds(3, 12)
        stage.tell(f"⚡ Redis full for {seconds:.0f} s (noeviction)")
        stage.redis.config_set("maxmemory-policy", "noeviction")
        stage.redis.config_set("maxmemory", 1)
        yield seconds
        stage.redis.config_set("maxmemory", 0)


@disaster
def half_the_keys_lost(stage: Stage) -> Disaster:
    with stage.using("redis"):
        keys = sorted(stage.redis.scan_iter(count=1000))
        if len(keys) < 2:
            raise Missed
        lost = stage.random.sample(keys, len(keys) // 2)
        stage.tell(f"⚡ {len(lost)} of the {len(keys)} keys in Redis lost")
        stage.redis.delete(*lost)
    yield 0


@disaster
def half_a_list_lost(stage: Stage) -> Disaster:
    with stage.using("redis"):
        key = "rq:queue:default"
        if (length := int(stage.redis.llen(key))) < 2:
            raise Missed
        stage.tell(f"⚡ half of the {length} messages in a queue lost")
        stage.redis.ltrim(key, length // 2, -1)
    yield 0


@disaster
def copies_of_messages(stage: Stage) -> Disaster:
    with stage.using("redis"):
        ids = [id for name in QUEUES for id in stage.redis.lrange(f"rq:queue:{name}", 0, -1)]
        # Those that wait, or else those that are being worked on.
        ids = ids or [row_id(job, str(row.pk)).encode() for row in stage.observer.snapshot.unfinished for job in JOBS]
        if not ids:
            raise Missed
        chosen = stage.random.sample(sorted(set(ids)), min(3, len(set(ids))))
        stage.tell(f"⚡ {COPIES} copies each of {', '.join(map(as_text, chosen))}")
        stage.redis.rpush("rq:queue:default", *(chosen * COPIES))
    yield 0


@disaster
def keys_of_a_wrong_kind(stage: Stage) -> Disaster:
    with stage.using("redis"):
        stage.tell("⚡ a list and the delayed set in Redis are of a wrong kind")
        with stage.redis.pipeline() as pipeline:
            for key in ("rq:queue:default", DELAYED):
                pipeline.set(key, "nonsense")
            pipeline.execute()
    yield 0


# --- PostgreSQL -------------------------------------------------------------------------------------------------------


@disaster
def postgres_restarted(stage: Stage) -> Disaster:
    with stage.using("postgres"):
        stage.tell("⚡ PostgreSQL restarted")
        stage.servers.postgres.restart()
    yield 0


@disaster
def postgres_killed(stage: Stage) -> Disaster:
    with stage.using("postgres"):
        seconds = stage.seconds(0, 10)
        stage.tell(f"⚡ PostgreSQL killed, and started in {seconds:.0f} s")
        stage.servers.postgres.kill()
        yield seconds
        stage.servers.postgres.start()


@disaster
def postgres_frozen(stage: Stage) -> Disaster:
    with stage.using("postgres"):
        seconds = stage.seconds(1, 20)
        stage.tell(f"⚡ PostgreSQL frozen for {seconds:.0f} s")
        stage.servers.postgres.freeze()
        yield seconds
        stage.servers.postgres.thaw()


@disaster
def postgres_sessions_ended(stage: Stage) -> Disaster:
    with stage.using("postgres"):
        stage.tell("⚡ every session of PostgreSQL ended")
        try:
            with connection.cursor() as cursor:
                cursor.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                    "WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
                )
        finally:
            connections.close_all()
    yield 0


# --- The networks to both ---------------------------------------------------------------------------------------------


def on_both_networks(strike: Callable[[Stage, str, Proxy], Disaster]) -> None:
    """Declare a disaster of the network twice, since it has another meaning for each of the servers."""
    for server in ("redis", "postgres"):

        def strike_one(stage: Stage, server: str = server) -> Disaster:
            network = stage.servers.redis_network if server == "redis" else stage.servers.postgres_network
            with stage.using(f"{server} network"):
                yield from strike(stage, server.capitalize(), network)
                network.heal()

        strike_one.__name__ = f"{server}_{strike.__name__}"
        disaster(strike_one)


@on_both_networks
def network_slow(stage: Stage, server: str, network: Proxy) -> Disaster:
    delay, seconds = stage.random.choice([0.02, 0.1, 0.4, 1.5]), stage.seconds(3, 15)
    stage.tell(f"⚡ the network to {server} slow: {delay:.2f} s each way, for {seconds:.0f} s")
    network.delay(delay)
    yield seconds


@on_both_networks
def network_cut(stage: Stage, server: str, network: Proxy) -> Disaster:
    stage.tell(f"⚡ all {network.connections} connections to {server} reset")
    network.cut()
    yield 0


@on_both_networks
def network_half_closed(stage: Stage, server: str, network: Proxy) -> Disaster:
    seconds, towards_client = stage.seconds(3, 15), stage.random.random() < 0.5
    side = "client" if towards_client else "server"
    stage.tell(f"⚡ all {network.connections} connections to {server} closed on the {side}'s side, for {seconds:.0f} s")
    network.half_close(towards_client)
    yield seconds


@on_both_networks
def network_refused(stage: Stage, server: str, network: Proxy) -> Disaster:
    seconds = stage.seconds(3, 12)
    stage.tell(f"⚡ {server} refuses connections for {seconds:.0f} s")
    network.refuse()
    yield seconds


@on_both_networks
def network_silent(stage: Stage, server: str, network: Proxy) -> Disaster:
    seconds = stage.seconds(3, 20)
    stage.tell(f"⚡ {server} says nothing more for {seconds:.0f} s")
    network.black_hole()
    yield seconds


# --- Processes --------------------------------------------------------------------------------------------------------


@disaster
def worker_killed(stage: Stage) -> Disaster:
    victim = stage.victim()
    stage.tell(f"⚡ {victim.name} ({victim.worker}) killed, its child left")
    stage.kill(victim.worker)
    yield 0


@disaster
def child_killed(stage: Stage) -> Disaster:
    victim = stage.victim(may_die=False)
    stage.tell(f"⚡ the child of {victim.name} ({victim.child.pid}) killed")
    stage.kill_child(victim.child)
    yield 0


@disaster
def worker_and_child_killed(stage: Stage) -> Disaster:
    victim = stage.victim()
    stage.tell(f"⚡ {victim.name} ({victim.worker}) and its child ({victim.child.pid}) killed")
    stage.kill(victim.worker)
    stage.kill_child(victim.child)
    yield 0


@disaster
def worker_told_to_stop(stage: Stage) -> Disaster:
    victim = stage.victim()
    with stage.using(victim.name):
        stage.tell(f"⚡ {victim.name} ({victim.worker}) told to stop")
        stage.ask_to_end(victim.worker)
        yield 10


@disaster
def worker_told_to_stop_and_killed(stage: Stage) -> Disaster:
    victim = stage.victim()
    with stage.using(victim.name):
        seconds = stage.random.uniform(0.02, 1.5)
        stage.tell(f"⚡ {victim.name} ({victim.worker}) told to stop, and killed with its child {seconds:.2f} s later")
        stage.ask_to_end(victim.worker)
        yield seconds
        # By then it may have ended, and somebody else may have its id.
        if stage.stack.pid(victim.name) == victim.worker:
            stage.kill(victim.worker)
        if victim.child in stage.watch.working():
            stage.kill_child(victim.child)


@disaster
def worker_and_child_frozen(stage: Stage) -> Disaster:
    victim = stage.victim(may_die=False)
    seconds = stage.seconds(3, 90)
    with stage.using(victim.name), stage.frozen(victim.worker, child=victim.child):
        stage.tell(f"⚡ {victim.name} and its child ({victim.child.pid}) frozen for {seconds:.0f} s")
        yield seconds


@disaster
def child_frozen(stage: Stage) -> Disaster:
    victim = stage.victim(may_die=False)
    seconds = stage.seconds(3, 90)
    with stage.using(victim.name), stage.frozen(child=victim.child):
        stage.tell(f"⚡ the child of {victim.name} ({victim.child.pid}) frozen for {seconds:.0f} s")
        yield seconds


@disaster
def scheduler_killed(stage: Stage) -> Disaster:
    pid = stage.pid("scheduler-2")
    stage.tell(f"⚡ scheduler-2 ({pid}) killed")
    stage.kill(pid)
    yield 0


@disaster
def scheduler_frozen(stage: Stage) -> Disaster:
    name = stage.random.choice(["scheduler-1", "scheduler-2"])
    pid, seconds = stage.pid(name), stage.seconds(3, 45)
    with stage.using(name), stage.frozen(pid):
        stage.tell(f"⚡ {name} frozen for {seconds:.0f} s")
        yield seconds


@disaster
def no_scheduler(stage: Stage) -> Disaster:
    spared, other, seconds = stage.pid("scheduler-1"), stage.pid("scheduler-2"), stage.seconds(25, 45)
    with stage.using("scheduler-1", "scheduler-2"), stage.frozen(spared):
        stage.tell(f"⚡ no scheduler for {seconds:.0f} s: one is frozen and one held down")
        stage.stack.hold("scheduler-2")
        stage.kill(other)
        yield seconds
        stage.stack.release("scheduler-2")


# --- An operator ------------------------------------------------------------------------------------------------------


@disaster
def job_switched_off(stage: Stage) -> Disaster:
    if not stage.is_free("postgres"):
        raise Missed
    job, seconds = stage.random.choice(JOBS), stage.seconds(3, 15)
    with stage.using("switch"):
        stage.tell(f"⚡ {job} switched off for {seconds:.0f} s")
        switch(job, on=True)
        yield seconds
        while not stage.is_free("postgres"):
            yield 0.5
        switch(job, on=False)


def switch(job: str, on: bool) -> None:
    try:
        flip(f"disable_{job}", on)
    finally:
        connections.close_all()


def read_kinds(names: str) -> list[str]:
    """Read a list of names with commas between. Raises StackError for one that there is not."""
    if names == "all":
        return list(DISASTERS)
    kinds = [name.strip() for name in names.split(",") if name.strip() not in {"", "none"}]
    if unknown := set(kinds) - DISASTERS.keys():
        raise StackError(
            f"There is no disaster {', '.join(sorted(unknown))}. There are {', '.join(DISASTERS)}, and none."
        )
    return kinds
