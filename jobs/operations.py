"""What an operator does to claims: queue now, release, quarantine. A few at once, or all that match a filter.

More than `AT_ONCE` are an `Operation`, which is a row like any other: a job works it off a batch at a time and notes on
it how far it has come, in the transaction that changed the claims. Whatever is killed, the next attempt goes on there.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

from django.db import router, transaction
from django.db.models import Count, Max
from django.utils.translation import gettext as _

from jobs import claims, clock, registry
from jobs.claims import with_lock
from jobs.deletion import delete
from jobs.job import Job
from jobs.message import label, pk_value
from jobs.models import Claim, ClaimQuerySet, Operation

AT_ONCE = 1000
BATCH = 1000
# How long one attempt at an operation takes at most. The worker has sweeps to run, too.
ATTEMPT_SECONDS = 20.0


class Result(NamedTuple):
    """Whether an action changed what it was for, and what there is to say about it."""

    changed: bool
    sentence: str


def apply(action: str, meant: ClaimQuerySet) -> list[Claim]:
    """Do it to these claims, at most a batch of them, in one transaction. Returns those that it changed.

    What is worked on is left alone. What seems to be, by a process that is gone, is not worked on. A claim that no job
    works off any more has nothing to wait for: it is removed when its waiting is to end.
    """
    if action != Operation.Action.RELEASE:
        for dead in meant.filter(lease_expires_at__lte=clock.now()):
            claims.expire(dead)
    with transaction.atomic(router.db_for_write(Claim)):
        # In the order of their keys, so that of two operators who change the same ones each waits for the other once.
        changed = list(meant.can(action).only("job", "model", "object_pk").order_by("pk").select_for_update())
        left_behind = {claim.pk for claim in changed if claim.is_left_behind}
        if action != Operation.Action.QUARANTINE:
            delete(meant.can(action).filter(pk__in=left_behind))
        getattr(Claim.objects.filter(pk__in=[claim.pk for claim in changed]), action)()
    return changed


def push(changed: Iterable[Claim]) -> None:
    """Queue the rows of claims that may be attempted now. That saves waiting for the tick; more it does not."""
    rows: dict[str, list[str]] = defaultdict(list)
    for claim in changed:
        if not claim.is_left_behind:
            rows[claim.job].append(claim.object_pk)
    for name, pks in rows.items():
        if isinstance(job := registry.get(name), Job) and job.is_swept:
            job.enqueue_many(pks)


def apply_to_row(action: str, job: Job, pk: str, by: str = "") -> Result:
    """Do it to one job's work on one row, whether there is a claim on it or not."""
    model = label(job.model)
    meant = Claim.objects.of_rows(job.name, model, [pk])
    changed = apply(action, meant)
    if action == Operation.Action.RELEASE:
        push(changed)
        if changed:
            return Result(True, _("The row is released, and queued."))
        return Result(False, _("The row is not quarantined."))
    if not job.rows().filter(pk=pk_value(job.model, pk)).exists():
        return Result(False, _("The row needs nothing: its sweep does not match it."))
    if action == Operation.Action.QUARANTINE:
        reason = _("Quarantined by %s.") % by if by else _("Quarantined by an operator.")
        if changed or claims.set_aside(job.name, model, pk, reason):
            return Result(True, _("The row is quarantined until somebody releases it."))
    if meant.quarantined().exists():
        return Result(False, _("The row is quarantined already: release it to have it worked on."))
    if meant.leased().exists():
        return Result(False, _("The row is being worked on: pause the job, or wait until the attempt has ended."))
    job.enqueue(pk_value(job.model, pk))
    return Result(True, _("The row is queued, unless its queue is full or its job is paused."))


def request(action: str, criteria: dict[str, str], by: str = "") -> Operation:
    """Have it done to all claims that match now, and return the row that tells how far that has come.

    The criteria are what `ClaimQuerySet.matching` takes. Claims that are made later are not touched.
    """
    found: dict[str, Any] = Claim.objects.matching(**criteria).aggregate(total=Count("pk"), last=Max("pk"))
    operation = Operation.objects.create(
        action=action,
        filter=criteria,
        last_pk=found["last"] or 0,
        total=found["total"],
        requested_by=by[:150],
        requested_at=clock.read(),
    )
    operate = registry.get("selfheal_operate")
    assert isinstance(operate, Job)
    operate.enqueue(operation)
    return operation


def advance(operation: Operation) -> None:
    """Do an operation from where it was left, until it is done or has taken long enough for one attempt.

    Each batch is found first and then changed under the operation's lock, which asks again whether it still matches.
    """
    job = registry.get("selfheal_operate")
    until = time.monotonic() + min(ATTEMPT_SECONDS, job.timeout_seconds / 2 if job else ATTEMPT_SECONDS)
    meant = Claim.objects.matching(**operation.filter)
    left = meant.filter(pk__lte=operation.last_pk).order_by("pk").values_list("pk", flat=True)
    while operation.finished_at is None:
        batch = list(left.filter(pk__gt=operation.at_pk)[:BATCH])
        with with_lock(operation):
            if batch:
                operation.at_pk = batch[-1]
                operation.seen += len(batch)
                operation.changed += len(apply(operation.action, meant.filter(pk__in=batch)))
            else:
                operation.finished_at = clock.read()
            operation.save(update_fields=["at_pk", "seen", "changed", "finished_at"])
        if time.monotonic() > until:
            return
