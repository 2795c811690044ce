"""The process that others are forked from: it has imported what all of them import, and nothing of this project.

For each line that asks for a process it forks one, for each that asks how one ended it says so. See forked.py.
"""

import contextlib
import importlib
import json
import os
import runpy
import signal
import sys
from collections.abc import Mapping, Sequence

# What can be imported before there are settings; of a module that cannot, what it begins with.
PRELOADED = [
    "asyncio",
    "concurrent.futures",
    "croniter",
    "django.contrib.admin.options",
    "django.contrib.admin.views.main",
    "django.contrib.auth.forms",
    "django.contrib.messages.storage.fallback",
    "django.contrib.sessions.backends.db",
    "django.contrib.staticfiles.finders",
    "django.core.cache.backends.db",
    "django.core.management.commands.check",
    "django.core.servers.basehttp",
    "django.db.backends.postgresql.base",
    "django.db.backends.sqlite3.base",
    "django.template.loaders.app_directories",
    "django.views.debug",
    "prometheus_client",
    "psycopg",
    "redis",
    "rq.worker",
    "rq_scheduler.scheduler",
]


def serve() -> None:
    for name in PRELOADED:
        # Without settings, that is ImproperlyConfigured.
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    for line in sys.stdin:
        asked = json.loads(line)
        if (pid := asked.get("wait_for")) is None:
            if (answer := os.fork()) == 0:
                become(**asked)
        else:
            ended, status = os.waitpid(pid, os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if ended else None
        print(json.dumps(answer), flush=True)


def become(argv: Sequence[str], environment: Mapping[str, str], log: str, ignored: Sequence[int]) -> None:
    """Be the process that was asked for. Does not return."""
    os.setsid()
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    os.environ.clear()
    os.environ.update(environment)
    nothing, output = os.open(os.devnull, os.O_RDONLY), os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for ours, theirs in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(ours, theirs)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    sys.argv = list(argv)
    runpy.run_path(argv[0], run_name="__main__")
    sys.exit()


if __name__ == "__main__":
    serve()
