"""The real engines, slowed down to something worth killing, with a ledger of who worked on which row and when."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import psutil

from databases.provisioners import Contents, Provisioned, Provisioner
from databases.provisioners.postgresql import PostgreSQLProvisioner
from databases.provisioners.sqlite import SQLiteProvisioner
from demo.ledger import Event

SECONDS = (0.5, 2.0)
"""How long the work on one row takes, at least and at most."""


class Ledger:
    """Has an engine do what it does in its own time, and writes each start and end to the file `SELFHEAL_LEDGER`.

    What is written is the row that the job behind it has claimed: a database by its name, a deploy by its marker, a
    backup by the name of its file.
    """

    def __init__(self, engine: Provisioner) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def create(self, name: str, password: str = "") -> Provisioned:
        with at_work("create", name):
            return self._engine.create(name, password)

    def copy(self, source: str, name: str, password: str = "", end_sessions: bool = False) -> Provisioned:
        with at_work("copy", name):
            return self._engine.copy(source, name, password, end_sessions)

    def delete(self, name: str) -> None:
        with at_work("delete", name):
            self._engine.delete(name)

    def deploy(self, name: str, password: str, marker: str, sql: str, timeout: timedelta) -> str:
        # That of the trial on the branch has a word more.
        with at_work("deploy", marker.partition(" ")[0]):
            return self._engine.deploy(name, password, marker, sql, timeout)

    def dump(self, name: str, to: Path) -> Contents:
        with at_work("dump", to.parent.name):
            return self._engine.dump(name, to)

    def load(self, name: str, dump: Path, password: str = "") -> Contents:
        with at_work("load", name):
            return self._engine.load(name, dump, password)


def sqlite() -> Ledger:
    return Ledger(SQLiteProvisioner())


def postgresql() -> Ledger:
    return Ledger(PostgreSQLProvisioner())


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
