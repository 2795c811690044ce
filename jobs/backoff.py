"""How long to wait: after a failure, and to spread work out. Pure: chance is passed in."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta


@dataclass(frozen=True)
class Backoff:
    """Exponential delays between attempts: `first`, twice that, four times that, never more than `cap`.

    Each delay is shortened by up to half at random, so that rows which failed together do not return together
    (the "equal jitter" of the AWS Architecture Blog, "Exponential Backoff And Jitter", 2015).
    """

    first: timedelta = timedelta(seconds=10)
    cap: timedelta = timedelta(hours=1)

    def delay(self, attempt: int, chance: Callable[[], float] = random.random) -> timedelta:
        """Return how long to wait after the given failed attempt, the first being 1."""
        # The exponent is bounded before it is used: attempt 2,000 must not overflow a timedelta.
        doublings = min(max(attempt - 1, 0), 40)
        longest = min(self.first.total_seconds() * 2**doublings, self.cap.total_seconds())
        return timedelta(seconds=longest * (0.5 + chance() / 2))


def spread(max_wait: timedelta, min_wait: timedelta, chance: Callable[[], float] = random.random) -> timedelta:
    """Return a random wait from `min_wait` up to `max_wait`.

    Raises `TypeError` for anything but timedeltas, `ValueError` for a negative or empty range.
    """
    if not (isinstance(max_wait, timedelta) and isinstance(min_wait, timedelta)):
        raise TypeError(f"max_wait and min_wait must be timedeltas, not {max_wait!r} and {min_wait!r}.")
    if not timedelta(0) <= min_wait <= max_wait:
        raise ValueError(f"The wait must go from zero or more up to max_wait, not from {min_wait} to {max_wait}.")
    return min_wait + (max_wait - min_wait) * chance()
