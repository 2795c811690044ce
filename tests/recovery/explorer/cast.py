"""The jobs and sweeps that the explorer's world runs, in two versions of the code.

A task's `behaviour` is what its job does to you, once for each comma: "fail,die,slow" fails, then kills its process,
then takes longer than a lease, then succeeds. "endless" runs into its time limit, "hopeless" always fails.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial

from django.db.models import QuerySet

from jobs import Backoff, job, registry, sweep, with_lock
from tests.cast.models import Task
from tests.recovery.explorer.world import current

EVERY_MINUTE = "* * * * *"
LIMIT = 5
SOON = Backoff(first=timedelta(seconds=10), cap=timedelta(seconds=40))
# The state from which each job takes a row, and to which.
MOVES = {"make": ("pending", "done"), "build": ("pending", "done"), "remove": ("deleting", "deleted")}
# The minutes at which reports are due; the world begins at minute 56.
REPORTS = (57, 58, 0, 3)
READY = ("done", "deleted")


# How long each behaviour keeps a worker, in seconds: "endless" runs into the time limit.
SLOW = {"slow": 90.0, "steady": 20.0, "endless": 1000.0}
TIME_LIMIT = 120.0


def misbehave(task: Task) -> None:
    """Do what the row says, and be seen at work."""
    actor = current()
    assert actor is not None
    world = actor.world
    behaviours = task.behaviour.split(",")
    turn = world.names[f"behaviour of {task.pk}"]
    world.names[f"behaviour of {task.pk}"] += 1
    behaviour = "hopeless" if "hopeless" in behaviours else behaviours[turn] if turn < len(behaviours) else ""
    actor.sleep(SLOW.get(behaviour, 0.5))
    if behaviour in ("fail", "hopeless"):
        raise RuntimeError(f"task {task.pk} fails")
    if behaviour == "die":
        world.count("job killed its process")
        actor.process.end(-9)
        actor.cut("other", "dead")


def move(task: Task, to: str) -> None:
    actor = current()
    assert actor is not None
    with actor.world.invariants.at_work(actor, f"task {task.pk}"):
        misbehave(task)
        with with_lock(task):
            task.state = to
            task.writes += 1
            task.save(update_fields=["state", "writes"])


def report(minute: int) -> None:
    """A cron job that is no sweep, due once in the life of a world."""
    actor = current()
    assert actor is not None
    with actor.world.invariants.at_work(actor, f"report {minute}"):
        actor.sleep(40.0)
    actor.world.invariants.reports.add(minute)


@contextmanager
def declared() -> Iterator[dict[str, dict[str, object]]]:
    """Declare everything, and yield the versions of the code: what the registry holds in each."""
    with registry.sandbox():
        registry._declared.clear()

        @job(backoff=SOON, timeout=timedelta(seconds=TIME_LIMIT))
        def make(task: Task) -> None:
            move(task, "done")

        @sweep(make, cron=EVERY_MINUTE, limit=LIMIT, batch_size=3)
        def find_pending() -> QuerySet[Task]:
            return Task.objects.pending()

        @job(backoff=SOON, max_attempts=3, timeout=timedelta(seconds=TIME_LIMIT))
        def remove(task: Task) -> None:
            move(task, "deleted")

        @sweep(remove, cron=EVERY_MINUTE, limit=LIMIT, jitter=timedelta(seconds=20))
        def find_deleting() -> QuerySet[Task]:
            return Task.objects.deleting()

        for minute in REPORTS:
            job(name=f"report_{minute}", cron=f"{minute} * * * *", queue="background", backoff=SOON)(
                partial(report, minute)
            )

        @job(queue="urgent", backoff=SOON, max_attempts=3, unique_for=timedelta(minutes=2))
        def ping(number: int) -> None:
            actor = current()
            assert actor is not None
            actor.sleep(0.5)
            if number % 3 == 0:
                raise RuntimeError("no answer")

        today = dict(registry._declared)
        registry._declared.clear()
        build = job(name="build", backoff=SOON, timeout=timedelta(seconds=TIME_LIMIT))(partial(move, to="done"))
        sweep(build, cron=EVERY_MINUTE, limit=LIMIT, name="find_pending")(find_pending.function)
        without = {name: each for name, each in today.items() if name not in ("make", "find_pending", "report_58")}
        renamed = {**without, **registry._declared}
        yield {"today": today, "renamed": renamed, "without": without}
