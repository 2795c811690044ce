"""The process behind `manage.py rqworker`: it waits for messages and forks a child for each.

The child does everything that touches a row. The worker only watches it, and writes down how it died, if it did. While
no scheduler ticks, the workers do, each tick in a child too. A worker outlives Redis and the database, and ends when it
is told to, never by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import logging
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from types import FrameType
from typing import Any

from django.utils.module_loading import import_string
from redis.exceptions import RedisError
from rq import worker_registration
from rq.exceptions import DequeueTimeout, NoSuchJobError
from rq.serializers import DefaultSerializer, JSONSerializer
from rq.timeouts import JobTimeoutException
from rq.utils import now
from rq.worker import Worker as RQWorker
from rq.worker.base import WorkerStatus, signal_name

from jobs import claims, clock, database, enqueue, perform, queues, scheduler
from jobs.conf import conf
from jobs.exceptions import Misconfigured
from jobs.job import Declared
from jobs.message import Message

logger = logging.getLogger("selfheal")

# How long it waits for a message before it looks up: whether to stop, to tick, to be heard of.
DEQUEUE_SECONDS = 2
# How long Redis may leave a command unanswered before the worker gives up on that connection.
SOCKET_SECONDS = DEQUEUE_SECONDS + 8
LONGEST_RETRY_SECONDS = 5.0
# How long it may take to write down how a child died.
NOTE_SECONDS = 20.0
# How a child ends that could not ask the database about its row, and one in which the library itself failed. Neither
# says anything about the row.
EXIT_NO_DATABASE = 69
EXIT_FAILED = 70

# What its command could be given instead. Messages are JSON in any case; rq's default is what the command passes.
ALLOWED: dict[str, Any] = {
    "job_class": Message,
    "queue_class": queues.Queue,
    "serializer": (DefaultSerializer, JSONSerializer),
}


def _ending(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    return f"was killed by {signal_name(-code)}" if code < 0 else f"ended with exit code {code}"


def _watch(seconds: float | None = None) -> None:
    """End this process after so long, or a lease, unless somebody says otherwise until then: also when C code hangs."""
    seconds = seconds or conf.LEASE.total_seconds()
    faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__ or sys.stderr)


def _note(attempt: claims.Attempt, note: Callable[[], object]) -> None:
    """Write down how an attempt has ended whose process could not, and queue who waits for its row."""
    note()
    enqueue.next_in_line(attempt.model, attempt.pk)


def _nothing() -> None:
    """Do nothing."""


def _ignore(signum: int, frame: FrameType | None) -> None:
    """Do nothing about a signal."""


class Worker(RQWorker):
    """rq's worker without what it keeps about each job in Redis: claims and runs are rows in the database."""

    queue_class = queues.Queue
    job_class = Message

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Make a worker. Raises `Misconfigured` for another job class, queue class or serializer than the project's."""
        for option, allowed in ALLOWED.items():
            given = kwargs.get(option)
            given = import_string(given) if isinstance(given, str) else given
            if given is not None and not (isinstance(given, type) and issubclass(given, allowed)):
                raise Misconfigured(f"This worker cannot run with {option}={given!r}; leave that option away.")
        super().__init__(*args, **kwargs)
        # It registers again every heartbeat, so that a Redis which was emptied knows it soon.
        self.worker_ttl = int(4 * conf.HEARTBEAT.total_seconds()) + SOCKET_SECONDS
        self._announced_at: float | None = None
        self._ticks_seen_at = time.monotonic()
        self._kill_requested = False

    def _set_connection(self, connection: Any) -> Any:
        # Nothing is sent twice: what got lost on the way, a sweep finds again.
        queues.configure(connection, SOCKET_SECONDS)
        return connection

    def _set_ip_address(self, connection: Any) -> None:
        # rq asks Redis while it constructs the worker. Redis may be away.
        self.ip_address = "unknown"

    # --- The loop -----------------------------------------------------------------------------------------------------

    def work(
        self,
        burst: bool = False,
        logging_level: str | None = None,
        date_format: str = "%H:%M:%S",
        log_format: str = "%(asctime)s %(message)s",
        max_jobs: int | None = None,
        max_idle_time: int | None = None,
        with_scheduler: bool = False,
        dequeue_strategy: Any = None,
    ) -> bool:
        """Perform messages until SIGTERM or SIGINT, or until one of rq's limits is reached. Returns whether any was.

        The first signal ends it after the message in work, the second at once. An error of Redis, of the database or of
        the machine only makes it wait.
        """
        if with_scheduler:
            self.log.warning("--with-scheduler is rq's own; schedules here are run by manage.py rqscheduler.")
        self._install_signal_handlers()
        self.birth_date = now()
        self.log.info("Worker %s started with PID %d, on %s", self.name, os.getpid(), ", ".join(self.queue_names()))
        performed, idle_since, retry_after = 0, time.monotonic(), 0.5

        def has_idled() -> bool:
            return max_idle_time is not None and time.monotonic() - idle_since >= max_idle_time

        while not self._stop_requested and (max_jobs is None or performed < max_jobs):
            try:
                if not burst:
                    self._tick_if_nobody_does()
                message = self._next_message(burst)
                retry_after = 0.5
                if message is not None:
                    self.execute_job(*message)
                    performed += 1
                    idle_since = time.monotonic()
                elif burst or has_idled():
                    break
            except NoSuchJobError:
                # Refused and dropped. Whoever pushes such things again and again must not have all of its attention.
                if has_idled():
                    break
            except RedisError as error:
                self.log.warning("Worker %s: Redis does not answer (%s), trying again", self.name, error)
                self._pause(retry_after)
                retry_after = min(retry_after * 2, LONGEST_RETRY_SECONDS)
            except Exception:
                # Out of memory, out of processes: whatever it is, the row is safe and somebody must go on.
                self.log.exception("Worker %s: going on after an error", self.name)
                self._pause(0.5)
        self.log.info("Worker %s stopped", self.name)
        with contextlib.suppress(RedisError):
            self.register_death()
        return performed > 0

    def _next_message(self, burst: bool) -> tuple[Message, Any] | None:
        """Return the next message with its queue, or None when there was none for a while.

        Raises `NoSuchJobError` for what is none. What `rq suspend` writes into Redis is not read: whoever can write
        there would stop every worker, and nobody would be told. Pauses are in the database.
        """
        self._announce(WorkerStatus.IDLE)
        popped: tuple[Message, Any] | None = None
        with contextlib.suppress(DequeueTimeout):
            popped = queues.Queue.dequeue_any(
                self._ordered_queues, None if burst else DEQUEUE_SECONDS, connection=self.connection
            )
        return popped

    def _tick_if_nobody_does(self) -> None:
        """Look, once per TICK and between two messages, whether there is a scheduler, and stand in for it if not."""
        if time.monotonic() < self._ticks_seen_at + conf.TICK.total_seconds():
            return
        self._ticks_seen_at = time.monotonic()
        if scheduler.stands_in(self.connection):
            # Whatever it is at, the next one begins anew.
            _, status, _ = self._in_child("a tick", scheduler.tick, scheduler.TICK_SECONDS, self.kill_horse)
            if status != 0:
                self.log.warning("Worker %s: a tick %s", self.name, _ending(status))

    def _pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while not self._stop_requested and time.monotonic() < until:
            time.sleep(0.1)

    def _announce(self, state: str) -> None:
        """Register with Redis, at most once per heartbeat, for rq's pages and commands; nothing here relies on it."""
        if self._announced_at is not None and time.monotonic() - self._announced_at < conf.HEARTBEAT.total_seconds():
            return
        # Also when it fails: a Redis that is away is not asked again with every look at the child.
        self._announced_at = time.monotonic()
        self._state = state
        self.last_heartbeat = now()
        with self.connection.pipeline() as pipeline:
            pipeline.hset(self.key, mapping={**self.serialize(), "state": state})
            pipeline.expire(self.key, self.worker_ttl)
            worker_registration.register(self, pipeline)
            pipeline.execute()
        # Among the names of workers may be what a stranger has written.
        with contextlib.suppress(ValueError):
            for queue in self.queues:
                worker_registration.clean_worker_registry(queue)

    # --- One message --------------------------------------------------------------------------------------------------

    def execute_job(self, message: Message, queue: Any) -> None:  # type: ignore[override]
        """Perform one message in a child, watch it, and write down how it died, if it did."""
        self.log.info("Worker %s: %s: %s", self.name, queue.name, message.id)
        message.worker_name = self.name
        # Made here, so that the claim of a child that died can be told from every other.
        attempt = perform.attempt_at(message, self.name) if message.pk is not None else None
        kill_after = message.declared.timeout_seconds + claims.KILL_AFTER.total_seconds()
        # By then the child is gone, also when this worker is. By this time a plain call's start is told from all else.
        again_at = clock.timestamp() + kill_after + 10
        pid, status, was_killed = self._in_child(
            message.id, lambda: self._perform(message, attempt, again_at), kill_after, lambda: self._note_stop(attempt)
        )
        if status != 0:
            # What it had started would work on, beside whoever takes the row next.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)
            self._note_death(message, attempt, again_at, pid, status, was_killed)

    def _in_child(
        self, what: str, work: Callable[[], object], kill_after: float, on_stop: Callable[[], None] = _nothing
    ) -> tuple[int, int, bool]:
        """Do it in a child, and watch that until it ends, or until `kill_after` seconds have passed.

        `on_stop` is called once, if the worker is told to stop meanwhile. Returns the child's pid, its wait status, and
        whether this worker killed it on demand.
        """
        database.disconnect()
        self._horse_pid = os.fork()
        if self._horse_pid == 0:
            self._be_child(what, work)
        with contextlib.suppress(OSError):
            # Both sides say so, since either may come first: to kill the child's group must never mean this one.
            os.setpgid(self._horse_pid, self._horse_pid)
        ended = self._wait_for_child(kill_after, on_stop)
        self._horse_pid = 0
        return ended

    def _be_child(self, what: str, work: Callable[[], object]) -> None:
        """Do the work and end the process. Does not return."""
        # A deploy sends SIGTERM to every process it can find; the worker decides what becomes of this one.
        # A handler rather than SIG_IGN, which the programs that a job starts would inherit.
        signal.signal(signal.SIGINT, _ignore)
        signal.signal(signal.SIGTERM, _ignore)
        code = 1
        try:
            os.setpgrp()
            self._is_horse = True
            self._horse_pid = os.getpid()
            random.seed()
            database.limit_waiting()
            _watch()
            if outcome := work():
                self.log.info("Worker %s: %s: %s", self.name, what, outcome)
            code = 0
        except BaseException as error:
            # What a job raises has been written down. This is about the database, or the library.
            if isinstance(error, database.MAY_BE_AWAY) and not database.answers():
                self.log.warning("Worker %s: %s: the database does not answer (%s)", self.name, what, error)
                code = EXIT_NO_DATABASE
            else:
                logger.exception("%s was not performed", what)
                code = EXIT_FAILED
        finally:
            with contextlib.suppress(Exception):
                logging.shutdown()
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    def _perform(self, message: Message, attempt: claims.Attempt | None, again_at: float) -> perform.Outcome:
        if attempt is not None:
            return perform.perform(attempt, self._guard)
        return perform.perform_call(message, self.connection, again_at, self._guard)

    @contextlib.contextmanager
    def _guard(self, declared: Declared, attempt: claims.Attempt | None = None) -> Iterator[None]:
        """Around the job's own code: its time limit, and the heartbeat of a claimed row. After it, all is as before."""
        claims.of_this_process = attempt
        heartbeat = claims.Heartbeat(attempt) if attempt is not None else contextlib.nullcontext()
        if attempt is None:
            # A plain call may take as long as its time limit says, and no longer, also when its worker is gone.
            _watch(declared.timeout_seconds + claims.KILL_AFTER.total_seconds())
        try:
            with heartbeat, self.death_penalty_class(declared.timeout_seconds, JobTimeoutException):
                yield
        finally:
            _watch()
            database.begin_anew()
            # A loop that the job has left running would have Django refuse every statement.
            asyncio._set_running_loop(None)

    def _wait_for_child(self, kill_after: float, on_stop: Callable[[], None]) -> tuple[int, int, bool]:
        began = time.monotonic()
        was_killed = was_told = False
        while True:
            pid, status = os.waitpid(self._horse_pid, os.WNOHANG)
            if pid:
                return pid, status, was_killed
            if self._stop_requested and not was_told:
                was_told = True
                try:
                    on_stop()
                except Exception:
                    # As when there are no more processes. Nothing but the child's end may end this: it would go on with
                    # nobody to watch it.
                    logger.exception("Worker %s could not write down that it stops", self.name)
            elapsed = time.monotonic() - began
            if (self._kill_requested and not was_killed) or elapsed > kill_after:
                was_killed = self._kill_requested
                self.kill_horse()
            with contextlib.suppress(Exception):
                self._announce(WorkerStatus.BUSY)
            # Short for short work, so that waiting adds at most a twentieth.
            time.sleep(min(0.05, max(0.0005, elapsed / 20)))

    def _note_stop(self, attempt: claims.Attempt | None) -> None:
        """Write down that this worker stops, since whoever asked for it may lose patience and kill everything.

        In a process of its own, which nobody waits for: the database may hang, and this one has a child to watch.
        """
        if attempt is None or os.fork():
            return
        try:
            database.limit_waiting()
            _watch()
            claims.note_stop(attempt)
        except Exception as error:
            self.log.warning("Worker %s: that it stops could not be written down (%s)", self.name, error)
        finally:
            os._exit(0)

    def _note_death(
        self,
        message: Message,
        attempt: claims.Attempt | None,
        again_at: float,
        pid: int,
        status: int,
        was_killed: bool,
    ) -> None:
        code = os.waitstatus_to_exitcode(status)
        evidence = f"Its process {_ending(status)}."
        self.log.warning("Worker %s: %s: %s", self.name, message.id, evidence)
        if code == claims.EXIT_LEASE_LOST:
            return
        is_away = code == EXIT_NO_DATABASE
        if attempt is None:
            enqueue.redeliver_call(message, self.connection, again_at, message.declared.backoff.delay(1))
        elif code not in (EXIT_NO_DATABASE, EXIT_FAILED):
            if was_killed:
                note = partial(claims.release, attempt)
            elif self._stop_requested:
                note = partial(claims.interrupt, attempt, pid, evidence)
            else:
                note = partial(claims.record_death, attempt, pid, evidence)
            # Whoever insisted has been obeyed.
            self._kill_requested = False
            # In a child too, since the database may hang. If it cannot be written down, the lease runs out, and whoever
            # takes the row next counts the crash.
            _, noted, _ = self._in_child(f"the death of {message.id}", partial(_note, attempt, note), NOTE_SECONDS)
            is_away = noted != 0
        if is_away:
            # The next message would meet the same; what is in the queue had better stay there.
            self._pause(LONGEST_RETRY_SECONDS)

    # --- Signals ------------------------------------------------------------------------------------------------------

    def _install_signal_handlers(self) -> None:
        super()._install_signal_handlers()
        # Whoever started this process may have ignored it, and then nobody is told how a child ends.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def request_stop(self, signum: int, frame: FrameType | None) -> None:
        """Stop after the message in work. Only sets a flag: an exception could lose what was just popped."""
        self._stop_requested = True
        self._shutdown_requested_date = now()
        signal.signal(signal.SIGINT, self.request_force_stop)
        signal.signal(signal.SIGTERM, self.request_force_stop)

    def request_force_stop(self, signum: int, frame: FrameType | None) -> None:
        """Stop at once: end the child and give its row back. A second signal within a second is taken for the first."""
        assert self._shutdown_requested_date is not None
        if (now() - self._shutdown_requested_date).total_seconds() >= 1:
            self._kill_requested = True
