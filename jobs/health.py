"""How it is going: everything that the pages, the command line, the probes and the metrics say, read at once.

It only reads. Whatever does not answer is said not to, within a second, and all the rest is there all the same.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal, cast

from django.apps import apps
from django.db import Error as DatabaseError
from django.db import connections, router
from django.db.models import Count, Q, QuerySet, Sum
from django.utils import timezone
from django.utils.translation import gettext as _
from django.utils.translation import ngettext
from redis import Redis
from redis.exceptions import RedisError
from rq import worker_registration
from rq.worker import Worker as RQWorker

from jobs import clock, cron, pauses, queues, registry, switches, tallies
from jobs.claims import split_holder
from jobs.conf import conf, redacted
from jobs.job import Declared
from jobs.models import is_left_behind
from jobs.pauses import Pause
from jobs.scheduler import LATE, TICKED_KEY, TICKS_MISSED
from jobs.sweep import Sweep, SweepResult
from jobs.tallies import FAILURES

if TYPE_CHECKING:
    from jobs.models import Schedule

# How long every Redis together may take to answer.
PATIENCE = timedelta(milliseconds=700)
# Of how many whole hours, and the one that is not over, the outcomes are shown.
HOURS = 23
# So many workers and attempts are shown by name.
SHOWN = 200
# Fewer failures than that are no more than bad luck.
FEW = 3
# Fewer successes than that after which the row still needed work may be users who were quicker.
MANY = 10

Kind = Literal["sweep", "swept", "cron", "plain"]
Severity = Literal["critical", "warning", "notice"]
SEVERITIES: tuple[Severity, ...] = ("critical", "warning", "notice")


@dataclass(frozen=True)
class Problem:
    """What is wrong, in a sentence, and what to do about it. `code` names its kind, `about` the job or queue."""

    severity: Severity
    code: str
    about: str
    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.what} {self.remedy}"


@dataclass(frozen=True)
class Server:
    """A database, or a Redis: whether it answers, and if not, what was said instead."""

    name: str
    trouble: str = ""

    @property
    def is_up(self) -> bool:
        return not self.trouble


@dataclass(frozen=True)
class Queue:
    """A queue. What is None could not be asked. `used_by` are the declared jobs and sweeps that run in it."""

    name: str
    depth: int | None
    workers: int | None
    used_by: list[str]


@dataclass
class Worker:
    """A worker that Redis has heard of lately, or that holds a lease."""

    name: str
    host: str
    pid: int | None
    queues: list[str]
    state: str
    last_heartbeat_at: datetime | None
    works_on: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Ticking:
    """Whether anybody ticks. Redis tells when that was last; while it does not, the schedules do, to the minute."""

    is_alive: bool
    last_tick_at: datetime | None
    next_run_at: datetime | None


@dataclass
class Item:
    """One declared job or sweep. Times are in seconds, and estimated: see `jobs.tallies.quantile`.

    `feeds` is a sweep's job; `last_sweep` is what the last one found, of a job that is fed what its sweep did.
    `still_needed` are those successes of the last hour after which the row still needed the work.
    `outcomes` are those of the last hour, `done` and `failed` counts of each of the last 24, the latest last.
    """

    name: str
    kind: Kind
    queue: str
    feeds: str = ""
    pause: Pause | None = None
    cron: str = ""
    next_run_at: datetime | None = None
    last_started_at: datetime | None = None
    last_finished_at: datetime | None = None
    last_succeeded_at: datetime | None = None
    last_outcome: str = ""
    last_sweep: dict[str, int] = field(default_factory=dict)
    leased: int = 0
    due: int = 0
    backing_off: int = 0
    quarantined: int = 0
    outcomes: dict[str, int] = field(default_factory=dict)
    done: list[int] = field(default_factory=lambda: [0] * (HOURS + 1))
    failed: list[int] = field(default_factory=lambda: [0] * (HOURS + 1))
    still_needed: int = 0
    took_median: float | None = None
    took_p99: float | None = None
    settled_median: float | None = None
    settled_p99: float | None = None
    is_late: bool = False

    @property
    def state(self) -> str:
        """In a word, how it is: paused, failed, late, failing, in vain, in quarantine (some of its rows), or well."""
        if self.pause is not None:
            return "paused"
        # Of a cron job, a run that is to be tried again has a claim meanwhile.
        is_tried_again = self.kind == "cron" and (self.leased or self.due or self.backing_off)
        if self.last_outcome in FAILURES and not is_tried_again:
            return "failed"
        if self.is_late:
            return "late"
        # A row whose last attempt failed has a claim. Where there is none, what failed has been mended since.
        is_settled = self.kind == "swept" and not (self.leased or self.due or self.backing_off or self.quarantined)
        # So of those of a sweep. Of a cron job it may be a call of its own that failed.
        is_mended = is_settled or (self.kind == "sweep" and self.last_outcome == "done")
        if self.failures >= FEW and self.failures * 2 > self.attempts and not is_mended:
            return "failing"
        if self.is_in_vain:
            return "in vain"
        return "quarantined" if self.quarantined else "well"

    @property
    def is_in_vain(self) -> bool:
        """Whether most successes leave their row in need of work. Where no row is, that has been mended since."""
        most = self.still_needed >= MANY and self.still_needed * 2 > self.outcomes.get("done", 0)
        return most and self.last_sweep.get("matched", 0) > 0

    @property
    def last_took(self) -> float | None:
        """How long its last run took; None while the next is at work, and before the first has ended."""
        if (
            self.last_started_at is None
            or self.last_finished_at is None
            or self.last_finished_at < self.last_started_at
        ):
            return None
        return (self.last_finished_at - self.last_started_at).total_seconds()

    @property
    def attempts(self) -> int:
        """How many attempts ended within the last hour."""
        return sum(self.outcomes.values())

    @property
    def failures(self) -> int:
        """How many of those failed."""
        return sum(self.outcomes.get(each, 0) for each in FAILURES)


@dataclass(frozen=True)
class Health:
    """All of it, at one moment. `problems` are ordered, the worst first. No job works off what is `left_behind`."""

    at: datetime
    problems: list[Problem]
    items: list[Item]
    queues: list[Queue]
    delayed: int | None
    workers: list[Worker]
    ticking: Ticking
    database: Server
    redis: list[Server]
    left_behind: int = 0

    @property
    def is_well(self) -> bool:
        """Whether there is nothing that somebody should do."""
        return not any(problem.severity != "notice" for problem in self.problems)

    def as_dict(self) -> dict[str, Any]:
        """Return all of it as what JSON takes: times in ISO 8601."""
        return {"is_well": self.is_well, **_plain(dataclasses.asdict(self))}


def read() -> Health:
    """Read how it is going. Does not raise when a server is away; a database that hangs, it waits for."""
    answers = _ask_redis()
    ticked_at = max((each.ticked_at for each in answers if each.ticked_at), default=None)
    workers = {worker.name: worker for answer in answers for worker in answer.workers}
    declared = registry.declared()
    items = {each.name: Item(each.name, _kind(each), each.queue) for each in declared}
    now, trouble, ticking, left_behind = timezone.now(), "", Ticking(False, ticked_at, None), 0
    try:
        now = clock.read()
        ticking = _read_schedules(items, declared, ticked_at, now)
        left_behind = _read_claims(items, workers)
        _read_tallies(items, now)
    except DatabaseError as error:
        trouble = redacted(error)
    database = Server(connections[_database()].display_name, trouble)
    depths = {name: depth for answer in answers for name, depth in answer.depths.items()}
    delayed = [answer.delayed for answer in answers if answer.delayed is not None]
    found = Health(
        at=now,
        problems=[],
        items=[*items.values()],
        queues=[_queue(name, depths.get(name), answers, declared) for name in queues.names()],
        delayed=sum(delayed) if delayed else None,
        workers=sorted(workers.values(), key=lambda worker: (worker.host, worker.pid or 0, worker.name)),
        ticking=ticking,
        database=database,
        redis=[answer.server for answer in answers],
        left_behind=left_behind,
    )
    found.problems.extend(sorted(_problems(found), key=lambda problem: SEVERITIES.index(problem.severity)))
    return found


# --- What the database says -------------------------------------------------------------------------------------------


def _kind(declared: Declared) -> Kind:
    if isinstance(declared, Sweep):
        return "sweep"
    return "swept" if declared.is_swept else "cron" if declared.is_scheduled else "plain"


def _read_schedules(
    items: dict[str, Item], declared: list[Declared], ticked_at: datetime | None, now: datetime
) -> Ticking:
    Schedule = apps.get_model("selfheal", "Schedule")
    schedules = {schedule.name: schedule for schedule in Schedule.objects.filter(name__in=items)}
    since = switches.disabled_since(items)
    for each in declared:
        item, schedule = items[each.name], schedules.get(each.name)
        if off := sorted(each.switches & since.keys(), key=lambda name: name != each.name):
            item.pause = pauses.describe(off[0], since[off[0]], schedules.get(off[0]))
        if schedule is None:
            continue
        item.cron = schedule.cron or each.cron or ""
        for name in ("next_run_at", "last_started_at", "last_finished_at", "last_succeeded_at", "last_outcome"):
            setattr(item, name, getattr(schedule, name))
        if isinstance(each, Sweep):
            item.feeds = each.job.name
            item.last_sweep = {name: getattr(schedule, name) for name in SweepResult._fields}
            items[item.feeds].last_sweep = item.last_sweep
        item.is_late = item.pause is None and each.is_scheduled and _is_late(schedule, item.cron, now)
    coming = [item.next_run_at for item in items.values() if item.cron and item.next_run_at]
    taken = [each.last_enqueued_at for each in schedules.values() if each.last_enqueued_at]
    overdue = not coming or min(coming) < now - TICKS_MISSED * conf.TICK
    # What is believed of Redis is only what could be so: it forgets a tick when the next ones have been missed.
    lately = ticked_at is not None and -LATE < now - ticked_at < TICKS_MISSED * conf.TICK + LATE
    return Ticking(
        is_alive=lately or not overdue,
        last_tick_at=ticked_at or max(taken, default=None),
        next_run_at=min(coming, default=None),
    )


def _is_late(schedule: Schedule, expression: str, now: datetime) -> bool:
    """Whether it has not succeeded for two of its intervals; a minute is granted in any case."""
    succeeded_at = schedule.last_succeeded_at
    if succeeded_at is None:
        # One that is new has had no chance yet.
        return schedule.due_runs > 2 and schedule.last_outcome != "done"
    if succeeded_at > now - LATE:
        # As most have. To read a cron expression takes longer than all the rest.
        return False
    try:
        return cron.next_time(expression, cron.next_time(expression, succeeded_at)) < now - LATE
    except Exception:
        # Such an expression the tick complains about; it comes due no more.
        return True


def unsettled() -> dict[str, Counter[str]]:
    """Return for each job how many of its claims are leased, due, backing off and quarantined. One query.

    Those that no job works off are `left_behind`. A quarantined row that needs nothing at present is not counted.
    """
    now = clock.now()
    leased = Q(lease_key__isnull=False, lease_expires_at__gt=now)
    aside, waits = Q(quarantined_at__isnull=False), Q(next_attempt_at__gt=now)
    # Of a condition on what may be NULL, SQL does not know the opposite.
    free, may_go = Q(lease_key__isnull=True) | Q(lease_expires_at__lte=now), Q(quarantined_at__isnull=True)
    in_time = Q(next_attempt_at__isnull=True) | Q(next_attempt_at__lte=now)
    by_job = (
        apps.get_model("selfheal", "Claim")
        .objects.values("job", "model")
        .annotate(
            leased=Count("pk", filter=leased),
            backing_off=Count("pk", filter=free & may_go & waits),
            quarantined=Count("pk", filter=free & aside & Q(unmatched_since__isnull=True)),
            due=Count("pk", filter=free & may_go & in_time),
            all=Count("pk"),
        )
    )
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for row in cast(Any, by_job.order_by()):
        job, total = row.pop("job"), row.pop("all")
        left_behind = is_left_behind(job, row.pop("model"))
        counts[job].update({"left_behind": total} if left_behind else row)
    return counts


def _read_claims(items: dict[str, Item], workers: dict[str, Worker]) -> int:
    """Count them for each job, name who holds them, and return how many no job works off."""
    by_job = unsettled()
    for name in by_job.keys() & items.keys():
        item, counts = items[name], by_job[name]
        item.leased, item.due = counts["leased"], counts["due"]
        item.backing_off, item.quarantined = counts["backing_off"], counts["quarantined"]
    claims = apps.get_model("selfheal", "Claim").objects.filter(lease_key__isnull=False)
    for claim in claims.filter(lease_expires_at__gt=clock.now()).order_by("leased_at")[:SHOWN]:
        name, host, pid = split_holder(claim.holder)
        renewed_at = claim.lease_expires_at and claim.lease_expires_at - conf.LEASE
        # Redis may not know of it: the queue is a hint, and so is who serves it.
        worker = workers.setdefault(name, Worker(name, host, pid, [], "busy", renewed_at))
        worker.works_on.append(f"{claim.job}: {claim.model} {claim.object_pk}")
    return sum(counts["left_behind"] for counts in by_job.values())


def _read_tallies(items: dict[str, Item], now: datetime) -> None:
    first, recent = tallies.last(HOURS, now), tallies.last(1, now)
    Tally = apps.get_model("selfheal", "Tally")
    within: QuerySet[Any] = Tally.objects.using(_database()).filter(hour__gte=first).order_by()
    for row in within.values("hour", "job", "outcome").annotate(runs=Sum("runs")):
        if item := items.get(row["job"]):
            place = (row["hour"] - first) // tallies.HOUR
            if row["outcome"] == "done":
                item.done[place] += row["runs"]
            elif row["outcome"] in FAILURES:
                item.failed[place] += row["runs"]
            if row["hour"] >= recent:
                item.outcomes[row["outcome"]] = item.outcomes.get(row["outcome"], 0) + row["runs"]
    for name, (took, settled) in tallies.histograms(within, "took", "settled_after").items():
        if item := items.get(name):
            item.took_median, item.took_p99 = tallies.quantile(took, 0.5), tallies.quantile(took, 0.99)
            item.settled_median, item.settled_p99 = tallies.quantile(settled, 0.5), tallies.quantile(settled, 0.99)
    # Of a success, only one whose row still needed work has anything to say.
    in_vain = within.filter(hour__gte=recent, outcome="done").exclude(fingerprint="")
    for name, runs in in_vain.values_list("job").annotate(Sum("runs")):
        if item := items.get(name):
            item.still_needed = runs


def _database() -> str:
    return router.db_for_write(apps.get_model("selfheal", "Claim"))


# --- What Redis says --------------------------------------------------------------------------------------------------


@dataclass
class _Answer:
    """What one Redis said."""

    server: Server
    names: list[str]
    depths: dict[str, int] = field(default_factory=dict)
    delayed: int | None = None
    ticked_at: datetime | None = None
    workers: list[Worker] = field(default_factory=list)


def _ask_redis() -> list[_Answer]:
    """Ask each Redis once, all of them at the same time, and wait for none longer than `PATIENCE`."""
    served: dict[Redis, list[str]] = {}
    for name in queues.names():
        served.setdefault(queues.get(name).connection, []).append(name)
    if not served:
        return []
    # In threads, since nothing else bounds the whole of a connection: a name that is looked up, a slow greeting.
    threads = ThreadPoolExecutor(len(served), thread_name_prefix="selfheal-health")
    asked = {threads.submit(_ask, connection, names): (connection, names) for connection, names in served.items()}
    wait(asked, PATIENCE.total_seconds())
    threads.shutdown(wait=False)
    late = _("It did not answer within %(seconds)s s.") % {"seconds": PATIENCE.total_seconds()}
    return [
        future.result() if future.done() else _Answer(Server(_address(connection), late), names)
        for future, (connection, names) in asked.items()
    ]


def _ask(connection: Redis, names: list[str]) -> _Answer:
    answer = _Answer(Server(_address(connection)), names)
    try:
        with connection.pipeline(transaction=False) as pipeline:
            for name in names:
                pipeline.llen(queues.get(name).key)
            pipeline.zcard(queues.DELAYED_KEY)
            pipeline.get(TICKED_KEY)
            pipeline.smembers(worker_registration.REDIS_WORKER_KEYS)
            *depths, delayed, ticked, keys = answers = pipeline.execute(raise_on_error=False)
        if all(isinstance(each, RedisError) for each in answers):
            # It lets nobody in, or is loading its data.
            raise answers[0]
        with connection.pipeline(transaction=False) as pipeline:
            for key in sorted(keys)[:SHOWN] if isinstance(keys, set) else ():
                pipeline.hgetall(key)
            registered = pipeline.execute(raise_on_error=False)
    except Exception as error:
        return _Answer(Server(_address(connection), redacted(error)), names)
    # What stands where something else belongs, the next tick repairs.
    answer.depths = {name: depth for name, depth in zip(names, depths, strict=True) if isinstance(depth, int)}
    answer.delayed = delayed if isinstance(delayed, int) else None
    answer.ticked_at = queues.moment(ticked)
    found = (_worker(sorted(keys)[place], each) for place, each in enumerate(registered) if isinstance(each, dict))
    answer.workers = [worker for worker in found if worker is not None]
    return answer


def _worker(key: bytes, stored: dict[bytes, bytes]) -> Worker | None:
    """Return the worker that rq's hash describes; None when it has expired."""
    text = {name.decode(): value.decode("utf-8", "replace") for name, value in stored.items()}
    if "queues" not in text:
        return None
    pid = text.get("pid", "")
    return Worker(
        name=key.decode("utf-8", "replace").removeprefix(RQWorker.redis_worker_namespace_prefix),
        host=text.get("hostname", ""),
        pid=int(pid) if pid.isdigit() else None,
        queues=text["queues"].split(","),
        state=text.get("state", ""),
        last_heartbeat_at=queues.moment(text.get("last_heartbeat")),
    )


def _address(connection: Redis) -> str:
    options = connection.connection_pool.connection_kwargs
    return f"Redis {options.get('host') or options.get('path') or ''}:{options.get('port', '')}".rstrip(":")


def _queue(name: str, depth: int | None, answers: list[_Answer], declared: list[Declared]) -> Queue:
    answer = next(each for each in answers if name in each.names)
    serving = sum(name in worker.queues for worker in answer.workers) if answer.server.is_up else None
    return Queue(name, depth, serving, [each.name for each in declared if each.queue == name])


# --- What is wrong ----------------------------------------------------------------------------------------------------


def _problems(health: Health) -> Iterator[Problem]:
    if not health.database.is_up:
        what = _("The database does not answer: %(trouble)s.") % {"trouble": health.database.trouble.rstrip(".")}
        yield Problem(
            "critical", "database", "", what, _("Start it. Nothing is performed until it does; none is lost.")
        )
    for server in health.redis:
        if not server.is_up:
            what = _("%(server)s does not answer: %(trouble)s.") % {
                "server": server.name,
                "trouble": server.trouble.rstrip("."),
            }
            remedy = _("Start it, or correct RQ_QUEUES. Nothing is performed until it answers; rows are not lost.")
            yield Problem("critical", "redis", "", what, remedy)
    if health.database.is_up:
        yield from _ticking_problems(health)
    for queue in health.queues:
        yield from _queue_problems(queue)
    for item in health.items:
        yield from _item_problems(item, health)
    if health.left_behind:
        what = ngettext(
            "%(count)d claim is of a job that is gone, or works on rows of another model now.",
            "%(count)d claims are of jobs that are gone, or work on rows of another model now.",
            health.left_behind,
        )
        remedy = _("Release them or queue them now, which removes them, or leave that to selfheal_prune.")
        yield Problem("notice", "left_behind", "", what % {"count": health.left_behind}, remedy)


def _ticking_problems(health: Health) -> Iterator[Problem]:
    if health.ticking.is_alive:
        return
    if at := health.ticking.next_run_at:
        what = _("Nobody ticks: what came due %(ago)s ago was not taken.") % {"ago": duration(health.at - at)}
    else:
        what = _("Nobody has ticked yet.")
    remedy = _("Start manage.py rqscheduler, or a worker, which stands in for it.")
    yield Problem("critical", "ticking", "", what, remedy)


def _queue_problems(queue: Queue) -> Iterator[Problem]:
    if queue.workers != 0 or not (queue.depth or queue.used_by):
        return
    if queue.depth:
        what = ngettext(
            "No worker serves the queue %(name)s, although %(depth)d job waits in it.",
            "No worker serves the queue %(name)s, although %(depth)d jobs wait in it.",
            queue.depth,
        )
    else:
        what = _("No worker serves the queue %(name)s.")
    remedy = _("Start manage.py rqworker %(name)s.")
    names = {"name": queue.name, "depth": queue.depth}
    yield Problem("critical" if queue.depth else "warning", "worker", queue.name, what % names, remedy % names)


def _item_problems(item: Item, health: Health) -> Iterator[Problem]:
    names = {"name": item.name}
    if item.state == "failed":
        what = _("%(name)s failed when it last ran.") % names
        yield Problem("warning", "failed", item.name, what, _("See its error among the failures, and mend that."))
    if item.state == "late" and not _is_late_for_a_reason(item, health):
        what = _("%(name)s has not succeeded for two of its intervals.") % names
        yield Problem("warning", "late", item.name, what, _("See whether a worker is free for its queue."))
    if item.quarantined:
        what = ngettext(
            "%(count)d row of %(name)s is in quarantine.",
            "%(count)d rows of %(name)s are in quarantine.",
            item.quarantined,
        )
        remedy = _("Find out why, then release them.")
        yield Problem("warning", "quarantined", item.name, what % {**names, "count": item.quarantined}, remedy)
    if item.state == "failing":
        what = _("%(failures)d of the last %(attempts)d attempts of %(name)s failed.")
        counts = {**names, "failures": item.failures, "attempts": item.attempts}
        yield Problem("warning", "failing", item.name, what % counts, _("See its error among the failures."))
    if item.is_in_vain:
        what = _("%(name)s succeeds, and its rows still need work: %(count)d times of %(done)d within the last hour.")
        counts = {**names, "count": item.still_needed, "done": item.outcomes.get("done", 0)}
        remedy = _("Have it change the row so that its sweep does not match, or raise if it cannot do the work yet.")
        yield Problem("warning", "in_vain", item.name, what % counts, remedy)
    if item.pause is not None:
        yield Problem("notice", "paused", item.name, _paused(item, item.pause), _("Resume it when that is over."))


def _is_late_for_a_reason(item: Item, health: Health) -> bool:
    """Whether what keeps it from running has been said already: one line for the cause, and not a dozen beside it."""
    without_workers = {queue.name for queue in health.queues if queue.workers == 0}
    all_redis_up = all(server.is_up for server in health.redis)
    return not (health.ticking.is_alive and all_redis_up) or item.queue in without_workers


def _paused(item: Item, pause: Pause) -> str:
    parts = [_("%(name)s is paused since %(time)s") % {"name": item.name, "time": _local(pause.since)}]
    if pause.until:
        parts.append(_("until %(time)s") % {"time": _local(pause.until)})
    if pause.by:
        parts.append(_("by %(user)s") % {"user": pause.by})
    return " ".join(parts) + (f": {pause.reason.rstrip('.')}." if pause.reason else ".")


def _local(moment: datetime) -> str:
    return f"{timezone.localtime(moment) if timezone.is_aware(moment) else moment:%Y-%m-%d %H:%M %Z}".strip()


def duration(time: timedelta | float) -> str:
    """Write a duration in one unit, as short as it is still clear: 340 ms, 12 s, 3 min, 5 h, 2 d."""
    seconds = time.total_seconds() if isinstance(time, timedelta) else time
    if seconds < 1:
        return _("%(n)d ms") % {"n": max(0, round(seconds * 1000))}
    if seconds < 10:
        return _("%(n).1f s") % {"n": seconds}
    for up_to, unit, text in ((120, 1, _("%(n)d s")), (7200, 60, _("%(n)d min")), (172_800, 3600, _("%(n)d h"))):
        if seconds < up_to:
            return text % {"n": seconds / unit}
    return _("%(n)d d") % {"n": seconds / 86400}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value.isoformat() if isinstance(value, datetime) else value
