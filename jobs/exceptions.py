"""What can go wrong, as far as a caller would act differently on it."""

from typing import Self

from django.core.exceptions import ImproperlyConfigured


class SelfHealError(Exception):
    """The root of every error that this library raises on purpose."""


class LeaseLost(SelfHealError):
    """The row belongs to another attempt by now, or to none: stop, and write nothing more."""

    @classmethod
    def on(cls, work: str) -> Self:
        return cls(
            f"The lease on {work} is lost: it was not renewed in time, and the row may already be worked on elsewhere. "
            "Nothing was written; the sweep will queue the row again if it still needs work."
        )


class NoLongerNeeded(SelfHealError):
    """The row was deleted, or its sweep no longer matches it: there is nothing left to do."""

    @classmethod
    def of(cls, work: str) -> Self:
        return cls(f"{work} no longer needs this work: its row was deleted or changed meanwhile.")


class QueueUnavailable(SelfHealError):
    """Redis did not take the job. Raised where nothing else would bring it back: for plain jobs and sweeps.

    Not at the commit of a transaction, where it would keep others' hooks from being run: there it is logged.
    """

    @classmethod
    def of(cls, name: str, reason: object) -> Self:
        return cls(f"{name} was not queued, because Redis did not answer: {reason}")


class Misconfigured(SelfHealError, ImproperlyConfigured):
    """A declaration or setting that cannot work. `manage.py check` names it before anything runs."""
