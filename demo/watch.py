"""Follow the ledger while it is being written, and note when the processes in it die."""

from __future__ import annotations

import time
from pathlib import Path

import psutil

from demo.ledger import Event, Process, open_starts, parse


class Watch:
    """The ledger so far and the deaths seen so far. Call `look()` some twenty times a second.

    A process counts as dead from the last moment it was seen alive, which is at most one look too early. Whoever kills
    one says so with `died()`, which is exact.
    """

    def __init__(self, ledger: Path) -> None:
        self.events: list[Event] = []
        self.deaths: dict[Process, float] = {}
        self._ledger = ledger
        self._read_to = 0
        self._seen_alive: dict[Process, float] = {}

    def look(self) -> None:
        self._read_on()
        for process, start in self.working().items():
            now = time.clock_gettime(time.CLOCK_MONOTONIC)
            if is_alive(process):
                self._seen_alive[process] = now
            else:
                # It may have written its end since the ledger was read, just before it died.
                self._read_on()
                if process in open_starts(self.events):
                    self.died(process, at=self._seen_alive.get(process, start.at))

    def died(self, process: Process, at: float) -> None:
        self.deaths.setdefault(process, at)

    def working(self) -> dict[Process, Event]:
        """What each living process is at."""
        return {process: start for process, start in open_starts(self.events).items() if process not in self.deaths}

    def _read_on(self) -> None:
        if not self._ledger.exists():
            return
        with self._ledger.open("rb") as ledger:
            ledger.seek(self._read_to)
            text = ledger.read()
        self._read_to += text.rfind(b"\n") + 1
        self.events += parse(text)


def is_alive(process: Process) -> bool:
    """Whether this very process still runs; a zombie does not, and neither does its successor of the same pid."""
    try:
        found = psutil.Process(process.pid)
        # The two readings of the birth may differ by a rounding, or by an adjusted clock.
        return bool(found.status() != psutil.STATUS_ZOMBIE and abs(found.create_time() - process.born) < 2)
    except psutil.NoSuchProcess:
        return False
