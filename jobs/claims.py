"""The right to work on one row: taken, renewed, settled, failed, lost.

A claim is a lease: it ends `LEASE` after it was last renewed, so a row whose worker died waits that long and no longer.
Every change is one conditional statement. Two processes may try the same; the database lets one of them.
"""

from __future__ import annotations

import contextlib
import faulthandler
import hashlib
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal, cast
from uuid import uuid4

from django.apps import apps
from django.core.exceptions import ObjectDoesNotExist
from django.db import DataError, IntegrityError, InterfaceError, OperationalError, connections, router, transaction
from django.db import Error as DatabaseError
from django.db.models import BooleanField, CompositePrimaryKey, F, Func, Model, Q, QuerySet
from django.db.models.constants import OnConflict
from django.db.models.sql import InsertQuery

from jobs import clock, database
from jobs.conf import conf
from jobs.deletion import delete
from jobs.exceptions import LeaseLost, NoLongerNeeded
from jobs.fingerprint import fingerprint
from jobs.message import label, pk_of, pk_text, pk_value

if TYPE_CHECKING:
    from jobs.job import Declared
    from jobs.models import Claim, ClaimQuerySet

logger = logging.getLogger("selfheal")

Refusal = Literal["busy", "waiting", "quarantined"]

# Deaths that the worker saw are certain; a lease that ran out may also mean that the database was away.
SEEN_DEATHS = 3
UNSEEN_DEATHS = 10
# How long a quarantined row must not have matched its sweep until that is taken for its end.
UNMATCHED_FOR = timedelta(days=1)

# What the run of a success says whose row still matches its sweep.
STILL_NEEDED = "It succeeded, and its row still needs this work."

# What a claim looks like that nobody holds.
UNHELD: dict[str, Any] = {
    "lease_key": None,
    "token": "",
    "leased_at": None,
    "lease_expires_at": None,
    "holder": "",
    "stopping_since": None,
}

# How a process ends that lost its lease or could not renew it. Says nothing about the row, so nothing is counted.
EXIT_LEASE_LOST = 75
# How long past its time limit an attempt may go on before its process ends itself, and before its worker ends it.
RUNAWAY_AFTER = timedelta(seconds=30)
KILL_AFTER = timedelta(seconds=60)


# This module is imported with the package, before Django's models are: they are looked up when called.
def _claims() -> ClaimQuerySet:
    claims: ClaimQuerySet = apps.get_model("selfheal", "Claim").objects.all()
    return claims


def _database() -> str:
    return router.db_for_write(apps.get_model("selfheal", "Claim"))


@dataclass
class Attempt:
    """One try at one row by one process: who, on what, and the token that proves it."""

    declared: Declared
    model: str
    pk: str
    token: str = field(default_factory=lambda: uuid4().hex)
    worker: str = ""
    taken_at: float = 0.0
    started_at: datetime | None = None
    first_claimed_at: datetime | None = None
    # How many transactions were open around it, on which connection: none, save in a test.
    depths: dict[str, int] = field(default_factory=dict)
    # Its job has itself brought the row to where its sweep does not match it any more.
    has_finished: bool = False

    @property
    def work(self) -> str:
        return f"{self.declared.name} of {self.model} {self.pk}"

    @property
    def lease_key(self) -> str:
        """The row, whichever job works on it."""
        key = f"{self.model}:{self.pk}"
        return key if len(key) <= 200 else f"{self.model[:100]}:#{hashlib.sha256(key.encode()).hexdigest()}"

    def is_on(self, row: Model) -> bool:
        return label(type(row)) == self.model and pk_of(row) == self.pk


def holder(worker: str, pid: int | None = None) -> str:
    """Return how claims and runs name a process: its worker, host and pid."""
    return f"{worker}@{socket.gethostname()}:{pid or os.getpid()}"[-250:]


def split_holder(holder: str) -> tuple[str, str, int | None]:
    """Undo `holder`: return its worker, host and pid."""
    worker, _, process = holder.rpartition("@")
    host, _, pid = process.rpartition(":")
    return worker, host, int(pid) if pid.isdigit() else None


_current: ContextVar[Attempt | None] = ContextVar("selfheal_attempt", default=None)
# In a process that exists for one attempt, the threads of the job speak for it too.
of_this_process: Attempt | None = None
# The connections in whose transactions `with_lock` has a row, and its claim: another thread has others.
_locked_on: ContextVar[frozenset[Any]] = ContextVar("selfheal_locked_on", default=frozenset())


# --- Taking -----------------------------------------------------------------------------------------------------------


def take(attempt: Attempt) -> Claim | Refusal:
    """Take the lease on the row, or say why not: somebody has it, the job is backing off, or it is quarantined.

    Whoever finds that another job has the row leaves a claim, which is a place in line: see `enqueue.next_in_line`.
    Taking over a lease that has expired counts a crash. A lost race never breaks a transaction around it.
    """
    attempt.taken_at = time.monotonic()
    lease = {
        "token": attempt.token,
        "lease_key": attempt.lease_key,
        "leased_at": clock.now(),
        "lease_expires_at": clock.now(conf.LEASE),
        "holder": holder(attempt.worker),
    }
    identity = {"job": attempt.declared.name, "model": attempt.model, "object_pk": attempt.pk}
    # The usual case, work that nobody has touched, first.
    if claim := _insert(**identity, **lease):
        return _begin(attempt, claim)

    for dead in _claims().filter(lease_key=attempt.lease_key, lease_expires_at__lte=clock.now()):
        expire(dead)
    mine = _claims().filter(**identity)
    known = mine.first()
    if known is None:
        # Another job has the lease. First a place in line, then another try: if that is refused too, the row is freed
        # later, and whoever frees it looks for such places afterwards.
        _insert(**identity)
    if known and known.crashes >= UNSEEN_DEATHS and attempt.declared.quarantines and not known.quarantined_at:
        mine.filter(quarantined_at__isnull=True, lease_key__isnull=True).update(quarantined_at=clock.now())
        _alarm(attempt, known.last_error or "its process died again and again")
    else:
        taken = 0
        # A competing job may take the row's lease between our look and our update: its unique key then refuses us.
        with contextlib.suppress(IntegrityError), transaction.atomic(_database()):
            taken = mine.due().filter(lease_key__isnull=True).update(**lease)
        if taken and (claim := mine.filter(token=attempt.token).first()):
            return _begin(attempt, claim)
    return _refusal(mine)


def _insert(**values: Any) -> Claim | None:
    """Make a claim, unless this work has one or the row is leased: a conflict on either unique key is no error.

    One statement, where `bulk_create(ignore_conflicts=True)` takes four: it opens a transaction and tells no result.
    """
    model = apps.get_model("selfheal", "Claim")
    claim: Claim = model(first_claimed_at=clock.now(), **values)
    query = InsertQuery(model, on_conflict=OnConflict.IGNORE)
    query.insert_values([field for field in model._meta.local_concrete_fields if not field.primary_key], [claim])
    [(statement, parameters)] = query.get_compiler(using=_database()).as_sql()
    with connections[_database()].cursor() as cursor:
        cursor.execute(f"{statement} RETURNING leased_at", parameters)
        inserted = cursor.fetchone()
    if inserted is None:
        return None
    if not isinstance(claim.leased_at, datetime):
        [claim.leased_at] = inserted
    claim.first_claimed_at = claim.leased_at
    return claim


def _begin(attempt: Attempt, claim: Claim) -> Claim:
    attempt.pk, attempt.started_at, attempt.first_claimed_at = claim.object_pk, claim.leased_at, claim.first_claimed_at
    return claim


def _refusal(mine: ClaimQuerySet) -> Refusal:
    backs_off = Q(next_attempt_at__gt=clock.now(), lease_key__isnull=True)
    set_aside = mine.filter(backs_off | Q(quarantined_at__isnull=False)).values_list("quarantined_at", flat=True)
    for quarantined_at in set_aside:
        return "quarantined" if quarantined_at else "waiting"
    return "busy"


def expire(claim: Claim) -> None:
    """Free the lease of a process that stopped renewing it, and write down what is known of it.

    It counts as a crash, unless its worker had been told to stop: then what killed it was a deploy, and not the row.
    """
    evidence = f"Its process stopped renewing the lease. {_last_renewed(claim)}"
    expired = _claims().filter(pk=claim.pk, token=claim.token, lease_expires_at__lte=clock.now())
    with transaction.atomic(_database()):
        if claim.stopping_since:
            if expired.update(**UNHELD):
                _record_of(claim, "interrupted", f"{evidence} Its worker was told to stop at {claim.stopping_since}.")
        elif expired.update(**UNHELD, crashes=F("crashes") + 1, last_error=evidence):
            _record_of(claim, "crashed", evidence)
            logger.warning("%s: %s", claim, evidence)


def _last_renewed(claim: Claim) -> str:
    renewed_at = claim.lease_expires_at and claim.lease_expires_at - conf.LEASE
    return f"Last renewed at {renewed_at}, by {claim.holder}."


def _alarm(attempt: Attempt, error: str) -> None:
    logger.error("%s is quarantined until somebody releases it: %s", attempt.work, error)


# --- Ending -----------------------------------------------------------------------------------------------------------


def settle(attempt: Attempt, kept: dict[str, Any], still_needed: bool = False) -> None:
    """End an attempt that succeeded: the claim is gone, the run is written. Raises `LeaseLost` when it was not ours.

    `kept` is what the schedule keeps of a run of its own. A row that is `still_needed` is for its next sweep to queue,
    and the run says so.
    """
    with transaction.atomic(_database()):
        _end(attempt)
        attempt.declared.finish("done", kept)
        if attempt.declared.keeps_history:
            _record(attempt, "done", error=STILL_NEEDED if still_needed else "")


def drop(attempt: Attempt, claim: Claim) -> None:
    """End an attempt at a row that needs nothing any more. No history, unless earlier attempts left some."""
    with transaction.atomic(_database()):
        _end(attempt)
        if _has_history(claim):
            _record(attempt, "resolved", error=claim.last_error)


def _has_history(claim: Claim) -> bool:
    """Whether anything happened to it yet. A place in line that is not needed any more is nobody's history."""
    return bool(claim.attempts or claim.crashes or claim.quarantined_at)


def fail(attempt: Attempt, error: str, traceback: str = "", needed: bool = True) -> None:
    """End an attempt that raised: count it, back off, and quarantine the row once `max_attempts` are used up.

    A row that its sweep does not match any more is settled. Raises `LeaseLost` when the claim was not ours any more.
    """
    declared = attempt.declared
    with transaction.atomic(_database()):
        claim = _claims().filter(token=attempt.token).first()
        if claim is None:
            raise LeaseLost.on(attempt.work)
        attempts = claim.attempts + 1
        is_last = declared.max_attempts is not None and attempts >= declared.max_attempts
        counted = {"attempts": attempts, "next_attempt_at": clock.now(declared.backoff.delay(attempts))}
        _set_back(attempt, "failed", error, counted, give_up=is_last, needed=needed)
        _record(attempt, "failed", error=error, traceback=traceback)


def record_death(attempt: Attempt, pid: int, evidence: str) -> None:
    """Write down that the process of an attempt died, as its worker saw it. Nothing, if it had settled before."""
    with transaction.atomic(_database()):
        claim = _claims().filter(token=attempt.token).first()
        if claim is None:
            return
        _begin(attempt, claim)
        # One that had stopped renewing its lease was ended by its own watchdog: frozen, cut off from a database that
        # hangs, or blocked by a transaction of its own. That is no death of the row's making.
        renews = not _claims().filter(token=attempt.token, lease_expires_at__lte=clock.now(conf.lease_margin)).exists()
        evidence = f"{evidence} {_last_renewed(claim)}"
        if not renews:
            evidence = f"It could not renew its lease in time. {evidence}"
        deaths, crashes = claim.deaths + renews, claim.crashes + 1
        counted = {
            "deaths": deaths,
            "crashes": crashes,
            "next_attempt_at": clock.now(attempt.declared.backoff.delay(crashes)),
        }
        is_last = deaths >= SEEN_DEATHS or crashes >= UNSEEN_DEATHS
        _set_back(attempt, "crashed", evidence, counted, give_up=is_last)
        _record(attempt, "crashed", error=evidence, pid=pid)


def _set_back(
    attempt: Attempt, outcome: str, error: str, counted: dict[str, Any], give_up: bool, needed: bool = True
) -> None:
    """Give the lease back with what was counted, quarantine the row when it is given up, or settle what is over."""
    if not needed:
        _end(attempt)
    elif give_up and not attempt.declared.quarantines:
        _end(attempt)
        attempt.declared.finish(outcome, {})
        logger.error("%s is given up until it comes due again: %s", attempt.work, error)
    elif not _give_back(attempt, last_error=error, quarantined_at=clock.now() if give_up else None, **counted):
        raise LeaseLost.on(attempt.work)
    else:
        attempt.declared.note(outcome)
        if give_up:
            _alarm(attempt, error)


def note_stop(attempt: Attempt) -> None:
    """Write down that the worker of an attempt was told to stop: should it be killed before the end, nothing counts."""
    _claims().filter(token=attempt.token).update(stopping_since=clock.now())


def interrupt(attempt: Attempt, pid: int, evidence: str) -> None:
    """Give the lease back, count nothing, and write down how the process ended: its worker was stopping."""
    with transaction.atomic(_database()):
        if claim := _claims().filter(token=attempt.token).first():
            _begin(attempt, claim)
            _give_back(attempt)
            _record(attempt, "interrupted", error=f"{evidence} Its worker had been told to stop.", pid=pid)


def set_aside(job: str, model: str, pk: str, reason: str) -> bool:
    """Quarantine a row on which there is no claim. Returns whether there was none."""
    identity = {"job": job, "model": model, "object_pk": pk}
    return _insert(**identity, quarantined_at=clock.now(), last_error=reason) is not None


def release(attempt: Attempt) -> None:
    """Give the lease back and count nothing: the worker was told to stop at once."""
    _give_back(attempt)


def record_loss(attempt: Attempt, reason: str) -> None:
    """Write down that an attempt found its lease gone. The claim is somebody else's, and stays as it is."""
    _record(attempt, "lost", error=reason)


def resolve(job: str, rows: QuerySet[Any]) -> int:
    """Settle the job's claims that nobody works on and whose row its sweep does not match any more. Returns how many.

    A quarantined one only when its row is gone, or has not matched for `UNMATCHED_FOR`: what a sweep asks of other rows
    may be otherwise for a while, which mends nothing. A row that was mended by hand needs no release all the same.
    """
    unleased = _claims().unleased().filter(job=job, model=label(rows.model)).order_by("pk")
    resolved, last = 0, 0
    # A composite primary key is a term of the statement for each row, of which a database takes only so many.
    size = 200 if isinstance(rows.model._meta.pk, CompositePrimaryKey) else 1000
    # Most of them are needed. What they say of their last error may be long.
    read = ("object_pk", "token", "quarantined_at", "unmatched_since")
    while batch := list(unleased.filter(pk__gt=last).only(*read)[:size]):
        last = batch[-1].pk
        needed = _needed(rows, batch)
        needed |= _still_quarantined(rows, batch, needed)
        tokens = {claim.pk: claim.token for claim in batch if claim.object_pk not in needed}
        for claim in unleased.filter(pk__in=tokens) if tokens else ():
            with transaction.atomic(_database()):
                if delete(_claims().unleased().filter(pk=claim.pk, token=tokens[claim.pk])):
                    # One with a token had a process, which is gone.
                    if claim.token or _has_history(claim):
                        _record_of(claim, "resolved", claim.last_error)
                    resolved += 1
    return resolved


def _still_quarantined(rows: QuerySet[Any], claims: list[Claim], needed: set[str]) -> set[str]:
    """Return the primary keys of rows that stay in quarantine though they do not match; note since when they do not."""
    quarantined = [claim for claim in claims if claim.quarantined_at]
    again = [claim.pk for claim in quarantined if claim.object_pk in needed and claim.unmatched_since]
    if again:
        _claims().filter(pk__in=again).update(unmatched_since=None)
    unmatched = [claim for claim in quarantined if claim.object_pk not in needed]
    if not unmatched:
        return set()
    # No manager, not even the base one, may hide it.
    existing = _needed(QuerySet(rows.model, using=rows.db), unmatched)
    noted = _claims().quarantined().filter(pk__in=[claim.pk for claim in unmatched])
    noted.filter(unmatched_since__isnull=True).update(unmatched_since=clock.now())
    recent = noted.filter(unmatched_since__gt=clock.now(-UNMATCHED_FOR))
    return existing.intersection(recent.values_list("object_pk", flat=True))


def forget(before: Any) -> None:
    """Delete claims that nobody works on, first made before the given time, and that no job works off any more."""
    delete(_claims().unleased().left_behind().filter(first_claimed_at__lt=before))


def _needed(rows: QuerySet[Any], claims: list[Claim]) -> set[str]:
    """Return the primary keys of those claimed rows that the queryset still matches."""
    pks = []
    for claim in claims:
        # One that cannot be a primary key of this model is from before the model changed.
        with contextlib.suppress(ValueError):
            pks.append(pk_value(rows.model, claim.object_pk))
    try:
        return _found(rows, pks)
    except (OperationalError, InterfaceError):
        raise
    except Exception:
        # One of them cannot even be asked for, being larger than its column takes, say. The others can.
        found = set()
        for pk in pks:
            with contextlib.suppress(OverflowError, ValueError, DataError):
                found |= _found(rows, [pk])
        return found


def _found(rows: QuerySet[Any], pks: list[Any]) -> set[str]:
    return set(map(pk_text, rows.filter(pk__in=pks).values_list("pk", flat=True)))


class _Unflushed(Func):
    """True; and PostgreSQL commits the transaction around it without waiting for the disk.

    An ending that a crash of the database takes back costs a lease, and a look at a row that needs nothing. A claim
    that it takes back would let two processes work on one row, so claims and heartbeats do wait.
    """

    function = "set_config"
    template = "%(function)s('synchronous_commit', 'off', true) = 'off'"
    output_field = BooleanField()

    def as_sqlite(self, *args: Any, **kwargs: Any) -> Any:
        return "1 = 1", ()


def _end(attempt: Attempt) -> None:
    if not delete(_claims().filter(_Unflushed(), token=attempt.token)):
        raise LeaseLost.on(attempt.work)


def _give_back(attempt: Attempt, **changes: Any) -> bool:
    return bool(_claims().filter(_Unflushed(), token=attempt.token).update(**UNHELD, **changes))


def _record(attempt: Attempt, outcome: str, error: str = "", traceback: str = "", pid: int | None = None) -> None:
    write_run(
        job=attempt.declared.name,
        model=attempt.model,
        object_pk=attempt.pk,
        outcome=outcome,
        error=error,
        traceback=traceback,
        holder=holder(attempt.worker, pid),
        first_claimed_at=attempt.first_claimed_at,
        started_at=attempt.started_at,
    )


def _record_of(claim: Claim, outcome: str, error: str) -> None:
    write_run(
        job=claim.job,
        model=claim.model,
        object_pk=claim.object_pk,
        outcome=outcome,
        error=error,
        holder=claim.holder,
        first_claimed_at=claim.first_claimed_at,
        started_at=claim.leased_at,
    )


def write_run(*, holder: str, error: str = "", **values: Any) -> None:
    """Append one ended attempt to the history."""
    worker, host, pid = split_holder(holder)
    apps.get_model("selfheal", "Run").objects.create(
        worker=worker[:100],
        host=host[:100],
        pid=pid,
        error=error,
        fingerprint=fingerprint(error),
        finished_at=clock.now(),
        **values,
    )


# --- Asking -----------------------------------------------------------------------------------------------------------


def held(job: str, model: type[Model], pks: list[str], line_up: bool = False) -> set[str]:
    """Return those of the rows that a sweep must leave: leased by any job, backing off or quarantined for this one.

    To `line_up` is to leave a place in line where only another job is in the way: see `enqueue.next_in_line`.
    """
    leased = Q(lease_key__isnull=False, lease_expires_at__gt=clock.now())
    set_aside = Q(job=job) & (Q(quarantined_at__isnull=False) | Q(next_attempt_at__gt=clock.now()))
    found = _claims().filter(leased | set_aside, model=label(model), object_pk__in=pks).values_list("object_pk", "job")
    own: set[str] = set()
    others: set[str] = set()
    for pk, name in found:
        (own if name == job else others).add(pk)
    for pk in sorted(others - own) if line_up else ():
        _insert(job=job, model=label(model), object_pk=pk)
    return own | others


def count(model: type[Model]) -> int:
    """Return how many claims there are on rows of the model."""
    return _claims().filter(model=label(model)).count()


# --- Holding ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def current(attempt: Attempt) -> Iterator[None]:
    """Make this the attempt that `with_lock` speaks for."""
    attempt.depths = database.depths()
    token = _current.set(attempt)
    try:
        yield
    finally:
        _current.reset(token)


@contextlib.contextmanager
def with_lock(row: Model) -> Iterator[Model]:
    """Open a short transaction in which the row is locked, freshly read into the instance passed, and still ours.

    Inside a swept job the row is read through the sweep's queryset, and just before the commit it is made sure that the
    claim is still this attempt's. So a change that a user made while the job worked is never overwritten. Raises
    `NoLongerNeeded` when the row is gone or no longer matches, and `LeaseLost` at the end of the block, which is rolled
    back, when the claim is not ours; let both pass, the worker ends quietly. Once the job itself has written what its
    sweep does not match any more, a later block asks only whether the row is there, as it does for another row than
    the job's. Nested, it is a savepoint. Outside a job it is a row lock.

    Raises `TypeError` for what is no row, `TransactionManagementError` inside of a transaction of the job's own, and
    the database's `OperationalError` when somebody else keeps the row locked for longer than a third of `HEARTBEAT`.
    """
    if not isinstance(cast(Any, row), Model):
        raise TypeError(f"with_lock takes a row, not {row!r}.")
    attempt = _current.get() or of_this_process
    using = router.db_for_write(type(row), instance=row)
    connection = connections[using]
    is_nested = connection in _locked_on.get() and connection.in_atomic_block
    # Whose claim is looked at in this block.
    outermost = None if is_nested else attempt
    if outermost and database.depth(connection) > outermost.depths.get(using, 0):
        raise transaction.TransactionManagementError(
            f"{outermost.work} opens with_lock inside a transaction of its own, which could be rolled back after it, "
            "and would keep the row locked until it ends. Leave that transaction away, or use with_lock in its place."
        )
    with contextlib.ExitStack() as stack:
        stack.enter_context(_undone_together(attempt))
        if outermost and using != _database():
            # The claim is looked at in this one, so that it stays ours until the row's is committed.
            stack.enter_context(transaction.atomic(_database()))
        stack.enter_context(transaction.atomic(using))
        # The row first and the claim last: whoever waits for a row keeps nobody from the claim.
        with _locked(row, using, attempt):
            yield row
        if outermost:
            _renew_or_lose(outermost)


@contextlib.contextmanager
def _undone_together(attempt: Attempt | None) -> Iterator[None]:
    """Forget that the job has finished its row when what it wrote is rolled back."""
    before = attempt is not None and attempt.has_finished
    try:
        yield
    except BaseException:
        if attempt is not None:
            attempt.has_finished = before
        raise


@contextlib.contextmanager
def _locked(row: Model, using: str, attempt: Attempt | None) -> Iterator[None]:
    """Lock the row and read it again, in a transaction that is there already."""
    own = attempt if attempt is not None and attempt.is_on(row) else None
    to_match = own if own is not None and not own.has_finished else None
    rows: QuerySet[Any] = QuerySet(type(row), using=using)
    try:
        _lock(row, using)
        row.refresh_from_db(from_queryset=_matching(rows, row, to_match) if to_match else rows)
    except ObjectDoesNotExist:
        if own is not None:
            raise NoLongerNeeded.of(own.work) from None
        raise
    opened = {connections[using], connections[_database()]} if attempt is not None else {connections[using]}
    token = _locked_on.set(_locked_on.get() | opened)
    finished = False
    try:
        if to_match is None:
            yield
            return
        # Nested, a row that matches no longer is this job's own doing.
        to_match.has_finished = True
        yield
        finished = not _matching(rows, row, to_match).exists()
    finally:
        _locked_on.reset(token)
        if to_match is not None:
            to_match.has_finished = finished


def _matching(rows: QuerySet[Any], row: Model, attempt: Attempt) -> QuerySet[Any]:
    # In a subquery: the sweep's joins may find the row twice, and what it loads of a row is its affair.
    return rows.filter(pk__in=attempt.declared.rows().using(rows.db).filter(pk=row.pk).values("pk"))


def _renew_or_lose(attempt: Attempt) -> None:
    # An update rather than SELECT FOR UPDATE: it locks on SQLite too.
    if not renew(attempt.token):
        raise LeaseLost.on(attempt.work)


def renew(token: str) -> bool:
    """Extend the lease to `LEASE` from now; False when the token is not the holder's any more."""
    return bool(_claims().filter(token=token).update(lease_expires_at=clock.now(conf.LEASE)))


def _lock(row: Model, using: str) -> None:
    """Lock the row until the transaction ends. Raises `DoesNotExist` when it is gone."""
    connection = connections[using]
    if connection.vendor == "sqlite":
        # SQLite locks the whole database at the first write; a deferred transaction that reads first can lose the race.
        table, column = (connection.ops.quote_name(name) for name in (row._meta.db_table, _any_column(row)))
        with connection.cursor() as cursor:
            cursor.execute(f"UPDATE {table} SET {column} = {column} WHERE 1 = 0")
        return
    # MariaDB knows no OF, and locks all that is joined.
    of = ("self", *_parent_links(type(row))) if connection.features.has_select_for_update_of else ()
    # No manager, not even the base one, may hide it.
    locked: QuerySet[Any] = QuerySet(type(row), using=using).select_for_update(of=of)
    locked.get(pk=row.pk)


def _parent_links(model: type[Model], prefix: str = "") -> Iterator[str]:
    """Yield the paths to the tables that an inherited row is spread over; each of them has to be locked."""
    for parent, link in model._meta.concrete_model._meta.parents.items():  # type: ignore[union-attr]
        if link is not None:
            yield prefix + link.name
            yield from _parent_links(parent, f"{prefix}{link.name}__")


def _any_column(row: Model) -> str:
    # A proxy has none of its own.
    return str(row._meta.concrete_model._meta.local_concrete_fields[0].column)  # type: ignore[union-attr]


class Heartbeat(threading.Thread):
    """Renews an attempt's lease for as long as its process lives, and ends the process when it must not go on.

    That is when the token is gone, when the lease could not be renewed in time, or when the attempt runs away past its
    time limit. For a process that its worker forked for this attempt alone; on a thread, with a connection of its own.
    """

    def __init__(self, attempt: Attempt) -> None:
        super().__init__(name=f"heartbeat of {attempt.work}", daemon=True)
        self.attempt = attempt
        self.ended = threading.Event()
        self.parent = os.getppid()
        self.runaway_at = time.monotonic() + attempt.declared.timeout_seconds + RUNAWAY_AFTER.total_seconds()

    def __enter__(self) -> Heartbeat:
        # From when the lease was taken: the process may have been frozen since.
        if time.monotonic() > self.attempt.taken_at + conf.HEARTBEAT.total_seconds():
            asked_at = time.monotonic()
            _renew_or_lose(self.attempt)
            self.attempt.taken_at = asked_at
        self._arm(self.attempt.taken_at)
        self.start()
        return self

    def __exit__(self, *exc: Any) -> None:
        self.ended.set()
        # Never let it renew a claim that is being settled, nor end a process that is about to report.
        self.join(timeout=conf.HEARTBEAT.total_seconds())
        faulthandler.cancel_dump_traceback_later()

    def run(self) -> None:
        try:
            self._beat()
        finally:
            connections.close_all()

    def _beat(self) -> None:
        renewed_at = self.attempt.taken_at
        wait = conf.HEARTBEAT.total_seconds()
        while not self.ended.wait(wait):
            asked_at = time.monotonic()
            if asked_at > self.runaway_at:
                self._end_process(f"{self.attempt.work} runs {RUNAWAY_AFTER} past its time limit", signal.SIGKILL)
            try:
                if not renew(self.attempt.token):
                    if self.ended.is_set():
                        return
                    self._end_process(f"{self.attempt.work} has lost its lease")
                renewed_at = asked_at
                self._arm(renewed_at)
                wait = conf.HEARTBEAT.total_seconds()
            except DatabaseError as error:
                logger.warning("The lease of %s was not renewed: %s", self.attempt.work, error)
                connections.close_all()
                wait = min(1.0, conf.HEARTBEAT.total_seconds())
            if time.monotonic() > renewed_at + (conf.LEASE - conf.lease_margin).total_seconds():
                self._end_process(f"{self.attempt.work} could not renew its lease in time")

    @staticmethod
    def _arm(renewed_at: float) -> None:
        # The watchdog of the interpreter itself: it ends a process whose threads cannot, be it stuck in C code, waiting
        # for a database that hangs, or just resumed after it was frozen.
        left = renewed_at + (conf.LEASE - conf.lease_margin / 2).total_seconds() - time.monotonic()
        faulthandler.dump_traceback_later(max(left, 0.001), exit=True, file=sys.__stderr__ or sys.stderr)

    def _end_process(self, reason: str, how: int | None = None) -> None:
        logger.error("Ending this process: %s.", reason)
        if os.getppid() != self.parent and os.getpgrp() == os.getpid():
            # The worker, which ends what the job has started, is gone.
            os.killpg(0, signal.SIGKILL)
        if how is not None:
            os.kill(os.getpid(), how)
        os._exit(EXIT_LEASE_LOST)
