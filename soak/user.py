"""A user who asks for databases at a steady rate, and has about a third of them deleted again, at any moment."""

from __future__ import annotations

import heapq
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from random import Random

from django.contrib.auth import get_user_model
from django.db import connections, transaction

from databases.models import Database
from databases.requests import request_creation, request_deletion
from demo.rows import clock

TABS = 8
"""Requests that may be open at once: one that hangs does not keep the user from the next."""
REGRETS = 1 / 3
JOBS = ("create_database", "delete_database")
"""What does what the user asks for."""


@dataclass(frozen=True)
class Request:
    """One request that was answered, or failed: then nobody knows whether its transaction was committed."""

    verb: str
    name: str
    began: float
    ended: float
    error: str = ""

    @property
    def took(self) -> float:
        return self.ended - self.began


class User:
    """Asks through the network that disasters strike, as a web process would. Call `play()` some ten times a second."""

    def __init__(self, rate: float, random: Random, database_port: int) -> None:
        self.requests: list[Request] = []
        self._rate = rate
        self._random = random
        self._account = get_user_model().objects.create_user("soak")
        self._tabs = ThreadPoolExecutor(TABS, "tab", self._open_tab, (database_port,))
        self._lock = threading.Lock()
        self._open = 0
        self._asked = 0
        self._regrets: list[tuple[float, str]] = []
        self._began = clock()

    def play(self) -> None:
        """Ask for whatever is due by now."""
        while self._asked < (clock() - self._began) * self._rate:
            self._asked += 1
            name = f"soak_{self._asked:06d}"
            self._ask("create", name)
            if self._random.random() < REGRETS:
                # At once, while it is made, or long after that.
                wait = self._random.choice([0.0, 1.0, 3.0, 30.0]) * self._random.random()
                heapq.heappush(self._regrets, (clock() + wait, name))
        while self._regrets and self._regrets[0][0] <= clock():
            self._ask("delete", heapq.heappop(self._regrets)[1])

    @property
    def waiting(self) -> int:
        """How many requests are neither answered nor failed."""
        return self._open

    def finish(self) -> None:
        """Ask for nothing more. What was asked for goes on to its end."""
        self._tabs.shutdown(wait=False)

    def leave(self) -> None:
        """Give up on whatever is still open."""
        self._tabs.shutdown(wait=False, cancel_futures=True)

    def _ask(self, verb: str, name: str) -> None:
        with self._lock:
            self._open += 1
        self._tabs.submit(self._request, verb, name)

    def _request(self, verb: str, name: str) -> None:
        began, error = clock(), ""
        try:
            with transaction.atomic():
                if verb == "create":
                    request_creation(Database(name=name, owner=self._account))
                else:
                    request_deletion(Database.objects.filter(name=name))
        except Exception as failure:
            error = f"{type(failure).__name__}: {failure}".strip()
        finally:
            # As at the end of any request in production.
            connections.close_all()
            with self._lock:
                self._open -= 1
                self.requests.append(Request(verb, name, began, clock(), error))

    @staticmethod
    def _open_tab(port: int) -> None:
        """Give this thread a connection of its own, through the proxy."""
        own = connections.create_connection("default")
        own.settings_dict = {**own.settings_dict, "PORT": port}
        connections["default"] = own


def wanted(requests: Iterable[Request], given_up: set[str], there: Mapping[str, object]) -> dict[str, str]:
    """Return how each row should end: what was answered counts, and what failed if it was committed nevertheless.

    `given_up` are the names whose deletion was committed, `there` has those that there is a row of. A deletion of what
    was never created is none.
    """
    endings: dict[str, str] = {}
    deletions = set(given_up)
    for request in requests:
        if request.verb == "create" and (not request.error or request.name in there):
            endings[request.name] = "ready"
    created_at = {each.name: each.ended for each in requests if each.verb == "create"}
    for request in requests:
        # One that overtook the creation, which waited for a tab or for the database, found nothing to delete.
        came_later = request.began >= created_at.get(request.name, float("inf"))
        if request.verb == "delete" and not request.error and came_later:
            deletions.add(request.name)
    return {name: "deleted" if name in deletions else ending for name, ending in endings.items()}


def undisturbed(requests: Iterable[Request], troubles: Iterable[tuple[float, float]]) -> list[Request]:
    """Return the requests during which nothing was wrong with the database: none of them may fail."""
    spans = list(troubles)
    return [each for each in requests if not any(each.began < until and since < each.ended for since, until in spans)]
