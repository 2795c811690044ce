"""Bugs to plant, each a context manager: the explorer has to find every one of them.

Each is what somebody could write who does not know why the code is as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any
from unittest import mock

from jobs import claims, enqueue, queues, scheduler
from jobs.claims import Attempt
from jobs.message import row_id
from jobs.models import Claim, ClaimQuerySet
from tests.recovery.explorer import processes

Bug = Callable[[], AbstractContextManager[Any]]
BUGS: dict[str, Bug] = {}
# The faults by which each is found soon: with them alone, one of the first seeds does. Without any, one of all faults'.
FOUND_BY: dict[str, tuple[str, ...]] = {}


def bug(*found_by: str) -> Callable[[Callable[[], Iterator[None]]], Bug]:
    """Declare a bug, and by which faults it is found soon."""

    def declare(plant: Callable[[], Iterator[None]]) -> Bug:
        BUGS[plant.__name__], FOUND_BY[plant.__name__] = contextmanager(plant), found_by
        return BUGS[plant.__name__]

    return declare


@bug("freeze_until_overtaken")
def no_fence() -> Iterator[None]:
    """with_lock does not ask whether the claim is still there."""
    with mock.patch.object(claims, "_renew_or_lose", return_value=None):
        yield


@bug("change")
def no_re_read_under_the_lock() -> Iterator[None]:
    """with_lock does not read the row again, and so writes over what a user has set meanwhile."""

    def lock_only(attempt: Attempt, row: Any) -> bool:
        return False

    with mock.patch.object(Attempt, "is_on", lock_only), mock.patch("django.db.models.Model.refresh_from_db"):
        yield


@bug()
def settle_without_the_token() -> Iterator[None]:
    """An attempt that has ended settles the row's claim, whoever has it by now."""

    def whoever_has_it(settle: Callable[..., None]) -> Callable[..., None]:
        def settle_it(attempt: Attempt, *how: Any, **options: Any) -> None:
            claims_of_the_row = Claim.objects.filter(model=attempt.model, object_pk=attempt.pk)
            if claim := claims_of_the_row.filter(job=attempt.declared.name).first():
                attempt = replace(attempt, token=claim.token)
            settle(attempt, *how, **options)

        return settle_it

    with ExitStack() as patches:
        for name in ("settle", "fail", "drop", "release"):
            patches.enter_context(mock.patch.object(claims, name, whoever_has_it(getattr(claims, name))))
        yield


@bug("enqueue_all")
def claims_ignore_next_attempt_at() -> Iterator[None]:
    """A row that backs off is taken when a message about it comes."""

    def due(self: ClaimQuerySet) -> ClaimQuerySet:
        return self.unleased().filter(quarantined_at__isnull=True)

    with mock.patch.object(ClaimQuerySet, "due", due):
        yield


@bug("change")
def lease_per_job() -> Iterator[None]:
    """Each job has a lease of its own on a row."""
    key = property(lambda attempt: f"{attempt.declared.name}:{attempt.model}:{attempt.pk}")
    with mock.patch.object(Attempt, "lease_key", key):
        yield


@bug("kill_worker")
def heartbeat_from_the_parent() -> Iterator[None]:
    """The worker renews the lease of its child, and nobody does when it is killed."""

    class FromTheParent(processes.Heartbeat):
        def __init__(self, attempt: Attempt) -> None:
            super().__init__(attempt)
            world = processes.here().world
            workers = [each for each in world.processes if each.kind == "worker"]
            self.process = next((each for each in workers if each.worker is self.process.worker), self.process)

        def join(self, timeout: float | None = None) -> None:
            if self.process.is_alive:
                super().join(timeout)

        @staticmethod
        def _arm(renewed_at: float) -> None:
            """The child has no watchdog then."""

        def _end_process(self, reason: str, how: int | None = None) -> None:
            """Nor is it ended."""

    with mock.patch.object(processes, "Heartbeat", FromTheParent):
        yield


@bug("kill", "lose_database_call")
def unique_by_hash() -> Iterator[None]:
    """An id counts as queued for as long as a hash says so, as with rq's `unique=True`."""
    push_ids, push_id, take = enqueue.push_ids, enqueue.push_id, claims.take

    def only_new(queue: Any, ids: list[bytes], spread_over: Any = None) -> None:
        new = [id for id in ids if queue.connection.hsetnx(b"rq:job:" + id, "status", "queued")]
        push_ids(queue, new, spread_over)

    def only_if_new(queue: Any, id: str, **options: Any) -> bool:
        return bool(queue.connection.hsetnx(f"rq:job:{id}", "status", "queued")) and push_id(queue, id, **options)

    def take_and_forget(attempt: Attempt) -> Any:
        taken = take(attempt)
        name = attempt.declared.name
        id = name if attempt.model == "selfheal.schedule" else row_id(name, attempt.pk)
        queues.get(attempt.declared.queue).connection.delete(f"rq:job:{id}")
        return taken

    with (
        mock.patch.object(enqueue, "push_ids", only_new),
        mock.patch.object(enqueue, "push_id", only_if_new),
        mock.patch.object(claims, "take", take_and_forget),
    ):
        yield


@bug("kill", "lose_redis_call")
def schedule_advanced_before_the_push() -> Iterator[None]:
    """A due run is pushed once, after its schedule has been advanced, and nobody remembers that it is owed."""
    advance = scheduler._advance

    def advance_and_push(schedule: Any, expression: str, now: Any, missed: str) -> None:
        is_due = schedule.next_run_at is not None and schedule.next_run_at <= now
        advance(schedule, expression, now, missed)
        if is_due:
            declared = scheduler.registry.get(schedule.name)
            enqueue.push_id(queues.get(declared.queue), declared.name)

    with (
        mock.patch.object(scheduler, "_advance", advance_and_push),
        mock.patch.object(scheduler, "_push_owed", return_value=[]),
        mock.patch.object(scheduler, "_push_claims", return_value=None),
    ):
        yield


@bug("kill_with_worker")
def leases_never_expire() -> Iterator[None]:
    """A row whose process died waits for ever."""
    with (
        mock.patch.object(claims, "expire", return_value=None),
        mock.patch.object(ClaimQuerySet, "unleased", lambda self: self.filter(lease_key__isnull=True)),
    ):
        yield


@bug("outage")
def sweep_without_a_look() -> Iterator[None]:
    """A sweep pushes what is queued already, and copies pile up while nobody works."""
    with mock.patch.object(enqueue, "queued_ids", side_effect=lambda queue, name: set()):
        yield


@bug("ping", "kill")
def lost_calls_are_not_looked_for() -> Iterator[None]:
    """A plain call whose worker is killed between taking and starting it is in no queue any more."""
    with mock.patch.object(enqueue, "find_lost_calls", return_value=0):
        yield


@bug("hide")
def what_is_hidden_counts_as_queued() -> Iterator[None]:
    """Whatever is in the delayed set is believed, however late it is to come."""
    with mock.patch.object(queues, "LONGEST_WAIT", timedelta(days=10_000)):
        yield


@bug("deploy")
def what_is_not_known_is_tidied_up() -> Iterator[None]:
    """A tick deletes the claims of jobs that its version of the code does not have."""
    take_due = scheduler._take_due

    def tidy_up(errors: Any) -> None:
        Claim.objects.exclude(job__in=[each.name for each in scheduler.registry.declared()]).delete()
        take_due(errors)

    with mock.patch.object(scheduler, "_take_due", tidy_up):
        yield
