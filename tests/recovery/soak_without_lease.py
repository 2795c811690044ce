"""The soak's settings with the lease taken out of the library: what its ledger and its audit must be able to see."""

from soak.settings import *  # noqa: F403
from soak.settings import INSTALLED_APPS

INSTALLED_APPS = [*INSTALLED_APPS, "tests.recovery.settings_without_lease.WithoutLease"]
