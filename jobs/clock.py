"""The one source of time for everything that the protocol decides."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime, timedelta
from typing import Any

from django.apps import apps
from django.db import connections, router
from django.db.models.functions import Now
from django.utils import timezone

_fixed: ContextVar[datetime | None] = ContextVar("selfheal_fixed_time", default=None)


def _database() -> Any:
    return connections[router.db_for_write(apps.get_model("selfheal", "Claim"))]


def now(plus: timedelta = timedelta(0)) -> Any:
    """The present, `plus` a duration, as a value for a query.

    It is the clock of the database that holds the claims, so hosts whose clocks differ agree on what has expired.
    SQLite has no clock of its own: there it is that of this host, which is the only one that can open the file.
    """
    if fixed := _fixed.get():
        return fixed + plus
    if _database().vendor == "postgresql":
        return Now() + plus if plus else Now()
    return timezone.now() + plus


def read() -> datetime:
    """The same present as a datetime. On PostgreSQL this asks the database."""
    if fixed := _fixed.get():
        return fixed
    connection = _database()
    if connection.vendor != "postgresql":
        return timezone.now()
    with connection.cursor() as cursor:
        cursor.execute("SELECT STATEMENT_TIMESTAMP()")
        moment: datetime = cursor.fetchone()[0]
    return moment


def timestamp() -> float:
    """The same present in seconds since 1970, by this host's clock: good enough for the delayed set."""
    fixed = _fixed.get()
    return fixed.timestamp() if fixed else time.time()


@contextmanager
def fixed(at: datetime | None) -> Iterator[None]:
    """Hold the clock still at the given moment. For tests; `None` leaves it running."""
    token = _fixed.set(at)
    try:
        yield
    finally:
        _fixed.reset(token)
