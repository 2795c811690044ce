"""`make chaos`: explore seeds, and print how often each fault struck, or how the first that fails does so."""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(prog="make chaos", description=__doc__)
    parser.add_argument("--seed", type=int, help="the first seed; without it, one that nobody has seen")
    parser.add_argument("--runs", type=int, default=1000, help="how many seeds, one after another")
    parser.add_argument("--postgres", action="store_true", help="on a PostgreSQL that is started for it")
    parser.add_argument("--cuts", action="store_true", help="print how often each cut was come to, too")
    parser.add_argument("--log", action="store_true", help="print every step")
    parser.add_argument("--plant", help="with this bug of planted.py in the code")
    arguments = parser.parse_args()
    # Its servers end with it.
    signal.signal(signal.SIGTERM, lambda *received: sys.exit(143))
    seed = arguments.seed if arguments.seed is not None else random.SystemRandom().randrange(10**9)
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
                return explore(redis.url, seed, arguments)
        finally:
            postgres.stop()


def explore(redis_url: str, seed: int, arguments: argparse.Namespace) -> int:
    import django

    django.setup()
    from contextlib import nullcontext

    from django.db import connection

    from tests.recovery.explorer.explore import explorer
    from tests.recovery.explorer.planted import BUGS

    connection.creation.create_test_db(verbosity=0)
    struck: Counter[str] = Counter()
    cut_at: Counter[tuple[str, str]] = Counter()
    calm: list[float] = []
    began = time.monotonic()
    planted = BUGS[arguments.plant]() if arguments.plant else nullcontext()
    with explorer(redis_url) as exploring, planted:
        for each in range(seed, seed + arguments.runs):
            schedule = exploring.run(each)
            struck.update(schedule.struck)
            cut_at.update(schedule.cut_at)
            calm.append(schedule.calm_for)
            if arguments.log:
                for at, who, what in schedule.log:
                    print(f"{at:9.3f}  {who:28} {what}")
            if schedule.violation:
                print(exploring.story(schedule))
                break
            if len(calm) % 100 == 0:
                print(f"{len(calm)} schedules, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    took = time.monotonic() - began
    for what, times in sorted(struck.items()):
        print(f"{times:9,}  {what}")
    if arguments.cuts:
        for (kind, what), times in sorted(cut_at.items()):
            print(f"{times:9,}  {kind}: {what}")
    print(
        f"{len(calm):,} schedules from seed {seed}, {sum(cut_at.values()):,} cuts, {took:.0f} s: "
        f"{len(calm) / took:.2f} a second. At rest {sorted(calm)[len(calm) // 2]:.0f} virtual seconds after the last "
        f"fault, at most {max(calm):.0f}."
    )
    connection.creation.destroy_test_db(connection.settings_dict["NAME"], verbosity=0)
    return int(bool(schedule.violation))


if __name__ == "__main__":
    raise SystemExit(main())
