"""The database of this test process as `migrate` has left it, put back after each test that commits something.

Django's own way is to empty every table and have every app make its rows again. That takes longer than most tests.
"""

import atexit
import sqlite3
from collections.abc import Callable

from django.db import connections
from django.test import TransactionTestCase


def keep(alias: str = "default") -> Callable[[], None]:
    """Remember the database as it is now. Returns what puts it back."""
    connection = connections[alias]
    connection.ensure_connection()
    return _kept_sqlite(alias) if connection.vendor == "sqlite" else _kept_postgres(alias)


def replace_flush(restore: Callable[[], None]) -> Callable[[TransactionTestCase], None]:
    """Return what stands in for the end of Django's test case; what else there is than the default is emptied by it."""
    original = TransactionTestCase._fixture_teardown

    def teardown(case: TransactionTestCase) -> None:
        restore()
        if others := set(case._databases_names(include_mirrors=False)) - {"default"}:
            case.databases = others
            original(case)

    return teardown


# The connection is asked for each time: where asyncio has a loop in this thread, as for a browser, Django has another.


def _kept_sqlite(alias: str) -> Callable[[], None]:
    kept = sqlite3.connect(":memory:", check_same_thread=False)
    atexit.register(kept.close)
    connections[alias].connection.backup(kept)

    def restore() -> None:
        connection = connections[alias]
        if connection.connection is not None and connection.connection.in_transaction:
            connection.close()
        connection.ensure_connection()
        kept.backup(connection.connection)

    return restore


def _kept_postgres(alias: str) -> Callable[[], None]:
    connection = connections[alias]
    names = sorted(connection.introspection.table_names())
    # Foreign keys are looked at when the transaction commits, so the order is all the same.
    put_back = []
    with connection.cursor() as cursor:
        cursor.execute("CREATE SCHEMA pristine")
        for name in names:
            cursor.execute(f"SELECT EXISTS (SELECT FROM {name})")
            if cursor.fetchone()[0]:
                cursor.execute(f"CREATE TABLE pristine.{name} AS TABLE {name}")
                put_back.append(f"INSERT INTO {name} TABLE pristine.{name};")
                # A test may have begun its numbers anew.
                for each in connection.introspection.get_sequences(cursor, name):
                    most = f"(SELECT max({each['column']}) FROM {name}), (SELECT last_value FROM {each['name']})"
                    put_back.append(f"PERFORM setval('{each['name']}', GREATEST({most}));")
    statement = f"""
        DO $$
        DECLARE
            filled text;
        BEGIN
            SET LOCAL lock_timeout = '30s';
            -- Those of processes that were killed: what they had begun would hold locks for a moment yet.
            PERFORM pg_terminate_backend(pid) FROM pg_stat_activity
            WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend';
            SELECT string_agg(name, ', ') INTO filled
            FROM unnest(ARRAY[{", ".join(f"'{name}'" for name in names)}]) AS name WHERE pg_relation_size(name) > 0;
            EXECUTE 'TRUNCATE ' || filled || ' CASCADE';
            {" ".join(put_back)}
        END $$
    """

    def restore() -> None:
        connection = connections[alias]
        raw = connection.connection
        # Left in a transaction, it would keep this one open, or its locks. And another may have ended its session.
        if raw is not None and (not raw.autocommit or raw.info.transaction_status or not connection.is_usable()):
            connection.close()
        with connection.cursor() as cursor:
            cursor.execute(statement)

    return restore
