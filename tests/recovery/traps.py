"""Traps: a real process is struck by a real signal at a named point of its code.

A test sets one when it starts a process. The first process that comes by springs it, and only the first: the one that
replaces it passes unharmed.
"""

import functools
import json
import os
import pkgutil
import signal
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from django.apps import AppConfig


@dataclass(frozen=True)
class Trap:
    """`Trap("before", "jobs.claims.take")` kills whoever is about to call that function.

    With `with_parent` the process that started it is killed as well, first.
    """

    when: str
    function: str
    how: str = "SIGKILL"
    with_parent: bool = False

    def __str__(self) -> str:
        return f"{self.when} {self.function}{' with its parent' if self.with_parent else ''}"

    def environment(self, folder: Path) -> dict[str, str]:
        return {"TRAP": json.dumps({**asdict(self), "sprung": str(self.sprung(folder))})}

    def sprung(self, folder: Path) -> Path:
        """The file that is there once it has sprung; it names the process and its parent."""
        return folder / f"{self.when}-{self.function}"


def spring(sprung: str, how: str, with_parent: bool) -> None:
    try:
        descriptor = os.open(sprung, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return
    os.write(descriptor, f"{os.getpid()} {os.getppid()}".encode())
    os.close(descriptor)
    if with_parent:
        os.kill(os.getppid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.Signals[how])


def lay(when: str, function: str, how: str, with_parent: bool, sprung: str) -> None:
    place, _, name = function.rpartition(".")
    holder = pkgutil.resolve_name(place)
    original = getattr(holder, name)

    @functools.wraps(original)
    def trapped(*args: Any, **kwargs: Any) -> Any:
        if when == "before":
            spring(sprung, how, with_parent)
        result = original(*args, **kwargs)
        if when == "after":
            spring(sprung, how, with_parent)
        return result

    setattr(holder, name, trapped)


class Traps(AppConfig):
    """Lays the trap that the environment describes, and shortens what no setting can."""

    name = __name__
    label = "traps"

    def ready(self) -> None:
        from jobs import claims

        if trap := os.environ.get("TRAP"):
            lay(**json.loads(trap))
        if seconds := os.environ.get("TEST_RUNAWAY_AFTER"):
            claims.RUNAWAY_AFTER = timedelta(seconds=float(seconds))
