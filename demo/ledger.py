"""Judge, from outside the library, who worked on which row and when.

The provisioner appends one line as it starts on a row and one as it ends. A start without an end closes when its
process was last seen alive, so an overlap is only reported when it is certain. Pure: lines in, verdict out.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import combinations
from math import inf
from typing import Literal, NamedTuple


class Process(NamedTuple):
    """One process of one boot. `born` tells it from a later one to which the system gave the same pid."""

    pid: int
    born: float


@dataclass(frozen=True)
class Event:
    """One line of the ledger."""

    kind: Literal["start", "end"]
    verb: str
    row: str
    pid: int
    born: float
    at: float
    """Seconds on the system-wide monotonic clock, which all processes of one boot share."""
    wall: float

    @property
    def process(self) -> Process:
        return Process(self.pid, self.born)

    def line(self) -> bytes:
        return json.dumps(asdict(self)).encode() + b"\n"


@dataclass(frozen=True)
class Interval:
    """The time one process spent on one row; `end` is infinite while it is still at it."""

    row: str
    verb: str
    process: Process
    start: float
    end: float
    closed_by: Literal["end", "death", None]

    def overlaps(self, other: Interval) -> bool:
        """Whether two processes were on the row together; touching ends are not enough."""
        return self.process != other.process and max(self.start, other.start) < min(self.end, other.end)


@dataclass(frozen=True)
class Clash:
    """Two processes on one row at once: the evidence."""

    first: Interval
    second: Interval

    def __str__(self) -> str:
        begin = self.second.start
        return (
            f"{self.first.row}: process {self.first.process.pid} ({self.first.verb}) was at it for "
            f"{begin - self.first.start:.2f} s when process {self.second.process.pid} ({self.second.verb}) started; "
            f"together for {min(self.first.end, self.second.end) - begin:.2f} s"
        )


def parse(text: bytes) -> list[Event]:
    """The events in the complete lines of `text`; what follows the last newline is still being written."""
    return [Event(**json.loads(line)) for line in text[: text.rfind(b"\n") + 1].splitlines()]


def open_starts(events: Iterable[Event]) -> dict[Process, Event]:
    """What each process is working on, as far as the ledger knows: its last start, if no end followed."""
    latest = {event.process: event for event in events}
    return {process: event for process, event in latest.items() if event.kind == "start"}


def intervals(events: Iterable[Event], deaths: Mapping[Process, float]) -> list[Interval]:
    """Pair each start with its end, or else with the death of its process.

    A second start of a process without an end in between closes the first: one process does one thing at a time.
    """
    found: list[Interval] = []
    working: dict[Process, Event] = {}

    def close(start: Event, end: float, closed_by: Literal["end", "death", None]) -> None:
        found.append(Interval(start.row, start.verb, start.process, start.at, max(start.at, end), closed_by))

    for event in sorted(events, key=lambda event: event.at):
        if start := working.pop(event.process, None):
            close(start, event.at, "end")
        if event.kind == "start":
            working[event.process] = event
    for process, start in working.items():
        close(start, deaths.get(process, inf), "death" if process in deaths else None)
    return sorted(found, key=lambda interval: interval.start)


def clashes(intervals: Iterable[Interval]) -> list[Clash]:
    """Every pair of intervals in which two processes worked on the same row at the same time."""
    by_row = defaultdict(list)
    for interval in sorted(intervals, key=lambda interval: interval.start):
        by_row[interval.row].append(interval)
    return [
        Clash(first, second)
        for of_one_row in by_row.values()
        for first, second in combinations(of_one_row, 2)
        if first.overlaps(second)
    ]


@dataclass(frozen=True)
class Ending:
    """How one row ended: its state in the database (None: no such row) and its real file on disk."""

    state: str | None
    file: str
    """`missing`, `sound`, or what SQLite found wrong with it."""


def lost(wanted: Mapping[str, str], endings: Mapping[str, Ending]) -> dict[str, str]:
    """The rows whose user did not get what they asked for, `ready` or `deleted`, each with the reason."""
    reasons = {row: _why_lost(state, endings.get(row, Ending(None, "missing"))) for row, state in wanted.items()}
    return {row: reason for row, reason in reasons.items() if reason}


def _why_lost(wanted: str, ending: Ending) -> str | None:
    if ending.state != wanted:
        return f"should be {wanted}, " + (f"is {ending.state}" if ending.state else "but there is no such row")
    if (expected := {"ready": "sound", "deleted": "missing"}[wanted]) != ending.file:
        return f"is {wanted}, so its file should be {expected}, but is {ending.file}"
    return None


def unrecorded(wanted: Mapping[str, str], intervals: Iterable[Interval]) -> set[str]:
    """The rows of whose last step the ledger holds no complete interval: a ledger that nobody wrote proves nothing."""
    last_step = {"ready": "create", "deleted": "delete"}
    recorded = {(interval.row, interval.verb) for interval in intervals if interval.closed_by == "end"}
    return {row for row, state in wanted.items() if (row, last_step[state]) not in recorded}
