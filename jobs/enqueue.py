"""Everything that puts work into Redis: one id, many, later, and the calls of plain jobs.

A pushed id is a hint. It follows the commit of the row's transaction, and where a sweep would find the row again
anyway, a Redis that is away costs one warning.
"""

from __future__ import annotations

import itertools
import logging
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar, cast

from django.apps import apps
from django.db import connections, transaction
from django.db.models import Q, QuerySet
from redis import Redis
from redis.exceptions import RedisError, ResponseError

from jobs import clock, queues, registry, switches
from jobs.exceptions import QueueUnavailable
from jobs.message import Message, label, row_id, row_ids

if TYPE_CHECKING:
    from jobs.job import Job

logger = logging.getLogger("selfheal")

T = TypeVar("T")

BATCH = 1000
# How many ids are read at once. More would hold up Redis, and in the end outlast the time that it has to answer.
SLICE = 100_000
# A refusal that takes no longer costs nobody much. In seconds.
AT_ONCE = 0.01

# Look, then push: the id of one job goes to the end of its list, or to its time in the delayed set, unless it is in
# one of them already. When too many are queued it is not: its sweep will bring the row when there is room. The ids of
# other jobs do not count towards that, unless there are so many that telling them apart would hold up Redis. Nor does
# what is in the delayed set until later than `last`.
PUSH = """
local list, delayed, names = KEYS[1], KEYS[2], KEYS[3]
local id, room, score, last = ARGV[1], tonumber(ARGV[2]), ARGV[3], tonumber(ARGV[4])
local waits_until = tonumber(redis.call('ZSCORE', delayed, id) or 'inf')
if waits_until <= last or redis.call('LPOS', list, id) then return 0 end
local queued = redis.call('LLEN', list) + redis.call('ZCOUNT', delayed, '-inf', last)
if queued >= room and queued <= 10000 then
    local own = string.match(id, '^[^-]+-')
    queued = 0
    for _, ids in ipairs({redis.call('LRANGE', list, 0, -1), redis.call('ZRANGEBYSCORE', delayed, '-inf', last)}) do
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

# A call that nobody takes must not leave its arguments for ever. In seconds, from when it is due or was last started.
KEEP_CALLS = 30 * 24 * 3600

# So long after a plain call was due it is looked for: a worker that has taken it has started it by then. In seconds.
LOST_AFTER = 60
# At most this many per tick, and in no list that is longer: to read that would hold up Redis.
LOOKED_FOR = 10_000

# A plain call, all of it or nothing: uniqueness, its id, its arguments. What a key of another type could make fail is
# first, since Redis takes nothing back. A unique key that keeps out calls for longer than it may is not ours.
CALL = """
local list, delayed, names, calls, hash, unique = unpack(KEYS)
local id, score, unique_for, lost_at, keep = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4], ARGV[5]
local held_for = redis.call('PTTL', unique)
if unique_for > 0 and held_for >= 0 and held_for <= unique_for then return 0 end
redis.call('ZADD', calls, lost_at, id)
if score ~= '' then
    redis.call('ZADD', delayed, score, id)
else
    redis.call('SADD', names, list)
    redis.call('RPUSH', list, id)
end
redis.call('HSET', hash, unpack(ARGV, 6))
redis.call('EXPIRE', hash, keep)
if unique_for > 0 then redis.call('SET', unique, id, 'PX', unique_for) end
return 1
"""

# A plain call starts. It goes into the delayed set for when its process must be gone, so that a worker killed with
# its child costs a delay and not the call. Returns the number of the attempt; 0 when the call has already ended, or
# this is a copy of one that is in work or waits for its next attempt.
START = """
local delayed, calls, hash, unique = unpack(KEYS)
local id, again_at, keep, release = unpack(ARGV)
if redis.call('EXISTS', hash) == 0 or redis.call('ZSCORE', delayed, id) then return 0 end
redis.call('ZADD', delayed, again_at, id)
redis.call('ZADD', calls, again_at, id)
redis.call('EXPIRE', hash, keep)
if release == '1' and redis.pcall('GET', unique) == id then redis.call('DEL', unique) end
return redis.call('HINCRBY', hash, 'attempt', 1)
"""

# A plain call whose process died is delivered again, unless that had ended it, or had put it off for longer by itself.
REDELIVER = """
local delayed, hash = unpack(KEYS)
local id, score, again_at = unpack(ARGV)
if redis.call('EXISTS', hash) == 0 then return 0 end
local waits_until = redis.call('ZSCORE', delayed, id)
if waits_until and tonumber(waits_until) ~= tonumber(again_at) then return 0 end
redis.call('ZADD', delayed, score, id)
return 1
"""

# A plain call ends for good.
END = """
local delayed, calls, hash, unique = unpack(KEYS)
redis.call('DEL', hash)
if redis.pcall('GET', unique) == ARGV[1] then redis.call('DEL', unique) end
redis.call('ZREM', delayed, ARGV[1])
redis.call('ZREM', calls, ARGV[1])
"""

# A plain call that was not found in its list goes to the end of it, unless it has ended, waits in the delayed set, or
# somebody else has looked meanwhile. With no list named, nobody here knows its job: it is kept for somebody who does.
FIND_LOST = """
local list, delayed, names, calls, hash = unpack(KEYS)
local id, now, look_again_at = unpack(ARGV)
if redis.call('EXISTS', hash) == 0 then redis.call('ZREM', calls, id) return 0 end
if tonumber(redis.call('ZSCORE', calls, id) or 'inf') > tonumber(now) then return 0 end
redis.call('ZADD', calls, look_again_at, id)
if list == '' or redis.call('ZSCORE', delayed, id) then return 0 end
redis.call('SADD', names, list)
redis.call('RPUSH', list, id)
return 1
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
    room = job.limit

    def push() -> None:
        with _Hint(job.name, queue := queues.get(job.queue)) as hint:
            if not hint.vain:
                push_id(queue, row_id(job.name, pk), room=room, wait=wait)

    _on_commit(push, using)


def rows(job: Job, subjects: Any) -> None:
    """Queue the work of a swept job on many rows, given as a queryset, primary keys or rows: a round trip per 1,000.

    As many as the job's limit has room for; its sweep brings the others as the queue empties.
    """
    pks, using = job.identify_many(subjects)
    if switches.disabled([job.name]):
        return
    limit = job.limit
    pks = itertools.islice(_not_waiting(job, pks), limit)
    if connections[using].in_atomic_block or not isinstance(subjects, QuerySet):
        # Which rows were meant is decided now, and whether they can be; whether they exist, by the commit.
        pks = iter(list(pks))

    def push() -> None:
        with _Hint(job.name, queue := queues.get(job.queue)) as hint:
            if hint.vain:
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

    _on_commit(push, using)


def _on_commit(push: Callable[[], None], using: str | None = None) -> None:
    """Push when the transaction commits, or now if there is none: only then can an error reach who asked for it.

    From within a commit it would reach whoever committed, and Django would drop the hooks of everybody behind this one.
    There it is logged.
    """

    def push_and_log() -> None:
        try:
            push()
        except Exception as error:
            logger.exception("After the commit of its transaction: %s", error)

    in_transaction = transaction.get_connection(using).in_atomic_block
    transaction.on_commit(push_and_log if in_transaction else push, using=using)


def next_in_line(model: str, pk: str) -> None:
    """Queue the jobs that found this row in another job's hands, now that it is free: at the head of their queues.

    They have waited in them before. The tick would bring them too, but at the end, and by then the job that had the row
    may have it again.
    """
    Claim = apps.get_model("selfheal", "Claim")
    due = Claim.objects.due().filter(model=model, object_pk=pk).order_by("-first_claimed_at")
    waiting = [each for name in due.values_list("job", flat=True) if (each := registry.get(name)) is not None]
    if not waiting:
        return
    disabled = switches.disabled({name for each in waiting for name in each.switches})
    jobs = [each for each in waiting if each.is_swept and each.works_on(model) and not each.switches & disabled]

    def push() -> None:
        for job in jobs:
            with _Hint(job.name, queue := queues.get(job.queue)) as hint:
                if not hint.vain:
                    _push_first(queue, row_id(job.name, pk))

    _on_commit(push, Claim.objects.db)


def _push_first(queue: queues.Queue, id: str) -> None:
    """Push an id to the head of its list, wherever it was queued before."""
    with queue.connection.pipeline() as pipeline:
        pipeline.zrem(queues.DELAYED_KEY, id)
        pipeline.lrem(queue.key, 1, id)
        pipeline.sadd(queue.redis_queues_keys, queue.key)
        pipeline.lpush(queue.key, id)
        pipeline.execute()


def call(job: Job, args: tuple[Any, ...], kwargs: dict[str, Any], wait: timedelta | None = None) -> None:
    """Queue one call of a plain job at commit. Outside of a transaction it raises `QueueUnavailable`."""
    calls(job, [(args, kwargs)], wait)


def calls(job: Job, arguments: Iterable[tuple[tuple[Any, ...], dict[str, Any]]], wait: timedelta | None = None) -> None:
    """Queue many calls of a plain job at commit, a round trip per 1,000. Raises as `call` does."""
    queue = queues.get(job.queue)
    messages = [Message.call(job, args, kwargs, queue.connection) for args, kwargs in arguments]
    if job.is_scheduled and switches.disabled([job.name]):
        return
    unique_for = int(job.unique_for.total_seconds() * 1000) if job.unique_for else 0
    waits = int(wait.total_seconds()) if wait else 0
    # Whoever is told can stop by himself, and a Redis that is back must not refuse him. At a commit nobody can.
    is_told = not transaction.get_connection().in_atomic_block

    def push() -> None:
        options = [_score(wait), unique_for, clock.timestamp() + waits + LOST_AFTER, KEEP_CALLS + waits]
        try:
            with _Push(job.name, queue) as attempt:
                if attempt.vain and not is_told:
                    raise QueueUnavailable.of(job.name, attempt.vain)
                for batch in batches(messages, BATCH):
                    with queue.connection.pipeline(transaction=False) as pipeline:
                        for message in batch:
                            fields = [part for pair in message.to_dict().items() for part in pair]
                            keys = [queue.key, queues.DELAYED_KEY, queue.redis_queues_keys, *_call_keys(message)]
                            run_script(pipeline, CALL, keys, [message.id, *options, *fields])
                        pipeline.execute()
        except RedisError as error:
            raise QueueUnavailable.of(job.name, error) from error

    _on_commit(push)


def start_call(message: Message, connection: Redis, again_at: float) -> int:
    """Begin an attempt at a plain call and return its number; 0 when this is a late copy, which must not run.

    At `again_at`, in seconds since 1970, its process is certainly gone: the call is delivered again, unless it ended.
    """
    release = cast("Job", message.declared).unique_until == "start"
    keys = [queues.DELAYED_KEY, *_call_keys(message)]
    arguments = [message.id, again_at, KEEP_CALLS, int(release)]
    return int(run_script(connection, START, keys, arguments))


def end_call(message: Message, connection: Redis) -> None:
    """Forget a plain call that succeeded, or has failed for the last time."""
    run_script(connection, END, [queues.DELAYED_KEY, *_call_keys(message)], [message.id])


def retry_call(message: Message, connection: Redis, wait: timedelta) -> None:
    """Deliver a plain call again after the wait."""
    connection.zadd(queues.DELAYED_KEY, {message.id: _score(wait)})


def redeliver_call(message: Message, connection: Redis, again_at: float, wait: timedelta) -> None:
    """Deliver a plain call again after the wait, whose process died, and had started it with `again_at` if at all."""
    run_script(connection, REDELIVER, [queues.DELAYED_KEY, message.key], [message.id, _score(wait), again_at])


def push_id(queue: queues.Queue, id: str, *, room: int = 2**31, wait: timedelta | None = None) -> bool:
    """Push one id unless it is queued or `room` of its job are already. Returns whether it was pushed."""
    keys = [queue.key, queues.DELAYED_KEY, queue.redis_queues_keys]
    return bool(run_script(queue.connection, PUSH, keys, [id, room, _score(wait), latest()]))


def push_ids(queue: queues.Queue, ids: list[bytes], spread_over: timedelta | None = None) -> None:
    """Push ids that were looked up before, in one round trip; over a random time when `spread_over` is given."""
    if not ids:
        return
    if spread_over:
        now, longest = clock.timestamp(), spread_over.total_seconds()
        queue.connection.zadd(queues.DELAYED_KEY, {id: now + random.uniform(0, longest) for id in ids})
        return
    with queue.connection.pipeline(transaction=False) as pipeline:
        pipeline.sadd(queue.redis_queues_keys, queue.key)
        pipeline.rpush(queue.key, *ids)
        pipeline.execute()


def queued_ids(queue: queues.Queue, name: str) -> set[bytes]:
    """Return the ids of one job's rows that are queued at this moment, in the list or the delayed set.

    Both hold those of other jobs too, any number of them. They are read by the `SLICE`, from the end: what workers take
    from the beginning meanwhile moves nothing.
    """
    prefix, last = f"{name}-".encode(), latest()
    found: set[bytes] = set()
    for end in itertools.count(-1, -SLICE):
        with queue.connection.pipeline() as pipeline:
            pipeline.lrange(queue.key, end - SLICE + 1, end)
            pipeline.zrevrangebyscore(queues.DELAYED_KEY, last, "-inf", -1 - end, SLICE)
            parts = pipeline.execute()
        found.update(id for part in parts for id in part if id.startswith(prefix))
        if max(map(len, parts)) < SLICE:
            break
    return found


def latest() -> float:
    """Return until when a row may wait in the delayed set, in seconds since 1970."""
    return clock.timestamp() + queues.LONGEST_WAIT.total_seconds()


def move_due(connection: Redis) -> int:
    """Move what is due from the delayed set into its queue, 1,000 at a time. Returns how many."""
    moved = 0
    destinations = [part for each in registry.declared() for part in (each.name, queues.get(each.queue).key)]
    while True:
        keys = [queues.DELAYED_KEY, queues.Queue.redis_queues_keys]
        moved_now, refused = run_script(connection, MOVE_DUE, keys, [clock.timestamp(), BATCH, *destinations])
        for id in refused:
            logger.warning("Refused %.200r from the delayed set: no job of that name is declared.", id)
        moved += int(moved_now)
        if moved_now + len(refused) < BATCH:
            return moved


def drop_overlong(connection: Redis) -> None:
    """Remove from the delayed set, by the 1,000, the rows and schedules that are there until later than ever.

    They count for nothing while they are. Plain calls stay, and so does what another version of the project may know.
    """
    declared = {each.name.encode(): each for each in registry.declared()}
    overlong = []
    for id in cast("list[bytes]", connection.zrangebyscore(queues.DELAYED_KEY, latest(), "inf", 0, BATCH)):
        name, dash, _ = id.partition(b"-")
        if (known := declared.get(name)) and not (dash and known.takes_calls):
            overlong.append(id)
    if overlong:
        logger.warning(
            "Dropped %d ids from the delayed set, %.200r among them: nothing of ours waits for more than %s.",
            len(overlong),
            overlong[0],
            queues.LONGEST_WAIT,
        )
        connection.zrem(queues.DELAYED_KEY, *overlong)


def find_lost_calls(connection: Redis) -> int:
    """Queue again each plain call that is in no queue and not in work, though it has not ended. Returns how many.

    Whoever took it died before it was started; or its list was lost, and the call was not. While more than 10,000 wait
    in its list, it is not looked for.
    """
    now, hashes = clock.timestamp(), Message.redis_job_namespace_prefix.encode()
    lists = {each.name.encode(): queues.get(each.queue).key for each in registry.declared() if each.takes_calls}
    due: defaultdict[str, set[bytes]] = defaultdict(set)
    for id in cast("list[bytes]", connection.zrangebyscore(queues.CALLS_KEY, "-inf", now, 0, LOOKED_FOR)):
        due[lists.get(id.partition(b"-")[0], "")].add(id)
    found = 0
    for key, ids in due.items():
        waiting = cast("list[bytes]", connection.lrange(key, 0, LOOKED_FOR)) if key else []
        missing = ids.difference(waiting) if len(waiting) <= LOOKED_FOR else set()
        in_place = dict.fromkeys(ids - missing, now + LOST_AFTER)
        keys = [key, queues.DELAYED_KEY, queues.Queue.redis_queues_keys, queues.CALLS_KEY]
        with connection.pipeline(transaction=False) as pipeline:
            for id in itertools.islice(missing, BATCH):
                run_script(pipeline, FIND_LOST, [*keys, hashes + id], [id, now, now + LOST_AFTER])
            found += sum(pipeline.execute())
        if in_place:
            # Not those that have ended meanwhile.
            connection.zadd(queues.CALLS_KEY, in_place, xx=True)
    if found:
        logger.warning("Queued %d plain calls again: they had not ended, and were in no queue and not in work.", found)
    return found


def run_script(connection: Redis, script: str, keys: list[Any], arguments: list[Any]) -> Any:
    """Execute a script in Redis, in one round trip.

    By its text: one that is called by its hash costs two more on each Redis that does not know it yet, and in a
    pipeline one more always. A Redis that is far away, or slow, holds up a web request for each of them.
    """
    return connection.eval(script, len(keys), *keys, *arguments)


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


def _call_keys(message: Message) -> tuple[str, ...]:
    job = cast("Job", message.declared)
    return queues.CALLS_KEY, message.key, f"selfheal:unique:{job.name}:{job.digest(message.args, message.kwargs)}"


def _score(wait: timedelta | None) -> float | str:
    return "" if wait is None else clock.timestamp() + wait.total_seconds()


class _Push:
    """Around a push, so that a request which makes a hundred does not wait a hundred times for a Redis that hangs.

    After one that waited and got no answer the next ones are in vain for twice as long as that took, whatever it was
    waiting for.
    """

    _hanging_until: ClassVar[dict[Any, tuple[float, str]]] = {}

    def __init__(self, name: str, queue: queues.Queue) -> None:
        self.name = name
        self.server = queue.connection

    @property
    def vain(self) -> str:
        """Why there is no sense in trying; empty where there is."""
        until, why = self._hanging_until.get(self.server, (0, ""))
        return why if time.monotonic() < until else ""

    def __enter__(self) -> Self:
        self.began_at = time.monotonic()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> bool | None:
        waited = time.monotonic() - self.began_at
        if isinstance(error, RedisError) and not isinstance(error, ResponseError) and waited > AT_ONCE:
            self._hanging_until[self.server] = self.began_at + 3 * waited, str(error) or type(error).__name__
        return None


class _Hint(_Push):
    """Around a push that its sweep would make up for: a Redis that is away costs one warning, and never the caller."""

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> bool:
        super().__exit__(kind, error, traceback)
        if isinstance(error, RedisError):
            logger.warning("%s was not queued, its sweep will do so: Redis did not answer (%s)", self.name, error)
            return True
        return False
