"""The connections to databases of a process that works: what they wait for, and that a job's doings stay its own.

Whatever a job leaves on a connection (a transaction, a role, a search path, a session that the server has ended), how
its attempt ended is written on another.
"""

from __future__ import annotations

import contextlib
from typing import Any

from django.apps import apps
from django.db import Error as DatabaseError
from django.db import InterfaceError, InternalError, OperationalError, connections, router
from django.db.backends.signals import connection_created

from jobs.conf import conf

# What a driver raises when its database is away. It raises them for a full disk, a deadlock and a missing column too.
MAY_BE_AWAY = (OperationalError, InterfaceError, InternalError)


def limit_waiting() -> None:
    """Let no statement of this process wait for a lock for longer than a third of `HEARTBEAT`."""
    connection_created.connect(_limit, dispatch_uid="selfheal")


def _limit(connection: Any, **kwargs: Any) -> None:
    seconds = conf.HEARTBEAT.total_seconds() / 3
    if connection.vendor == "postgresql":
        statement = "SELECT set_config(name, %s, false) FROM pg_settings WHERE name = ANY(%s)"
        value = f"{max(1, round(seconds * 1000))}ms"
        # The other is of PostgreSQL 14: a statement that waits ends with its client, and is not executed after it. A
        # platform that cannot notice a client's end refuses both in one.
        for names in (["lock_timeout", "client_connection_check_interval"], ["lock_timeout"]):
            if _set(connection, statement, [value, names]):
                break
    elif connection.vendor == "mysql":
        _set(connection, "SET SESSION innodb_lock_wait_timeout = %s + 0", [str(max(1, round(seconds)))])


def _set(connection: Any, statement: str, values: list[Any]) -> bool:
    """Return whether the database has taken it."""
    with contextlib.suppress(DatabaseError), connection.cursor() as cursor:
        cursor.execute(statement, values)
        return True
    return False


def depths() -> dict[str, int]:
    """Return how many transactions and savepoints are open on each connection of this thread, one in another."""
    return {each.alias: depth(each) for each in connections.all(initialized_only=True)}


def depth(connection: Any) -> int:
    """Return the same of one connection, that of a `BEGIN` or of autocommit turned off included."""
    if connection.in_atomic_block:
        return 1 + len(connection.savepoint_ids)
    raw = connection.connection
    if raw is None:
        return 0
    status = getattr(getattr(raw, "info", None), "transaction_status", getattr(raw, "in_transaction", 0))
    # Of PostgreSQL: active, in a transaction, or in a failed one. A session that the server has ended is in none.
    return int(status in (1, 2, 3) or not connection.get_autocommit())


def begin_anew() -> None:
    """Forget every connection of this thread, and whatever was done to it. The next statement connects again."""
    for each in connections.all(initialized_only=True):
        # The driver's own first: one that goes back to a pool would be used again as it is.
        for close in (getattr(each.connection, "close", None), each.close, getattr(each, "close_pool", None)):
            if close is not None:
                with contextlib.suppress(Exception):
                    close()
        del connections[each.alias]


def disconnect() -> None:
    """Close every connection, those in Django's pools too: one that two processes share breaks in both.

    Or worse: what one of them has begun, the other commits.
    """
    connections.close_all()
    for connection in connections.all(initialized_only=True):
        if close_pool := getattr(connection, "close_pool", None):
            close_pool()


def answers() -> bool:
    """Whether the database of the claims can be written to: asked, and not guessed from the class of an error."""
    claims = apps.get_model("selfheal", "Claim")
    connection = connections[router.db_for_write(claims)]
    table, column = (connection.ops.quote_name(name) for name in (claims._meta.db_table, "token"))
    try:
        connection.close()
        with connection.cursor() as cursor:
            cursor.execute(f"UPDATE {table} SET {column} = {column} WHERE 1 = 0")
    except MAY_BE_AWAY:
        return False
    return True
