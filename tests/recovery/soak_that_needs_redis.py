"""The soak's settings with a library whose pushes raise while Redis is away: what its user must be able to see."""

from django.apps import AppConfig

from soak.settings import *  # noqa: F403
from soak.settings import INSTALLED_APPS

INSTALLED_APPS = [*INSTALLED_APPS, f"{__name__}.NeedsRedis"]


class NeedsRedis(AppConfig):
    name = __name__
    label = "needs_redis"

    def ready(self) -> None:
        from django.db import transaction

        from jobs import enqueue

        enqueue._Hint.__exit__ = lambda *args: False  # type: ignore[method-assign]
        enqueue._on_commit = transaction.on_commit
