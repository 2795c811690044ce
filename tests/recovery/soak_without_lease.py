"""The soak's settings with the lease taken out of the library: what its ledger must be able to see.

And with work that takes long enough for several sweeps to queue it again, also on a machine that is busy.
"""

from django.apps import AppConfig

from soak.settings import *  # noqa: F403
from soak.settings import INSTALLED_APPS

INSTALLED_APPS = [*INSTALLED_APPS, "tests.recovery.settings_without_lease.WithoutLease", f"{__name__}.SlowWork"]


class SlowWork(AppConfig):
    name = __name__
    label = "slow_work"

    def ready(self) -> None:
        from demo import provisioner

        provisioner.SECONDS = (5.0, 6.0)
