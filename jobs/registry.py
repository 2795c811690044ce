"""What this project declared: its jobs and sweeps by name. Nothing else can be run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from django.utils.module_loading import autodiscover_modules

if TYPE_CHECKING:
    from jobs.job import Declared

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,79}")

_declared: dict[str, Declared] = {}
_refused: list[tuple[Declared, str]] = []


def add(declared: Declared) -> None:
    """Register a job or sweep. A name that is taken stays with the first; `manage.py check` reports the second."""
    if (first := _declared.get(declared.name)) is not None:
        _refused.append(
            (
                declared,
                (
                    f"{first.origin} has its name, {declared.name!r}, already, and names are unique in a project. "
                    "Rename one of them, or pass name=."
                ),
            )
        )
        return
    _declared[declared.name] = declared


def get(name: str) -> Declared | None:
    """Return what was declared under this name, or None."""
    return _declared.get(name)


def declared() -> list[Declared]:
    """Return every job and sweep, by name."""
    # A name that is no text is for the checks to report, not for the sort to trip over.
    return [_declared[name] for name in sorted(_declared, key=str)]


def refused() -> list[tuple[Declared, str]]:
    """Return each declaration whose name was taken, with what to do about it."""
    return list(_refused)


def autodiscover() -> None:
    """Import the `jobs` module of every installed app, as the admin does with `admin`."""
    autodiscover_modules("jobs")


@contextmanager
def sandbox() -> Iterator[None]:
    """Forget on leaving whatever was declared inside. For tests."""
    before, refused_before = dict(_declared), list(_refused)
    try:
        yield
    finally:
        _declared.clear()
        _declared.update(before)
        _refused[:] = refused_before
