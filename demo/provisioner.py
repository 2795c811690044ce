"""The real SQLite engine, slowed down to something worth killing, with a ledger of who worked on which row and when."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import psutil

from databases.provisioners import Provisioned
from databases.provisioners.sqlite import SQLiteProvisioner
from demo.ledger import Event

SECONDS = (0.5, 2.0)
"""How long the work on one row takes, at least and at most."""


class LedgerProvisioner(SQLiteProvisioner):
    """Does what its parent does, in its own time, and writes each start and end to the file `SELFHEAL_LEDGER`."""

    def create(self, name: str) -> Provisioned:
        with at_work("create", name):
            return super().create(name)

    def delete(self, name: str) -> None:
        with at_work("delete", name):
            super().delete(name)


@contextmanager
def at_work(verb: str, row: str) -> Iterator[None]:
    """Record the work inside, and wait before and after it, so that a kill finds it undone, half done and done."""
    before, after = (random.uniform(*SECONDS) / 2 for _ in range(2))
    write("start", verb, row)
    try:
        time.sleep(before)
        yield
        time.sleep(after)
    finally:
        write("end", verb, row)


def write(kind: Literal["start", "end"], verb: str, row: str) -> None:
    """Append one event. A single write to a file opened for appending arrives whole, whoever else is writing."""
    event = Event(
        kind=kind,
        verb=verb,
        row=row,
        pid=os.getpid(),
        born=psutil.Process().create_time(),
        at=time.clock_gettime(time.CLOCK_MONOTONIC),
        wall=time.time(),
    )
    ledger = os.open(os.environ["SELFHEAL_LEDGER"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(ledger, event.line())
    finally:
        os.close(ledger)
