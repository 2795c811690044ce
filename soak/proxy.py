"""A TCP proxy of our own, which does to a connection what networks do: delay, cut, half-close, refuse, say nothing."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, Self

from config.servers import free_port

HOST = "127.0.0.1"
CHUNK = 65536
ANSWER_SECONDS = 10
RESET = struct.pack("ii", 1, 0)
"""SO_LINGER for no time at all: what is closed so is reset, and not ended in good order."""

Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Connection:
    """One client, and its connection to the server."""

    def __init__(self, client: Stream) -> None:
        self.client = client
        self.server: Stream | None = None
        self.is_silent = False
        """Whether what arrives is swallowed."""

    def cut(self) -> None:
        """Reset both sides."""
        for _, writer in filter(None, (self.client, self.server)):
            with contextlib.suppress(OSError):
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            writer.transport.abort()

    def half_close(self, towards_client: bool) -> None:
        """End one direction, as if that side had said its last word, and say nothing more in the other."""
        self.is_silent = True
        side = self.client if towards_client else self.server
        if side and not side[1].is_closing():
            with contextlib.suppress(OSError):
                side[1].write_eof()


class Proxy:
    """Passes connections to `port` of this machine on to a server's port. Use it in a `with` block.

    Its methods are called from any other thread, and have happened when they return. What a mode has silenced is cut
    when the mode ends, by `heal()`: no network loses the bytes in the middle of a connection.
    """

    def __init__(self, to_port: int) -> None:
        self.port = free_port()
        self._to_port = to_port
        self._delay = 0.0
        self._is_black_hole = False
        self._connections: set[Connection] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._server: asyncio.Server | None = None
        self._reserved: socket.socket | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        self._do(self._listen())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._do(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def delay(self, seconds: float) -> None:
        """Hold every chunk of bytes back for so long, in both directions."""
        self._delay = seconds

    def cut(self) -> None:
        """Reset every connection. New ones pass."""
        self._do(self._cut(lambda each: True))

    def half_close(self, towards_client: bool = True) -> None:
        """End one direction of every connection, and swallow what the other one says. New ones pass."""
        self._do(self._half_close(towards_client))

    def refuse(self) -> None:
        """Reset every connection, and refuse new ones."""
        self._do(self._refuse())

    def black_hole(self) -> None:
        """Accept new connections and say nothing; swallow what the others say."""
        self._do(self._swallow())

    def heal(self) -> None:
        """Pass everything again."""
        self._do(self._heal())

    @property
    def connections(self) -> int:
        return len(self._connections)

    def _do(self, what: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(what, self._loop).result(ANSWER_SECONDS)

    # --- In the thread of the loop ------------------------------------------------------------------------------------

    async def _listen(self) -> None:
        reserved, self._reserved = self._reserved or bound(self.port), None
        self._server = await asyncio.start_server(self._accept, sock=reserved)

    async def _cut(self, which: Any) -> None:
        for each in [each for each in self._connections if which(each)]:
            each.cut()

    async def _half_close(self, towards_client: bool) -> None:
        for each in self._connections:
            each.half_close(towards_client)

    async def _refuse(self) -> None:
        if self._server:
            # Whoever was accepted a moment ago is not among the connections yet. Were the server closed under it,
            # nobody would ever close it, and its client would wait for ever.
            give_up_at = self._loop.time() + ANSWER_SECONDS / 2
            while (others := asyncio.all_tasks() - {asyncio.current_task()}) and self._loop.time() < give_up_at:
                await self._cut(lambda each: True)
                await asyncio.wait(others, timeout=0.01)
            self._server.close()
            self._server = None
            # Bound and not listening: connections are refused, and nobody else gets the port.
            self._reserved = bound(self.port)
        await self._cut(lambda each: True)

    async def _swallow(self) -> None:
        self._is_black_hole = True
        for each in self._connections:
            each.is_silent = True

    async def _heal(self) -> None:
        self._delay, self._is_black_hole = 0.0, False
        await self._cut(lambda each: each.is_silent)
        if not self._server:
            await self._listen()

    async def _close(self) -> None:
        await self._refuse()
        if self._reserved:
            self._reserved.close()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = Connection((reader, writer))
        connection.is_silent = self._is_black_hole
        self._connections.add(connection)
        try:
            if not connection.is_silent:
                connection.server = await asyncio.open_connection(HOST, self._to_port)
            pumps = [self._pump(connection, connection.client, connection.server)]
            if connection.server:
                pumps.append(self._pump(connection, connection.server, connection.client))
            await asyncio.gather(*pumps)
        except OSError:
            pass
        finally:
            # Also in good order, when both sides have said their last word: then there is nothing left to lose.
            connection.cut()
            self._connections.discard(connection)

    async def _pump(self, connection: Connection, source: Stream, sink: Stream | None) -> None:
        while chunk := await source[0].read(CHUNK):
            if self._delay:
                await asyncio.sleep(self._delay)
            if sink and not connection.is_silent:
                sink[1].write(chunk)
                await sink[1].drain()
        if sink and not connection.is_silent and not sink[1].is_closing():
            sink[1].write_eof()


def bound(port: int) -> socket.socket:
    """Return a socket that has the port, and does not listen yet."""
    found = socket.socket()
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    found.bind((HOST, port))
    return found
