"""Break everything for a few minutes, and count what was lost.

The exit code is 0 only when every disaster struck, no row was lost and none was worked by two at once.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import django

from config import HOME
from config.servers import PostgresServer, RedisServer, ServerError, postgres_binary
from config.stack import StackError, Supervisor, interrupt_on_sigterm, job_commands
from demo.screen import Screen

MARKER = "this-folder-is-emptied-at-each-start"


def main() -> None:
    """Run to the end, or until Ctrl-C or SIGTERM, and leave no process behind."""
    options = parse_options()
    run_as_a_proof(lambda: run(options))


def run_as_a_proof(run: Callable[[], int]) -> NoReturn:
    """End this process with what the run returns, or with a sentence when it did not come to its end."""
    interrupt_on_sigterm()
    try:
        sys.exit(run())
    except (StackError, ServerError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        print("\nStopped before the end, which proves nothing. No process is left.")
        sys.exit(130)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m demo", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--databases", type=int, default=300, help="how many the user creates")
    add("--rate", type=float, default=10.0, help="how many of them a second")
    add("--stories", type=int, default=6, help="databases of each engine that are branched, deployed to and restored")
    add("--disasters", default="all", help="their names with commas between, in this order; or none; or all")
    add("--home", type=Path, default=HOME / "demo", help="a folder for it, emptied at each start")
    add("--time-limit", type=float, default=420.0, help="seconds after which unfinished rows count as lost")
    add("--seed", type=int, default=random.randrange(10**6), help="of whatever is left to chance; a new one each time")
    add("--settings", default="config.settings", help="Django's settings")
    add("--cron", default="", help="when the sweeps run, if not as the code says: what an operator sets in the admin")
    return parser.parse_args()


def run(options: argparse.Namespace) -> int:
    screen = Screen()
    home: Path = options.home.resolve()
    claim(home)
    server = RedisServer(home / "redis")
    os.environ.update(environment(home, server.url, options.settings))

    # Inside, no other demo has this folder, and nothing that an earlier one left behind is running.
    with Supervisor(home) as stack, server:
        empty(home)
        # Where the user's databases of that engine are; the project's own is SQLite.
        postgres = PostgresServer(home / "postgres")
        postgres.erase()
        with postgres:
            os.environ["DATABASES_POSTGRES_URL"] = postgres.url
            return play(options, home, server, stack, screen)


def play(options: argparse.Namespace, home: Path, server: RedisServer, stack: Supervisor, screen: Screen) -> int:
    prepare_django(home, options.cron)
    # Not before: what these import needs Django.
    from django.db import connections

    from demo import report, rows
    from demo.disasters import read_plan
    from demo.ledger import intervals
    from demo.stage import Stage
    from demo.user import User
    from demo.watch import Watch

    deadline = rows.clock() + options.time_limit
    plan = read_plan(options.disasters)
    chance = random.Random(options.seed)

    for name, argv in job_commands().items():
        stack.start(name, argv)
    user = User(options.databases, options.rate, options.stories, chance)
    try:
        stage = Stage(server, stack, Watch(home / "ledger"), user, screen, chance)
        screen.say(
            f"A scheduler, four workers, and a user who wants {options.databases} databases, and to branch, change, "
            f"back up and restore {options.stories} of each engine. Seed {options.seed}."
        )
        stage.play(plan, deadline)
    finally:
        user.leave()
    screen.end_progress()

    # Only when nobody works any more can the rows, the files and the ledger be compared.
    stack.stop()
    stage.watch.look()
    attempts = intervals(stage.watch.events, stage.watch.deaths)
    for story in user.stories:
        story.compare()
    verdict = report.Verdict.on(stage, rows.endings(), attempts, rows.remains())
    connections.close_all()

    if stage.strikes:
        screen.say(f"\n{report.disasters(stage)}\n\nBack in work: every row that it hit was queued or running again.")
    if user.stories:
        screen.say(f"\n{report.stories(user.stories)}")
    killed = sum(attempt.closed_by == "death" for attempt in attempts)
    screen.say(
        f"\nThe workers made {len(attempts)} attempts in {stage.seconds(stage.snapshot.at):.0f} s; "
        f"a death cut off {killed} of them. The user's slowest request took {user.slowest:.2f} s."
    )
    for line in verdict.evidence():
        screen.say(line)
    if not verdict.is_proof:
        screen.say(f"\nThe ledger is {home / 'ledger'}; what the processes said is in {stack.logs}.")
    screen.say(f"\n{verdict.summary}")
    return 0 if verdict.is_proof else 1


def claim(home: Path) -> None:
    """Make the folder ours. Raises StackError when it holds something that is not."""
    if home.is_dir() and any(home.iterdir()) and not (home / MARKER).exists():
        raise StackError(f"The folder is emptied at each start, and {home} holds something else. Name another.")
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    (home / MARKER).touch()


def empty(home: Path) -> None:
    """Remove what the last run left, except what is in use again: the lock, and the server's folder."""
    for folder in ("databases", "backups", "scratch"):
        shutil.rmtree(home / folder, ignore_errors=True)
    for file in (home / "ledger", *home.glob("db.sqlite3*"), *home.glob("logs/*.log")):
        file.unlink(missing_ok=True)


def environment(home: Path, redis_url: str, settings: str) -> dict[str, str]:
    """What steers the settings, here and in every process, whatever the caller's environment says."""
    return {
        "DJANGO_SETTINGS_MODULE": settings,
        "SELFHEAL_HOME": str(home),
        "SELFHEAL_LEDGER": str(home / "ledger"),
        "REDIS_URL": redis_url,
        "DATABASE_URL": f"sqlite:///{home / 'db.sqlite3'}",
        "DATABASES_FOLDER": str(home / "databases"),
        "DATABASES_SQLITE_PROVISIONER": "demo.provisioner.sqlite",
        "DATABASES_POSTGRES_PROVISIONER": "demo.provisioner.postgresql",
        "DATABASES_POSTGRES_URL": "",
        "DATABASES_POSTGRES_BIN": str(postgres_binary("pg_dump").parent),
        "BACKUPS_FOLDER": str(home / "backups"),
        "BACKUPS_SCRATCH": str(home / "scratch"),
        "ALLOWED_HOSTS": "",
        "DEBUG": "1",
    }


def prepare_django(home: Path, cron: str) -> None:
    """Migrate the empty database, and keep what the library logs here off the screen."""
    django.setup()
    from django.core.management import call_command

    from demo.rows import MODELS
    from jobs import registry
    from jobs.models import Schedule
    from jobs.sweep import Sweep

    log = logging.FileHandler(home / "logs" / f"{home.name}.log")
    log.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    for name in ("", "selfheal", "databases", "backups", "django"):
        logging.getLogger(name).handlers[:] = [log]
    call_command("migrate", verbosity=0)
    if cron:
        sweeps = [each.name for each in registry.declared() if isinstance(each, Sweep) and each.job.name in MODELS]
        Schedule.objects.filter(name__in=sweeps).update(cron=cron)


if __name__ == "__main__":
    main()
