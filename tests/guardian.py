"""Ends what a run of the tests has started, however that run itself ends: also by SIGKILL.

A run has a folder of its own, and holds a lock in it for as long as it lives. Every process that it starts, and that
those start, carries the folder's name in its environment. Beside the run stands this module as a process of its own:
once it gets the lock, the run is over, and what still carries the name is killed. Should both of them be killed, the
next run does that.
"""

import fcntl
import os
import shutil
import signal
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

import psutil

MARK = "SELFHEAL_TESTS"
PREFIX = "selfheal-tests-"
# PostgreSQL makes 300 files for a database and deletes them with it, and ext4 is slow to make some where many were
# deleted a moment ago: that was half of the time of such tests. So a run lives in memory, where there is enough of it,
# unless TMPDIR says otherwise.
IN_MEMORY = Path("/dev/shm")
ENOUGH = 4 << 30
# What a run leaves behind may still be about to end by itself.
GRACE_SECONDS = 5

# Kept open: closing any file of the lock gives the lock up.
_lock: IO[bytes]


def begin() -> Path:
    """Make the folder of this run, and mark this process's environment with it. Ends what killed runs have left.

    It is also where temporary files go from now on.
    """
    global _lock
    end_what_is_over()
    home = Path(tempfile.mkdtemp(prefix=PREFIX, dir=_places()[0]))
    os.environ["TMPDIR"] = tempfile.tempdir = str(home)
    _lock = (home / "lock").open("wb")
    fcntl.lockf(_lock, fcntl.LOCK_EX)
    os.environ[MARK] = str(home)
    os.posix_spawn(sys.executable, [sys.executable, __file__, str(home)], os.environ)
    return home


def left_behind(home: Path) -> list[psutil.Process]:
    """Return what a run has started and not ended, once it has had a moment to end."""
    deadline = time.monotonic() + GRACE_SECONDS
    while (found := _marked(home)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def _places() -> list[Path]:
    """Where the folders of runs are, beginning with where the next one goes."""
    on_disk = Path(tempfile.gettempdir())
    if "TMPDIR" in os.environ or not os.access(IN_MEMORY, os.W_OK):
        return [on_disk]
    has_room = shutil.disk_usage(IN_MEMORY).free >= ENOUGH
    return [IN_MEMORY, on_disk] if has_room else [on_disk, IN_MEMORY]


def end_what_is_over() -> None:
    """End what runs have left that were killed together with their guardians."""
    for home in [home for place in _places() for home in place.glob(f"{PREFIX}*")]:
        # Not while the run lives, or its guardian is at it.
        with suppress(OSError), (home / "lock").open("r+b") as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _end(home)


def _end(home: Path) -> None:
    """Kill what carries the folder's name, and those that they start while this looks; then remove the folder."""
    for _ in range(50):
        if not (found := _marked(home)):
            break
        for process in found:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(found, timeout=0.2)
    shutil.rmtree(home, ignore_errors=True)


def _marked(home: Path) -> list[psutil.Process]:
    return [process for process in psutil.process_iter() if _is_marked(process, home)]


def _is_marked(process: psutil.Process, home: Path) -> bool:
    try:
        return process.environ().get(MARK) == str(home) and __file__ not in process.cmdline()
    except (psutil.Error, OSError):
        return False


def main(home: Path) -> None:
    # Ctrl-C is for the run.
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    with suppress(FileNotFoundError), (home / "lock").open("wb") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
    _end(home)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
