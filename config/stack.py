"""The processes of a deployment, on one machine: stock commands, kept running by a small supervisor.

`make run`, `make demo` and the recovery tests start their processes with it. It is no part of the product: in
production systemd, Kubernetes or the like does this.
"""

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, NamedTuple, Self

import psutil

from config import BASE_DIR

MARK = "SELFHEAL_STACK"
RESTART_SECONDS = 1.0


class StackError(Exception):
    """The processes could not be started, or would not end."""


class Death(NamedTuple):
    """The end of a process that nobody had told to end; `code` is negative for a signal, as in subprocess."""

    name: str
    pid: int
    code: int


def manage(*arguments: str) -> list[str]:
    """Return the command line of a management command of this project, run by this Python."""
    return [sys.executable, str(BASE_DIR / "manage.py"), *arguments]


def job_commands(workers: int = 3) -> dict[str, list[str]]:
    """Return what a deployment runs, by name: a scheduler, workers for every queue, one for the background alone."""
    return {
        "scheduler": manage("rqscheduler"),
        **{f"worker-{n}": manage("rqworker", "urgent", "background", "default") for n in range(1, workers + 1)},
        "worker-background": manage("rqworker", "background"),
    }


def interrupt_on_sigterm() -> None:
    """Make SIGTERM, and a closed terminal, act as Ctrl-C does: KeyboardInterrupt, so that `with` blocks are left."""
    # SIGINT too: a shell that starts a program in the background has it ignored.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)


@dataclass
class Process:
    """One command that a supervisor keeps running."""

    name: str
    argv: Sequence[str]
    env: Mapping[str, str]
    log_path: Path
    is_held: bool = False
    started_at: float = 0.0
    running: subprocess.Popen[bytes] | None = None


class Supervisor:
    """Starts processes, replaces those that died, and leaves none behind. Use it in a `with` block.

    Nothing happens in the background: its owner calls `poll()` in a loop of its own, a few times a second.

    Every process carries a mark, the environment variable SELFHEAL_STACK=<folder>, which its children inherit. What a
    killed supervisor left behind, a worker's orphaned child included, is found by it and ended when the next one enters
    with the same folder. Two supervisors cannot have one folder at the same time.
    """

    def __init__(self, folder: Path | str, env: Mapping[str, str] | None = None) -> None:
        self.folder = Path(folder).resolve()
        self.logs = self.folder / "logs"
        self._env = {"PYTHONUNBUFFERED": "1", **(env or {}), MARK: str(self.folder)}
        self._processes: dict[str, Process] = {}
        self._resources = ExitStack()

    def __enter__(self) -> Self:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.logs.mkdir(exist_ok=True)
        self._lock(self._resources.enter_context((self.folder / "stack.lock").open("a+")))
        self._end_marked()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._resources:
            self.stop()

    def start(self, name: str, argv: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        """Start a command and keep it running from now on; its output is added to `<folder>/logs/<name>.log`."""
        if name in self._processes:
            raise StackError(f"There is a process {name!r} already. Choose another name.")
        process = Process(name, argv, {**os.environ, **self._env, **(env or {})}, self.logs / f"{name}.log")
        self._processes[name] = process
        self._start(process)

    def poll(self) -> list[Death]:
        """Replace the processes that died, save those held down, and return the deaths since the last call.

        One that dies within a second of its start is replaced a second after that start, not at once.
        """
        deaths = []
        for process in self._processes.values():
            if process.running and (code := process.running.poll()) is not None:
                deaths.append(Death(process.name, process.running.pid, code))
                process.running = None
            if not process.running and not process.is_held and time.monotonic() > process.started_at + RESTART_SECONDS:
                self._start(process)
        return deaths

    def hold(self, name: str) -> None:
        """Do not replace this process when it dies. It is not killed by this."""
        self._processes[name].is_held = True

    def release(self, name: str) -> None:
        """Keep this process running again; the next `poll()` starts it."""
        self._processes[name].is_held = False

    def pid(self, name: str) -> int | None:
        """Return the process id, or None while it is down. One that died counts until `poll()` has seen it."""
        running = self._processes[name].running
        return running.pid if running else None

    @property
    def names(self) -> list[str]:
        return list(self._processes)

    def stop(self, grace: float = 10.0) -> None:
        """End every process: asked first (SIGTERM), and after `grace` seconds killed, with all that carries the mark.

        A second Ctrl-C meanwhile shortens the grace; it leaves no process behind either.
        """
        running = [process.running for process in self._processes.values() if process.running]
        self._processes.clear()
        try:
            for popen in running:
                popen.terminate()
                popen.send_signal(signal.SIGCONT)
            deadline = time.monotonic() + grace
            for popen in running:
                with suppress(subprocess.TimeoutExpired):
                    popen.wait(max(0.0, deadline - time.monotonic()))
        finally:
            self._end_marked()
            for popen in running:
                popen.wait()

    def _start(self, process: Process) -> None:
        process.started_at = time.monotonic()
        process.running = self._launch(process.argv, process.env, process.log_path)

    def _launch(self, argv: Sequence[str], env: Mapping[str, str], log_path: Path) -> subprocess.Popen[bytes]:
        with log_path.open("ab") as log:
            # A session of its own: Ctrl-C in the terminal is for the supervisor, which then ends this in its own order.
            return subprocess.Popen(
                argv, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def _lock(self, file: IO[str]) -> None:
        """Take the folder for this supervisor. The kernel frees it when this process dies, however it dies."""
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "?"
            self._resources.close()
            raise StackError(
                f"Process {holder} already runs a stack in {self.folder}. "
                "Stop it first, or set SELFHEAL_HOME to another folder."
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()

    def _end_marked(self) -> None:
        """Kill every process that carries this folder's mark, and those that they start while this looks."""
        for _ in range(50):
            if not (found := [process for process in psutil.process_iter() if self._is_marked(process)]):
                return
            for process in found:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(found, timeout=0.2)
        raise StackError(f"These processes of the stack in {self.folder} would not end: {found}. Kill them by hand.")

    def _is_marked(self, process: psutil.Process) -> bool:
        try:
            return process.pid != os.getpid() and bool(process.environ().get(MARK) == str(self.folder))
        except (psutil.Error, OSError):
            return False
