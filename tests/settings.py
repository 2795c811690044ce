"""The project's settings with the cast of jobs in tests/cast added, and intervals that a test can wait for.

The recovery tests give real processes these settings too; what differs from test to test comes in by the environment.
"""

import json
import os
from datetime import timedelta

from config import HOME
from config.settings import *  # noqa: F403
from config.settings import DATABASES, INSTALLED_APPS, JOBS, MIDDLEWARE

INSTALLED_APPS = [*INSTALLED_APPS, "tests.cast"]
MIDDLEWARE = [*MIDDLEWARE, "tests.policy.strict"]
SECRET_KEY = "for-tests-only"
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]

# Durations in seconds, as in {"LEASE": 3}.
JOBS = JOBS | {
    name: timedelta(seconds=seconds) for name, seconds in json.loads(os.environ.get("TEST_JOBS", "{}")).items()
}

# Of the connection itself, as in {"CONN_MAX_AGE": 600}.
DATABASES["default"] |= json.loads(os.environ.get("TEST_DATABASE", "{}"))

# A file, because the tests that race open it several times; in a folder of its own for each test process, because some
# tests take the folder away.
if DATABASES["default"]["ENGINE"] == "django.db.backends.sqlite3":
    folder = HOME / os.environ.get("PYTEST_XDIST_WORKER", "alone")
    folder.mkdir(parents=True, exist_ok=True)
    DATABASES["default"]["TEST"] = {"NAME": str(folder / "test.sqlite3")}
