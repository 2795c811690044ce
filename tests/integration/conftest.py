"""What the tests of the library share: jobs declared for one test, real races, and a Redis that misbehaves."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from django.db import connection, connections
from django.utils import timezone
from redis import Redis
from redis.connection import Connection
from rq.utils import now
from waffle import get_waffle_switch_model

from config.servers import RedisServer
from jobs import enqueue, queues, registry
from jobs.models import Schedule
from jobs.scheduler import Scheduler
from jobs.worker import Worker
from tests.cast.models import Task
from tests.engines import ON_ITS_OWN, Engine, PostgreSQL, SQLite

QUEUES = ["urgent", "default", "background"]
DEFAULT_LIST = "rq:queue:default"
BACKGROUND_LIST = "rq:queue:background"
URGENT_LIST = "rq:queue:urgent"


@pytest.fixture
def declaring() -> Iterator[None]:
    """Forget after the test what it declares."""
    with registry.sandbox():
        yield


@pytest.fixture
def nothing_else(declaring: None) -> None:
    """As if the project declared nothing but what the test does."""
    registry._declared.clear()


@pytest.fixture
def queued(redis: Redis) -> Callable[..., list[str]]:
    """What is in a queue's list, oldest first."""
    return lambda key=DEFAULT_LIST: [id.decode() for id in redis.lrange(key, 0, -1)]


@pytest.fixture
def delayed(redis: Redis) -> Callable[[], dict[str, float]]:
    """What is in the delayed set, each with its time."""
    return lambda: {id.decode(): score for id, score in redis.zrange(queues.DELAYED_KEY, 0, -1, withscores=True)}


@pytest.fixture
def worker(redis_server: RedisServer) -> Iterator[Worker]:
    """A worker of every queue, as Redis knows it."""
    with Redis.from_url(redis_server.url) as own:
        worker = Worker(QUEUES, connection=own)
        worker.birth_date = now()
        worker._announce("idle")
        yield worker


@pytest.fixture
def at_work(worker: Worker, db: None) -> Worker:
    """Somebody ticks, a worker waits, and every sweep has succeeded lately."""
    Scheduler(connection=worker.connection).enqueue_jobs()
    Schedule.objects.update(last_succeeded_at=timezone.now())
    return worker


@pytest.fixture
def task(db: None) -> Task:
    return Task.objects.create()


@pytest.fixture
def switch(db: None) -> Callable[..., None]:
    """Turn the switch of a job or sweep, as an operator does on another machine: this process is not told."""

    def switch(name: str, on: bool = True) -> None:
        Switch = get_waffle_switch_model()
        if not Switch.objects.filter(name=f"disable_{name}").update(active=on):
            Switch.objects.bulk_create([Switch(name=f"disable_{name}", active=on)])

    return switch


@pytest.fixture
def race() -> Callable[..., list[Any]]:
    """Call functions at the same moment, each in a thread with a database connection of its own; return the results."""

    def race(*functions: Callable[[], Any]) -> list[Any]:
        start = threading.Barrier(len(functions), timeout=20)

        def run(function: Callable[[], Any]) -> Any:
            try:
                connection.ensure_connection()
                start.wait()
                return function()
            finally:
                connections.close_all()

        with ThreadPoolExecutor(len(functions)) as threads:
            return [future.result(30) for future in [threads.submit(run, function) for function in functions]]

    return race


@pytest.fixture
def round_trips(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """Count how often something is sent to Redis, once the connection is there."""

    @contextmanager
    def counting() -> Iterator[list[bytes]]:
        queues.get("default").connection.ping()
        sent: list[bytes] = []
        send = Connection.send_packed_command

        def send_and_count(self: Connection, command: Any, check_health: bool = True) -> None:
            sent.append(command if isinstance(command, bytes) else b"".join(command))
            send(self, command, check_health=check_health)

        with monkeypatch.context() as patch:
            patch.setattr(Connection, "send_packed_command", send_and_count)
            yield sent

    return counting


@pytest.fixture
def hanging_redis(redis_server: RedisServer) -> Iterator[None]:
    """A Redis that accepts connections and never answers."""
    enqueue._Hint._hanging_until.clear()
    redis_server.freeze()
    yield
    redis_server.thaw()
    enqueue._Hint._hanging_until.clear()


@pytest.fixture
def refusing_redis(redis_server: RedisServer) -> Iterator[None]:
    """No Redis at all: connections are refused."""
    redis_server.kill()
    yield
    redis_server.start()


@pytest.fixture(params=ON_ITS_OWN)
def engine(request: pytest.FixtureRequest, tmp_path: Path, settings) -> Engine:
    """An engine with nothing in it yet."""
    settings.DATABASES_FOLDER = tmp_path / "databases"
    if request.param == "sqlite":
        return Engine(SQLite(settings.DATABASES_FOLDER))
    return Engine(PostgreSQL(request.getfixturevalue("postgres")))
