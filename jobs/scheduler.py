"""The tick: what is due in the database goes into Redis. And the process that ticks.

Any number of processes may tick. None is special, and none remembers anything: each tick reads from the schedules what
is due and what is still owed, and asserts it again.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from datetime import datetime
from types import FrameType
from typing import Any

from django.apps import apps
from django.db import close_old_connections, connections, router
from django.db.models import F
from redis import Redis
from rq_scheduler.scheduler import Scheduler as RQScheduler

from jobs import clock, cron, enqueue, queues, registry, switches
from jobs.conf import conf
from jobs.job import Declared
from jobs.message import Message

logger = logging.getLogger("selfheal")

# At most this many claims whose time has come are queued again per tick and job: their sweep brings the others.
DUE_CLAIMS = 1000


def tick() -> list[str]:
    """Queue every run that is due or owed and every claim whose time has come; move what is due in the delayed set.

    Returns the names of the schedules that were pushed. Each part is tried whatever becomes of the others; the first
    error is raised at the end, when all that can be done is done.
    """
    errors: list[Exception] = []
    pushed: list[str] = []

    def attempt(part: Callable[[], Any]) -> None:
        try:
            part()
        except Exception as error:
            errors.append(error)

    attempt(enqueue.move_due)
    attempt(lambda: pushed.extend(_push_schedules(attempt)))
    attempt(lambda: _push_claims(attempt))
    if errors:
        for error in errors[1:]:
            logger.error("A tick met another error: %s", error)
        raise errors[0]
    return pushed


def _push_schedules(attempt: Callable[[Callable[[], Any]], None]) -> list[str]:
    Schedule = apps.get_model("selfheal", "Schedule")
    scheduled = {declared.name: declared for declared in registry.declared() if declared.is_scheduled}
    now = clock.read()
    disabled = _disabled(scheduled.values())

    for schedule in _schedules():
        if schedule.name in scheduled:
            attempt(lambda schedule=schedule: _advance(schedule, scheduled[schedule.name], now, disabled))

    # Taken due or lost since: as long as a run is owed and nobody has claimed it, its message belongs in the queue.
    owed = set(Schedule.objects.owed().filter(name__in=scheduled).values_list("name", flat=True)) - disabled
    if owed:
        owed -= set(apps.get_model("selfheal", "Claim").objects.filter(job__in=owed).values_list("job", flat=True))
    pushed = []
    for name in sorted(owed):

        def push(name: str = name) -> None:
            if enqueue.push_id(queues.get(scheduled[name].queue), name):
                pushed.append(name)

        attempt(push)
    return pushed


def _advance(schedule: Any, declared: Declared, now: datetime, disabled: set[str]) -> None:
    """Take a schedule that is due, and set when it is due next.

    Only one of those who try at the same moment succeeds. What it takes is owed from then on, so that nothing is lost
    when it dies before it has pushed. A schedule that is switched off passes its time by.
    """
    following = cron.next_time(schedule.cron or declared.cron, now)
    if schedule.next_run_at is not None and schedule.next_run_at <= now:
        owed = {} if schedule.name in disabled else {"last_enqueued_at": now}
    elif schedule.next_run_at != following:
        # New, or its cron has changed.
        owed = {}
    else:
        return
    same = type(schedule).objects.filter(pk=schedule.pk, next_run_at=schedule.next_run_at)
    if schedule.next_run_at is None:
        same = type(schedule).objects.filter(pk=schedule.pk, next_run_at__isnull=True)
    same.update(next_run_at=following, **owed)


def _push_claims(attempt: Callable[[Callable[[], Any]], None]) -> None:
    """Queue the claims that are backing off no longer, or whose process has died."""
    due = apps.get_model("selfheal", "Claim").objects.due().order_by(F("next_attempt_at").asc(nulls_first=True))
    if not due.exists():
        return
    declared = registry.declared()
    disabled = _disabled(declared)
    for each in declared:
        if each.name not in disabled:
            attempt(lambda each=each: _push_claims_of(each, due))


def _push_claims_of(declared: Declared, due: Any) -> None:
    pks = list(due.filter(job=declared.name).values_list("object_pk", flat=True)[:DUE_CLAIMS])
    if not pks:
        return
    queue = queues.get(declared.queue)
    if not declared.is_swept:
        enqueue.push_id(queue, declared.name)
        return
    room = declared.limit - queue.count
    queued = enqueue.queued_ids(queue, declared.name)
    ids = [id for pk in pks if (id := declared.id_of(pk).encode()) not in queued]
    enqueue.push_ids(queue, ids[: max(room, 0)])


def _disabled(declared: Iterable[Declared]) -> set[str]:
    """Return the names that must not be pushed: their own switch is on, or that of the job which a sweep feeds."""
    named: dict[str, set[str]] = defaultdict(set)
    for each in declared:
        named[each.name].add(each.name)
        if (job := getattr(each, "job", None)) is not None:
            named[job.name].add(each.name)
    return {name for switch in switches.disabled(named) for name in named[switch]}


def _schedules(using: str | None = None) -> list[Any]:
    """Return the schedules of all that is declared, after creating those that are missing."""
    Schedule = apps.get_model("selfheal", "Schedule")
    names = [declared.name for declared in registry.declared()]
    found = list(Schedule.objects.using(using).filter(name__in=names))
    missing = [Schedule(name=name) for name in names if name not in {schedule.name for schedule in found}]
    if missing:
        Schedule.objects.using(using).bulk_create(missing, ignore_conflicts=True)
    return found + missing


def on_migrate(using: str, **kwargs: Any) -> None:
    """After `migrate`: a schedule for every job and sweep, a switch for every one that can be switched off."""
    Schedule = apps.get_model("selfheal", "Schedule")
    tables = connections[using].introspection.table_names()
    if router.allow_migrate_model(using, Schedule) and Schedule._meta.db_table in tables:
        _schedules(using)
    switches.create_missing(
        (each.name for each in registry.declared() if each.is_scheduled or each.is_swept), using, tables
    )


class Scheduler(RQScheduler):  # type: ignore[misc]
    """The process behind `manage.py rqscheduler`: a tick every `TICK`, whatever `--interval` says.

    It outlives Redis and the database: while one of them is away it says so once, and goes on trying.
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
        trouble = None
        while not self._stop_requested:
            began = time.monotonic()
            try:
                close_old_connections()
                self.enqueue_jobs()
                if trouble:
                    self.log.info("The scheduler ticks again.")
                trouble = None
            except Exception as error:
                # Whatever it is, the next tick starts from the database again.
                if repr(error) != trouble:
                    logger.exception("A tick failed; the next is in %s", conf.TICK)
                trouble = repr(error)
                for connection in connections.all(initialized_only=True):
                    connection.close_if_unusable_or_obsolete()
            if burst:
                return
            while not self._stop_requested and time.monotonic() < began + conf.TICK.total_seconds():
                time.sleep(0.1)
        self.log.info("Scheduler stopped.")

    def enqueue_jobs(self) -> None:
        """Tick once."""
        tick()

    def _install_signal_handlers(self) -> None:
        def stop(signum: int, frame: FrameType | None) -> None:
            # A flag only: an exception here could strike between any two statements of a tick.
            self._stop_requested = True

        signal.signal(signal.SIGINT, stop)
        signal.signal(signal.SIGTERM, stop)
