"""Break everything for many minutes, count what was lost, and see that nothing grows.

The exit code is 0 only when no row was lost, none was worked by two at once, nobody wrote who must not, no row was
quarantined, no command ended by itself, memory and Redis are flat and, in ten minutes or more, every disaster struck.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from pathlib import Path

import psycopg

from config import HOME
from config.servers import PostgresServer, RedisServer, ServerError
from config.stack import StackError, Supervisor, interrupt_on_sigterm, job_commands, manage
from demo.__main__ import claim, empty, environment, prepare_django
from demo.screen import Screen
from soak.proxy import Proxy

SWEEP_SECONDS = 60.0
"""From one sweep to the next, as the code of the jobs says."""
WORK_SECONDS = 2.0
LONG_ENOUGH = 10.0
"""Minutes in which every disaster must have struck."""


def main() -> None:
    """Run to the end, or until Ctrl-C or SIGTERM, and leave no process behind."""
    options = parse_options()
    interrupt_on_sigterm()
    try:
        sys.exit(run(options))
    except (StackError, ServerError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        print("\nStopped before the end, which proves nothing. No process is left.")
        sys.exit(130)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m soak", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--minutes", type=float, default=20.0, help="how long disasters strike; then every row must come to its end")
    add("--workers", type=int, default=8, help="how many workers")
    add("--rate", type=float, default=2.0, help="how many databases a second the user asks for")
    add("--every", type=float, default=5.0, help="seconds between two disasters, on average")
    add("--disasters", default="all", help="their names with commas between; or none; or all")
    add("--home", type=Path, default=HOME / "soak", help="a folder for it, emptied at each start")
    add("--seed", type=int, default=random.randrange(10**6), help="of whatever is left to chance; a new one each time")
    add("--settings", default="soak.settings", help="Django's settings")
    add("--cron", default="", help="when the sweeps run, if not as the code says: what an operator sets in the admin")
    return parser.parse_args()


def run(options: argparse.Namespace) -> int:
    home: Path = options.home.resolve()
    claim(home)
    redis, postgres = RedisServer(home / "redis"), PostgresServer(home / "postgres")
    # Inside, no other soak has this folder, and nothing that an earlier one left behind is running.
    with Supervisor(home) as stack, redis, postgres:
        empty(home)
        (home / "redis" / "dump.rdb").unlink(missing_ok=True)
        redis.flush()
        with psycopg.connect(postgres.url, autocommit=True) as connection:
            connection.execute("DROP SCHEMA public CASCADE")
            connection.execute("CREATE SCHEMA public")
        with Proxy(redis.port) as redis_network, Proxy(postgres.port) as postgres_network:
            # The user's requests find Redis as the processes do; only what observes has a way of its own.
            redis_url = redis.url.replace(f":{redis.port}/", f":{redis_network.port}/")
            # Without DEBUG, in which Django remembers every query: memory is measured.
            common = environment(home, redis_url, options.settings) | {"DEBUG": "", "SECRET_KEY": "for-the-soak-only"}
            os.environ.update(common | {"DATABASE_URL": postgres.url, "PGAPPNAME": "user"})
            through = postgres.url.replace(f":{postgres.port}/", f":{postgres_network.port}/")
            theirs = common | {"DATABASE_URL": through}
            return play(options, home, stack, theirs, redis, postgres, redis_network, postgres_network)


def play(
    options: argparse.Namespace,
    home: Path,
    stack: Supervisor,
    theirs: dict[str, str],
    redis: RedisServer,
    postgres: PostgresServer,
    redis_network: Proxy,
    postgres_network: Proxy,
) -> int:
    prepare_django(home, options.cron)
    # Not before: what these import needs Django.
    from django.db import connections
    from django.db.models import Count

    from demo import rows
    from demo.ledger import intervals, lost, unrecorded
    from demo.watch import Watch
    from jobs.conf import conf
    from jobs.models import Run
    from soak import audit, report
    from soak.disasters import read_kinds
    from soak.observer import Observer
    from soak.stage import SPARED, Stage
    from soak.user import User, slowest, wanted

    kinds = read_kinds(options.disasters)
    screen, chance = Screen(), random.Random(options.seed)
    audit.install()
    commands(stack, options.workers, theirs)
    user = User(options.rate, chance, postgres_network.port)
    # The next disaster may end it, and this thread asks nothing before the last one is over.
    connections.close_all()
    observer = Observer(redis.url, lambda: {name: pid for name in stack.names if (pid := stack.pid(name))})
    stage = Stage(
        redis_server=redis,
        postgres=postgres,
        redis_network=redis_network,
        postgres_network=postgres_network,
        stack=stack,
        watch=Watch(home / "ledger"),
        observer=observer,
        user=user,
        screen=screen,
        random=chance,
        every=options.every,
    )
    screen.say(
        f"Two schedulers, {options.workers} workers, a user who wants {options.rate:g} databases a second, and a "
        f"disaster every {options.every:g} s or so for {options.minutes:g} minutes. "
        f"Seed {options.seed}."
    )
    observer.start()
    try:
        stage.play(kinds, rows.clock() + options.minutes * 60)
        interval = SWEEP_SECONDS if not options.cron else WORK_SECONDS
        backlog = WORK_SECONDS * len(observer.snapshot.unfinished) / options.workers
        backing_off = observer.longest_backoff()
        # What is found again may be lost once more, to a disaster that was just undone.
        limit = 2 * (conf.LEASE.total_seconds() + interval + conf.TICK.total_seconds()) + backlog + backing_off + 30
        over_at = rows.clock()
        stage.tell(
            f"No more disasters. {len(observer.snapshot.unfinished)} rows have not ended, and have {limit:.0f} s: two "
            f"leases, sweeps and ticks, {backing_off:.0f} s of backing off, {backlog:.0f} s of work, and 30 s of grace."
        )
        stage.settle(over_at + limit)
        settled_after = rows.clock() - over_at
        screen.end_progress()
        observer.measure()
        keys = observer.keys()
    finally:
        user.leave()
        observer.end()

    # Only when nobody works any more can the rows, the files and the ledger be compared.
    stack.stop()
    stage.watch.look()
    attempts = intervals(stage.watch.events, stage.watch.deaths)
    endings, writes = rows.endings(home / "databases"), audit.writes()
    given_up = {write.name for write in writes if write.new == "deleting"}
    expected = wanted(user.requests, given_up, endings)
    verdict = report.Verdict(
        endings=endings,
        lost=lost(expected, endings),
        at_once=report.at_once(attempts, stage.frozen_for, conf.lease_margin.total_seconds() / 2),
        bad_writes=list(audit.bad(writes)),
        unrecorded=sorted(unrecorded(expected, attempts)),
        quarantined=sorted(observer.quarantined),
        unasked=stage.unasked,
        grown=[*report.grown(observer.memory, SPARED), *report.piled_up(keys)],
        never_struck=[name for name in kinds if not stage.struck[name] and options.minutes >= LONG_ENOUGH],
    )
    outcomes = Run.objects.filter(job__in=rows.JOBS).values_list("outcome").annotate(Count("pk")).order_by("outcome")
    history = ", ".join(f"{outcome} {count}" for outcome, count in outcomes)
    connections.close_all()

    killed = sum(attempt.closed_by == "death" for attempt in attempts)
    failed = sum(bool(request.error) for request in user.requests)
    screen.say(f"\n{report.disasters_table(kinds, stage.struck)}\n\n{report.memory_table(observer.memory, SPARED)}")
    screen.say(f"\n{report.keys_table(keys)}\n\n{report.heals(observer.heals.spans)}")
    screen.say(
        f"The workers made {len(attempts)} attempts; a death cut off {killed} of them. "
        f"{len(stage.frozen_for)} children were frozen. The rows had ended {settled_after:.1f} s after the disasters."
    )
    screen.say(f"The library's own history of them: {history or 'nothing'}.")
    screen.say(f"Of {len(user.requests)} requests {failed} failed.")
    if worst := slowest(user.requests, stage.troubles):
        screen.say(
            f"While the database was there, the slowest took {worst.took:.2f} s, to {worst.verb} {worst.name} "
            f"at {worst.began - stage.began:.1f} s."
        )
    screen.say(
        f"PostgreSQL had {observer.sessions.most} sessions at most and {observer.sessions.last} at the end; "
        f"Redis {observer.clients.most} clients at most and {observer.clients.last} at the end."
    )
    for line in verdict.evidence():
        screen.say(line)
    if not verdict.is_proof:
        screen.say(f"\nThe ledger is {home / 'ledger'}; what the processes said is in {stack.logs}.")
    screen.say(f"\n{verdict.summary}")
    return 0 if verdict.is_proof else 1


def commands(stack: Supervisor, workers: int, environment: dict[str, str]) -> None:
    """Start what a deployment runs, with a second scheduler, and workers for every queue save the last."""
    found = job_commands(workers - 1)
    found["scheduler-1"] = found.pop("scheduler")
    found["scheduler-2"] = manage("rqscheduler")
    for name, argv in found.items():
        stack.start(name, argv, environment)


if __name__ == "__main__":
    main()
