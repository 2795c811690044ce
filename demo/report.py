"""The end of the story: what each disaster cost, what became of the rows, and the evidence if anything went wrong."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

from databases.models import Database
from demo.disasters import Strike
from demo.ledger import Clash, Ending, Interval, clashes, lost, unrecorded
from demo.screen import table
from demo.stage import Stage
from demo.story import STEPS, Story

SHOWN = 20
"""Pieces of evidence of one kind that are printed; more of them say nothing new."""


@dataclass(frozen=True)
class Verdict:
    """What the ledger, the database and the disk say, and whether that is a proof."""

    endings: Mapping[str, Ending]
    attempts: list[Interval]
    lost: dict[str, str]
    clashes: list[Clash]
    unrecorded: set[str]
    missed: list[str]
    failures: list[str]
    untold: dict[str, str]
    """The stories that did not come to a good end, each with the reason."""
    remains: list[str]

    @classmethod
    def on(cls, stage: Stage, endings: Mapping[str, Ending], attempts: list[Interval], remains: list[str]) -> Verdict:
        wanted = stage.user.wanted
        return cls(
            endings=endings,
            attempts=attempts,
            # What the user never came to ask for is lost too.
            lost=lost({**dict.fromkeys(stage.user.names, "ready"), **wanted}, endings),
            clashes=clashes(attempts),
            unrecorded=unrecorded(wanted, attempts),
            missed=stage.missed,
            failures=stage.user.failures,
            untold={story.name: why for story in stage.user.stories if (why := story.why_untold)},
            remains=remains,
        )

    @property
    def is_proof(self) -> bool:
        wrong = (self.lost, self.clashes, self.unrecorded, self.missed, self.failures, self.untold, self.remains)
        return not any(wrong)

    @property
    def summary(self) -> str:
        states = [ending.state for ending in self.endings.values()]
        at_once = {clash.first.row for clash in self.clashes}
        return (
            f"Created {len(states)}, ready {states.count('ready')}, deleted {states.count('deleted')}, "
            f"lost {len(self.lost) + len(self.untold)}, worked by two at once {len(at_once)}."
        )

    def evidence(self) -> Iterator[str]:
        yield from listed("Lost", (f"{row} {reason}" for row, reason in self.lost.items()))
        yield from listed("Stories without a good end", (f"{name}: {why}" for name, why in self.untold.items()))
        yield from listed("Left behind, and nobody's", self.remains)
        yield from listed("Worked by two at once", map(str, self.clashes))
        yield from listed("Finished, and the ledger knows nothing of it", sorted(self.unrecorded))
        yield from listed("Disasters that did not strike", self.missed)
        yield from listed("The user's requests that failed", self.failures)


def listed(title: str, items: Iterable[str]) -> Iterator[str]:
    remaining = iter(items)
    if shown := list(islice(remaining, SHOWN)):
        yield f"\n{title}:"
        yield from (f"  {item}" for item in shown)
        if more := sum(1 for _ in remaining):
            yield f"  and {more} more"


def stories(told: Iterable[Story]) -> str:
    """The table of what was done on each engine, from creating a database to restoring a backup of it."""
    by_engine: dict[str, list[Story]] = defaultdict(list)
    for story in told:
        by_engine[story.engine].append(story)

    def line(engine: str, of_it: list[Story]) -> list[str]:
        counts = (sum(step in story.done for story in of_it) for step in STEPS)
        return [Database.Engine(engine).label, *(f"{count} of {len(of_it)}" for count in counts)]

    return table(["engine", *STEPS], [line(*each) for each in by_engine.items()])


def disasters(stage: Stage) -> str:
    """The table of disasters; the times out of work count from the strike, however long it lasted."""
    return table(
        ["disaster", "struck at", "lasted", "rows hit", "back in work"],
        [
            [
                strike.name,
                f"{stage.seconds(strike.at):.1f} s",
                lasted(strike),
                str(len(strike.hit)),
                out_of_work(strike),
            ]
            for strike in stage.strikes
        ],
    )


def lasted(strike: Strike) -> str:
    if strike.over is None:
        return "to the end"
    return f"{strike.over - strike.at:.0f} s" if strike.over - strike.at >= 1 else "-"


def out_of_work(strike: Strike) -> str:
    if not strike.hit:
        return "-"
    return "never" if strike.out_of_work_for is None else f"after {strike.out_of_work_for:.1f} s"
