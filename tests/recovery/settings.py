"""What the processes of the recovery tests run with: the tests' settings, traps, and a shorter patience of SQLite."""

import os

from tests.settings import *  # noqa: F403
from tests.settings import DATABASES, INSTALLED_APPS

INSTALLED_APPS = [*INSTALLED_APPS, "tests.recovery.traps.Traps"]

if seconds := os.environ.get("TEST_DATABASE_TIMEOUT"):
    DATABASES["default"]["OPTIONS"]["timeout"] = float(seconds)
