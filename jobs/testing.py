"""Helpers for the tests of projects that declare jobs.

`perform` needs no Redis and works inside a TestCase. `tick` and `drain` do what the scheduler and the workers do, in
this process, with the Redis in RQ_QUEUES.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import datetime
from typing import Any

from django.db import DatabaseError, connections, transaction
from rq.exceptions import NoSuchJobError

from jobs import clock, queues, scheduler
from jobs import perform as performing
from jobs.claims import Attempt
from jobs.job import Declared, Job
from jobs.message import label
from jobs.perform import Outcome

__all__ = ["drain", "perform", "tick"]


def perform(job: Job, row: Any) -> Outcome:
    """Do a swept job's work on one row as a worker would, and return how it ended.

    The row is claimed and read again, and the end is written down; an exception is not raised but counted, and kept on
    the `Run` and the `Claim`. There is no heartbeat and no time limit.
    """
    if not job.is_swept:
        raise TypeError(f"No sweep feeds {job.name}: call it, or drain() the queue.")
    pk, _ = job.identify(row)
    return performing.perform(Attempt(job, label(job.model), pk, worker="test"), _contained)


@contextmanager
def _contained(declared: Declared, attempt: Attempt | None) -> Iterator[None]:
    """Inside a TestCase, take back what an error of the database would do to the transaction around the test.

    Elsewhere the statement fails alone, and what the job wrote before stays. Here that goes with it.
    """
    around = [each.alias for each in connections.all(initialized_only=True) if each.in_atomic_block]
    # The connection's own method: the function in django.db.transaction has another name from Django 6.1 on.
    savepoints = {alias: savepoint for alias in around if (savepoint := connections[alias].savepoint())}
    is_broken = False
    try:
        yield
    except DatabaseError:
        is_broken = True
        raise
    finally:
        for alias, savepoint in savepoints.items():
            if is_broken or transaction.get_rollback(alias):
                transaction.set_rollback(False, alias)
                transaction.savepoint_rollback(savepoint, alias)
            else:
                transaction.savepoint_commit(savepoint, alias)


def tick(now: datetime | None = None) -> list[str]:
    """Tick once, at the given time or the present; return the names of the schedules that were pushed."""
    with clock.fixed(now):
        return scheduler.tick()


def drain(now: datetime | None = None) -> Counter[Outcome]:
    """Perform everything that is in the queues, and what that adds to them; return how often each outcome came.

    What is backing off at the given time or the present is left alone: after a `tick(now=later)`, drain then as well.
    """
    with clock.fixed(now) if now else nullcontext():
        return _drain()


def _drain() -> Counter[Outcome]:
    outcomes: Counter[Outcome] = Counter()
    remaining = [queues.get(name) for name in queues.names()]
    while remaining:
        try:
            popped = queues.Queue.dequeue_any(remaining[:1], None, connection=remaining[0].connection)
        except NoSuchJobError:
            continue
        if popped is None:
            remaining.pop(0)
            continue
        message, queue = popped
        if message.pk is None:
            outcomes[performing.perform_call(message, queue.connection, clock.timestamp())] += 1
        else:
            outcomes[performing.perform(performing.attempt_at(message, "test"))] += 1
        remaining = [queues.get(name) for name in queues.names()]
    return outcomes
