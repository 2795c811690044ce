"""The project with the lease taken out of the library: what the demo's ledger must be able to see.

A live lease of somebody else neither refuses a claim nor keeps a sweep from queueing the row.
"""

from django.apps import AppConfig

from tests.settings import *  # noqa: F403
from tests.settings import INSTALLED_APPS

INSTALLED_APPS = [*INSTALLED_APPS, f"{__name__}.WithoutLease"]


class WithoutLease(AppConfig):
    name = __name__
    label = "without_lease"

    def ready(self) -> None:
        from jobs import claims
        from jobs.models import Claim

        with_lease = claims.take

        def take(attempt):
            Claim.objects.filter(lease_key=attempt.lease_key).delete()
            return with_lease(attempt)

        claims.take = take
        claims.held = lambda *arguments: set()
