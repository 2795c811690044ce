"""The end of the story: what each disaster cost, what became of the rows, and the evidence if anything went wrong."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

from demo.disasters import Strike
from demo.ledger import Clash, Ending, Interval, clashes, lost, unrecorded
from demo.screen import table
from demo.stage import Stage

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

    @classmethod
    def on(cls, stage: Stage, endings: Mapping[str, Ending], attempts: list[Interval]) -> Verdict:
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
        )

    @property
    def is_proof(self) -> bool:
        return not (self.lost or self.clashes or self.unrecorded or self.missed or self.failures)

    @property
    def summary(self) -> str:
        states = [ending.state for ending in self.endings.values()]
        at_once = {clash.first.row for clash in self.clashes}
        return (
            f"Created {len(states)}, ready {states.count('ready')}, deleted {states.count('deleted')}, "
            f"lost {len(self.lost)}, worked by two at once {len(at_once)}."
        )

    def evidence(self) -> Iterator[str]:
        yield from listed("Lost", (f"{row} {reason}" for row, reason in self.lost.items()))
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
