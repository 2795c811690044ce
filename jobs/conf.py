"""The settings in `JOBS`, their defaults, and nothing read before it is needed.

Every one is a duration, given as a timedelta, save `REDACT`.
"""

import re
from collections.abc import Callable, Iterator
from datetime import timedelta

from django.conf import settings
from django.utils.module_loading import import_string

from jobs.exceptions import Misconfigured

DEFAULTS = {
    # A row whose worker died waits this long for the next attempt, and no longer.
    "LEASE": timedelta(seconds=60),
    # How often a running attempt renews its lease. Several must fit into one lease.
    "HEARTBEAT": timedelta(seconds=15),
    # How often the scheduler looks for what is due.
    "TICK": timedelta(seconds=5),
    # How long a push may wait for Redis: connecting, and again for the answer.
    "REDIS_TIMEOUT": timedelta(milliseconds=500),
    # How long the history of attempts is kept.
    "KEEP_RUNS": timedelta(days=14),
}


# The password in a URL, as in what a driver says about a server that does not let it in.
URL_PASSWORD = re.compile(r"(?<=://)([^/\s:@]*):[^/\s@]+@")


def hide_url_passwords(text: str) -> str:
    """What `REDACT` does unless it is set: `postgres://user:***@host` for what stood there."""
    return URL_PASSWORD.sub(r"\1:***@", text)


class Conf:
    """`conf.LEASE` and its siblings, read from the settings at each use.

    Raises `Misconfigured` for a value that is no positive timedelta.
    """

    def __getattr__(self, name: str) -> timedelta:
        if name not in DEFAULTS:
            raise AttributeError(name)
        value = getattr(settings, "JOBS", {}).get(name, DEFAULTS[name])
        if not isinstance(value, timedelta) or value <= timedelta(0):
            raise Misconfigured(f"JOBS[{name!r}] is {value!r}; make it a timedelta longer than zero.")
        return value

    @property
    def REDACT(self) -> Callable[[str], str]:
        """What takes secrets out of the errors of jobs, before they are stored and logged: a function, or its path.

        Raises `Misconfigured` for anything else.
        """
        value = getattr(settings, "JOBS", {}).get("REDACT", hide_url_passwords)
        try:
            function = import_string(value) if isinstance(value, str) else value
        except ImportError as error:
            raise Misconfigured(f"JOBS['REDACT'] is {value!r}, which cannot be imported: {error}") from None
        if not callable(function):
            raise Misconfigured(f"JOBS['REDACT'] is {value!r}; make it a function of a text, or the path to one.")
        redact: Callable[[str], str] = function
        return redact

    @property
    def lease_margin(self) -> timedelta:
        """How long before its lease ends a process that cannot renew it ends itself: 10 s of the default 60."""
        return self.LEASE / 6


conf = Conf()


def redacted(error: Exception) -> str:
    """Return what an error says, on one line and without its secrets; no more than its type when `REDACT` fails."""
    try:
        return " ".join(str(conf.REDACT(f"{type(error).__name__}: {error}")).split())
    except Exception:
        # Better to know less than to show what was to be hidden.
        return type(error).__name__


def problems() -> Iterator[str]:
    """Yield a sentence for each setting that cannot work."""
    given = getattr(settings, "JOBS", {})
    if not isinstance(given, dict):
        yield f"JOBS is {given!r}; make it a dict."
        return
    names = [*DEFAULTS, "REDACT"]
    for name in given.keys() - set(names):
        yield f"JOBS has no setting {name!r}; use one of {', '.join(names)}."
    try:
        for name in names:
            getattr(conf, name)
        if conf.HEARTBEAT * 2 > conf.LEASE:
            yield (
                f"JOBS['HEARTBEAT'] ({conf.HEARTBEAT}) leaves room for less than two heartbeats in "
                f"JOBS['LEASE'] ({conf.LEASE}); make the lease longer or the heartbeat shorter."
            )
    except Misconfigured as error:
        yield str(error)
