"""The servers of the soak, empty, and the networks between them and whoever uses them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import psycopg

from config.servers import PostgresServer, RedisServer
from soak.proxy import Proxy


class Servers(NamedTuple):
    """Both servers, and a proxy in front of each."""

    redis: RedisServer
    postgres: PostgresServer
    redis_network: Proxy
    postgres_network: Proxy

    @property
    def redis_url(self) -> str:
        """The way to Redis through its network."""
        return self.redis.url.replace(f":{self.redis.port}/", f":{self.redis_network.port}/")

    @property
    def database_url(self) -> str:
        """The way to PostgreSQL through its network."""
        return self.postgres.url.replace(f":{self.postgres.port}/", f":{self.postgres_network.port}/")


@contextmanager
def started(home: Path) -> Iterator[Servers]:
    """Start everything with nothing in it, whatever an earlier run has left in the folder."""
    with RedisServer(home / "redis") as redis, PostgresServer(home / "postgres") as postgres:
        redis.flush()
        (redis.folder / "dump.rdb").unlink(missing_ok=True)
        with psycopg.connect(postgres.url, autocommit=True) as connection:
            connection.execute("DROP SCHEMA public CASCADE")
            connection.execute("CREATE SCHEMA public")
        with Proxy(redis.port) as redis_network, Proxy(postgres.port) as postgres_network:
            yield Servers(redis, postgres, redis_network, postgres_network)
