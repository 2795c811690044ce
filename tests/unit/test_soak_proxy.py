"""The soak's proxy, between a real client and a real server: each mode does what that network would do."""

import contextlib
import socket
import socketserver
import threading
import time
from collections.abc import Iterator

import pytest

from soak.proxy import Proxy

pytestmark = pytest.mark.once

PATIENCE = 10


class Echo(socketserver.BaseRequestHandler):
    """Says back what it hears, and says `bye` when the client has said its last word."""

    def handle(self) -> None:
        with contextlib.suppress(OSError):
            while heard := self.request.recv(1000):
                self.request.sendall(heard)
            self.request.sendall(b"bye")


class EchoServer(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True


@pytest.fixture
def echo() -> Iterator[EchoServer]:
    with EchoServer(("127.0.0.1", 0), Echo) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        yield server
        server.shutdown()


@pytest.fixture
def proxy(echo: EchoServer) -> Iterator[Proxy]:
    with Proxy(echo.server_address[1]) as proxy:
        yield proxy


@contextlib.contextmanager
def connected(proxy: Proxy) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=PATIENCE) as client:
        yield client


def says(client: socket.socket, word: bytes = b"hello") -> bytes:
    """Send a word and return what comes back."""
    client.sendall(word)
    return client.recv(1000)


def is_silent(client: socket.socket) -> bool:
    client.settimeout(0.3)
    try:
        says(client)
    except TimeoutError:
        return True
    finally:
        client.settimeout(PATIENCE)
    return False


def test_it_passes_what_it_hears_and_the_last_word(proxy):
    with connected(proxy) as client:
        assert says(client) == b"hello"
        client.shutdown(socket.SHUT_WR)
        assert client.recv(1000) == b"bye"
        assert client.recv(1000) == b""


def test_it_passes_more_than_it_can_hold_at_once(proxy):
    word = b"0123456789" * 300_000
    with connected(proxy) as client:
        threading.Thread(target=client.sendall, args=(word,)).start()
        heard = b""
        while len(heard) < len(word):
            heard += client.recv(100_000)
    assert heard == word


def test_delayed_each_way_and_no_longer_than_asked_for(proxy):
    with connected(proxy) as client:
        assert says(client) == b"hello"
        proxy.delay(0.2)
        began = time.monotonic()
        assert says(client) == b"hello"
        assert time.monotonic() - began >= 0.4
        proxy.heal()
        began = time.monotonic()
        assert says(client) == b"hello"
        assert time.monotonic() - began < 0.4


def test_cut_is_a_reset_and_the_next_one_passes(proxy):
    with connected(proxy) as client:
        assert says(client) == b"hello"
        proxy.cut()
        with pytest.raises(ConnectionResetError):
            client.recv(1000)
    with connected(proxy) as client:
        assert says(client) == b"hello"


def test_half_closed_towards_the_client(proxy):
    with connected(proxy) as client:
        assert says(client) == b"hello"
        proxy.half_close(towards_client=True)
        assert client.recv(1000) == b""
        # It may go on talking, and nobody hears it.
        client.sendall(b"hello")
        with connected(proxy) as other:
            assert says(other) == b"hello"


def test_half_closed_towards_the_server(proxy):
    with connected(proxy) as client:
        assert says(client) == b"hello"
        proxy.half_close(towards_client=False)
        # The server says its last word, which is swallowed.
        assert is_silent(client)
        proxy.heal()
        with pytest.raises(ConnectionResetError):
            client.recv(1000)


def test_whoever_has_just_connected_when_it_ends_is_not_left_waiting(echo):
    for _ in range(30):
        with Proxy(echo.server_address[1]) as proxy:
            clients = [socket.create_connection(("127.0.0.1", proxy.port), timeout=PATIENCE) for _ in range(3)]
        for client in clients:
            with client, contextlib.suppress(ConnectionResetError):
                assert client.recv(1000) == b""


def test_refused_until_it_heals_on_the_same_port(proxy):
    with connected(proxy) as client:
        assert says(client) == b"hello"
        proxy.refuse()
        with pytest.raises(ConnectionResetError):
            client.recv(1000)
    with pytest.raises(ConnectionRefusedError), connected(proxy):
        pass
    # Nobody else gets the port meanwhile.
    with socket.socket() as thief, pytest.raises(OSError, match="in use"):
        thief.bind(("127.0.0.1", proxy.port))
    proxy.heal()
    with connected(proxy) as client:
        assert says(client) == b"hello"


def test_a_black_hole_accepts_and_says_nothing_and_cuts_all_that_at_the_end(proxy):
    with connected(proxy) as old:
        assert says(old) == b"hello"
        proxy.black_hole()
        with connected(proxy) as new:
            assert is_silent(new)
            assert is_silent(old)
            proxy.heal()
            for client in (old, new):
                with pytest.raises(ConnectionResetError):
                    client.recv(1000)
    with connected(proxy) as client:
        assert says(client) == b"hello"


def test_a_server_that_is_down_is_down_for_the_client_too(proxy, echo):
    echo.server_close()
    # On a busy machine as early as it connects.
    with pytest.raises(ConnectionResetError), connected(proxy) as client:
        client.recv(1000)


def test_it_forgets_connections_and_leaves_no_thread_behind(echo):
    before = threading.active_count()
    with Proxy(echo.server_address[1]) as proxy:
        with connected(proxy) as client:
            assert says(client) == b"hello"
            assert proxy.connections == 1
        deadline = time.monotonic() + PATIENCE
        while proxy.connections and time.monotonic() < deadline:
            time.sleep(0.01)
        assert proxy.connections == 0
    assert not [thread for thread in threading.enumerate() if thread.name == "proxy"]
    assert threading.active_count() <= before + 1
