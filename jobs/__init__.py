"""Background jobs that cannot be lost: the row is the truth, the queue is a hint.

Everything that a project needs is named here. A job does one idempotent piece of work for one row, or with plain
arguments; a sweep is the queryset of the rows that still need it. What Redis forgets, a worker drops or a deploy
kills, the next sweep finds again.
"""

from jobs.backoff import Backoff
from jobs.claims import with_lock
from jobs.exceptions import LeaseLost, NoLongerNeeded, QueueUnavailable
from jobs.job import job
from jobs.sweep import SweepResult, sweep

__all__ = [  # noqa: RUF022  (grouped by use)
    # Declare
    "job",
    "sweep",
    "Backoff",
    # Inside a job
    "with_lock",
    "LeaseLost",
    "NoLongerNeeded",
    # Around it
    "SweepResult",
    "QueueUnavailable",
]
