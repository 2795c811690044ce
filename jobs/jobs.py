"""The library's own scheduled work."""

from django.apps import apps
from django.db import router

from jobs import claims, clock, registry
from jobs.conf import conf
from jobs.job import job

BATCH = 10_000


@job(cron="29 4 * * *")
def selfheal_prune() -> None:
    """Delete the history older than `KEEP_RUNS`, a batch at a time so that no lock is held for long.

    So are claims of that age that nobody holds and whose job is not declared any more: no sweep would settle them.
    """
    before = clock.now(-conf.KEEP_RUNS)
    Run = apps.get_model("selfheal", "Run")
    runs = Run.objects.using(router.db_for_write(Run))
    old = runs.filter(finished_at__lt=before).order_by("finished_at").values_list("pk")
    while batch := [pk for (pk,) in old[:BATCH]]:
        runs.filter(pk__in=batch).delete()
    declared = [each.name for each in registry.declared()]
    claims.forget(declared, before)
