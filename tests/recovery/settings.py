"""What the processes of the recovery tests run with: the tests' settings, traps, and a shorter patience with locks."""

import os

from tests.settings import *  # noqa: F403
from tests.settings import DATABASES, INSTALLED_APPS

INSTALLED_APPS = [*INSTALLED_APPS, "tests.recovery.traps.Traps"]

if seconds := os.environ.get("TEST_DATABASE_TIMEOUT"):
    if DATABASES["default"]["ENGINE"] == "django.db.backends.sqlite3":
        DATABASES["default"]["OPTIONS"]["timeout"] = float(seconds)
    else:
        DATABASES["default"]["OPTIONS"] = {"options": f"-c lock_timeout={seconds}s"}
