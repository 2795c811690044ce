"""`make chaos`: explore seeds, and print what struck how often, or the shortest trace of the first that fails."""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections import Counter
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(prog="make chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--log", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="selfheal-chaos-") as home:
        os.environ["SELFHEAL_HOME"] = home
        os.environ["DJANGO_SETTINGS_MODULE"] = "tests.settings"
        import django

        django.setup()
        from django.db import connection

        from config.servers import RedisServer
        from tests.recovery.explorer.explore import explorer

        seed = arguments.seed if arguments.seed is not None else int(time.time())
        struck: Counter[str] = Counter()
        cuts = 0
        began = time.monotonic()
        connection.creation.create_test_db(verbosity=0)
        with RedisServer(Path(home) / "redis") as server, explorer(server.url) as exploring:
            for n in range(arguments.runs):
                done = exploring.run(seed + n)
                struck.update(done.struck)
                cuts += len(done.log)
                if done.violation or arguments.log:
                    for at, who, what in done.log[-200 if not arguments.log else 0:]:
                        print(f"{at:9.3f} {who:30} {what}")
                if done.violation:
                    print("\n".join(map(str, done.decisions)))
                    print(f"seed {seed + n}: {done.violation}")
                    break
            took = time.monotonic() - began
            print(f"{n + 1} schedules, {cuts} cuts, {took:.1f} s, {took / (n + 1):.3f} s each; calm for {done.calm_for:.0f}")
            for what, times in struck.most_common():
                print(f"{times:7} {what}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
