"""Real processes that start in a fifth of the time: forked from one that has imported what all of them import.

To import Django, rq and the rest takes half a second of a core, and the recovery tests start hundreds of processes.
What runs are the stock commands, in sessions of their own; as a stranger starts them, they are tested elsewhere.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from config import BASE_DIR
from config.stack import Supervisor


class Forked:
    """A process of the zygote's, to be used as one of `subprocess.Popen`."""

    def __init__(self, zygote: Zygote, pid: int) -> None:
        self._zygote, self.pid = zygote, pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._zygote.ask(wait_for=self.pid)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = time.monotonic() + (threading.TIMEOUT_MAX if timeout is None else timeout)
        while (code := self.poll()) is None:
            if time.monotonic() >= deadline:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
            time.sleep(0.01)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


class Zygote:
    """The process that the others are forked from. Ends when its `stdin` is closed."""

    def __init__(self) -> None:
        # What it imports must not find any settings.
        environment = {name: value for name, value in os.environ.items() if name != "DJANGO_SETTINGS_MODULE"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.recovery.zygote"],
            cwd=BASE_DIR,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def fork(self, argv: Sequence[str], environment: Mapping[str, str], log: Path) -> Forked:
        """Run a script of Python's, given as a command line of this Python."""
        assert argv[0] == sys.executable
        # As any child would find them.
        ignored = [number for number in (signal.SIGCHLD, signal.SIGINT) if signal.getsignal(number) == signal.SIG_IGN]
        return Forked(self, self.ask(argv=argv[1:], environment=dict(environment), log=str(log), ignored=ignored))

    def ask(self, **what: Any) -> Any:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def end(self) -> None:
        self._process.communicate()


class ForkingSupervisor(Supervisor):
    """A supervisor of processes that carry no mark, being forked: it knows them by their sessions."""

    def __init__(self, folder: Path, environment: Mapping[str, str], zygote: Zygote) -> None:
        super().__init__(folder, environment)
        self._zygote = zygote
        self._sessions: set[int] = set()

    def _launch(self, argv: Sequence[str], environment: Mapping[str, str], log: Path) -> Any:
        forked = self._zygote.fork(argv, environment, log)
        self._sessions.add(forked.pid)
        return forked

    def _is_marked(self, process: psutil.Process) -> bool:
        with contextlib.suppress(ProcessLookupError, psutil.Error):
            if os.getsid(process.pid) in self._sessions:
                return process.status() != psutil.STATUS_ZOMBIE
        return super()._is_marked(process)
