"""Claims raced for by many sessions of PostgreSQL at once, and nobody waiting for somebody who waits for them."""

import random
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import pytest
from django.db import transaction
from django.utils import timezone

from jobs import LeaseLost, NoLongerNeeded, claims
from jobs.claims import Attempt
from jobs.job import Declared
from jobs.models import Claim, Run
from tests.cast.jobs import delete_task, do_task, schedule_tasks
from tests.cast.models import Task

pytestmark = [pytest.mark.postgres, pytest.mark.django_db(transaction=True)]

MANY = 16
# Attempts that ended, of which some would have met in a circle if there were one.
ENOUGH = 20


def attempt(task: Task, job: Declared = do_task) -> Attempt:
    return Attempt(job, "cast.task", str(task.pk), worker="w1")


def winners(results: list[Any]) -> list[Claim]:
    assert {result for result in results if not isinstance(result, Claim)} <= {"busy"}
    return [result for result in results if isinstance(result, Claim)]


@pytest.mark.parametrize("state", ["free", "given back", "expired"])
def test_of_many_sessions_one_gets_the_row(race, state):
    for _ in range(3):
        task = Task.objects.create()
        if state != "free":
            first = attempt(task)
            claims.take(first)
        if state == "given back":
            claims.release(first)
        if state == "expired":
            Claim.objects.filter(token=first.token).update(lease_expires_at=timezone.now() - timedelta(minutes=1))
        results = race(*[lambda task=task: claims.take(attempt(task))] * MANY)
        assert len(winners(results)) == 1
        assert Run.objects.filter(object_pk=str(task.pk)).count() == (state == "expired")


def test_two_jobs_never_have_one_row(race):
    for _ in range(3):
        task = Task.objects.create()
        one, other = (lambda job=job, task=task: claims.take(attempt(task, job)) for job in (do_task, delete_task))
        assert len(winners(race(*[one, other] * (MANY // 2)))) == 1
        assert Claim.objects.filter(object_pk=str(task.pk), lease_key__isnull=False).count() == 1


def test_two_jobs_with_claims_of_their_own_never_have_one_row(race):
    """Both were given back, so both come by an update: the lease's unique key refuses the later one."""
    for _ in range(3):
        task = Task.objects.create()
        for job in (do_task, delete_task):
            before = attempt(task, job)
            claims.take(before)
            claims.release(before)
        one, other = (lambda job=job, task=task: claims.take(attempt(task, job)) for job in (do_task, delete_task))
        assert len(winners(race(*[one, other] * (MANY // 2)))) == 1


def test_inside_transactions_too(race):
    """A project that takes a row inside its own transaction waits for nobody it could block, and is not broken."""
    task = Task.objects.create()

    def take() -> Any:
        with transaction.atomic():
            taken = claims.take(attempt(task))
            Task.objects.create(name="written after")
            return taken

    assert len(winners(race(*[take] * 12))) == 1
    assert Task.objects.filter(name="written after").count() == 12


def test_nobody_waits_in_a_circle(race):
    """Everything that touches claims, at once, on few rows, with leases that run out all the time.

    PostgreSQL ends one of those who wait in a circle with an error, which the race would raise.
    """
    tasks = [Task.objects.create() for _ in range(3)]
    other = Task.objects.create(state="done")
    ended: list[str] = []
    began = time.monotonic()

    def goes_on() -> bool:
        # On a machine that is busy with something else it takes longer until enough has happened.
        so_far = time.monotonic() - began
        return so_far < 5 or (ended.count("done") <= ENOUGH and so_far < 25)

    def work(job: Declared, seed: int) -> Callable[[], None]:
        luck = random.Random(seed)

        def work() -> None:
            while goes_on():
                made = attempt(luck.choice(tasks), job)
                if not isinstance(claims.take(made), Claim):
                    continue
                try:
                    lock(made)
                    claims.renew(made.token)
                    if luck.random() < 0.5:
                        claims.settle(made, {})
                    else:
                        claims.fail(made, "RuntimeError: no")
                    ended.append("done")
                except LeaseLost:
                    ended.append("lost")

        def lock(made: Attempt) -> None:
            own = Task.objects.get(pk=made.pk)
            with suppress(NoLongerNeeded), claims.current(made), claims.with_lock(own):
                own.writes += 1
                own.save(update_fields=["writes"])
                if luck.random() < 0.3:
                    with claims.with_lock(Task.objects.get(pk=other.pk)):
                        pass

        return work

    def beat() -> None:
        while goes_on():
            for token in Claim.objects.exclude(token="").values_list("token", flat=True):
                claims.renew(token)

    def disturb() -> None:
        while goes_on():
            leased = Claim.objects.filter(lease_key__isnull=False).order_by("?").values_list("pk", flat=True)[:1]
            Claim.objects.filter(pk__in=list(leased)).update(lease_expires_at=timezone.now() - timedelta(seconds=1))
            Claim.objects.filter(quarantined_at__isnull=False).release()
            Claim.objects.all().queue_now()
            time.sleep(0.05)

    def sweep() -> None:
        while goes_on():
            schedule_tasks.sweep()

    race(*(work(job, seed) for seed in range(4) for job in (do_task, delete_task)), beat, disturb, sweep)
    assert ended.count("done") > ENOUGH
