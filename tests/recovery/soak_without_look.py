"""The soak's settings with a `with_lock` that locks the row and does not look: neither at the claim nor at the state.

And without the watchdog, so that a process which was frozen past its lease writes when it wakes up.
"""

from contextlib import contextmanager

from django.apps import AppConfig
from django.db import transaction

from soak.settings import *  # noqa: F403
from soak.settings import INSTALLED_APPS

INSTALLED_APPS = [*INSTALLED_APPS, f"{__name__}.WithoutLook"]


@contextmanager
def locked(row):
    with transaction.atomic():
        type(row).objects.select_for_update().get(pk=row.pk)
        yield row


class WithoutLook(AppConfig):
    name = __name__
    label = "without_look"

    def ready(self) -> None:
        from databases import jobs
        from jobs.claims import Heartbeat

        jobs.with_lock = locked
        Heartbeat._arm = staticmethod(lambda renewed_at: None)
        Heartbeat._beat = lambda self: None
