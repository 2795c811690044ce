"""What every test starts from: a Redis of its own test process, empty."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from redis import Redis

from config.servers import RedisServer


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
