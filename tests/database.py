"""The database of this test process, SQLite or PostgreSQL, seen from outside: its URL, locked, taken away."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

from django.db import connection
from django.db.models import QuerySet


def url(**changes: Any) -> str:
    """Return the URL by which another process finds it."""
    settings = {**connection.settings_dict, **changes}
    if connection.vendor == "sqlite":
        return f"sqlite:///{settings['NAME']}"
    return "postgres://{USER}:{PASSWORD}@{HOST}:{PORT}/{NAME}".format(**settings)


@contextmanager
def locked() -> Iterator[None]:
    """Keep everybody from writing, as a transaction of somebody who has forgotten about it would."""
    if connection.vendor == "sqlite":
        with closing(sqlite3.connect(connection.settings_dict["NAME"], isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            yield
            other.execute("ROLLBACK")
        return
    import psycopg

    tables = ", ".join(connection.introspection.table_names())
    with psycopg.connect(url()) as other:
        other.execute(f"LOCK TABLE {tables} IN EXCLUSIVE MODE")
        yield
        other.rollback()


@contextmanager
def locking(rows: QuerySet[Any]) -> Iterator[None]:
    """Keep these rows locked on PostgreSQL, as a transaction of somebody who has forgotten about it would."""
    import psycopg

    statement, parameters = rows.values("pk").query.sql_with_params()
    with psycopg.connect(url()) as other:
        other.execute(f"{statement} FOR UPDATE", parameters)
        yield
        other.rollback()


@contextmanager
def closed() -> Iterator[None]:
    """End the sessions of everybody else on PostgreSQL, and let nobody begin one. That of the test goes on."""
    import psycopg

    connection.ensure_connection()
    name, own = connection.settings_dict["NAME"], connection.connection.info.backend_pid
    with psycopg.connect(url(NAME="postgres"), autocommit=True) as other:
        other.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS false')
        try:
            ending = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s AND pid <> %s"
            other.execute(ending, [name, own])
            yield
        finally:
            other.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS true')


@contextmanager
def read_only() -> Iterator[None]:
    """Have new sessions on PostgreSQL write nothing, as on a primary that another has taken the place of."""
    name = connection.settings_dict["NAME"]
    with connection.cursor() as cursor:
        cursor.execute(f'ALTER DATABASE "{name}" SET default_transaction_read_only = on')
        try:
            yield
        finally:
            cursor.execute(f'ALTER DATABASE "{name}" RESET default_transaction_read_only')
