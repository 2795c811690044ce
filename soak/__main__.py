"""Break everything for many minutes, count what was lost, and see that nothing grows.

The exit code is 0 only when no row was lost, none was worked by two at once, nobody wrote who must not, no row was
quarantined, no request failed while the database was there, no command ended by itself, memory and Redis are flat and,
in ten minutes or more, every disaster struck.
"""

from __future__ import annotations

import argparse
import os
import random
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from config import HOME
from config.stack import Supervisor, job_commands, manage
from demo.__main__ import claim, empty, environment, prepare_django, run_as_a_proof
from demo.screen import Screen
from soak.servers import Servers, started

if TYPE_CHECKING:
    from soak.stage import Stage

SWEEP_SECONDS = 60.0
"""From one sweep to the next, as the code of the jobs says."""
WORK_SECONDS = 2.0
GRACE = 30.0
LONG_ENOUGH = 10.0
"""Minutes in which every disaster must have struck."""


def main() -> None:
    """Run to the end, or until Ctrl-C or SIGTERM, and leave no process behind."""
    options = parse_options()
    run_as_a_proof(lambda: run(options))


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
    # Inside, no other soak has this folder, and nothing that an earlier one left behind is running.
    with Supervisor(home) as stack, started(home) as servers:
        empty(home)
        # The user's requests find Redis as the processes do; only what observes has a way of its own. Without DEBUG, in
        # which Django remembers every query: memory is measured.
        common = environment(home, servers.redis_url, options.settings)
        common |= {"DEBUG": "", "SECRET_KEY": "for-the-soak-only"}
        os.environ.update(common | {"DATABASE_URL": servers.postgres.url, "PGAPPNAME": "user"})
        return play(options, home, servers, stack, common | {"DATABASE_URL": servers.database_url})


def play(options: argparse.Namespace, home: Path, servers: Servers, stack: Supervisor, theirs: dict[str, str]) -> int:
    prepare_django(home, options.cron)
    # Not before: what these import needs Django.
    from django.db import connections

    from demo import rows
    from demo.watch import Watch
    from soak import audit, report
    from soak.disasters import read_kinds
    from soak.observer import Observer
    from soak.stage import Stage
    from soak.user import User

    kinds = read_kinds(options.disasters)
    screen, chance = Screen(), random.Random(options.seed)
    screen.say(
        f"Two schedulers, {options.workers} workers, a user who wants {options.rate:g} databases a second, and a "
        f"disaster every {options.every:g} s or so for {options.minutes:g} minutes. Seed {options.seed}."
    )
    audit.install()
    commands(stack, options.workers, theirs)
    user = User(options.rate, chance, servers.postgres_network.port)
    observer = Observer(servers.redis.url, lambda: {name: pid for name in stack.names if (pid := stack.pid(name))})
    # The next disaster may end it, and this thread asks nothing before the last one is over.
    connections.close_all()
    stage = Stage(servers, stack, Watch(home / "ledger"), observer, user, screen, chance, options.every)
    observer.start()
    try:
        stage.play(kinds, rows.clock() + options.minutes * 60)
        settled_after = settle(stage, options)
        observer.measure()
        keys = observer.keys()
    finally:
        user.leave()
        observer.end()

    # Only when nobody works any more can the rows, the files and the ledger be compared.
    stack.stop()
    stage.watch.look()
    attempts = report.attempts(stage)
    verdict = report.Verdict.on(stage, rows.endings(), attempts, audit.writes(), keys)
    if options.minutes >= LONG_ENOUGH:
        verdict = replace(verdict, never_struck=[name for name in kinds if not stage.struck[name]])
    for line in report.figures(stage, kinds, attempts, keys):
        screen.say(line)
    screen.say(f"The rows had ended {settled_after:.1f} s after the disasters.")
    connections.close_all()
    for line in verdict.evidence():
        screen.say(line)
    if not verdict.is_proof:
        screen.say(f"\nThe ledger is {home / 'ledger'}; what the processes said is in {stack.logs}.")
    screen.say(f"\n{verdict.summary}")
    return 0 if verdict.is_proof else 1


def settle(stage: Stage, options: argparse.Namespace) -> float:
    """Wait until every row has ended, for as long as the promises may take. Returns the seconds that it took."""
    from demo import rows
    from jobs.conf import conf

    began, unfinished = rows.clock(), len(stage.observer.snapshot.unfinished)
    interval = WORK_SECONDS if options.cron else SWEEP_SECONDS
    backing_off = stage.observer.longest_backoff()
    backlog = WORK_SECONDS * unfinished / options.workers
    # Twice: what is found again may be lost once more, to a disaster that was just undone.
    limit = 2 * (conf.LEASE.total_seconds() + interval + conf.TICK.total_seconds()) + backlog + backing_off + GRACE
    stage.tell(
        f"No more disasters. {unfinished} rows have not ended, and have {limit:.0f} s: two leases, sweeps and ticks, "
        f"{backing_off:.0f} s of backing off, {backlog:.0f} s of work, and {GRACE:.0f} s of grace."
    )
    stage.settle(began + limit)
    stage.screen.end_progress()
    return rows.clock() - began


def commands(stack: Supervisor, workers: int, environment: dict[str, str]) -> None:
    """Start what a deployment runs, with a second scheduler, and workers for every queue save the last."""
    found = job_commands(workers - 1)
    found["scheduler-1"] = found.pop("scheduler")
    found["scheduler-2"] = manage("rqscheduler")
    for name, argv in found.items():
        stack.start(name, argv, environment)


if __name__ == "__main__":
    main()
