"""Everything that puts work into Redis: one id, many, later, and the calls of plain jobs.

A pushed id is a hint. It follows the commit of the row's transaction, and where a sweep would find the row again
anyway, a Redis that is away costs one warning.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

from django.apps import apps
from django.db import connections, transaction
from django.db.models import Q
from redis import Redis
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from jobs import clock, queues, registry, switches
from jobs.backoff import spread
from jobs.conf import conf
from jobs.exceptions import QueueUnavailable
from jobs.message import Message, label, row_id, row_ids

if TYPE_CHECKING:
    from jobs.job import Job

logger = logging.getLogger("selfheal")

T = TypeVar("T")

BATCH = 1000

# Look, then push: the id of one job goes to the end of its list, or to its time in the delayed set, unless it is in
# one of them already. When too many are queued it is not: its sweep will bring the row when there is room. The ids of
# other jobs do not count towards that, unless there are so many that telling them apart would hold up Redis.
PUSH = """
local list, delayed, names = KEYS[1], KEYS[2], KEYS[3]
local id, room, score = ARGV[1], tonumber(ARGV[2]), ARGV[3]
if redis.call('ZSCORE', delayed, id) or redis.call('LPOS', list, id) then return 0 end
local queued = redis.call('LLEN', list) + redis.call('ZCARD', delayed)
if queued >= room and queued <= 10000 then
    local own = string.match(id, '^[^-]+-')
    queued = 0
    for _, ids in ipairs({redis.call('LRANGE', list, 0, -1), redis.call('ZRANGE', delayed, 0, -1)}) do
        for _, other in ipairs(ids) do
            if string.sub(other, 1, #own) == own then queued = queued + 1 end
        end
    end
end
if queued >= room then return 0 end
if score ~= '' then
    redis.call('ZADD', delayed, score, id)
else
    redis.call('SADD', names, list)
    redis.call('RPUSH', list, id)
end
return 1
"""

# A call whose id gets lost must not leave its arguments for ever. In seconds.
KEEP_CALLS = str(30 * 24 * 3600)

# A plain call, all of it or nothing: uniqueness, its arguments, its id.
CALL = """
local list, delayed, names, hash, unique = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local id, score, unique_for = ARGV[1], ARGV[2], tonumber(ARGV[3])
if unique_for > 0 and not redis.call('SET', unique, id, 'NX', 'PX', unique_for) then return 0 end
redis.call('HSET', hash, unpack(ARGV, 4))
redis.call('EXPIRE', hash, KEEP_CALLS)
if score ~= '' then
    redis.call('ZADD', delayed, score, id)
else
    redis.call('SADD', names, list)
    redis.call('RPUSH', list, id)
end
return 1
""".replace("KEEP_CALLS", KEEP_CALLS)

# A plain call starts. It goes into the delayed set for when its process must be gone, so that a worker killed with
# its child costs a delay and not the call. Returns the number of the attempt; 0 when the call has already ended.
START = """
local delayed, hash, unique = KEYS[1], KEYS[2], KEYS[3]
local id, again_at, release = ARGV[1], ARGV[2], ARGV[3]
if redis.call('EXISTS', hash) == 0 then return 0 end
redis.call('ZADD', delayed, again_at, id)
redis.call('EXPIRE', hash, KEEP_CALLS)
if release == '1' and redis.call('GET', unique) == id then redis.call('DEL', unique) end
return redis.call('HINCRBY', hash, 'attempt', 1)
""".replace("KEEP_CALLS", KEEP_CALLS)

# A plain call ends for good.
END = """
local delayed, hash, unique = KEYS[1], KEYS[2], KEYS[3]
redis.call('ZREM', delayed, ARGV[1])
redis.call('DEL', hash)
if redis.call('GET', unique) == ARGV[1] then redis.call('DEL', unique) end
"""

# What is due moves from the delayed set to the lists of its jobs' queues. What names no declared job is removed; what
# its list does not take, being something else than a list, stays. Returns how many moved, and what was removed.
MOVE_DUE = """
local delayed, names = KEYS[1], KEYS[2]
local due = redis.call('ZRANGEBYSCORE', delayed, '-inf', ARGV[1], 'LIMIT', 0, ARGV[2])
local list_of, moved, refused = {}, 0, {}
for i = 3, #ARGV, 2 do list_of[ARGV[i]] = ARGV[i + 1] end
for _, id in ipairs(due) do
    local list = list_of[string.match(id, '^[^-]+') or '']
    if not list then
        table.insert(refused, id)
        redis.call('ZREM', delayed, id)
    elseif type(redis.pcall('RPUSH', list, id)) == 'number' then
        moved = moved + 1
        redis.call('SADD', names, list)
        redis.call('ZREM', delayed, id)
    end
end
return {moved, refused}
"""


def row(job: Job, subject: Any, wait: timedelta | None = None) -> None:
    """Queue the work of a swept job on one row when the transaction of the row's database commits."""
    pk, using = job.identify(subject)
    if _waiting(job, [pk]) or switches.disabled([job.name]):
        return

    def push() -> None:
        with _Hint(job.name, queue := queues.get(job.queue)) as hint:
            if hint.worthwhile:
                push_id(queue, row_id(job.name, pk), room=job.limit, wait=wait)

    transaction.on_commit(push, using=using)


def rows(job: Job, subjects: Any) -> None:
    """Queue the work of a swept job on many rows, given as a queryset, primary keys or rows: a round trip per 1,000.

    As many as the job's limit has room for; its sweep brings the others as the queue empties.
    """
    pks, using = job.identify_many(subjects)
    if switches.disabled([job.name]):
        return
    limit = job.sweep.effective_limit() if job.sweep else 0
    pks = itertools.islice(_not_waiting(job, pks), limit)
    if connections[using].in_atomic_block:
        # Which rows were meant is decided now; whether they exist, by the commit.
        pks = iter(list(pks))

    def push() -> None:
        with _Hint(job.name, queue := queues.get(job.queue)) as hint:
            if not hint.worthwhile:
                return
            queued = queued_ids(queue, job.name)
            room = limit - len(queued)
            for batch in batches(pks, BATCH):
                ids = [id for id in row_ids(job.name, dict.fromkeys(batch)) if id not in queued]
                push_ids(queue, ids[: max(room, 0)])
                queued.update(ids)
                room -= len(ids)
                if room <= 0:
                    return

    transaction.on_commit(push, using=using)


def call(job: Job, args: tuple[Any, ...], kwargs: dict[str, Any], wait: timedelta | None = None) -> None:
    """Queue one call of a plain job at commit. Raises `QueueUnavailable`: nothing else would bring it back."""
    calls(job, [(args, kwargs)], wait)


def calls(job: Job, arguments: Iterable[tuple[tuple[Any, ...], dict[str, Any]]], wait: timedelta | None = None) -> None:
    """Queue many calls of a plain job at commit, a round trip per 1,000. Raises `QueueUnavailable`."""
    queue = queues.get(job.queue)
    messages = [Message.call(job, args, kwargs, queue.connection) for args, kwargs in arguments]
    if job.is_scheduled and switches.disabled([job.name]):
        return
    unique_for = int(job.unique_for.total_seconds() * 1000) if job.unique_for else 0

    def push() -> None:
        script = queue.connection.register_script(CALL)
        try:
            for batch in batches(messages, BATCH):
                with queue.connection.pipeline(transaction=False) as pipeline:
                    for message in batch:
                        fields = [part for pair in message.to_dict().items() for part in pair]
                        script(
                            keys=[queue.key, queues.DELAYED_KEY, queue.redis_queues_keys, *_call_keys(message)],
                            args=[message.id, _score(wait), unique_for, *fields],
                            client=pipeline,
                        )
                    pipeline.execute()
        except RedisError as error:
            raise QueueUnavailable(job.name, error) from error

    transaction.on_commit(push)


def start_call(message: Message, connection: Redis, gone_after: float) -> int:
    """Begin an attempt at a plain call and return its number; 0 when the call has ended and must not run again.

    `gone_after` seconds from now its process is certainly gone: then the call is delivered again, unless it ended.
    """
    release = cast("Job", message.declared).unique_until == "start"
    return int(
        connection.register_script(START)(
            keys=[queues.DELAYED_KEY, *_call_keys(message)],
            args=[message.id, clock.timestamp() + gone_after, int(release)],
        )
    )


def end_call(message: Message, connection: Redis) -> None:
    """Forget a plain call that succeeded, or has failed for the last time."""
    connection.register_script(END)(keys=[queues.DELAYED_KEY, *_call_keys(message)], args=[message.id])


def retry_call(message: Message, connection: Redis, wait: timedelta) -> None:
    """Deliver a plain call again after the wait."""
    connection.zadd(queues.DELAYED_KEY, {message.id: _score(wait)})


def push_id(queue: queues.Queue, id: str, *, room: int = 2**31, wait: timedelta | None = None) -> bool:
    """Push one id unless it is queued or `room` of its job are already. Returns whether it was pushed."""
    keys = [queue.key, queues.DELAYED_KEY, queue.redis_queues_keys]
    return bool(queue.connection.register_script(PUSH)(keys=keys, args=[id, room, _score(wait)]))


def push_ids(queue: queues.Queue, ids: list[bytes], spread_over: timedelta | None = None) -> None:
    """Push ids that were looked up before, in one round trip; over a random time when `spread_over` is given."""
    if not ids:
        return
    if spread_over:
        queue.connection.zadd(
            queues.DELAYED_KEY, {id: _score(spread(spread_over, timedelta(0))) for id in ids}, nx=True
        )
        return
    with queue.connection.pipeline(transaction=False) as pipeline:
        pipeline.sadd(queue.redis_queues_keys, queue.key)
        pipeline.rpush(queue.key, *ids)
        pipeline.execute()


def queued_ids(queue: queues.Queue, name: str) -> set[bytes]:
    """Return the ids of one job's rows that are queued at this moment, in the list or the delayed set."""
    prefix = f"{name}-".encode()
    with queue.connection.pipeline() as pipeline:
        pipeline.lrange(queue.key, 0, -1)
        pipeline.zrange(queues.DELAYED_KEY, 0, -1)
        snapshot = pipeline.execute()
    return {id for part in snapshot for id in part if id.startswith(prefix)}


def move_due() -> int:
    """Move what is due from the delayed set of each Redis into its queue, 1,000 at a time. Returns how many."""
    moved = 0
    destinations = [part for each in registry.declared() for part in (each.name, queues.get(each.queue).key)]
    for connection in queues.connections():
        script = connection.register_script(MOVE_DUE)
        while True:
            moved_now, refused = script(
                keys=[queues.DELAYED_KEY, queues.Queue.redis_queues_keys],
                args=[clock.timestamp(), BATCH, *destinations],
            )
            for id in refused:
                logger.warning("Refused %.200r from the delayed set: no job of that name is declared.", id)
            moved += moved_now
            if moved_now + len(refused) < BATCH:
                break
    return moved


def batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield the items in lists of at most `size`."""
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def _not_waiting(job: Job, pks: Iterable[str]) -> Iterator[str]:
    may_wait = apps.get_model("selfheal", "Claim").objects.filter(job=job.name).exists()
    for batch in batches(pks, BATCH):
        waiting = _waiting(job, batch) if may_wait else set()
        yield from (pk for pk in batch if pk not in waiting)


def _waiting(job: Job, pks: list[str]) -> set[str]:
    """Return those of the rows that are backing off or quarantined: they are left alone until that is over."""
    claims = apps.get_model("selfheal", "Claim").objects.of_rows(job.name, label(job.model), pks)
    waiting = claims.filter(Q(quarantined_at__isnull=False) | Q(next_attempt_at__gt=clock.now()))
    return set(waiting.values_list("object_pk", flat=True))


def _call_keys(message: Message) -> tuple[str, str]:
    job = cast("Job", message.declared)
    return message.key, f"selfheal:unique:{job.name}:{job.digest(message.args, message.kwargs)}"


def _score(wait: timedelta | None) -> float | str:
    return "" if wait is None else clock.timestamp() + wait.total_seconds()


class _Hint:
    """Around a push that its sweep would make up for: a Redis that is away costs one warning, and never the caller.

    After a time-out it gives up at once for a moment, so that a request which queues a hundred rows does not wait a
    hundred times for a Redis that hangs.
    """

    _hanging_until: ClassVar[dict[Any, float]] = {}

    def __init__(self, name: str, queue: queues.Queue) -> None:
        self.name = name
        self.server = queue.connection

    @property
    def worthwhile(self) -> bool:
        return time.monotonic() >= self._hanging_until.get(self.server, 0)

    def __enter__(self) -> _Hint:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> bool:
        if isinstance(error, RedisTimeoutError):
            self._hanging_until[self.server] = time.monotonic() + 2 * conf.REDIS_TIMEOUT.total_seconds()
        if isinstance(error, RedisError):
            logger.warning("%s was not queued, its sweep will do so: Redis did not answer (%s)", self.name, error)
            return True
        return False
