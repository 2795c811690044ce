"""Exploring: one schedule, many, and the shortest trace of one that fails."""

from __future__ import annotations

import logging
import random
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any
from unittest import mock

from django.db import connection
from django.test import override_settings
from redis import Redis

from jobs import registry
from jobs.testing import tick
from tests.recovery.explorer import cast, shrink
from tests.recovery.explorer.chooser import Chooser, Decision, Script
from tests.recovery.explorer.invariants import Invariants
from tests.recovery.explorer.processes import QUEUES, Roster
from tests.recovery.explorer.seams import Seams
from tests.recovery.explorer.world import EPOCH, Violation, World


@dataclass
class Schedule:
    """How one schedule went."""

    seed: int
    violation: str | None
    decisions: list[Decision]
    # After how many cuts it had to be calm.
    limit: int
    log: list[tuple[float, str, str]]
    struck: Counter[str] = field(default_factory=Counter)
    cut_at: Counter[tuple[str, str]] = field(default_factory=Counter)
    calm_for: float = 0.0


class Explorer:
    """Runs schedules, one after another, in a database and a Redis that it has for itself."""

    def __init__(self, redis_url: str, versions: dict[str, Any]) -> None:
        self.redis_url = redis_url
        self.seams = Seams(redis_url)
        self.versions = versions

    def run(self, seed: int, chooser: Any = None) -> Schedule:
        """Run the schedule of a seed; or, of the same seed, only what a script says."""
        chooser = chooser or Chooser(seed)
        random.seed(seed)
        self.seams.reset()
        self._begin()
        with Redis.from_url(self.redis_url) as redis:
            world = World(chooser, self.seams, Invariants, Roster(self.versions, redis), seed)
            violation = None
            try:
                world.run()
            except Violation as found:
                violation = str(found)
        calm_for = world.monotonic - world.calm_at
        return Schedule(seed, violation, chooser.made, chooser.cuts, world.log, world.struck, world.cut_at, calm_for)

    def shortest(self, failed: Schedule) -> Schedule:
        """Return the same failure with as few decisions as can be: what is left out does not matter to it."""
        kind = _kind(failed.violation)
        best = failed

        def still_fails(decisions: list[Decision]) -> bool:
            nonlocal best
            tried = self.run(failed.seed, Script(decisions, failed.limit))
            if tried.violation is None or _kind(tried.violation) != kind:
                return False
            best = tried
            return True

        shrink.shortest(failed.decisions, still_fails)
        return best

    def story(self, failed: Schedule, most_lines: int = 60) -> str:
        """Tell how a schedule failed: its shortest trace, what was done last, and how to see it again."""
        found = self.shortest(failed)
        lines = [f"{at:9.3f}  {who:28} {what}" for at, who, what in found.log[-most_lines:]]
        return "\n".join(
            [
                f"{found.violation}",
                f"\nThe shortest trace has {len(found.decisions)} of {len(failed.decisions)} decisions:",
                *(f"  {decision}" for decision in found.decisions),
                f"\nThe last of its {len(found.log)} cuts:",
                *lines,
                f"\nSee it again: make chaos SEED={failed.seed} RUNS=1",
            ]
        )

    def _begin(self) -> None:
        """Tick once, after which every schedule is known, and none is due."""
        registry._declared.clear()
        registry._declared.update(self.versions["today"])
        tick(EPOCH)


def _kind(violation: str | None) -> str:
    """What is the same in two tellings of one violation: not who met it, where, and when."""
    return " ".join(re.findall(r"\b[a-z]{3,}\b", (violation or "").partition("[")[0].rpartition(": ")[2] or ""))


@contextmanager
def explorer(redis_url: str) -> Iterator[Explorer]:
    """Yield an explorer of the database that Django is connected to, which it empties."""
    logging.disable(logging.CRITICAL)
    settings = connection.settings_dict
    options = {**settings["OPTIONS"], **({"timeout": 0} if connection.vendor == "sqlite" else {})}
    connection.close()
    with (
        cast.declared() as versions,
        # A slower tick than the default, since most of what a calm world does is ticks.
        override_settings(
            RQ_QUEUES={name: {"URL": redis_url} for name in QUEUES},
            JOBS={"TICK": timedelta(seconds=20)},
            DEBUG=False,
        ),
        mock.patch.dict(settings, OPTIONS=options, CONN_MAX_AGE=None),
    ):
        made = Explorer(redis_url, versions)
        try:
            with made.seams.installed():
                yield made
        finally:
            made.seams.close()
            logging.disable(logging.NOTSET)
