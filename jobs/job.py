"""A job: a function that does one idempotent piece of work."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator
from datetime import date, time, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Literal, cast, overload
from uuid import UUID

from django.apps import apps
from django.db import router
from django.db.models import F, IntegerField, Model, QuerySet

from jobs import clock, enqueue, queues, registry
from jobs import cron as cron_expressions
from jobs.backoff import Backoff, spread
from jobs.exceptions import NoLongerNeeded
from jobs.message import check_pk, label, pk_of, pk_text, pk_value

if TYPE_CHECKING:
    from jobs.sweep import Sweep

PLAIN_MAX_ATTEMPTS = 5
MISSED = ("once", "skip", "all")
BY_KIND: Any = object()
# What a primary key can be in Python; a tuple or list is a composite one.
KEYS = (str, int, float, Decimal, UUID, date, time, timedelta, tuple, list)


class Declared:
    """What jobs and sweeps share: a name, a queue, a time limit, perhaps a schedule, and the rows that they work on.

    A run of a schedule is work on the row of its `Schedule`, claimed and settled like any other, so losing the message
    about it loses nothing.
    """

    backoff = Backoff()
    # What becomes of the times that nobody was there to take.
    missed = "once"
    # Whether each run that went well is kept in the history, or only those that did not.
    keeps_history = True
    # Whether a row that still needs it after a success is as it should be.
    works_in_parts = False

    def __init__(
        self, function: Callable[..., Any], name: str | None, queue: str, timeout: timedelta | None, cron: str | None
    ) -> None:
        self.function = function
        self.name = name if name is not None else function.__name__
        self.queue = queue
        self.timeout = timeout
        self.cron = cron
        functools.update_wrapper(cast(Callable[..., Any], self), function, updated=())

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}>"

    @property
    def origin(self) -> str:
        """Where it is declared, for messages."""
        return f"{self.function.__module__}.{self.function.__qualname__}"

    @property
    def timeout_seconds(self) -> int:
        """After how many seconds an attempt is ended: its own time limit, or its queue's."""
        return math.ceil(self.timeout.total_seconds()) if self.timeout else queues.default_timeout(self.queue)

    @property
    def max_attempts(self) -> int | None:
        """How many exceptions a row or call may raise before it is given up; None for ever."""
        return None

    @property
    def quarantines(self) -> bool:
        """Whether a row that is given up is set aside for a person. A schedule is not: it comes due again."""
        return self.is_swept

    @property
    def switches(self) -> set[str]:
        """The names whose switches stop it."""
        return {self.name}

    @property
    def has_switch(self) -> bool:
        """Whether it can be paused. A plain job that nothing but a call starts cannot."""
        return self.is_scheduled or self.is_swept

    @property
    def is_scheduled(self) -> bool:
        return self.cron is not None

    @property
    def is_swept(self) -> bool:
        return False

    @property
    def takes_calls(self) -> bool:
        """Whether it can be queued with arguments of its own."""
        return False

    @property
    def model(self) -> type[Model]:
        """The model of the rows that it works on."""
        return apps.get_model("selfheal", "Schedule")

    def works_on(self, model: str) -> bool:
        """Whether this works on the rows that are claimed under that name; yes, if its sweep cannot tell."""
        try:
            return (self.is_swept or self.is_scheduled) and label(self.model) == model
        except Exception:
            return True

    def rows(self) -> QuerySet[Any]:
        """Return the rows that need this work. Here: its own schedule, while a run of it is owed."""
        return apps.get_model("selfheal", "Schedule").objects.owed().filter(pk=self.name)

    def work(self, row: Any) -> dict[str, Any]:
        """Do the work on the claimed row; return what its schedule should keep about it."""
        raise NotImplementedError

    def finish(self, outcome: str, kept: dict[str, Any]) -> None:
        """Write on the schedule that a run has ended: all that were owed when it began, or now if that is not kept."""
        changes = {"settled_runs": F("settled_runs") + 1 if self.missed == "all" else F("due_runs"), **kept}
        if outcome == "done":
            changes["last_succeeded_at"] = clock.now()
        self.note(outcome, **changes)

    def note(self, outcome: str, **changes: Any) -> None:
        """Write on the schedule how an attempt at a run has ended. Rows have none."""
        if not self.is_swept:
            apps.get_model("selfheal", "Schedule").objects.filter(pk=self.name).update(
                last_finished_at=clock.now(), last_outcome=outcome, **changes
            )

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield the check id of each thing that cannot work, and a sentence that says what to do."""
        if not (isinstance(self.name, str) and registry.NAME.fullmatch(self.name)):
            yield "E005", f"The name {self.name!r} must be letters, digits and underscores, at most 80 of them."
        if inspect.iscoroutinefunction(self.function):
            yield "E004", "It is a coroutine function, which would never be awaited; wrap it in async_to_sync."
        elif inspect.isgeneratorfunction(self.function) or inspect.isasyncgenfunction(self.function):
            yield "E004", "It is a generator function, which would never be run; take the yield out of it."
        if self.queue not in queues.names():
            yield "E003", f"There is no queue {self.queue!r} in RQ_QUEUES; add it there or pass another queue=."
        if self.cron is not None and (problem := cron_expressions.problem(self.cron)):
            yield "E002", problem
        if self.timeout is not None and not _is_duration(self.timeout):
            yield "E004", f"timeout is {self.timeout!r}; pass a timedelta longer than zero."


class Job(Declared):
    """A function that does one idempotent piece of work: for a row, if a sweep feeds it, or with plain arguments.

    Calling it runs the function, here and now, without a claim.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        queue: str = "default",
        name: str | None = None,
        timeout: timedelta | None = None,
        max_attempts: int | None = BY_KIND,
        backoff: Backoff | None = None,
        cron: str | None = None,
        missed: str = "once",
        unique_for: timedelta | None = None,
        unique_until: str | None = None,
    ) -> None:
        super().__init__(function, name, queue, timeout, cron)
        self.missed = missed
        self._max_attempts = max_attempts
        self.backoff = backoff if backoff is not None else Backoff()
        self.unique_for = unique_for
        self._unique_until = unique_until
        self.sweep: Sweep | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    @property
    def is_swept(self) -> bool:
        return self.sweep is not None

    @property
    def takes_calls(self) -> bool:
        return not self.is_swept

    @property
    def max_attempts(self) -> int | None:
        if self._max_attempts is BY_KIND:
            return None if self.is_swept else PLAIN_MAX_ATTEMPTS
        return self._max_attempts

    @property
    def unique_until(self) -> str:
        """When the key that keeps out a second call is released."""
        return self._unique_until or "done"

    @property
    def limit(self) -> int:
        """How many of this job's ids are queued at once, about: as its sweep says, or an operator."""
        assert self.sweep is not None
        return self.sweep.effective_limit()

    def enqueue(self, *args: Any, **kwargs: Any) -> None:
        """Queue the work on a row (given itself, or its primary key), or a call with JSON arguments, at commit.

        A swept job never raises because Redis is away: its sweep will find the row. A plain job raises
        `QueueUnavailable` then; within a transaction, at whose commit that is too late, it logs an error. Raises
        `ValueError` for an unsaved row, `TypeError` for arguments that are not JSON.
        """
        if self.is_swept:
            enqueue.row(self, self._only(args, kwargs))
        else:
            enqueue.call(self, args, kwargs)

    def enqueue_many(self, rows: QuerySet[Any] | Iterable[Any]) -> None:
        """Queue the work on many rows: a queryset, primary keys or rows; a round trip per 1,000.

        For a plain job: one call for each item, a tuple of arguments or the only argument.
        """
        if self.is_swept:
            enqueue.rows(self, rows)
        else:
            enqueue.calls(self, [(item if isinstance(item, tuple) else (item,), {}) for item in rows])

    def enqueue_with_jitter(
        self, *args: Any, max_wait: timedelta, min_wait: timedelta = timedelta(0), **kwargs: Any
    ) -> None:
        """Queue like `enqueue`, after a random wait from `min_wait` up to `max_wait`, which the scheduler ends.

        A row waits for a day at most: what is to be done later than that, its sweep has to match later.
        """
        wait = spread(max_wait, min_wait)
        if self.is_swept:
            if max_wait > queues.LONGEST_WAIT:
                raise ValueError(
                    f"max_wait is {max_wait}, and a row waits in the queue for {queues.LONGEST_WAIT} at most; "
                    f"have the sweep of {self.name} match it when its time has come."
                )
            enqueue.row(self, self._only(args, kwargs), wait)
        else:
            enqueue.call(self, args, kwargs, wait)

    def _only(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if len(args) != 1 or kwargs:
            raise TypeError(f"{self.name} works on one row: pass the row or its primary key, and nothing else.")
        return args[0]

    @property
    def model(self) -> type[Model]:
        """The model of the rows that its sweep feeds it."""
        return self.sweep.fed_model if self.sweep is not None else super().model

    def identify(self, subject: Any) -> tuple[str, str]:
        """Return a row's primary key as text, and the alias of the database whose commit its work must wait for.

        Raises `ValueError` for an unsaved row or what cannot be a primary key, `TypeError` for a row of another model.
        """
        model = self.model
        text = self._text_of(subject, model)
        if isinstance(subject, Model):
            return text, _written_to(subject)
        return text, self._database()

    def identify_many(self, subjects: Any) -> tuple[Iterator[str], str]:
        """Do the same for a queryset, or for primary keys or rows one by one, which are all in one database."""
        model = self.model
        if isinstance(subjects, (str, bytes)) or not isinstance(subjects, Iterable):
            raise TypeError(f"{self.name}.enqueue_many takes a queryset, primary keys or rows, not {subjects!r}.")
        if isinstance(subjects, QuerySet):
            if subjects.model._meta.concrete_model is not model._meta.concrete_model:
                raise TypeError(f"{self.name} works on {model._meta.label}, not on {subjects.model._meta.label}.")
            pks = subjects.values_list("pk", flat=True).iterator(chunk_size=enqueue.BATCH)
            return map(pk_text, pks), subjects._db or router.db_for_write(model)  # type: ignore[attr-defined]
        subjects = iter(subjects)
        first = list(itertools.islice(subjects, 1))
        using = _written_to(first[0]) if first and isinstance(first[0], Model) else self._database()
        return (self._text_of(subject, model) for subject in itertools.chain(first, subjects)), using

    def _database(self) -> str:
        """Return the alias of the database of a row of which only the primary key is known."""
        assert self.sweep is not None
        return self.sweep.fed_from or router.db_for_write(self.model)

    def _text_of(self, subject: Any, model: type[Model]) -> str:
        """Return the primary key, as text, of a row or of what should be one."""
        if type(subject) is int and isinstance(model._meta.pk, IntegerField):
            # The usual key needs no interpretation, and there may be a million of them.
            return check_pk(str(subject))
        if isinstance(subject, Model):
            if not isinstance(subject, model._meta.concrete_model or model):
                raise TypeError(f"{self.name} works on {model._meta.label}, not on {subject._meta.label}.")
            if subject.pk is None or subject._state.adding:
                raise ValueError(f"{subject!r} is not saved yet: save it, then enqueue {self.name}.")
            return check_pk(pk_of(subject))
        if isinstance(subject, KEYS) and not isinstance(subject, bool):
            return check_pk(pk_text(pk_value(model, pk_text(subject))))
        if subject is None or isinstance(subject, bool):
            raise ValueError(f"{subject!r} is no primary key; pass a saved row to {self.name}, or its primary key.")
        # A text key would take anything, by its str().
        raise TypeError(f"{self.name} works on a row: pass it or its primary key, not {subject!r}.")

    def digest(self, args: Any, kwargs: Any) -> str:
        """Return what tells one call from another, for uniqueness, whether arguments are given by place or by name."""
        with contextlib.suppress(TypeError, ValueError):
            bound = inspect.signature(self.function).bind(*args, **kwargs)
            args, kwargs = bound.args, bound.kwargs
        return hashlib.sha256(json.dumps([args, kwargs], sort_keys=True).encode()).hexdigest()[:32]

    def rows(self) -> QuerySet[Any]:
        """Return the rows that need this work: those of its sweep, or its own schedule while a run is owed."""
        return self.sweep.queryset() if self.sweep is not None else super().rows()

    def work(self, row: Any) -> dict[str, Any]:
        if self.is_swept:
            _must_have_run(self.function(row), self)
            return {}
        kept: dict[str, Any] = row.start()
        # For a job without rows, that nothing is to be done is a good end.
        with contextlib.suppress(NoLongerNeeded):
            _must_have_run(self.function(), self)
        # One of them by one, or all that had come due before this one began.
        return {} if self.missed == "all" else kept

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from super().problems()
        if self._max_attempts is not BY_KIND and not (self._max_attempts is None or _is_count(self._max_attempts)):
            yield "E004", f"max_attempts is {self._max_attempts!r}; pass a number from 1, or None for no end."
        if not isinstance(cast(Any, self.backoff), Backoff):
            yield "E004", f"backoff is {self.backoff!r}; pass Backoff(first=..., cap=...)."
        elif not (_is_duration(self.backoff.first) and _is_duration(self.backoff.cap)):
            yield "E004", f"backoff is {self.backoff!r}; make first and cap timedeltas longer than zero."
        if self.unique_for is not None and not _is_duration(self.unique_for):
            yield "E004", f"unique_for is {self.unique_for!r}; pass a timedelta longer than zero."
        if self._unique_until not in (None, "start", "done"):
            yield "E004", f'unique_until is {self._unique_until!r}; pass "start" or "done".'
        elif self._unique_until is not None and self.unique_for is None:
            yield "E004", "unique_until does nothing without unique_for; pass both."
        arguments = (object(),) if self.is_swept else ()
        if self.is_swept or self.is_scheduled:
            try:
                inspect.signature(self.function).bind(*arguments)
            except TypeError as error:
                given = "the row" if self.is_swept else "nothing"
                yield "E004", f"It is called with {given}, which its parameters do not allow: {error}."
        if self.is_swept and self.unique_for is not None:
            yield "E006", "unique_for is for plain jobs; a row's id is unique in the queue anyway. Remove it."
        if self.missed not in MISSED:
            yield "E004", f'missed is {self.missed!r}; pass "once", "skip" or "all".'
        elif self.missed != "once" and self.cron is None:
            yield "E004", f'missed="{self.missed}" does nothing without cron; pass both.'
        if self.is_swept and self.cron is not None:
            yield "E006", "A job that a sweep feeds has no cron of its own; move it to the sweep."


def _written_to(row: Model) -> str:
    # The router's answer, since the row may have been read from a replica; without routers it is the row's own.
    return router.db_for_write(type(row), instance=row)


def _must_have_run(returned: Any, job: Job) -> None:
    """Raise `TypeError` for a result that means that the function has not run yet. Any other is discarded."""
    if inspect.isawaitable(returned) or inspect.isgenerator(returned):
        raise TypeError(f"{job.name} returned a {type(returned).__name__}, which nobody will run.")


def _is_duration(value: Any) -> bool:
    return isinstance(value, timedelta) and value > timedelta(0)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


@overload
def job(function: Callable[..., Any], /) -> Job: ...
@overload
def job(
    *,
    queue: str = "default",
    name: str | None = None,
    timeout: timedelta | None = None,
    max_attempts: int | None = ...,
    backoff: Backoff | None = None,
    cron: str | None = None,
    missed: Literal["once", "skip", "all"] = "once",
    unique_for: timedelta | None = None,
    unique_until: Literal["start", "done"] | None = None,
) -> Callable[[Callable[..., Any]], Job]: ...
def job(function: Callable[..., Any] | None = None, /, **options: Any) -> Any:
    """Declare a function as a job.

    `queue` is a name in RQ_QUEUES. `name` must be unique in the project. `timeout` ends an attempt (default: the
    queue's). `max_attempts` is the number of exceptions after which a row is quarantined (default: never) or a plain
    call given up (default: 5), `backoff` the wait between them. `cron` runs it on a schedule, in Django's time zone, a
    sixth field being seconds. After an outage it makes up for the times that were missed by one run (`missed="once"`),
    by none ("skip"), or by one for each, up to 1,000 ("all"). For plain jobs, `unique_for` keeps out a second call with
    the same arguments until the first has started (`unique_until="start"`) or ended for good ("done", the default), and
    never longer.

    What cannot work is reported by `manage.py check`, which every command runs at start.
    """

    if function is not None and not callable(cast(Any, function)):
        raise TypeError(f'@job takes a function, and options by name, such as @job(queue="default"); not {function!r}.')

    def declare(function: Callable[..., Any]) -> Job:
        declared = Job(function, **options)
        registry.add(declared)
        return declared

    return declare if function is None else declare(function)
