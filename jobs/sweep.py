"""A sweep: the rows that need a job, turned into queued jobs, again and again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, NamedTuple, cast

from django.apps import apps
from django.core.exceptions import EmptyResultSet
from django.db import DatabaseError, router
from django.db.models import BinaryField, ForeignKey, Model, OneToOneRel, QuerySet
from django.db.models.query import ModelIterable
from django.db.models.sql.datastructures import Join
from django.utils.functional import cached_property
from redis.exceptions import RedisError

from jobs import claims, enqueue, queues, registry, switches
from jobs.exceptions import Misconfigured, QueueUnavailable
from jobs.job import Declared, Job, _is_count, _is_duration
from jobs.message import pk_text, row_ids


class SweepResult(NamedTuple):
    """What a sweep found. `matched` is the sum of the other three.

    `waiting` rows are leased, backing off or quarantined, or there was no room for them within the limit.
    """

    matched: int = 0
    enqueued: int = 0
    already_queued: int = 0
    waiting: int = 0


class Sweep(Declared):
    """A scheduled job that queues another job for every row which needs it. Calling it returns its queryset."""

    keeps_history = False

    def __init__(
        self,
        function: Callable[[], QuerySet[Any]],
        job: Job,
        *,
        cron: str,
        queue: str,
        name: str | None,
        timeout: timedelta | None,
        batch_size: int,
        limit: int,
        jitter: timedelta | None,
    ) -> None:
        super().__init__(function, name, queue, timeout, cron)
        self.job = job
        self.batch_size = batch_size
        self.limit = limit
        self.jitter = jitter

    def __call__(self) -> Any:
        return self.function()

    @property
    def switches(self) -> set[str]:
        """Its own, and that of the job which it feeds."""
        return {self.name, self.job.name}

    @property
    def max_attempts(self) -> int:
        """One: it comes due again within its interval, and to back off would only delay that."""
        return 1

    @cached_property
    def fed_model(self) -> type[Model]:
        """The model of the rows that it finds."""
        model: type[Model] = self.queryset().model
        return model

    @cached_property
    def fed_from(self) -> str | None:
        """The alias of the database that its function says `using()` with; None where it leaves that to the router."""
        return self._found()._db  # type: ignore[attr-defined, no-any-return]

    def queryset(self) -> QuerySet[Any]:
        """Return the rows that need the job, from the database that is written to.

        Raises `Misconfigured` when the function returns anything that cannot be asked about one row.
        """
        found = self._found()
        # A replica may not have heard of the row's last change, and the row is the truth.
        return found if found._db else found.using(router.db_for_write(found.model))  # type: ignore[attr-defined]

    def _found(self) -> QuerySet[Any]:
        found = self.function()
        if not isinstance(found, QuerySet):
            raise Misconfigured(f"{self.name} returned {type(found).__name__}; return a queryset of the rows.")
        query = found.query
        if query.distinct_fields:
            raise Misconfigured(
                f"{self.name} returned a queryset with distinct({', '.join(map(repr, query.distinct_fields))}), which "
                "means another set of rows when it is asked about one of them. Filter with Exists() instead."
            )
        if query.where.contains_over_clause:
            raise Misconfigured(
                f"{self.name} returned a queryset that is filtered by a window function, which sees other rows when it "
                "is asked about one of them. Filter with Exists() or a Subquery() instead."
            )
        if query.is_sliced or query.combinator:
            raise Misconfigured(
                f"{self.name} returned a queryset that cannot be filtered any further, because it is a "
                f"{query.combinator or 'slice'}; "
                "combine with | instead, and bound it with limit=."
            )
        if not issubclass(found._iterable_class, ModelIterable):
            raise Misconfigured(f"{self.name} returned values; return a queryset of the rows themselves.")
        if query.select_for_update:
            raise Misconfigured(
                f"{self.name} returned a queryset that locks its rows, which is too early. "
                "Remove select_for_update(): with_lock() locks the row when the job writes."
            )
        if (before := self.__dict__.setdefault("fed_model", found.model)) is not found.model:
            raise Misconfigured(
                f"{self.name} returned rows of {found.model._meta.label}, and before that of {before._meta.label}; "
                "return those of one model, and write a job and a sweep for the other."
            )
        return found

    def sweep(
        self, dry_run: bool = False, *, on_batch: Callable[[SweepResult], bool | None] | None = None
    ) -> SweepResult:
        """Queue the job for every row that needs it and is not queued, leased, backing off or quarantined.

        Oldest first in the queryset's order, in batches, until about `limit` are queued; a round trip to Redis each.
        Unleased claims whose row needs nothing any more are settled. With `dry_run` it only counts. Switched off, it
        does neither. `on_batch` is told after each batch what was found so far, and answers True to have it end there.
        Raises `QueueUnavailable` when Redis does not answer.
        """
        if not dry_run and switches.disabled(self.switches):
            return SweepResult()
        rows = self.queryset()
        unsettled = claims.count(rows.model)
        try:
            result = self._feed(rows, unsettled, dry_run, on_batch)
        except RedisError as error:
            raise QueueUnavailable.of(self.name, error) from error
        if unsettled and not dry_run:
            # Last, so that a claim which cannot be asked about holds up no row.
            claims.resolve(self.job.name, rows)
        return result

    def _feed(
        self,
        rows: QuerySet[Any],
        unsettled: int,
        dry_run: bool,
        on_batch: Callable[[SweepResult], bool | None] | None,
    ) -> SweepResult:
        limit = self.effective_limit()
        queue = queues.get(self.job.queue)
        queued = enqueue.queued_ids(queue, self.job.name)
        # Every row is queued, or has room to be, or has a claim: no more need to be read, however long the backlog.
        wanted = rows if rows.ordered else rows.order_by("pk")
        pks = _each_once(wanted, limit + unsettled, self.batch_size)
        room = limit - len(queued)
        enqueued = already_queued = waiting = 0
        result = SweepResult()
        for batch in enqueue.batches(map(pk_text, pks), self.batch_size):
            held = claims.held(self.job.name, rows.model, batch, not dry_run) if unsettled else set()
            new: list[bytes] = []
            once = list(dict.fromkeys(batch))
            for pk, id in zip(once, row_ids(self.job.name, once), strict=True):
                if id in queued:
                    already_queued += 1
                elif pk in held or len(new) >= room:
                    waiting += 1
                else:
                    new.append(id)
            if not dry_run:
                enqueue.push_ids(queue, new, self.jitter)
            room -= len(new)
            enqueued += len(new)
            result = SweepResult(enqueued + already_queued + waiting, enqueued, already_queued, waiting)
            if on_batch and on_batch(result):
                break
            if room <= 0 and already_queued + enqueued >= limit:
                break
        return result

    def effective_limit(self) -> int:
        """Return the operator's limit if there is one, else the code's."""
        override = apps.get_model("selfheal", "Schedule").objects.filter(pk=self.name).values_list("limit", flat=True)
        return next((limit for limit in override if limit is not None), self.limit)

    def work(self, row: Any) -> dict[str, Any]:
        """Sweep, as a run of its schedule, and have the schedule keep the counts."""
        return {**row.start(), **self.sweep()._asdict()}

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from super().problems()
        if self.job.sweep is not self:
            yield "E006", f"{self.job.name} already has a sweep, {self.job.sweep}; combine their querysets with |."
        if not isinstance(self.cron, str):
            yield "E002", f'cron is {self.cron!r}; pass an expression, such as "* * * * *" for every minute.'
        for option in ("batch_size", "limit"):
            if not _is_count(value := getattr(self, option)):
                yield "E004", f"{option} is {value!r}; pass a number from 1."
        if self.jitter is not None and not _is_duration(self.jitter):
            yield "E004", f"jitter is {self.jitter!r}; pass a timedelta longer than zero."
        elif self.jitter is not None and self.jitter > queues.LONGEST_WAIT:
            yield "E004", f"jitter is {self.jitter}; {queues.LONGEST_WAIT} is the most."
        try:
            yield from _problems_of(self.queryset().model)
        except Misconfigured as error:
            yield "E009", str(error)
        except DatabaseError:
            # It asks the database while it is built, and there may be no tables yet: the worker will tell.
            return
        except Exception as error:
            yield "E009", f"{self.name} raised {type(error).__name__}: {error}; it must return a queryset."


def _problems_of(model: type[Model]) -> Iterator[tuple[str, str]]:
    """Yield what keeps the rows of a model from being claimed one by one."""
    if isinstance(model._meta.pk, BinaryField):
        yield "E009", f"The primary key of {model._meta.label} is binary, and cannot be written in an id; use another."
    for ancestor in (model, *model._meta.get_parent_list()):
        links = {parent._meta.label: link for parent, link in ancestor._meta.parents.items() if link is not None}
        tables = ", ".join(links)
        if len(links) == 1 and not all(link.primary_key for link in links.values()):
            sentence = (
                "A row of {} is also a row of {}, under another primary key. Make the link to it the primary key."
            )
            yield "E009", sentence.format(ancestor._meta.label, tables)
        if len(links) > 1:
            sentence = (
                "A row of {} is also a row of each of {}, and one lease cannot keep the jobs of all of them off. "
                "Inherit from one model that has a table, and refer to the other."
            )
            yield "E009", sentence.format(ancestor._meta.label, tables)


def _each_once(rows: QuerySet[Any], most: int, chunk_size: int) -> Iterator[Any]:
    """Yield the first primary keys of a queryset. A join may find a row many times; it counts, and comes, once."""
    pks = rows.values_list("pk", flat=True)
    if not _may_repeat(pks):
        yield from pks[:most].iterator(chunk_size=chunk_size)
        return
    seen: set[Any] = set()
    limit = most
    # One that looks for rows without any of the others finds each once: then the first limit is enough.
    while True:
        read = 0
        for pk in pks[:limit].iterator(chunk_size=chunk_size):
            read += 1
            if pk not in seen:
                seen.add(pk)
                yield pk
                if len(seen) == most:
                    return
        if read < limit or len(seen) >= most:
            return
        limit *= 4


def _may_repeat(rows: QuerySet[Any]) -> bool:
    """Whether one of its joins is to many rows, so that no LIMIT says how many different rows are found."""
    query = rows.query.clone()
    # The joins by which it is ordered are made when its statement is.
    with contextlib.suppress(EmptyResultSet):
        query.get_compiler(rows.db).as_sql()
    joins = [join for join in query.alias_map.values() if isinstance(join, Join)]
    return bool(query.extra_tables) or not all(isinstance(join.join_field, (ForeignKey, OneToOneRel)) for join in joins)


def sweep(
    job: Job,
    *,
    cron: str,
    queue: str = "background",
    name: str | None = None,
    timeout: timedelta | None = None,
    batch_size: int = 1000,
    limit: int = 100_000,
    jitter: timedelta | None = None,
) -> Callable[[Callable[[], QuerySet[Any]]], Sweep]:
    """Declare a function that returns the queryset of the rows that need the job.

    The queryset must match every state in which the work is not finished: it decides what is queued, and it is asked
    again about the claimed row before the work begins and when it is written down.

    `cron` says how often, in Django's time zone, a sixth field being seconds. `queue` runs the sweep itself.
    `batch_size` rows are pushed at a time, and about `limit` of its jobs are queued at once. `jitter` spreads them out.
    """

    if not isinstance(cast(Any, job), Job):
        raise TypeError(f"@sweep takes the job that it feeds, declared with @job, not {job!r}.")

    def declare(function: Callable[[], QuerySet[Any]]) -> Sweep:
        declared = Sweep(
            function,
            job,
            cron=cron,
            queue=queue,
            name=name,
            timeout=timeout,
            batch_size=batch_size,
            limit=limit,
            jitter=jitter,
        )
        if job.sweep is None:
            job.sweep = declared
        registry.add(declared)
        return declared

    return declare
