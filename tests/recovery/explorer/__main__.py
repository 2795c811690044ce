"""`make chaos`: explore seeds, and print how often each fault struck, or how the first that fails does so."""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import time

from tests.recovery.explorer.parallel import Explored, explore_all


def main() -> int:
    arguments = parse()
    # Its processes end with it.
    signal.signal(signal.SIGTERM, lambda *received: sys.exit(143))
    seed = arguments.seed if arguments.seed is not None else random.SystemRandom().randrange(10**9)
    began = time.monotonic()
    explored = explore_all(range(seed, seed + arguments.runs), arguments)
    report(explored, seed, time.monotonic() - began, arguments.cuts)
    return int(bool(explored.story))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make chaos", description=__doc__)
    add = parser.add_argument
    add("--seed", type=int, help="the first seed; without it, one that nobody has seen")
    add("--runs", type=positive, default=1000, help="how many seeds, one after another")
    add("--processes", type=positive, default=os.cpu_count() or 1, help="how many of them at once")
    add("--postgres", action="store_true", help="on a PostgreSQL that is started for it")
    add("--cuts", action="store_true", help="print how often each cut was come to, too")
    add("--log", action="store_true", help="print every step")
    add("--plant", help="with this bug of planted.py in the code")
    return parser.parse_args()


def positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError("give a number from 1")
    return number


def report(explored: Explored, seed: int, took: float, cuts: bool) -> None:
    for at, who, what in explored.log:
        print(f"{at:9.3f}  {who:28} {what}")
    for name, times in sorted(explored.struck.items()):
        print(f"{times:9,}  {name}")
    if cuts:
        for (kind, what), times in sorted(explored.cut_at.items()):
            print(f"{times:9,}  {kind}: {what}")
    calm = sorted(explored.calm)
    print(
        f"{len(calm):,} schedules from seed {seed}, {explored.cut_at.total():,} cuts, {took:.0f} s: "
        f"{len(calm) / took:.2f} a second. At rest {calm[len(calm) // 2]:.0f} virtual seconds after the last fault, at "
        f"most {calm[-1]:.0f}."
    )
    if explored.story:
        print(explored.story)


if __name__ == "__main__":
    raise SystemExit(main())
