"""Why a row is not ready: all that stands between it and its job, looked at in order, and what mends it.

Everything is asked of the database, which knows, and where an id is in the queue of Redis, which may be away. Nothing
here changes anything.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, NamedTuple

from django.db import transaction
from django.utils import timezone
from django.utils.formats import date_format
from django.utils.timesince import timesince
from django.utils.translation import gettext as _
from django.utils.translation import ngettext
from redis.exceptions import RedisError
from rq import worker_registration

from jobs import clock, enqueue, pauses, queues, registry
from jobs.conf import conf, redacted
from jobs.job import Job
from jobs.message import label, pk_text, pk_value, row_id
from jobs.models import Claim, Run, Schedule
from jobs.pauses import Pause
from jobs.scheduler import LATE
from jobs.sweep import Sweep

State = Literal["fine", "waiting", "problem"]
Remedy = Literal["", "queue_now", "release", "resume", "run_sweep"]

RUNS = 20
# After how many successes in a row that left it as it was a row has a problem.
IN_VAIN = 3
# How many rows that need work are counted.
COUNTED = 10_000
# How many runs a sweep may be behind before that is a problem.
BEHIND = 2
# How many of a queue's workers are asked whether they live.
WORKERS = 100


class Step(NamedTuple):
    """One thing that must be right, and how it was found to be."""

    title: str
    found: str
    state: State = "fine"


class Verdict(NamedTuple):
    sentence: str
    state: State = "fine"
    remedy: Remedy = ""


@dataclass(frozen=True)
class Explanation:
    """What is known of one job and one row. `needy` is how many rows need the job, at most `COUNTED` + 1."""

    job: str
    pk: str
    steps: list[Step]
    verdict: Verdict
    # Whether the sweep matches the row.
    is_needed: bool = False
    # What is in the way of the job besides the row itself.
    paused: list[str] = field(default_factory=list)
    sweep: str = ""
    claim: Claim | None = None
    runs: list[Run] = field(default_factory=list)
    needy: int = 0
    redis_is_away: bool = False

    @property
    def is_well(self) -> bool:
        return all(step.state == "fine" for step in self.steps)

    @property
    def is_counted(self) -> bool:
        """Whether that many rows need the job, and not more."""
        return self.needy <= COUNTED


class Place(NamedTuple):
    """Where an id was in Redis, and who may come for it."""

    position: int | None
    length: int
    due_at: datetime | None
    delayed: int
    workers: int
    heard_at: datetime | None


@dataclass
class Facts:
    """What was found, before it is put into words."""

    job: Job
    sweep: Sweep
    pk: str
    now: datetime
    exists: bool
    is_needed: bool
    trouble: str
    paused: list[Pause]
    schedule: Schedule
    claims: list[Claim]
    runs: list[Run]
    place: Place | None
    redis_error: str

    @property
    def claim(self) -> Claim | None:
        """What is unsettled of this job and row."""
        return next((claim for claim in self.claims if claim.job == self.job.name), None)

    @property
    def lease(self) -> Claim | None:
        """Who has the row, whichever job it is for."""
        return next((claim for claim in self.claims if claim.lease_key), None)

    @property
    def is_expired(self) -> bool:
        lease = self.lease
        return lease is not None and lease.lease_expires_at is not None and lease.lease_expires_at <= self.now

    @property
    def in_vain(self) -> int:
        """How many of its last attempts succeeded one after the other, and the row still needed the work."""
        is_in_vain = (run.outcome == Run.Outcome.DONE and bool(run.error) for run in self.runs)
        return sum(1 for _ in itertools.takewhile(bool, is_in_vain)) if self.is_needed else 0

    @property
    def behind(self) -> int:
        return self.schedule.due_runs - self.schedule.settled_runs

    @property
    def nobody_ticks(self) -> bool:
        """Whoever ticks takes what is due: a schedule that is due stays so only while nobody does."""
        return self.schedule.next_run_at is not None and self.schedule.next_run_at < self.now - LATE

    @property
    def sweep_fails(self) -> bool:
        return self.schedule.last_outcome in (Run.Outcome.FAILED, Run.Outcome.CRASHED)

    @property
    def limit(self) -> int:
        return self.sweep.limit if self.schedule.limit is None else self.schedule.limit

    @property
    def is_full(self) -> bool:
        """Whether the last sweep filled the queue, and it is still as full."""
        filled = self.schedule.enqueued + self.schedule.already_queued >= self.limit
        return filled and (self.place is None or self.place.length + self.place.delayed >= self.limit)


def explain(job: Job | str, row: Any, *, model: str = "", ask_redis: bool = True) -> Explanation:
    """Say why a row, given itself or by its primary key, is not ready. Raises `ValueError` for what is no primary key.

    A job may be named, also one that is not declared any more, and `model` be the one that it worked on. A bounded
    number of queries, and two round trips to Redis; without `ask_redis`, which is for whoever has just seen that it is
    away, none.
    """
    declared = registry.get(job) if isinstance(job, str) else job
    if not isinstance(declared, Job) or declared.sweep is None:
        return _beyond(job if isinstance(job, str) else job.name, pk_text(getattr(row, "pk", row)))
    if model and model != label(declared.model):
        return _beyond(declared.name, str(row), works_on=label(declared.model))
    pk, _using = declared.identify(row)
    facts = _look(declared, declared.sweep, pk, ask_redis)
    return Explanation(
        job=declared.name,
        pk=pk,
        steps=list(_steps(facts)),
        verdict=_verdict(facts),
        is_needed=facts.is_needed,
        paused=[pause.name for pause in facts.paused],
        sweep=facts.sweep.name,
        claim=facts.claim,
        runs=facts.runs,
        needy=0 if facts.trouble else declared.rows().order_by()[: COUNTED + 1].count(),
        redis_is_away=bool(facts.redis_error),
    )


def _beyond(name: str, pk: str, works_on: str = "") -> Explanation:
    """What there is to say of work that nothing brings to a row any more, or never did."""
    declared = registry.get(name)
    if declared is None:
        sentence = _("No job named %s is declared any more: nothing works on this row.") % name
        sentence += " " + _("To release its claim or to queue it now removes it.")
    elif works_on:
        sentence = _("%(job)s works on %(model)s now: nothing works on this row.") % {"job": name, "model": works_on}
        sentence += " " + _("To release its claim or to queue it now removes it.")
    elif declared.is_scheduled:
        verdict = Verdict(_("This is a run of the schedule %s; the tick brings it.") % name)
        return Explanation(name, pk, [Step(_("Job"), verdict.sentence)], verdict)
    else:
        sentence = _("No sweep feeds %s: it works on what it is called with.") % name
    return Explanation(name, pk, [Step(_("Job"), sentence, "problem")], Verdict(sentence, "problem"))


def _runs(model: str, pk: str, job: str) -> list[Run]:
    return list(Run.objects.filter(model=model, object_pk=pk, job=job).order_by("-pk")[:RUNS])


# --- Looking ----------------------------------------------------------------------------------------------------------


def _look(job: Job, sweep: Sweep, pk: str, ask_redis: bool) -> Facts:
    exists, is_needed, trouble = _look_at_row(job, pk)
    paused = pauses.read(sweep.switches)
    # None: a project that was not migrated yet, or whose schedules were deleted, until the next tick.
    schedule = Schedule.objects.filter(pk=sweep.name).first() or Schedule(name=sweep.name)
    claims = list(Claim.objects.filter(model=label(job.model), object_pk=pk))
    runs = _runs(label(job.model), pk, job.name)
    # Last: what was read can only be older than this.
    now = clock.read()
    place, redis_error = None, "" if ask_redis else _("It did not answer just now.")
    if ask_redis:
        try:
            place = _look_into_redis(job, pk)
        except RedisError as error:
            redis_error = redacted(error)
    return Facts(
        job=job,
        sweep=sweep,
        pk=pk,
        now=now,
        exists=exists,
        is_needed=is_needed,
        trouble=trouble,
        paused=list(paused.values()),
        schedule=schedule,
        claims=claims,
        runs=runs,
        place=place,
        redis_error=redis_error,
    )


def _look_at_row(job: Job, pk: str) -> tuple[bool, bool, str]:
    """Return whether the row exists, whether the sweep matches it, and what went wrong when it was asked."""
    value = pk_value(job.model, pk)
    try:
        rows = job.rows()
        # A savepoint, should the queryset fail within somebody's transaction.
        with transaction.atomic(rows.db):
            if rows.filter(pk=value).exists():
                return True, True, ""
            return job.model._base_manager.using(rows.db).filter(pk=value).exists(), False, ""
    except Exception as error:
        return True, True, redacted(error)


def _look_into_redis(job: Job, pk: str) -> Place:
    queue, id, latest = queues.get(job.queue), row_id(job.name, pk), enqueue.latest()
    with queue.connection.pipeline(transaction=False) as pipeline:
        pipeline.lpos(queue.key, id)
        pipeline.llen(queue.key)
        pipeline.zscore(queues.DELAYED_KEY, id)
        pipeline.zcount(queues.DELAYED_KEY, "-inf", latest)
        pipeline.smembers(worker_registration.WORKERS_BY_QUEUE_KEY % queue.name)
        position, length, score, delayed, registered = pipeline.execute()
        # Not by rq's own classes: they delete what they do not find.
        for key in sorted(registered)[:WORKERS]:
            pipeline.hget(key, "last_heartbeat")
        heartbeats = [heartbeat for heartbeat in pipeline.execute() if heartbeat]
    heard_at = max(filter(None, map(queues.moment, heartbeats)), default=None)
    due_at = None if score is None or score > latest else datetime.fromtimestamp(max(score, 0), UTC)
    return Place(position, length, due_at, delayed, len(heartbeats), heard_at)


# --- Saying -----------------------------------------------------------------------------------------------------------


def _verdict(facts: Facts) -> Verdict:
    """Say in one sentence what counts, the nearest thing first."""
    claim, lease, place, next_run_at = facts.claim, facts.lease, facts.place, facts.schedule.next_run_at
    if facts.trouble:
        return Verdict(_("Its sweep's queryset fails: %s") % facts.trouble, "problem")
    if not facts.exists:
        return Verdict(_("The row is gone: there is nothing left to do."))
    if lease and not facts.is_expired:
        if lease.job == facts.job.name:
            return Verdict(_("It is being worked on."))
        return Verdict(_("It waits for %s, which holds the row.") % lease.job, "waiting")
    if not facts.is_needed and claim and claim.quarantined_at:
        sentence = _("It is quarantined, and needs nothing at present. When that lasts for a day, its quarantine ends.")
        return Verdict(sentence, "waiting", "release")
    if not facts.is_needed:
        return Verdict(_("Nothing to do: the sweep does not match this row."))
    if claim and claim.quarantined_at:
        sentence = _("It is quarantined: nothing happens until somebody releases it.")
        return Verdict(sentence, "problem", "release")
    if facts.paused:
        return Verdict(" ".join(map(said_of_pause, facts.paused)), "waiting", "resume")
    if claim and claim.next_attempt_at and claim.next_attempt_at > facts.now:
        sentence = _("It failed, and is attempted again at %s.") % said_of_time(claim.next_attempt_at, facts.now)
        return Verdict(sentence, "waiting", "queue_now")
    if facts.in_vain >= IN_VAIN:
        return Verdict(_said_of_success(facts.in_vain), "problem")
    if place and not place.workers:
        return Verdict(_("No worker serves the queue %s: start one.") % facts.job.queue, "problem")
    if place and place.position is not None:
        numbers = {"number": place.position + 1, "length": place.length}
        return Verdict(_("It is queued: number %(number)d of %(length)d.") % numbers, "waiting")
    if facts.nobody_ticks:
        return Verdict(_("Nobody ticks: start a scheduler, or a worker."), "problem")
    if facts.is_expired:
        return Verdict(_("The process that worked on it is gone; the next tick queues it again."), "waiting")
    if place and place.due_at:
        return Verdict(_("It is spread out: it is queued at %s.") % said_of_time(place.due_at, facts.now), "waiting")
    if facts.redis_error:
        return Verdict(_("Redis does not answer; when it is back, the sweep queues the row."), "problem")
    if facts.behind > BEHIND:
        return Verdict(_("Its sweep does not run: no worker comes to %s.") % facts.sweep.queue, "problem")
    if facts.sweep_fails:
        return Verdict(_("Its sweep failed the last time that it ran."), "problem", "run_sweep")
    if facts.is_full:
        sentence = _("The queue is full, with %d jobs of this kind; the sweep queues it when there is room.")
        return Verdict(sentence % facts.limit, "waiting")
    following = said_of_time(next_run_at, facts.now) if next_run_at else _("its next run")
    return Verdict(_("It is not queued yet; the sweep does that at %s.") % following, "waiting", "queue_now")


def _steps(facts: Facts) -> Iterator[Step]:
    names = {"job": facts.job.name, "sweep": facts.sweep.name}
    yield Step(_("Job"), _("%(job)s is declared, and fed by %(sweep)s.") % names)
    if facts.trouble:
        yield Step(_("Row"), _("The sweep's queryset fails: %s") % facts.trouble, "problem")
    elif not facts.exists:
        yield Step(_("Row"), _("It is gone."))
    elif facts.is_needed:
        yield Step(_("Row"), _("The sweep matches it: it needs this work."))
    else:
        yield Step(_("Row"), _("The sweep does not match it: it needs nothing."))
    if facts.is_needed or facts.claims:
        # Of a row that needs nothing and that nobody works on, the rest is nobody's concern.
        yield _step_of_pauses(facts)
        yield _step_of_ticks(facts)
        yield _step_of_sweep(facts)
        yield _step_of_claim(facts)
        if facts.in_vain:
            state: State = "problem" if facts.in_vain >= IN_VAIN else "waiting"
            yield Step(_("Attempts"), _said_of_success(facts.in_vain), state)
        yield from _steps_in_redis(facts)


def _step_of_pauses(facts: Facts) -> Step:
    if facts.paused:
        return Step(_("Switches"), " ".join(map(said_of_pause, facts.paused)), "waiting")
    return Step(_("Switches"), _("Neither the job nor its sweep is paused."))


def said_of_pause(pause: Pause) -> str:
    by = _("by %s") % pause.by if pause.by else _("by an unknown person")
    until = _("until %s") % said_of_time(pause.until) if pause.until else _("until somebody resumes it")
    sentence = _("%(name)s is paused %(by)s since %(since)s, %(until)s.") % {
        "name": pause.name,
        "by": by,
        "since": said_of_time(pause.since),
        "until": until,
    }
    return f"{sentence} {_('Reason: %s') % pause.reason}" if pause.reason else sentence


def _step_of_ticks(facts: Facts) -> Step:
    next_run_at = facts.schedule.next_run_at
    if next_run_at is None:
        return Step(_("Tick"), _("The schedule is new: no tick has looked at it yet."), "waiting")
    if facts.nobody_ticks:
        sentence = _("The sweep was due at %s, and no scheduler or worker has taken note of it.")
        return Step(_("Tick"), sentence % said_of_time(next_run_at, facts.now), "problem")
    return Step(_("Tick"), _("The sweep is due next at %s.") % said_of_time(next_run_at, facts.now))


def _step_of_sweep(facts: Facts) -> Step:
    schedule = facts.schedule
    if schedule.last_finished_at is None:
        state: State = "problem" if facts.behind > BEHIND else "waiting"
        return Step(_("Sweep"), _("It has never run."), state)
    said = _("It ended at %(at)s: %(outcome)s.") % {
        "at": said_of_time(schedule.last_finished_at, facts.now),
        "outcome": _outcome(schedule.last_outcome),
    }
    if facts.behind > BEHIND:
        said += " " + _("%d runs came due since then, and none has ended.") % facts.behind
    counts = _("%(matched)d matched: %(enqueued)d enqueued, %(already_queued)d already, %(waiting)d waiting.") % {
        name: getattr(schedule, name) for name in ("matched", "enqueued", "already_queued", "waiting")
    }
    if facts.sweep_fails or facts.behind > BEHIND:
        return Step(_("Sweep"), said, "problem")
    if facts.is_full:
        return Step(_("Sweep"), f"{said} {counts} {_('That is its limit, %d.') % facts.limit}", "waiting")
    return Step(_("Sweep"), f"{said} {counts}")


def _step_of_claim(facts: Facts) -> Step:
    title, now = _("Claim"), facts.now
    claim, lease = facts.claim, facts.lease
    if lease and lease.leased_at and lease.lease_expires_at:
        parts = {
            "job": lease.job,
            "holder": lease.holder,
            "since": said_of_time(lease.leased_at, now),
            "renewed": said_of_time(lease.lease_expires_at - conf.LEASE, now),
            "until": said_of_time(lease.lease_expires_at, now),
        }
        if facts.is_expired:
            sentence = _("%(holder)s worked on it for %(job)s; its lease, last renewed at %(renewed)s, is over.")
            return Step(title, sentence % parts, "waiting")
        sentence = _("%(holder)s works on it for %(job)s since %(since)s; leased until %(until)s, renewed %(renewed)s.")
        return Step(title, sentence % parts, "fine" if lease.job == facts.job.name else "waiting")
    if claim is None:
        return Step(title, _("Nobody works on it, and nothing went wrong before."))
    before = _said_of_attempts(claim)
    if claim.quarantined_at:
        state: State = "problem" if facts.is_needed else "waiting"
        return Step(title, _("Quarantined since %s.") % said_of_time(claim.quarantined_at, now) + before, state)
    if claim.next_attempt_at and claim.next_attempt_at > now:
        return Step(title, _("Backing off until %s.") % said_of_time(claim.next_attempt_at, now) + before, "waiting")
    return Step(title, _("It may be attempted now.") + before)


def _said_of_attempts(claim: Claim) -> str:
    said = ""
    if claim.attempts:
        said += " " + ngettext("%d attempt failed.", "%d attempts failed.", claim.attempts) % claim.attempts
    if claim.crashes:
        said += " " + ngettext("%d process died.", "%d processes died.", claim.crashes) % claim.crashes
    error = claim.last_error.partition("\n")[0]
    return f"{said} {error}" if error else said


def _said_of_success(times: int) -> str:
    text = ngettext(
        "It succeeded %(times)s time, and still needs work: the job must change the row so that its sweep does not "
        "match it, or raise if it cannot do the work yet.",
        "It succeeded %(times)s times, and still needs work: the job must change the row so that its sweep does not "
        "match it, or raise if it cannot do the work yet.",
        times,
    )
    return text % {"times": times if times < RUNS else _("%d or more") % RUNS}


def _steps_in_redis(facts: Facts) -> Iterator[Step]:
    place, queue = facts.place, {"queue": facts.job.queue}
    if place is None:
        sentence = _("Redis does not answer, so where the row is queued is not known. Nothing is lost: %s")
        yield Step(_("Queue"), sentence % facts.redis_error, "problem")
        return
    if place.position is not None:
        numbers = {**queue, "number": place.position + 1, "length": place.length}
        yield Step(_("Queue"), _("Number %(number)d of %(length)d in %(queue)s.") % numbers)
    elif place.due_at is not None:
        yield Step(_("Queue"), _("Delayed until %s.") % said_of_time(place.due_at, facts.now), "waiting")
    elif facts.lease and not facts.is_expired:
        yield Step(_("Queue"), _("Not in %(queue)s: it is at work.") % queue)
    else:
        sentence = _("Not in %(queue)s, which has %(length)d entries.") % {**queue, "length": place.length}
        yield Step(_("Queue"), sentence, "waiting" if facts.is_needed else "fine")
    if not place.workers:
        yield Step(_("Workers"), _("None serves %(queue)s, as far as Redis knows.") % queue, "problem")
    else:
        sentence = ngettext("%(count)d serves %(queue)s", "%(count)d serve %(queue)s", place.workers)
        heard = _("heard of last at %s.") % (said_of_time(place.heard_at, facts.now) if place.heard_at else "?")
        yield Step(_("Workers"), f"{sentence % {**queue, 'count': place.workers}}, {heard}")


def _outcome(outcome: str) -> str:
    return str(dict(Run.Outcome.choices).get(outcome, outcome))


def said_of_time(moment: datetime, now: datetime | None = None) -> str:
    """Write a time with its zone and, if `now` is given, how long before or after that it is."""
    said = date_format(timezone.localtime(moment) if timezone.is_aware(moment) else moment, "Y-m-d H:i:s T").strip()
    return said if now is None else f"{said} ({said_of_distance(moment, now)})"


def said_of_distance(moment: datetime, now: datetime) -> str:
    """Write how long ago a time is, or how far away."""
    distance = abs(now - moment)
    if distance < timedelta(minutes=1):
        long = ngettext("%d second", "%d seconds", distance.seconds) % distance.seconds
    else:
        long = timesince(min(now, moment), max(now, moment), depth=1)
    return _("%s ago") % long if moment <= now else _("in %s") % long
