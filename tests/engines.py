"""The engines that make databases, seen from outside: what there is of each, and what their users do with it."""

import sqlite3
from contextlib import closing
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from databases.provisioners import Provisioner, get_provisioner

# What an engine does says nothing about the database in which the rows are: each has its turn on that of its own kind.
ON_ITS_OWN = [pytest.param("sqlite", marks=pytest.mark.sqlite), pytest.param("postgresql", marks=pytest.mark.postgres)]

ORDERS = """
    CREATE TABLE orders (id integer PRIMARY KEY, item text NOT NULL, price real, photo {blob});
    INSERT INTO orders VALUES (1, 'a teapot; blue', 1.5, NULL), (2, 'ein Löffel', NULL, {bytes}), (3, '', -0.0, NULL);
    CREATE TABLE untouched (id integer);
    CREATE VIEW teapots AS SELECT item FROM orders WHERE item LIKE '%teapot%';
    CREATE INDEX by_item ON orders (item);
"""


@dataclass
class SQLite:
    """The files in one folder."""

    folder: Path
    name = "sqlite"
    orders = ORDERS.format(blob="blob", bytes="x'00ff'")

    def everything(self) -> set[str]:
        return {path.name for path in self.folder.iterdir()} if self.folder.exists() else set()

    def user(self, name: str) -> Any:
        return closing(sqlite3.connect(self.folder / f"{name}.sqlite3", isolation_level=None))


@dataclass
class PostgreSQL:
    """What is on one server beside what it came with."""

    session: psycopg.Connection
    name = "postgresql"
    orders = ORDERS.format(blob="bytea", bytes="'\\x00ff'")

    def everything(self) -> set[str]:
        databases = self.session.execute("SELECT 'database ' || datname FROM pg_database WHERE oid >= 16384").fetchall()
        roles = self.session.execute("SELECT 'role ' || rolname FROM pg_roles WHERE oid >= 16384").fetchall()
        return {name for (name,) in [*databases, *roles]}

    def user(self, name: str, database: str = "") -> Any:
        port = self.session.info.port
        conninfo = make_conninfo(
            host="127.0.0.1", port=port, dbname=database or name, user=name, password=password_of(name)
        )
        return psycopg.connect(conninfo, autocommit=True)


@dataclass
class Engine:
    """An engine, and those who use what it makes. The password of `shop` is `shop's`."""

    kind: SQLite | PostgreSQL

    @property
    def name(self) -> str:
        return self.kind.name

    @property
    def provisioner(self) -> Provisioner:
        return get_provisioner(self.name)

    def everything(self) -> set[str]:
        """The names of all that there is, also of what should not be there."""
        return self.kind.everything()

    def user(self, name: str) -> Any:
        """A session of the user to whom the database belongs; each statement is committed."""
        return self.kind.user(name)

    def ask(self, name: str, statement: str) -> list[tuple]:
        with self.user(name) as session:
            return session.execute(statement).fetchall()

    def do(self, name: str, statement: str) -> None:
        with self.user(name) as session:
            session.execute(statement)

    def create(self, name: str) -> None:
        self.provisioner.create(name, password_of(name))

    def copy(self, source: str, name: str, end_sessions: bool = False) -> None:
        self.provisioner.copy(source, name, password_of(name), end_sessions)

    def deploy(self, name: str, sql: str, marker: str = "a marker", seconds: float = 60) -> str:
        return self.provisioner.deploy(name, password_of(name), marker, sql, timedelta(seconds=seconds))

    def fill(self, name: str) -> None:
        """Make one with something in it."""
        self.create(name)
        self.deploy(name, self.kind.orders, "filled")

    def has(self, name: str, table: str) -> bool:
        where = "sqlite_master WHERE name" if self.name == "sqlite" else "pg_tables WHERE tablename"
        return self.ask(name, f"SELECT count(*) FROM {where} = '{table}'") == [(1,)]


def password_of(name: str) -> str:
    return f"{name}'s"
