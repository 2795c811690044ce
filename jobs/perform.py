"""One message, performed: switch, claim, the row read again, the function, and how it ended written down."""

from __future__ import annotations

import contextlib
import logging
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, cast

from django.db import connections
from django.db.models import QuerySet
from django.db.transaction import TransactionManagementError
from redis import Redis

from jobs import claims, clock, database, enqueue, switches
from jobs.claims import Attempt
from jobs.conf import conf
from jobs.exceptions import LeaseLost, NoLongerNeeded
from jobs.job import Declared, Job
from jobs.message import Message, label, pk_of, pk_value

if TYPE_CHECKING:
    from jobs.models import Claim

logger = logging.getLogger("selfheal")

Outcome = Literal["done", "failed", "not_needed", "busy", "waiting", "quarantined", "disabled"]

# What of an error is kept. It may be anything, and is written to the database at every attempt.
LONGEST_ERROR = 10_000
LONGEST_TRACE = 100_000


@dataclass
class _OtherwiseWritten:
    """The database writes the row's primary key otherwise: 1.00 for 1, or abc where the letters' case means nothing."""

    pk: str


Guard = Callable[[Declared, Attempt | None], AbstractContextManager[Any]]


def unguarded(declared: Declared, attempt: Attempt | None) -> AbstractContextManager[None]:
    """No time limit and no heartbeat: for tests."""
    return contextlib.nullcontext()


def attempt_at(message: Message, worker: str = "") -> Attempt:
    """Return a fresh attempt at the row or the schedule that the message names."""
    declared = message.declared
    assert message.pk is not None
    return Attempt(declared, label(declared.model), message.pk, worker=worker)


def perform(attempt: Attempt, guard: Guard = unguarded) -> Outcome:
    """Do the work on one row, if it is enabled, free, and still needed. Never raises for what the job does.

    `guard` is entered around the job's own code: in a worker, a time limit and a heartbeat.
    """
    declared = attempt.declared
    if switches.disabled(declared.switches):
        return "disabled"
    claim = claims.take(attempt)
    if isinstance(claim, str):
        return claim
    try:
        outcome = _work(attempt, claim, guard)
        if isinstance(outcome, _OtherwiseWritten):
            # Two spellings of its key must not be two leases on one row.
            _write_down(partial(claims.drop, attempt, claim))
            attempt.pk = outcome.pk
            return perform(attempt, guard)
        enqueue.next_in_line(attempt.model, attempt.pk)
        return outcome
    except LeaseLost as lost:
        reason = str(lost) or str(LeaseLost.on(attempt.work))
        logger.warning(reason)
        _write_down(lambda: claims.record_loss(attempt, reason))
        return "busy"


def _work(attempt: Attempt, claim: Claim, guard: Guard) -> Outcome | _OtherwiseWritten:
    """Work on the claimed row, and write down how that ended. Raises `LeaseLost` when it is not ours any more."""
    declared = attempt.declared
    outcome: Outcome
    end: Callable[[], None]
    try:
        with claims.current(attempt), guard(declared, attempt):
            row = _read(declared.rows(), attempt.pk)
            if (pk := pk_of(row)) != attempt.pk:
                return _OtherwiseWritten(pk)
            kept = declared.work(row)
            _refuse_open_transactions(attempt.work, attempt.depths)
    except NoLongerNeeded as over:
        _let_go(over)
        outcome, end = "not_needed", partial(claims.drop, attempt, claim)
    except LeaseLost:
        raise
    except BaseException as error:
        _raise_if_asked_to_stop(error)
        described = _describe(error, attempt.work)
        _let_go(error)
        outcome, end = "failed", lambda: claims.fail(attempt, *described, needed=_matches(attempt) is not False)
    else:
        outcome, end = "done", lambda: claims.settle(attempt, kept, _is_still_needed(attempt))
    _write_down(end)
    return outcome


def _refuse_open_transactions(work: str, before: dict[str, int]) -> None:
    """Raise for a transaction that the job has begun and not ended: what it wrote there is rolled back."""
    open_on = [alias for alias, depth in database.depths().items() if depth > before.get(alias, 0)]
    if open_on:
        raise TransactionManagementError(
            f"{work} has left a transaction open on {', '.join(open_on)}, or autocommit off. What it wrote "
            "there is rolled back. Have it commit, as transaction.atomic() does at the end of its block."
        )


def perform_call(message: Message, connection: Redis, again_at: float, guard: Guard = unguarded) -> Outcome:
    """Do a plain call. A failure delivers it again after its backoff, until its attempts are used up.

    At `again_at`, in seconds since 1970, this process is certainly gone.
    """
    job = cast(Job, message.declared)
    if job.is_scheduled and switches.disabled(job.switches):
        enqueue.end_call(message, connection)
        return "disabled"
    # Before an attempt is counted: the database may be away.
    started_at = clock.read()
    attempt = enqueue.start_call(message, connection, again_at)
    if not attempt:
        return "not_needed"
    try:
        if job.max_attempts is not None and attempt > job.max_attempts:
            raise RuntimeError(f"Its process died in each of its {job.max_attempts} attempts.")
        depths = database.depths()
        with guard(job, None):
            job.function(*message.args, **message.kwargs)
            _refuse_open_transactions(message.id, depths)
    except BaseException as error:
        _raise_if_asked_to_stop(error)
        sentence, trace = _describe(error, message.id)
        if job.max_attempts is not None and attempt >= job.max_attempts:
            enqueue.end_call(message, connection)
        else:
            enqueue.retry_call(message, connection, job.backoff.delay(attempt))
        _write_down(lambda: _record_call(message, "failed", started_at, sentence, trace))
        return "failed"
    enqueue.end_call(message, connection)
    _write_down(lambda: _record_call(message, "done", started_at))
    return "done"


def _read(rows: QuerySet[Any], pk: str) -> Any:
    """Read the claimed row as its sweep finds it. Raises `NoLongerNeeded` when it does not."""
    try:
        row = rows.filter(pk=pk_value(rows.model, pk)).first()
    except ValueError:
        row = None
    if row is None:
        raise NoLongerNeeded.of(f"{rows.model._meta.label} {pk}")
    return row


def _matches(attempt: Attempt) -> bool | None:
    """Whether the row matches its sweep now. None when the queryset fails itself, which is logged and answers nothing.

    Raises what the database raises when it is away.
    """
    try:
        _read(attempt.declared.rows(), attempt.pk)
        return True
    except NoLongerNeeded:
        return False
    except Exception as error:
        is_alone = not any(attempt.depths.values())
        # Not inside of a transaction around it, as in a TestCase: to ask on another connection would end that.
        if is_alone and isinstance(error, database.MAY_BE_AWAY) and not database.answers():
            raise
        logger.exception("The rows of %s cannot be read", attempt.declared.name)
        return None


def _is_still_needed(attempt: Attempt) -> bool:
    """Whether the row needs the work after a success, which it is whatever the queryset has to say."""
    declared = attempt.declared
    if not declared.is_swept or declared.works_in_parts or attempt.has_finished:
        return False
    return _matches(attempt) is True


def _write_down(statement: Callable[[], None]) -> None:
    """Execute what ends an attempt, on a fresh connection if the old one died while the job was at work.

    Tries for half a lease: within that nobody else can have taken the row.
    """
    give_up_at = time.monotonic() + conf.LEASE.total_seconds() / 2
    while True:
        try:
            return statement()
        except database.MAY_BE_AWAY:
            if time.monotonic() > give_up_at or any(each.in_atomic_block for each in connections.all(True)):
                raise
            logger.warning("The end of an attempt could not be written down, trying again", exc_info=True)
            connections.close_all()
            time.sleep(0.5)


def _let_go(error: BaseException) -> None:
    """Drop what the job still holds by its error: behind a query that it has read half of, SQLite would not write."""
    errors = [error]
    for each in errors:
        traceback.clear_frames(each.__traceback__)
        errors += [other for other in (each.__cause__, each.__context__) if other is not None and other not in errors]


def _raise_if_asked_to_stop(error: BaseException) -> None:
    """Let Ctrl-C through, in a test or a shell. Anything else that a job raises is its failure, sys.exit() included."""
    if isinstance(error, KeyboardInterrupt):
        raise error


def _describe(error: BaseException, work: str) -> tuple[str, str]:
    """Log what a job raised; return it as a sentence and a traceback that can be stored. Secrets are in neither."""
    said = trace = f"{type(error).__name__}: (it cannot be written as text)"
    with contextlib.suppress(Exception):
        trace = "".join(traceback.format_exception(error))
        said = f"{type(error).__name__}: {error}"
    try:
        sentence, redacted = conf.REDACT(said), conf.REDACT(trace)
    except Exception as failure:
        # Better to know less than to show what was to be hidden.
        redacted = sentence = f"{type(error).__name__}: (REDACT raised {type(failure).__name__})"
    if redacted == trace:
        logger.error("%s failed", work, exc_info=error)
    else:
        logger.error("%s failed: %s", work, redacted)
    return _storable(sentence)[:LONGEST_ERROR], _storable(redacted)[-LONGEST_TRACE:]


def _storable(text: str) -> str:
    """Write as text what PostgreSQL does not take, a NUL, and what no database does, half a surrogate pair."""
    return text.replace("\0", "\\x00").encode("utf-8", "backslashreplace").decode()


def _record_call(message: Message, outcome: str, started_at: datetime, error: str = "", trace: str = "") -> None:
    claims.write_run(
        job=message.declared.name,
        outcome=outcome,
        error=error,
        traceback=trace,
        holder=claims.holder(message.worker_name or ""),
        started_at=started_at,
    )
