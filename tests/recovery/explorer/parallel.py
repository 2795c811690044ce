"""Many seeds, in several processes: each has servers of its own, and all end when one has found something."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from multiprocessing.synchronize import Event
from pathlib import Path

# Set as soon as one process has found a violation: the others have nothing to add to it.
found: Event


@dataclass
class Explored:
    """What one process, or all of them, have seen."""

    struck: Counter[str] = field(default_factory=Counter)
    cut_at: Counter[tuple[str, str]] = field(default_factory=Counter)
    calm: list[float] = field(default_factory=list)
    log: list[tuple[float, str, str]] = field(default_factory=list)
    story: str = ""

    def __add__(self, other: Explored) -> Explored:
        return Explored(
            self.struck + other.struck,
            self.cut_at + other.cut_at,
            self.calm + other.calm,
            self.log + other.log,
            self.story or other.story,
        )


def explore_all(seeds: range, arguments: argparse.Namespace) -> Explored:
    # A fork would share the threads and connections of whoever is at it.
    spawning = multiprocessing.get_context("spawn")
    processes = min(arguments.processes, len(seeds))
    with ProcessPoolExecutor(processes, spawning, initializer=_begin, initargs=(spawning.Event(),)) as pool:
        shares = [seeds[each::processes] for each in range(processes)]
        parts = pool.map(_explore, range(processes), shares, [arguments] * processes)
        return sum(parts, Explored())


def _begin(event: Event) -> None:
    """Begin a process, which ends in good order, with its servers, when it is told to."""
    global found
    found = event
    signal.signal(signal.SIGTERM, lambda *received: sys.exit(143))


def _explore(number: int, seeds: range, arguments: argparse.Namespace) -> Explored:
    """Explore these seeds until one fails, here or in another process."""
    _stay_on_one_core(number)
    with tempfile.TemporaryDirectory(prefix="selfheal-chaos-") as home:
        # Not before: what is imported from `config` has read the environment.
        os.environ.pop("DATABASE_URL", None)
        os.environ["SELFHEAL_HOME"] = home
        os.environ["DJANGO_SETTINGS_MODULE"] = "tests.settings"
        from config.servers import PostgresServer, RedisServer

        postgres = PostgresServer(Path(home) / "postgres")
        try:
            if arguments.postgres:
                postgres.start()
                os.environ["DATABASE_URL"] = postgres.url
            with RedisServer(Path(home) / "redis") as redis:
                return _explore_on(redis.socket_url, seeds, arguments)
        finally:
            postgres.stop()


def _stay_on_one_core(number: int) -> None:
    """Keep this process, and the servers that it starts, on one core: of its threads and theirs one at a time runs."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[number % len(cores)]})


def _explore_on(redis_url: str, seeds: range, arguments: argparse.Namespace) -> Explored:
    import django

    django.setup()
    from django.db import connection

    from tests.recovery.explorer.explore import explorer
    from tests.recovery.explorer.planted import BUGS

    connection.creation.create_test_db(verbosity=0)
    explored, began = Explored(), time.monotonic()
    planted = BUGS[arguments.plant]() if arguments.plant else nullcontext()
    with explorer(redis_url) as exploring, planted:
        for seed in seeds:
            if found.is_set():
                break
            schedule = exploring.run(seed)
            log = schedule.log if arguments.log else []
            explored += Explored(schedule.struck, schedule.cut_at, [schedule.calm_for], log)
            if schedule.violation:
                found.set()
                explored.story = exploring.story(schedule)
            if len(explored.calm) % 100 == 0:
                took = time.monotonic() - began
                print(f"{len(explored.calm)} of {len(seeds)}, {took:.0f} s", file=sys.stderr, flush=True)
    connection.creation.destroy_test_db(connection.settings_dict["NAME"], verbosity=0)
    return explored
