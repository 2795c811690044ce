"""What every test starts from: a Redis of its own test process, empty."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import hypothesis
import psycopg
import pytest
from django.test import TransactionTestCase
from psycopg import sql
from redis import Redis

from config.servers import PostgresServer, RedisServer, postgres_binary
from tests import pristine


def pytest_configure(config: pytest.Config) -> None:
    hypothesis.settings.register_profile("short", max_examples=50)
    hypothesis.settings.register_profile("long", max_examples=300)
    hypothesis.settings.load_profile("long" if config.option.long else "short")


@pytest.fixture(scope="session", autouse=True)
def django_db_setup(django_db_setup: None, django_db_blocker: Any) -> Iterator[None]:
    """The database of this test process, as it is after each test."""
    with django_db_blocker.unblock():
        teardown = pristine.replace_flush(pristine.keep())
    with mock.patch.object(TransactionTestCase, "_fixture_teardown", teardown):
        yield


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A real server, one for each test process. Whoever stops or freezes it starts it again."""
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(autouse=True)
def _empty_redis(request: pytest.FixtureRequest, settings) -> Iterator[None]:
    """Point RQ_QUEUES at the empty server of this test process; the recovery tests start servers of their own."""
    if "recovery" in Path(str(request.node.fspath)).parts:
        yield
        return
    server = request.getfixturevalue("redis_server")
    server.thaw()
    server.start()
    settings.RQ_QUEUES = {name: {**queue, "URL": server.url} for name, queue in settings.RQ_QUEUES.items()}
    server.flush()
    yield


@pytest.fixture
def redis(redis_server: RedisServer) -> Iterator[Redis]:
    """A plain client, to look at what is really there."""
    with Redis.from_url(redis_server.url) as client:
        yield client


@pytest.fixture(scope="session")
def postgres_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    """The server of which databases are asked for, one for each test process that needs it."""
    with PostgresServer(tmp_path_factory.mktemp("postgres")) as server:
        yield server


@pytest.fixture
def postgres(postgres_server: PostgresServer, settings) -> Iterator[psycopg.Connection]:
    """A superuser's session on that server, to look at what is really there. The server is empty again afterwards."""
    settings.DATABASES_POSTGRES_URL = postgres_server.url
    settings.DATABASES_POSTGRES_BIN = str(postgres_binary("pg_dump").parent)
    with psycopg.connect(postgres_server.url, autocommit=True) as session:
        yield session
        for (name,) in session.execute("SELECT datname FROM pg_database WHERE oid >= 16384").fetchall():
            session.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))
        for (name,) in session.execute("SELECT rolname FROM pg_roles WHERE oid >= 16384").fetchall():
            session.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(name)))


@pytest.fixture
def backups_folder(tmp_path: Path, settings) -> Path:
    """Where this test alone keeps its backups."""
    folder = tmp_path / "backups"
    storage = {**settings.STORAGES["backups"], "OPTIONS": {"location": folder}}
    settings.STORAGES = {**settings.STORAGES, "backups": storage}
    return folder
