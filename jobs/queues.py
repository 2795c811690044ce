"""The one door to Redis: the Queue class behind django-rq's settings, and the connection for pushes.

Only this module imports django_rq.
"""

from __future__ import annotations

import functools
import logging
import socket
import time
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any

from django.conf import settings
from django_rq.connection_utils import get_redis_connection
from django_rq.queues import DjangoRQ
from redis import Redis
from redis.backoff import NoBackoff
from redis.connection import Connection
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ReadOnlyError
from redis.retry import Retry
from rq import worker_registration
from rq.exceptions import NoSuchJobError
from rq.utils import parse_timeout
from rq_scheduler.scheduler import Scheduler as RQScheduler

from jobs import registry, resolver
from jobs.conf import conf
from jobs.exceptions import Misconfigured
from jobs.message import Message

logger = logging.getLogger("selfheal")

# rq-scheduler's sorted set. Here it holds what waits for its time: spread-out work and retries of plain jobs.
DELAYED_KEY: str = RQScheduler.scheduled_jobs_key
# How long a row may wait there. What is to come later than that is not ours, and counts as if it were not there: who
# can write to Redis could hide a row behind it for ever.
LONGEST_WAIT = timedelta(days=1)
# Each plain call that has not ended, with the time from which it is looked for. The list says in which order they come,
# and forgets one as soon as a worker has taken it.
CALLS_KEY = "selfheal:calls"


class Queue(DjangoRQ):
    """rq's queue, in which the id is the message. A worker on it refuses what the project did not declare."""

    # rq's base job class deletes ids that have no hash when a page merely lists them.
    job_class = Message

    @classmethod
    def dequeue_any(
        cls,
        queues: Iterable[Any],
        timeout: int | None,
        connection: Redis,
        job_class: Any = None,
        serializer: Any = None,
        death_penalty_class: Any = None,
    ) -> Any:
        """Pop the next message of the first queue that has one, and return it with its queue.

        Waits up to `timeout` seconds, then raises `DequeueTimeout`; with None it does not wait and returns None when
        all are empty. Whatever is no message of a declared job is dropped and logged, and raises `NoSuchJobError`: the
        next may be another, and who waits for messages has more to do than that.
        """
        by_key = {queue.key: queue for queue in queues}
        if (popped := cls.lpop(list(by_key), timeout, connection=connection)) is None:
            return None
        key, raw = (part.decode("utf-8", "backslashreplace") if isinstance(part, bytes) else part for part in popped)
        try:
            return Message.fetch(raw, connection=connection), by_key[key]
        except (NoSuchJobError, ValueError) as refusal:
            logger.warning("Refused %.200r from queue %s: %.400s", raw, by_key[key].name, refusal)
            # Another version of the project may know its job; what nobody can read is not looked for again.
            if registry.get(raw.partition("-")[0]) is not None:
                connection.zrem(CALLS_KEY, popped[1])
            raise NoSuchJobError(str(refusal)) from refusal


def names() -> list[str]:
    """Return the names in RQ_QUEUES."""
    return list(getattr(settings, "RQ_QUEUES", {}))


def default_timeout(name: str) -> int:
    """Return after how many seconds a job in this queue is ended, unless it says otherwise itself.

    Raises rq's `TimeoutFormatError` for a `DEFAULT_TIMEOUT` that is none.
    """
    configured = getattr(settings, "RQ_QUEUES", {}).get(name, {}).get("DEFAULT_TIMEOUT")
    return parse_timeout(configured) or Queue.DEFAULT_TIMEOUT


def get(name: str) -> Queue:
    """Return the queue, on a connection that gives up after `REDIS_TIMEOUT` and never tries twice.

    A push that is repeated after a time-out can arrive twice, and one that waits holds up a web request.
    """
    try:
        config = settings.RQ_QUEUES[name]
    except (AttributeError, KeyError):
        raise Misconfigured(f"There is no queue {name!r} in RQ_QUEUES; add it there.") from None
    return Queue(name, connection=_connect(_Config(config), conf.REDIS_TIMEOUT.total_seconds()))


def connections() -> list[Redis]:
    """Return one such connection for each Redis that RQ_QUEUES names."""
    distinct = {id(connection): connection for connection in (get(name).connection for name in names())}
    return list(distinct.values())


def moment(stored: Any) -> datetime | None:
    """Return the time that stands in Redis, in seconds since 1970 or in ISO 8601; None for anything else."""
    text = stored.decode("utf-8", "replace") if isinstance(stored, bytes) else str(stored)
    try:
        return datetime.fromtimestamp(float(text), UTC)
    except (ValueError, OverflowError, OSError):
        pass
    try:
        read = datetime.fromisoformat(text)
    except ValueError:
        return None
    return read if read.tzinfo else read.replace(tzinfo=UTC)


def repair(connection: Redis) -> None:
    """Delete whatever stands in a Redis where a list or a set of ours belongs.

    Until then nothing could be pushed or popped. Hints that such a key has displaced are lost anyway.
    """
    for queue in (queue for queue in map(get, names()) if queue.connection is connection):
        kinds = {
            queue.key: "list",
            queue.redis_queues_keys: "set",
            DELAYED_KEY: "zset",
            CALLS_KEY: "zset",
            worker_registration.REDIS_WORKER_KEYS: "set",
            worker_registration.WORKERS_BY_QUEUE_KEY % queue.name: "set",
        }
        with connection.pipeline(transaction=False) as pipeline:
            for key in kinds:
                pipeline.type(key)
            found = [kind.decode() for kind in pipeline.execute()]
        for (key, kind), is_a in zip(kinds.items(), found, strict=True):
            if is_a not in (kind, "none"):
                logger.error("%s in Redis was a %s, and must be a %s: it is deleted.", key, is_a, kind)
                connection.delete(key)


class _Config:
    """A queue's configuration as a dictionary key, without the parts that do not tell one Redis from another."""

    _IRRELEVANT = ("DEFAULT_TIMEOUT", "DEFAULT_RESULT_TTL", "ASYNC", "SERIALIZER", "QUEUE_CLASS")

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = {key: value for key, value in config.items() if key not in self._IRRELEVANT}
        self._key = repr(sorted(self.config.items(), key=lambda item: item[0]))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Config) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


@functools.lru_cache(maxsize=32)
def _connect(config: _Config, timeout: float) -> Redis:
    connection = get_redis_connection(config.config)
    configure(connection, timeout)
    return connection


def configure(connection: Redis, timeout: float) -> None:
    """Make a connection that was not used yet give up after `timeout` seconds, without trying again.

    A server is reached within `REDIS_TIMEOUT`, or not at all. The sentinels that are asked for the primary share that,
    or `timeout` if it is longer: all of them may hang.
    """
    pool, longest = connection.connection_pool, conf.REDIS_TIMEOUT.total_seconds()
    pool.connection_kwargs.update(socket_timeout=timeout, socket_connect_timeout=min(timeout, longest))
    pool.connection_kwargs["decode_responses"] = False
    pool.connection_class = _in_time(pool.connection_class)
    connection.set_retry(Retry(NoBackoff(), 0))
    sentinels = getattr(getattr(pool, "sentinel_manager", None), "sentinels", ())
    for sentinel in sentinels:
        configure(sentinel, min(timeout / len(sentinels), longest))


def _in_time(kind: type) -> type:
    """Return the class of connections with ours around it: what TLS or a sentinel adds is between the two."""
    if issubclass(kind, _LeavesReplicas):
        return kind
    inner = (_Reaches,) if kind is Connection else (kind, _Reaches) if issubclass(kind, Connection) else (kind,)
    return type("Connection", (_LeavesReplicas, *inner), {})


class _LeavesReplicas:
    """A connection that does not stay with a primary which has become a replica of another.

    A failover may leave it open. To connect again is to reach whoever has the primary's name or address by then.
    """

    def read_response(self, *args: Any, **options: Any) -> Any:
        try:
            return super().read_response(*args, **options)  # type: ignore[misc]
        except ReadOnlyError as error:
            self.disconnect()  # type: ignore[attr-defined]
            raise RedisConnectionError(f"It is a replica by now: {error}") from error


class _Reaches(Connection):
    """A connection over TCP. All its addresses share the time that it may take to reach one of them, the name included.

    redis-py waits that long for each address, and for the name as long as the resolver likes.
    """

    def _connect(self) -> socket.socket:
        seconds = self.socket_connect_timeout
        assert seconds is not None
        found = resolver.addresses(self.host, self.port, self.socket_type, seconds / 2)
        give_up_at = time.monotonic() + seconds / 2
        trouble: OSError = OSError(f"{self.host} has no address")
        for place, (family, kind, protocol, _, address) in enumerate(found):
            reached = None
            try:
                reached = socket.socket(family, kind, protocol)
                reached.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if self.socket_keepalive:
                    reached.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                    for option, value in self.socket_keepalive_options.items():
                        reached.setsockopt(socket.IPPROTO_TCP, option, value)
                # One that hangs leaves as much for each of the others.
                reached.settimeout(max(0.001, (give_up_at - time.monotonic()) / (len(found) - place)))
                reached.connect(address)
                reached.settimeout(self.socket_timeout)
                return reached
            except OSError as error:
                trouble = error
                if reached is not None:
                    reached.close()
        raise trouble
