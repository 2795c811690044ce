"""The seams: where the library meets the database, Redis, time and chance, and a world may cut it off.

Outside the model, that is in threads that no actor runs in, all of this behaves as always.
"""

from __future__ import annotations

import math
import random
import re
import sqlite3
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any
from unittest import mock

from django.db import OperationalError, connection, connections
from redis import Redis
from redis.client import Pipeline
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from jobs import claims, enqueue, message, perform, scheduler, worker
from jobs.conf import conf
from tests.recovery.explorer.world import Actor, Killed, World, current

NEVER_MS = 10**12
# For how long, in virtual seconds, SQLite waits for whoever writes.
PATIENCE = 20.0
SCRIPTS = {
    **{getattr(enqueue, name): name for name in ("PUSH", "CALL", "START", "REDELIVER", "END", "FIND_LOST", "MOVE_DUE")},
    scheduler.STAND_IN: "STAND_IN",
}
STATEMENT = re.compile(
    r'(SELECT|DELETE).*?FROM "(\w+)"|(INSERT)[^"]*INTO "(\w+)"|(UPDATE) "(\w+)"|(\w+)',
    re.S,
)
TIMES_TO_LIVE = """
local times = {}
for _, key in ipairs(redis.call('KEYS', 'selfheal:*')) do
  table.insert(times, key)
  table.insert(times, redis.call('PTTL', key))
end
return times
"""
PUSHES = (
    "PUSH", "CALL", "REDELIVER", "FIND_LOST", "MOVE_DUE", "RPUSH", "SADD+RPUSH", "ZADD", "ZREM+LREM+SADD+LPUSH"
)  # fmt: skip
EXECUTE = Pipeline.execute
WRITES = ("INSERT", "UPDATE", "DELETE")


class VirtualTime:
    """Stands in for the module `time` where the library waits or measures."""

    @staticmethod
    def monotonic() -> float:
        actor = current()
        return actor.world.monotonic if actor else 0.0

    @staticmethod
    def sleep(seconds: float) -> None:
        actor = current()
        assert actor is not None
        actor.sleep(seconds)


class FromOutside(Redis):
    """A client that no world cuts off, whichever thread it is used in."""

    execute_command = Redis.execute_command

    def pipeline(self, *args: Any, **options: Any) -> Any:
        pipeline = super().pipeline(*args, **options)
        pipeline.execute = partial(EXECUTE, pipeline)
        return pipeline


class Seams:
    """The database and Redis that worlds are built on, one world after another."""

    def __init__(self, redis_url: str) -> None:
        # Nobody's but the world's own: it looks from outside.
        self.redis = FromOutside.from_url(redis_url)
        self.is_postgres = connection.vendor == "postgresql"
        self._mutex = threading.Lock()
        self._sessions: list[Any] = []
        # When each of the library's keys expires, in virtual time.
        self._expire_at: dict[bytes, float] = {}
        self._arrived: dict[Actor, threading.Lock] = {}

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Put the seams in."""
        DatabaseWrapper = type(connections["default"])
        replaced = [
            (Redis, "execute_command", _through_redis(Redis.execute_command, _name_of_command)),
            (Pipeline, "execute", _through_redis(Pipeline.execute, _name_of_pipeline)),
            *((module, "time", VirtualTime) for module in (claims, enqueue, perform, scheduler, worker)),
            *((module, "uuid4", _uuid4) for module in (claims, message)),
            (DatabaseWrapper, "get_new_connection", self._open_session(DatabaseWrapper.get_new_connection)),
            (DatabaseWrapper, "_close", self._close_session),
        ]
        with ExitStack() as stack:
            for holder, name, replacement in replaced:
                stack.enter_context(mock.patch.object(holder, name, replacement))
            yield

    # --- The database -------------------------------------------------------------------------------------------------

    def open_database(self, actor: Actor) -> None:
        """Give an actor its own connection, every statement of which is a cut."""
        actor.connection = mine = connections["default"]

        def execute(execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
            cursor = context["cursor"]
            return self._call(actor, _name_of_statement(sql), lambda: execute(sql, params, many, context), cursor.close)

        commit, set_autocommit = mine._commit, mine._set_autocommit

        def set_autocommit_and_look(autocommit: bool) -> None:
            # A transaction that a time limit has left on its way to be committed is committed by this, on SQLite.
            commits = autocommit and not self.is_postgres and mine.connection.in_transaction
            set_autocommit(autocommit)
            if commits:
                actor.world.invariants.after_commit(actor)

        mine.execute_wrappers.append(execute)
        mine._commit = lambda: self._call(actor, "COMMIT", commit)
        mine._set_autocommit = set_autocommit_and_look

    def roll_back(self, actor: Actor) -> None:
        """Roll back what an actor has not committed, before its code is unwound: Django would commit it on its way."""
        if actor.connection is not None and actor.connection.connection is not None and not actor.is_stuck:
            with suppress(Exception):
                actor.connection.connection.rollback()

    def close_database(self, actor: Actor) -> None:
        if actor.connection is not None and actor.connection.connection is not None:
            self._close_session(actor.connection)
            self.wait_for_stuck(actor.world)

    def _open_session(self, original: Any) -> Any:
        """Connecting takes long, so a session that one actor has closed is used by another."""

        def get_new_connection(wrapper: Any, parameters: Any) -> Any:
            if self._sessions:
                return self._sessions.pop()
            session = original(wrapper, parameters)
            if not self.is_postgres:
                # The first function is only added. Whether one may be replaced is asked from the second on.
                self._is_idle(session)
            return session

        return get_new_connection

    @property
    def _close_session(self) -> Any:
        def close(wrapper: Any) -> None:
            session = wrapper.connection
            with suppress(Exception):
                session.rollback()
                if self.is_postgres or self._is_idle(session):
                    self._sessions.append(session)
                else:
                    session.close()

        return close

    @staticmethod
    def _is_idle(session: Any) -> bool:
        """Whether SQLite lets a function be replaced: not while a query is left that a killed process has half read."""
        try:
            session.create_function("explorer_idle", 0, bool)
        except sqlite3.OperationalError:
            return False
        return True

    def _call(self, actor: Actor, what: str, call: Callable[[], Any], forget: Callable[[], None] = lambda: None) -> Any:
        """Make a call at its cut, or lose it. `forget` throws an answer away that nobody will read."""
        world, mine = actor.world, actor.connection
        lost = actor.cut("database", what)
        if actor.is_doomed and (mine.in_atomic_block or what == "COMMIT"):
            raise OperationalError("(explorer) the connection was lost in this transaction")
        actor.is_doomed = False
        if lost == "before" or world.database_away_until > world.monotonic:
            world.count("database refused a call" if lost is None else "database call lost before it was done")
            self._lose_connection(actor)
            raise OperationalError("(explorer) the connection is lost")
        result = self._patiently(actor, call)
        if what == "COMMIT" or (what.startswith(WRITES) and not mine.in_atomic_block):
            self.wait_for_stuck(world)
            world.invariants.after_commit(actor)
        if lost == "after":
            world.count(f"answer of the database lost after {'COMMIT' if what == 'COMMIT' else 'a statement'}")
            # SQLite holds its lock for as long as there is something to be fetched of what an INSERT returns.
            forget()
            self._lose_connection(actor)
            raise OperationalError("(explorer) the connection was lost before the answer")
        return result

    def _patiently(self, actor: Actor, call: Callable[[], Any]) -> Any:
        """Execute a statement; one that waits for a lock lets others go on meanwhile."""
        if self.is_postgres:
            try:
                return call()
            finally:
                self._arrive(actor)
        give_up_at = actor.world.monotonic + PATIENCE
        while True:
            try:
                return call()
            except OperationalError as error:
                # Only what begins a transaction can meet a lock: a statement of its own, or BEGIN IMMEDIATE.
                # When nobody has the lock, what this session has read half way is older than what it wants to write.
                if "locked" not in str(error) or actor.world.monotonic > give_up_at or self._is_free(actor):
                    raise
                actor.world.count("waited for a lock")
                actor.wait(give_up_at - actor.world.monotonic + 0.01, lambda: self._is_free(actor), "locked")

    @staticmethod
    def _is_free(actor: Actor) -> bool:
        """Whether nobody else holds SQLite's only lock."""
        return not any(
            other.connection is not None and other.connection.connection and other.connection.connection.in_transaction
            for process in actor.world.processes
            for other in process.actors
            if other is not actor and not other.has_ended
        )

    def _lose_connection(self, actor: Actor) -> None:
        """Roll back what an actor has not committed, and make the rest of its transaction fail."""
        mine = actor.connection
        # A transaction that is about to be committed is not in its block any more.
        actor.is_doomed = mine.in_atomic_block
        with suppress(Exception):
            if self.is_postgres:
                mine.connection.close()
            else:
                mine.connection.rollback()
        self.wait_for_stuck(actor.world)

    # --- Locks of PostgreSQL ------------------------------------------------------------------------------------------

    def wait_for_baton(self, actor: Actor) -> None:
        """Wait until the actor gives the baton back, or waits for a lock that somebody without the baton holds."""
        baton = actor.world.baton
        if not self.is_postgres:
            baton.acquire()
            return
        while not baton.acquire(timeout=0.01):
            if self._is_blocked(actor):
                with self._mutex:
                    if not baton.acquire(blocking=False):
                        actor.is_stuck, actor.stuck_at = True, actor.world.monotonic
                        self._arrived[actor] = threading.Lock()
                        self._arrived[actor].acquire()
                        actor.world.count("waited for a lock")
                return

    def _arrive(self, actor: Actor) -> None:
        with self._mutex:
            arrived = self._arrived.get(actor)
        if arrived is None:
            return
        arrived.release()
        if actor.process.is_alive:
            actor.turn.acquire()
        if not actor.process.is_alive:
            raise Killed
        actor._set_clock()

    def wait_for_stuck(self, world: World) -> None:
        """Wait until everybody who waited for a lock has got it, or waits for another. Whoever calls has the baton."""
        for actor, arrived in list(self._arrived.items()):
            while not arrived.acquire(timeout=0.002):
                if self._is_blocked(actor):
                    if not 0 < actor.gives_up_at <= world.monotonic:
                        break
                    world.count("waited for a lock for too long")
                    with self.outside() as cursor:
                        cursor.execute("SELECT pg_cancel_backend(%s)", [actor.connection.connection.info.backend_pid])
            else:
                del self._arrived[actor]
                actor.is_stuck = False

    def end_session(self, actor: Actor) -> None:
        self._arrived.pop(actor, None)
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_terminate_backend(%s)", [actor.connection.connection.info.backend_pid])

    def _is_blocked(self, actor: Actor) -> bool:
        raw = actor.connection and actor.connection.connection
        if raw is None or raw.closed:
            return False
        with self.outside() as cursor:
            cursor.execute("SELECT cardinality(pg_blocking_pids(%s))", [raw.info.backend_pid])
            return bool(cursor.fetchone()[0])

    # --- From outside -------------------------------------------------------------------------------------------------

    @contextmanager
    def outside(self) -> Iterator[Any]:
        """Yield a cursor of the world's own connection, in whatever thread the baton is."""
        with self._own.cursor() as cursor:
            yield cursor

    @property
    def _own(self) -> Any:
        if not hasattr(self, "_outside"):
            self._outside = connection.copy()
            self._outside.inc_thread_sharing()
        return self._outside

    def reset(self) -> None:
        """Empty the database and Redis, so that every schedule begins alike."""
        tables = ["selfheal_claim", "selfheal_run", "selfheal_schedule", "waffle_switch", "cast_task"]
        with self.outside() as cursor:
            if self.is_postgres:
                cursor.execute(f"TRUNCATE {', '.join(tables)} RESTART IDENTITY CASCADE")
            else:
                for table in [*tables, "sqlite_sequence"]:
                    cursor.execute(f"DELETE FROM {table}")
        self.empty_redis()
        self._arrived.clear()

    def empty_redis(self) -> None:
        self.redis.flushall()
        self.redis.script_flush()

    def age_redis(self, world: World, seconds: float) -> None:
        """Let the library's keys expire in virtual time. Those that are waiting for it have a time to live without end.

        They are believed to have been set just now, which no more than the steps since the last call can make wrong.
        """
        times = self.redis.eval(TIMES_TO_LIVE, 0)
        for key, left in zip(times[::2], times[1::2], strict=True):
            if 0 <= left < NEVER_MS / 2:
                self._expire_at[key] = world.monotonic - seconds + math.ceil(left / 1000)
                self.redis.pexpire(key, NEVER_MS)
            if left != -1 and self._expire_at[key] <= world.monotonic:
                self.redis.delete(key)

    def close(self) -> None:
        self.redis.close()
        if hasattr(self, "_outside"):
            self._outside.close()
        for session in self._sessions:
            session.close()


def _through_redis(original: Any, name: Callable[..., str]) -> Any:
    def call(self: Any, *args: Any, **options: Any) -> Any:
        actor = current()
        if actor is None:
            return original(self, *args, **options)
        world = actor.world
        what = name(self, *args)
        lost = actor.cut("redis", what)
        if world.redis_away_until > world.monotonic:
            world.count("redis hung" if world.redis_hangs else "redis refused a call")
            if world.redis_hangs:
                actor.sleep(conf.REDIS_TIMEOUT.total_seconds())
                raise RedisTimeoutError("(explorer) Timeout reading from socket")
            raise RedisConnectionError("(explorer) Connection refused")
        if lost == "before":
            world.count("redis call lost before it was done")
            raise RedisConnectionError("(explorer) Connection reset")
        result = original(self, *args, **options)
        if what in PUSHES:
            world.pushes += 1
            world.invariants.after_push(actor)
        if lost == "after":
            world.count("answer of redis lost")
            raise RedisTimeoutError("(explorer) Timeout reading from socket")
        return result

    return call


def _name_of_command(client: Any, *args: Any) -> str:
    if args[0] == "EVAL":
        return SCRIPTS[args[1]]
    return str(args[0])


def _name_of_pipeline(pipeline: Any, *args: Any) -> str:
    return "+".join(dict.fromkeys(_name_of_command(pipeline, *command[0]) for command in pipeline.command_stack))


def _name_of_statement(sql: str) -> str:
    """Its verb and its table."""
    found = STATEMENT.match(sql.lstrip(" ("))
    return " ".join(filter(None, found.groups())) if found else "a statement"


def _uuid4() -> uuid.UUID:
    """A token that is the same in every replay."""
    actor = current()
    chance = actor.world.chance if actor else random
    return uuid.UUID(int=chance.getrandbits(128), version=4)
