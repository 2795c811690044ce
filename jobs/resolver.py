"""Where a server is: asked of the system's resolver, which nobody can tell to hurry.

It takes five seconds and more to say that no name server answers. Here it is waited for as long as the caller says, and
what it has said before stands in for what it does not say.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from typing import Any

Question = tuple[str, int, int]

# For how many seconds at least this process waits, whatever a caller says. One that answers nobody has the time.
patience = 0.0

_lock = threading.Lock()
# At most one thread for each question, however many ask it of a name server that hangs.
_asking: dict[Question, _Lookup] = {}
# What was said last. A child has it from its parent, who may have waited longer than it ever could.
_said: dict[Question, list[Any]] = {}


def addresses(host: str, port: int, socket_type: int, seconds: float) -> list[Any]:
    """Return what `socket.getaddrinfo` does for a TCP connection, or what it last did when it fails or is late.

    Raises `OSError` when it has never said anything; after so many seconds `TimeoutError`, and from then on at once,
    until it has come to an end. An answer that comes late is there for the next who asks.
    """
    question = (host, port, socket_type)
    with _lock:
        if (lookup := _asking.get(question)) is None:
            lookup = _Lookup(question)
            try:
                lookup.start()
            except RuntimeError as error:
                raise OSError(f"{host} could not be looked up: {error}") from error
            _asking[question] = lookup
    lookup.join(max(0.0, lookup.began_at + max(seconds, patience) - time.monotonic()))
    if lookup.trouble and question not in _said:
        raise lookup.trouble
    if question not in _said:
        raise TimeoutError(f"{host} could not be looked up within {seconds:g} s")
    return _said[question]


class _Lookup(threading.Thread):
    def __init__(self, question: Question) -> None:
        super().__init__(name="selfheal-resolver", daemon=True)
        self.question = question
        self.began_at = time.monotonic()
        self.trouble: Exception | None = None

    def run(self) -> None:
        try:
            host, port, socket_type = self.question
            _said[self.question] = socket.getaddrinfo(host, port, socket_type, socket.SOCK_STREAM)
        except Exception as error:
            self.trouble = error
        finally:
            with _lock:
                _asking.pop(self.question, None)


def _forget() -> None:
    """In a child none of these threads goes on, and one of them may have had the lock."""
    global _lock
    _lock = threading.Lock()
    _asking.clear()


os.register_at_fork(after_in_child=_forget)
