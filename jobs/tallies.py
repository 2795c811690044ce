"""What happened, hour by hour: how many runs of each job ended how, and how long they took.

A tally is counted from the runs, again and again until its hour is over, and written over what was there. So counting
it twice, or late, does no harm, and what an outage kept from being counted is counted after it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from django.apps import apps
from django.db import router, transaction
from django.db.models import (
    BigIntegerField,
    Case,
    Count,
    F,
    FloatField,
    Func,
    IntegerField,
    Max,
    Min,
    Q,
    QuerySet,
    Sum,
    Value,
    When,
    Window,
)
from django.db.models.functions import Coalesce, RowNumber
from django.db.models.lookups import LessThanOrEqual

from jobs import clock
from jobs.conf import conf
from jobs.deletion import delete

if TYPE_CHECKING:
    from jobs.models import Tally

HOUR = timedelta(hours=1)
# In seconds: each about three times the one before.
BOUNDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3600.0, math.inf)
# Attempts that did not come to their end, through no fault of whoever stopped a worker.
FAILURES = ("failed", "crashed", "lost")
# So many errors of a job are told apart within an hour. The others are one error together.
MOST_ERRORS = 100
OTHER = "other"
# A run can be seen this long after its end, at the latest, and a count takes no longer than that.
COMMITTED_AFTER = timedelta(minutes=10)
BATCH = 1000


class Seconds(Func):
    """How long it was from one moment to another, to about a tenth of a millisecond."""

    arity = 2
    arg_joiner = " - "
    template = "EXTRACT(EPOCH FROM (%(expressions)s))"
    output_field = FloatField()

    def as_sqlite(self, compiler: Any, connection: Any, **context: Any) -> Any:
        # Django's own difference of two times would call Python for each row.
        (end, _), (start, _) = (compiler.compile(each) for each in self.get_source_expressions())
        return f"(julianday({end}) - julianday({start})) * 86400", ()


class _Bar(Func):
    """One bar of a histogram."""

    arity = 1
    template = "(%(expressions)s -> %(place)s)::bigint"
    output_field = BigIntegerField()

    def as_sqlite(self, compiler: Any, connection: Any, **context: Any) -> Any:
        return self.as_sql(compiler, connection, template="json_extract(%(expressions)s, '$[%(place)s]')", **context)


def hour_of(moment: datetime) -> datetime:
    """Return the beginning of a moment's hour, in UTC."""
    return moment.astimezone(UTC).replace(minute=0, second=0, microsecond=0)


def last(hours: int, now: datetime) -> datetime:
    """Return where the last so many hours begin, as tallies have them: whole ones, and the one that is not over yet."""
    return hour_of(now) - hours * HOUR


# --- Counting ---------------------------------------------------------------------------------------------------------


def count(counted_at: datetime | None) -> int:
    """Count every hour that may have runs which no count has seen. Returns how many hours that were.

    `counted_at` is when a count last ended well; with None it is whatever is kept that is counted.
    """
    now = clock.read()
    oldest = _runs().order_by("finished_at").values_list("finished_at", flat=True).first()
    # A clock that was ahead has counted hours that are still to come. That hides none of them.
    first = hour_of(min(counted_at, now) - COMMITTED_AFTER if counted_at else oldest or now)
    # What a count has done that was then broken off need not be done again.
    newest = _newest(now)
    # Of the runs of an hour from before that, some are deleted already.
    kept = min(hour_of(now - conf.KEEP_RUNS) + HOUR, hour_of(now))
    hour, counted = max(first, kept, newest - HOUR if newest else kept), 0
    while hour <= now:
        count_hour(hour)
        hour, counted = hour + HOUR, counted + 1
    return counted


def _newest(now: datetime) -> datetime | None:
    """Return the newest hour that has a tally. The one before it is the first that a count may write again."""
    return _tallies().filter(hour__lte=now).order_by("-hour").values_list("hour", flat=True).first()


def count_hour(hour: datetime) -> None:
    """Count the runs that ended within the hour, and write that over its tallies."""
    counted = _counted(_runs().filter(finished_at__gte=hour, finished_at__lt=hour + HOUR))
    for tally in counted:
        tally.hour = hour
    with transaction.atomic(_database()):
        delete(_tallies().filter(hour=hour))
        # Whoever has written the same hour meanwhile has counted the same.
        _write(counted)


def _write(tallies: Iterable[Tally]) -> None:
    _tallies().bulk_create(
        tallies,
        batch_size=BATCH,
        update_conflicts=True,
        unique_fields=["hour", "job", "outcome", "fingerprint"],
        update_fields=["error", "runs", "took", "settled_after"],
    )


def _counted(runs: QuerySet[Any]) -> list[Tally]:
    known = _frequent(runs)
    groups = runs.values("job", "outcome", "fingerprint", took_up_to=_bound("started_at")).annotate(
        settled_up_to=_bound("first_claimed_at"), runs=Count("pk")
    )
    tallies: dict[tuple[str, str, str], Tally] = {}
    # The database adds up. What arrives here is a row for each histogram's bar, however many runs there are.
    for group in groups.order_by().iterator(chunk_size=BATCH):
        job, outcome, fingerprint = group["job"], group["outcome"], group["fingerprint"]
        if fingerprint and (job, fingerprint) not in known:
            fingerprint = OTHER
        tally = tallies.setdefault((job, outcome, fingerprint), _nothing(job, outcome, fingerprint))
        tally.error = known.get((job, fingerprint), "")
        tally.runs += group["runs"]
        for histogram, bar in ((tally.took, group["took_up_to"]), (tally.settled_after, group["settled_up_to"])):
            if bar is not None:
                histogram[bar] += group["runs"]
    for tally in tallies.values():
        tally.took, tally.settled_after = list(accumulate(tally.took)), list(accumulate(tally.settled_after))
    return list(tallies.values())


def _frequent(runs: QuerySet[Any]) -> dict[tuple[str, str], str]:
    """Return the most frequent errors of each job, by their fingerprint, with a sample of each."""
    errors = runs.exclude(fingerprint="").values("job", "fingerprint").annotate(times=Count("pk"), sample=Min("error"))
    frequent_first = [F("times").desc(), F("fingerprint").asc()]
    placed = errors.annotate(place=Window(RowNumber(), partition_by="job", order_by=frequent_first)).order_by()
    return {(each["job"], each["fingerprint"]): each["sample"] for each in placed.filter(place__lte=MOST_ERRORS)}


def _bound(start: str) -> Case:
    """Return which of the bounds a run's time from that start does not exceed; NULL when it has no such time."""
    took = Seconds(F("finished_at"), F(start))
    within = (When(LessThanOrEqual(took, bound), then=Value(place)) for place, bound in enumerate(BOUNDS[:-1]))
    return Case(
        When(**{f"{start}__isnull": True}, then=None),
        *within,
        default=Value(len(BOUNDS) - 1),
        output_field=IntegerField(),
    )


# --- Adding up --------------------------------------------------------------------------------------------------------


def fold(before: datetime) -> None:
    """Add up the tallies of the hours before that, in one for each job and outcome. No total becomes less by it.

    Those that count no failure wait for a day only: nobody asks for their hours any more, and everybody for the total.
    """
    now = clock.read()
    # An hour that will be counted again is not to be counted twice.
    counted = min(last(PERIODS["day"], now), (_newest(now) or now) - HOUR)
    Tally = apps.get_model("selfheal", "Tally")
    is_old = Q(hour__lt=hour_of(before)) | Q(hour__lt=counted) & ~Q(outcome__in=FAILURES)
    old = _tallies().filter(is_old, hour__gt=Tally.BEFORE)
    while True:
        with transaction.atomic(_database()):
            # Locked, so that nobody else adds them up too.
            batch = list(old.select_for_update().order_by("pk")[:BATCH])
            if not batch:
                return
            totals = {(each.job, each.outcome): each for each in _tallies().filter(hour=Tally.BEFORE)}
            changed: dict[tuple[str, str], Any] = {}
            for tally in batch:
                key = (tally.job, tally.outcome)
                total = changed.setdefault(key, totals.get(key) or _nothing(*key, hour=Tally.BEFORE))
                total.runs += tally.runs
                total.took = add([total.took, tally.took])
                total.settled_after = add([total.settled_after, tally.settled_after])
            _write(changed.values())
            delete(_tallies().filter(pk__in=[tally.pk for tally in batch]))


def add(histograms: Iterable[Sequence[int]]) -> list[int]:
    """Add histograms up, bar by bar. One that nobody has written is empty."""
    return [sum(bars) for bars in zip(*filter(None, histograms), strict=True)] or [0] * len(BOUNDS)


def quantile(histogram: Sequence[int], share: float) -> float | None:
    """Estimate the seconds within which that share of the runs was done; None when there was none.

    A histogram knows between which two bounds it lies, and this takes it to lie there as if the runs were spread
    evenly. So it is wrong by less than those bounds are apart: from 10 ms on by a factor of less than 3.6, below by
    less than 10 ms. Beyond the last bound it answers with that: an hour, or more.
    """
    if not histogram or not histogram[-1]:
        return None
    wanted, below, start = share * histogram[-1], 0, 0.0
    for up_to, bound in zip(histogram, BOUNDS, strict=True):
        if up_to >= wanted and up_to > below:
            return start if bound == math.inf else start + (bound - start) * (wanted - below) / (up_to - below)
        below, start = up_to, bound
    return None


# --- Asking -----------------------------------------------------------------------------------------------------------

PERIODS = {"hour": 1, "day": 24, "week": 168}


def outcomes(jobs: Iterable[str]) -> Iterator[tuple[str, str, int]]:
    """Yield how many runs of these jobs ended how, since they were first counted."""
    totals = _tallies().filter(job__in=jobs).order_by().values_list("job", "outcome").annotate(Sum("runs"))
    yield from totals


def times(jobs: Iterable[str]) -> dict[str, list[int]]:
    """Return the histogram of how long the runs of each of these jobs took that were done, since the first count."""
    return {job: took for job, [took] in histograms(_tallies().filter(job__in=jobs), "took").items()}


def histograms(tallies: QuerySet[Any], *names: str) -> dict[str, list[list[int]]]:
    """Return the sums of these histograms, for each job that has any of what was done.

    The database adds up. What arrives here is a row for each job, however many hours are kept.
    """
    bars = {
        f"{name}_{place}": Coalesce(Sum(_Bar(name, place=place)), 0) for name in names for place in range(len(BOUNDS))
    }
    sums = tallies.filter(outcome="done").order_by().values("job").annotate(**bars).values_list("job", *bars)
    size = len(BOUNDS)
    return {job: [list(added[at : at + size]) for at in range(0, len(added), size)] for job, *added in sums}


def errors(now: datetime) -> QuerySet[Any]:
    """Return the failures by job and error: how many in each of `PERIODS`, a sample, the first hour and the last."""
    Tally = apps.get_model("selfheal", "Tally")
    kept = _tallies().filter(hour__gt=Tally.BEFORE, outcome__in=FAILURES).order_by()
    counts = {
        f"last_{period}": Coalesce(Sum("runs", filter=Q(hour__gte=last(hours, now))), 0)
        for period, hours in PERIODS.items()
    }
    seen = {"sample": Max("error"), "first_seen": Min("hour"), "last_seen": Max("hour")}
    errors: QuerySet[Any] = kept.values("job", "fingerprint").annotate(**counts, **seen)
    return errors


def _nothing(job: str, outcome: str, fingerprint: str = "", **values: Any) -> Tally:
    none = [0] * len(BOUNDS)
    tally: Tally = apps.get_model("selfheal", "Tally")(
        job=job, outcome=outcome, fingerprint=fingerprint, took=none, settled_after=[*none], **values
    )
    return tally


# This module is imported with the package, before Django's models are: they are looked up when called.
def _database() -> str:
    return router.db_for_write(apps.get_model("selfheal", "Tally"))


def _runs() -> QuerySet[Any]:
    return apps.get_model("selfheal", "Run")._default_manager.using(_database())


def _tallies() -> QuerySet[Any]:
    return apps.get_model("selfheal", "Tally")._default_manager.using(_database())
