"""The end: every figure, and the evidence of whatever must not be."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from django.db.models import Count

from demo.ledger import Clash, Ending, Interval, Process, clashes, intervals, lost, unrecorded
from demo.report import listed
from demo.rows import MODELS
from demo.screen import table
from jobs.conf import conf
from jobs.models import Run
from soak import audit
from soak.stage import SPARED, Stage
from soak.user import Request, undisturbed, wanted

Keys = Mapping[str, tuple[int, int, int]]
"""Each group of keys in Redis: how many they are, their entries, and how many of them never expire."""

FLAT = 10.0
"""Megabytes by which a process may be larger at the end than in the beginning."""
ENOUGH = 24
"""So many measurements are two minutes; before, its start would count as growth."""
MANY = 100
"""More keys or entries than this that never expire, when all is done, are more than what a deployment needs."""


@dataclass(frozen=True)
class Verdict:
    """What was found. It is a proof when nothing is in it but `endings`."""

    endings: Mapping[str, Ending] = field(default_factory=dict)
    lost: Mapping[str, str] = field(default_factory=dict)
    at_once: Sequence[Clash] = ()
    bad_writes: Sequence[str] = ()
    unrecorded: Sequence[str] = ()
    quarantined: Sequence[str] = ()
    failed: Sequence[str] = ()
    unasked: Sequence[str] = ()
    grown: Sequence[str] = ()
    never_struck: Sequence[str] = ()

    @classmethod
    def on(
        cls,
        stage: Stage,
        endings: Mapping[str, Ending],
        attempts: Sequence[Interval],
        writes: Sequence[audit.Write],
        keys: Keys,
    ) -> Verdict:
        given_up = {write.name for write in writes if write.new == "deleting"}
        expected = wanted(stage.user.requests, given_up, endings)
        return cls(
            endings=endings,
            lost=lost(expected, endings),
            # The watchdog leaves so much of a lease that it ends a process before anybody else may take the row.
            at_once=at_once(attempts, stage.frozen_for, conf.lease_margin.total_seconds() / 2),
            bad_writes=list(audit.bad(writes)),
            unrecorded=sorted(unrecorded(expected, attempts)),
            quarantined=sorted(stage.observer.quarantined),
            failed=[
                f"{each.began - stage.began:.1f} s: to {each.verb} {each.name}: {each.error}"
                for each in failed(undisturbed(stage.user.requests, stage.troubles))
            ],
            unasked=stage.unasked,
            grown=[*grown(stage.observer.memory, SPARED), *piled_up(keys)],
        )

    @property
    def is_proof(self) -> bool:
        return not any(self._wrong().values())

    @property
    def summary(self) -> str:
        states = [ending.state for ending in self.endings.values()]
        return (
            f"{len(states)} rows, ready {states.count('ready')}, deleted {states.count('deleted')}; "
            f"lost {len(self.lost)}, at once {len(self.at_once)}, bad writes {len(self.bad_writes)}, "
            f"quarantined {len(self.quarantined)}."
        )

    def evidence(self) -> Iterator[str]:
        for title, found in self._wrong().items():
            yield from listed(title, found)

    def _wrong(self) -> dict[str, Sequence[str]]:
        return {
            "Lost": [f"{row} {reason}" for row, reason in self.lost.items()],
            "Worked by two at once": [str(clash) for clash in self.at_once],
            "Bad writes": self.bad_writes,
            "Finished, and the ledger knows nothing of it": self.unrecorded,
            "Quarantined, though none of them is at fault": self.quarantined,
            "Requests that failed while the database was there": self.failed,
            "Commands that ended by themselves": self.unasked,
            "Grown": self.grown,
            "Disasters that never struck": self.never_struck,
        }


def attempts(stage: Stage) -> list[Interval]:
    """Return who worked on which row and when, by the ledger."""
    return intervals(stage.watch.events, stage.watch.deaths)


def figures(stage: Stage, kinds: Sequence[str], attempts: Sequence[Interval], keys: Keys) -> Iterator[str]:
    """Yield everything that was measured, line by line."""
    observer, requests = stage.observer, stage.user.requests
    yield f"\n{disasters_table(kinds, stage.struck)}"
    yield f"\n{memory_table(observer.memory, SPARED)}"
    yield f"\n{keys_table(keys)}"
    yield f"\n{heals(observer.heals.spans)}"
    killed = sum(attempt.closed_by == "death" for attempt in attempts)
    yield (
        f"The workers made {len(attempts)} attempts; a death cut off {killed} of them. "
        f"{len(stage.frozen_for)} children were frozen."
    )
    outcomes = Run.objects.filter(job__in=MODELS).values_list("outcome").annotate(Count("pk")).order_by("outcome")
    history = ", ".join(f"{outcome} {count}" for outcome, count in outcomes)
    yield f"The library's own history of them: {history or 'nothing'}."
    calm = undisturbed(requests, stage.troubles)
    yield (
        f"Of {len(requests)} requests {len(failed(requests))} failed; of the {len(calm)} while the database was there, "
        f"{len(failed(calm))}."
    )
    if worst := max(calm, key=lambda each: each.took, default=None):
        yield (
            f"The slowest of these took {worst.took:.2f} s, to {worst.verb} {worst.name} "
            f"at {worst.began - stage.began:.1f} s."
        )
    yield (
        f"PostgreSQL had {observer.sessions.most} sessions at most and {observer.sessions.last} at the end; "
        f"Redis {observer.clients.most} clients at most and {observer.clients.last} at the end."
    )


def failed(requests: Iterable[Request]) -> list[Request]:
    return [each for each in requests if each.error]


def at_once(attempts: Sequence[Interval], frozen_for: Mapping[Process, float], margin: float) -> list[Clash]:
    """Return who worked on a row together, but for processes that were frozen for longer than the margin.

    Those may finish the instruction that they are in; whether they wrote, the audit tells.
    """
    return clashes(each for each in attempts if frozen_for.get(each.process, 0.0) <= margin)


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value that this share of them does not exceed; 0 when there are none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else 0.0


def thirds(values: Sequence[float]) -> tuple[float, float]:
    """Return the medians of the first and of the last third, without the first value: the process was just starting."""
    settled = list(values[1:]) or list(values)
    size = max(1, len(settled) // 3)
    return median(settled[:size]), median(settled[-size:])


def grown(memory: Mapping[str, Sequence[float]], spared: Sequence[str]) -> Iterator[str]:
    """Yield a sentence for each process that was spared and has grown, as far as there are measurements enough."""
    for name in spared:
        if not memory.get(name):
            yield f"{name} was never measured"
            continue
        first, last = thirds(memory[name])
        if len(memory[name]) >= ENOUGH and last - first > FLAT:
            yield f"{name} from {first:.1f} to {last:.1f} MB"


def piled_up(keys: Keys) -> Iterator[str]:
    """Yield a sentence for each group of keys that never expire and have become many."""
    for group, (count, entries, lasting) in keys.items():
        if lasting and (count > MANY or entries > MANY):
            yield f"{group} in Redis: {count} keys with {entries} entries, {lasting} of which never expire"


def heals(spans: Sequence[float]) -> str:
    return (
        f"Out of work and found again: {len(spans)} times; median {percentile(spans, 0.5):.1f} s, "
        f"p99 {percentile(spans, 0.99):.1f} s, worst {max(spans, default=0.0):.1f} s."
    )


def memory_table(memory: Mapping[str, Sequence[float]], spared: Sequence[str]) -> str:
    return table(
        ["process", "measured", "first third", "last third", "most"],
        [
            [
                f"{name} (never killed)" if name in spared else name,
                str(len(values)),
                *(f"{value:.1f} MB" for value in (*thirds(values), max(values))),
            ]
            for name, values in sorted(memory.items())
            if values
        ],
    )


def keys_table(keys: Keys) -> str:
    return table(
        ["keys in Redis at the end", "keys", "entries", "never expire"],
        [[group, *map(str, counts)] for group, counts in keys.items()],
    )


def disasters_table(kinds: Sequence[str], struck: Mapping[str, int]) -> str:
    return table(["disaster", "struck"], [[name, str(struck.get(name, 0))] for name in kinds])
