"""Work that is killed at a step, really: by SIGKILL, in a process of its own."""

import os
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from django.db import connections

from tests.recovery import traps


def killed(folder: Path, when: str, function: str, work: Callable[..., Any], *arguments: Any) -> bool:
    """Do the work in a process of its own that kills itself before or after it calls this function; say whether it did.

    Only by the first call. What the test has written must be committed.
    """
    trap = traps.Trap(when, function)
    trap.sprung(folder).unlink(missing_ok=True)

    def walk_into_it() -> None:
        traps.lay(when, function, trap.how, False, str(trap.sprung(folder)))
        work(*arguments)

    status = in_a_child(walk_into_it)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def in_a_child(work: Callable[[], Any]) -> int:
    """Do the work in a forked process, and return how that ended: 0 when it did not raise."""
    connections.close_all()
    with warnings.catch_warnings():
        # The threads that run the tests are not needed there.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        code = 1
        try:
            # Where asyncio has a loop in this thread, as for a browser, Django keeps its connections by that loop. The
            # child has none, and would be handed those of before: open, and shared.
            for each in connections.all(initialized_only=True):
                del connections[each.alias]
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1]
