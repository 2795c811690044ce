"""The project's settings for the processes of the soak. Each says to PostgreSQL which process it is.

A trigger writes that down beside the holder of the lease, whenever a row is written: see audit.py.
"""

import json
import os
from datetime import timedelta

from config.settings import *  # noqa: F403
from config.settings import JOBS

# Production's intervals, unless a test is in a hurry. Durations in seconds, as in {"LEASE": 6}.
JOBS = JOBS | {
    name: timedelta(seconds=seconds) for name, seconds in json.loads(os.environ.get("SOAK_JOBS", "{}")).items()
}


def _say_who() -> None:
    # libpq reads it for each connection, and a worker's child opens its own.
    os.environ["PGAPPNAME"] = str(os.getpid())


os.register_at_fork(after_in_child=_say_who)
