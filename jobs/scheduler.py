"""The tick: what is due in the database goes into Redis. And the process that ticks.

Any number of processes may tick. None is special, and none remembers anything: each tick reads from the schedules what
is due and what is still owed, and asserts it again.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import time
import traceback
from collections.abc import Iterable, Iterator
from datetime import datetime, timedelta
from types import FrameType
from typing import TYPE_CHECKING, Any

from django.apps import apps
from django.db import connections, router, transaction
from django.db.models import F, Model, Q
from redis import Redis
from redis.exceptions import RedisError, ResponseError
from rq_scheduler.scheduler import Scheduler as RQScheduler

from jobs import clock, cron, database, enqueue, pauses, queues, registry, resolver, switches
from jobs.conf import conf
from jobs.exceptions import Misconfigured
from jobs.job import Declared, Job
from jobs.message import Message, label, row_ids

if TYPE_CHECKING:
    from jobs.models import ClaimQuerySet, Schedule

logger = logging.getLogger("selfheal")

# There while somebody ticks, with the time of the last tick. A hint like all that Redis holds: while it is lost, there
# are more ticks than needed.
TICKED_KEY = "selfheal:ticked"
# For how many TICKs a scheduler that has just ticked is believed to be at it.
TICKS_MISSED = 3

# Whoever finds nobody at it is at it from now on, and the only one for a while. Nobody who ticks says so for more than
# `most`: what says it for ever would keep everybody from it.
STAND_IN = """
local most, left = tonumber(ARGV[3]), redis.call('PTTL', KEYS[1])
if left >= 0 and left <= most then return 0 end
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[1])
return 1
"""

# How long a tick may take.
TICK_SECONDS = 60.0
# How many runs one tick pushes in any case.
AT_ONCE = 20
# A run that nobody took within this time of when it was due was missed.
LATE = timedelta(minutes=1)
# At most this many of the runs that were missed are made up for, where all of them should be.
CAUGHT_UP = 1000

# At most this many claims whose time has come are queued again per tick and job: their sweep brings the others.
DUE_CLAIMS = 1000


class _Errors:
    """The errors of one tick. None of them keeps the rest of it from being done."""

    def __init__(self) -> None:
        self.met: list[Exception] = []
        self._away: list[Redis] = []

    @contextlib.contextmanager
    def kept(self, connection: Redis | None = None) -> Iterator[None]:
        """Go on after an error. A Redis that did not answer is away for the rest of this tick."""
        try:
            yield
        except Exception as error:
            self.met.append(error)
            # What it refuses, such as to push to a list that is broken, it has answered.
            if connection and isinstance(error, RedisError) and not isinstance(error, ResponseError):
                self._away.append(connection)

    def is_away(self, connection: Redis) -> bool:
        return any(each is connection for each in self._away)

    def raise_met(self) -> None:
        if len(self.met) == 1:
            raise self.met[0]
        if self.met:
            raise ExceptionGroup("Several parts of a tick failed", self.met)


def tick() -> list[str]:
    """Queue every run that is due or owed and every claim whose time has come; move what is due in the delayed set.

    Returns the names of the schedules that were pushed. What fails is raised at the end, when all that can be done is
    done. One Redis that is away is asked once, and holds up no other.
    """
    errors = _Errors()
    pushed: list[str] = []
    with errors.kept():
        for connection in queues.connections():
            with errors.kept(connection):
                queues.repair(connection)
                enqueue.move_due(connection)
                enqueue.drop_overlong(connection)
                enqueue.find_lost_calls(connection)
    with errors.kept():
        _take_due(errors)
    with errors.kept():
        pushed = _push_owed(errors)
    with errors.kept():
        _push_claims(errors)
    errors.raise_met()
    return pushed


def stands_in(connection: Redis) -> bool:
    """Whether a worker is to tick now, since no scheduler runs, or it hangs. True for one of those who ask."""
    arguments = [_milliseconds(conf.TICK), clock.timestamp(), _milliseconds(conf.TICK * TICKS_MISSED)]
    return bool(enqueue.run_script(connection, STAND_IN, [TICKED_KEY], arguments))


def _milliseconds(duration: timedelta) -> int:
    return max(1, int(duration.total_seconds() * 1000))


def _take_due(errors: _Errors) -> None:
    """Take the schedules that are due, and end the pauses that are over.

    What is taken is owed from then on, whatever becomes of this process.
    """
    now = clock.read()
    schedules = _schedules()
    with errors.kept():
        pauses.end_due(schedules, now)
    for schedule in schedules:
        declared = registry.get(schedule.name)
        if declared is not None and declared.cron is not None:
            with errors.kept():
                _advance(schedule, schedule.cron or declared.cron, now, declared.missed)


def _advance(schedule: Schedule, expression: str, now: datetime, missed: str) -> None:
    """Set when the schedule is due next, and owe a run if it is due now, to be pushed once it is not switched off.

    Of those who try at the same moment one succeeds: the statement asks again for what was read.
    """
    try:
        following = cron.next_time(expression, now)
    except Exception as error:
        raise Misconfigured(f"{schedule} cannot be scheduled: {cron.problem(expression) or error}") from error
    changes: dict[str, Any] = {"next_run_at": following}
    if schedule.next_run_at is not None and schedule.next_run_at <= now:
        if due := _due(schedule.next_run_at, expression, now, missed):
            changes.update(due_runs=F("due_runs") + due, last_enqueued_at=now)
    elif schedule.next_run_at == following:
        return
    # Otherwise it is new, or its cron has changed.
    as_read = Q(next_run_at=schedule.next_run_at) if schedule.next_run_at else Q(next_run_at__isnull=True)
    mine = type(schedule).objects.filter(as_read, pk=schedule.pk)
    using = router.db_for_write(type(schedule))
    with transaction.atomic(using):
        # One that somebody keeps locked is left for the next tick, and keeps no other waiting.
        if connections[using].features.has_select_for_update_skip_locked:
            mine = mine.filter(pk__in=list(mine.select_for_update(skip_locked=True).values_list("pk", flat=True)))
        mine.update(**changes)


def _due(since: datetime, expression: str, now: datetime, missed: str) -> int:
    """Return how many runs are to be made of the times that have come due since then."""
    if missed == "skip":
        return int(since > now - LATE or cron.next_time(expression, now - LATE) <= now)
    return cron.count_until(expression, since, now, CAUGHT_UP) if missed == "all" else 1


def _push_owed(errors: _Errors) -> list[str]:
    """Queue each run that is owed and that nobody has claimed, unless it is queued; return the names pushed.

    Just taken or lost since: there is no need to know.
    """
    declared = {each.name: each for each in registry.declared() if each.is_scheduled}
    Schedule = apps.get_model("selfheal", "Schedule")
    waiting = (
        Schedule.objects.owed().filter(name__in=declared).order_by(F("last_started_at").asc(nulls_first=True), "name")
    )
    owed = list(waiting.values_list("name", flat=True))
    if not owed:
        return []
    claimed = apps.get_model("selfheal", "Claim").objects.filter(model=label(Schedule), job__in=owed)
    # Most sweeps come due at the same second. Many of them are spread over their minute, in the order in which they
    # last ran: it stays a minute from one run of each to the next, and what comes due often does not go first.
    share = max(AT_ONCE, math.ceil(len(declared) * conf.TICK / timedelta(minutes=1)))
    pushed = []
    left = _disabled(declared.values()) | set(claimed.values_list("job", flat=True))
    for name in (name for name in owed if name not in left):
        queue = queues.get(declared[name].queue)
        if errors.is_away(queue.connection):
            continue
        with errors.kept(queue.connection):
            if enqueue.push_id(queue, name):
                pushed.append(name)
        if len(pushed) >= share:
            break
    return pushed


def _push_claims(errors: _Errors) -> None:
    """Queue the claims that are backing off no longer, or whose process has died."""
    due = apps.get_model("selfheal", "Claim").objects.due().order_by(F("next_attempt_at").asc(nulls_first=True))
    names = set(due.order_by().values_list("job", flat=True).distinct())
    if not names:
        return
    declared = [each for name in sorted(names) if (each := registry.get(name)) is not None]
    disabled = _disabled(declared)
    for each in declared:
        connection = queues.get(each.queue).connection
        if each.name not in disabled and not errors.is_away(connection):
            with errors.kept(connection):
                _push_claims_of(each, due)


def _push_claims_of(declared: Declared, due: ClaimQuerySet) -> None:
    # Others are left from before the job was given another model, or its sweep was taken from it.
    due = due.filter(job=declared.name, model=label(declared.model))
    queue = queues.get(declared.queue)
    if not (isinstance(declared, Job) and declared.sweep):
        if declared.is_scheduled and due.exists():
            enqueue.push_id(queue, declared.name)
        return
    queued = enqueue.queued_ids(queue, declared.name)
    room = declared.sweep.effective_limit() - len(queued)
    pks = due.values_list("object_pk", flat=True)[:DUE_CLAIMS]
    ids = [id for id in row_ids(declared.name, pks) if id not in queued]
    enqueue.push_ids(queue, ids[: max(room, 0)])


def _disabled(declared: Iterable[Declared]) -> set[str]:
    """Return the names that must not be pushed: their own switch is on, or that of the job which a sweep feeds."""
    declared = list(declared)
    on = switches.disabled({name for each in declared for name in each.switches})
    return {each.name for each in declared if each.switches & on}


def _schedules(using: str | None = None) -> list[Schedule]:
    """Return the schedules of all that is declared, after creating those that are missing."""
    Schedule = apps.get_model("selfheal", "Schedule")
    names = [declared.name for declared in registry.declared()]
    found = list(Schedule.objects.using(using).filter(name__in=names))
    missing = [Schedule(name=name) for name in names if name not in {schedule.name for schedule in found}]
    if missing:
        Schedule.objects.using(using).bulk_create(missing, ignore_conflicts=True)
    return found + missing


def on_migrate(using: str, **kwargs: Any) -> None:
    """After `migrate`: a schedule for every job and sweep, a switch for every one that can be switched off.

    Not in tables that are not of today: this may be the migration of another app, or the way back to an older one.
    """
    if _has_tables_of_today(using, apps.get_model("selfheal", "Schedule")):
        _schedules(using)
    if _has_tables_of_today(using, switches.model()):
        switches.create_missing((each.name for each in registry.declared() if each.has_switch), using)


def _has_tables_of_today(using: str, model: type[Model]) -> bool:
    """Whether the model's table in this database has every column that the model has.

    The database is asked and not the migrations: they may be faked, squashed, or not used at all.
    """
    connection, table = connections[using], model._meta.db_table
    if not router.allow_migrate_model(using, model) or table not in connection.introspection.table_names():
        return False
    with connection.cursor() as cursor:
        columns = {column.name for column in connection.introspection.get_table_description(cursor, table)}
    return columns >= {field.column for field in model._meta.concrete_fields}


class Scheduler(RQScheduler):
    """The process behind `manage.py rqscheduler`: a tick every `TICK`, whatever `--interval` says.

    It outlives Redis and the database: while one of them is away it says so once, and goes on trying. Each tick is made
    in a child, which is ended when it takes too long.
    """

    job_class = Message
    queue_class = queues.Queue

    def __init__(self, *args: Any, connection: Redis | None = None, **kwargs: Any) -> None:
        super().__init__(*args, connection=connection, **kwargs)
        self._stop_requested = False

    def run(self, burst: bool = False) -> None:
        """Tick until SIGTERM or SIGINT, which end it between two ticks. With `burst`, tick once."""
        self._install_signal_handlers()
        self.log.info("Scheduler started with PID %d, ticking every %s", os.getpid(), conf.TICK)
        if burst:
            self.enqueue_jobs()
            return
        trouble = ""
        while not self._stop_requested:
            began = time.monotonic()
            try:
                met = self._tick(trouble)
            except OSError as error:
                # No process or file is to be had.
                if (met := repr(error)) != trouble:
                    logger.exception("A tick failed; the next is in %s", conf.TICK)
            if trouble and not met:
                self.log.info("The scheduler ticks again.")
            trouble = met
            while not self._stop_requested and time.monotonic() < began + conf.TICK.total_seconds():
                time.sleep(0.1)
        self.log.info("Scheduler stopped.")

    def _tick(self, known: str) -> str:
        """Tick in a child, and return what went wrong, or nothing. What is known is not said again."""
        # Connections that two processes share break in both.
        database.disconnect()
        reading, writing = os.pipe()
        try:
            pid = os.fork()
        except OSError:
            os.close(reading)
            os.close(writing)
            raise
        if pid == 0:
            self._tick_and_end(writing)
        os.close(writing)
        deadline = time.monotonic() + TICK_SECONDS
        while not (ended := os.waitpid(pid, os.WNOHANG))[0] and time.monotonic() < deadline:
            if self._stop_requested:
                # Whatever it is at, the next one begins anew.
                deadline = min(deadline, time.monotonic() + 1)
            time.sleep(0.02)
        if not ended[0]:
            os.kill(pid, signal.SIGKILL)
            ended = os.waitpid(pid, 0)
        with os.fdopen(reading, errors="replace") as pipe:
            met, _, trace = pipe.read().partition("\n")
        if ended[1] and not met:
            met = f"It ended with exit code {os.waitstatus_to_exitcode(ended[1])}."
        if met and met != known:
            logger.error("A tick failed; the next is in %s\n%s", conf.TICK, trace or met)
        return met

    def _tick_and_end(self, writing: int) -> None:
        """Tick, write down what went wrong, and end this process. Does not return."""
        said = ""
        try:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            database.limit_waiting()
            # What a name server says is gone with this process, so the next one would know no more. A resolver waits
            # for five seconds before it asks another server.
            resolver.patience = 10
            self.enqueue_jobs()
        except BaseException as error:
            # Whatever it is, the next tick starts from the database again.
            said = f"{error!r}".replace("\n", " ") + "\n" + traceback.format_exc()
        finally:
            with contextlib.suppress(Exception):
                # As much as a pipe holds that nobody reads yet.
                os.write(writing, said.encode(errors="replace")[:60_000])
                logging.shutdown()
            os._exit(int(bool(said)))

    def enqueue_jobs(self) -> None:
        """Tick once, and have the workers know that it is done. One that could not is not believed to be at it."""
        tick()
        for connection in queues.connections():
            connection.set(TICKED_KEY, clock.timestamp(), px=_milliseconds(conf.TICK * TICKS_MISSED))

    def _install_signal_handlers(self) -> None:
        def stop(signum: int, frame: FrameType | None) -> None:
            # A flag only: an exception here could strike between any two statements of a tick.
            self._stop_requested = True

        signal.signal(signal.SIGINT, stop)
        signal.signal(signal.SIGTERM, stop)
