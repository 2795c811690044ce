"""The library's own scheduled work."""

from django.apps import apps
from django.db import router
from django.db.models import QuerySet

from jobs import claims, clock, operations, tallies
from jobs.conf import conf
from jobs.deletion import delete
from jobs.job import job
from jobs.models import Operation
from jobs.sweep import sweep

BATCH = 10_000


@job(cron="29 4 * * *")
def selfheal_prune() -> None:
    """Delete the history older than `KEEP_RUNS`, a batch at a time so that no lock is held for long.

    So are claims of that age that nobody holds and whose job is not declared any more, or works on rows of another
    model by now: no sweep would settle them. And operations that ended before that. Tallies of that age are added up.
    """
    before = clock.read() - conf.KEEP_RUNS
    Run = apps.get_model("selfheal", "Run")
    runs = Run.objects.using(router.db_for_write(Run))
    old = runs.filter(finished_at__lt=before).order_by("finished_at").values_list("pk")
    while batch := [pk for (pk,) in old[:BATCH]]:
        delete(runs.filter(pk__in=batch))
    claims.forget(before)
    delete(Operation.objects.filter(finished_at__lt=before))
    tallies.fold(before)


@job(queue="background")
def selfheal_operate(operation: Operation) -> None:
    """Do what an operator asked for to a good part of the claims that are meant; the next sweep brings the rest."""
    operations.advance(operation)


selfheal_operate.works_in_parts = True


@sweep(selfheal_operate, cron="* * * * *")
def selfheal_operations() -> QuerySet[Operation]:
    """What an operator asked for is work like any other: a row, found again until it is done."""
    return Operation.objects.unfinished()


@job(cron="* * * * *", queue="background")
def selfheal_tally() -> None:
    """Count what happened since this last went well, hour by hour."""
    own = apps.get_model("selfheal", "Schedule").objects.filter(pk=selfheal_tally.name)
    tallies.count(own.values_list("last_succeeded_at", flat=True).first())


# Its success is seen in what it counts. Sixty runs an hour would hide those that somebody looks for.
selfheal_tally.keeps_history = False
