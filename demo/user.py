"""A user of the admin, who asks for databases and changes their mind about some of them."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from random import Random

from django.contrib.auth import get_user_model
from django.db import connections
from django.test import Client
from django.urls import reverse

from databases.models import Database
from demo.ledger import Event
from demo.rows import clock

TABS = 8
"""Requests that may be open at once: one that takes long does not keep the user from the next."""


class User:
    """Posts the admin's own forms, through the whole of Django, at a steady rate. Call `play()` twenty times a second.

    `wanted` says of each name asked for how its row should end. A tenth are deleted again once their creation began.
    """

    def __init__(self, databases: int, rate: float, random: Random) -> None:
        self.names = [f"demo_{number:04d}" for number in range(1, databases + 1)]
        self.wanted: dict[str, str] = {}
        self.slowest = 0.0
        self._rate = rate
        self._regrets = set(random.sample(self.names, databases // 10))
        self._account = get_user_model().objects.create_superuser("demo", password=None)
        self._tabs = ThreadPoolExecutor(TABS, thread_name_prefix="tab")
        self._tab = threading.local()
        self._asked: list[Future[None]] = []
        self._began = clock()

    def play(self, ledger: list[Event]) -> None:
        """Ask for whatever is due by now."""
        while len(self.wanted) < min(len(self.names), (clock() - self._began) * self._rate):
            name = self.names[len(self.wanted)]
            self.wanted[name] = "ready"
            self._asked.append(self._tabs.submit(self._create, name))
        for name in self._regrets.intersection(event.row for event in ledger):
            self._regrets.remove(name)
            self.wanted[name] = "deleted"
            self._asked.append(self._tabs.submit(self._delete, name))

    @property
    def is_done(self) -> bool:
        """Whether everything was asked for, and each request answered."""
        everything = len(self.wanted) == len(self.names) and not self._regrets
        return everything and all(request.done() for request in self._asked)

    @property
    def failures(self) -> list[str]:
        """What became of the requests that were not answered as a user hopes."""
        return [repr(error) for request in self._asked if request.done() and (error := request.exception())]

    def leave(self) -> None:
        self._tabs.shutdown(cancel_futures=True)

    def _create(self, name: str) -> None:
        self._post(reverse("admin:databases_database_add"), {"name": name, "owner": self._account.pk})

    def _delete(self, name: str) -> None:
        pk = Database.objects.values_list("pk", flat=True).get(name=name)
        self._post(reverse("admin:databases_database_delete_database", args=[pk]), {})

    def _post(self, url: str, form: dict[str, object]) -> None:
        began = clock()
        try:
            response = self._client().post(url, form)
        finally:
            # As at the end of any request in production.
            connections.close_all()
        self.slowest = max(self.slowest, clock() - began)
        # The admin sends whoever succeeded on to another page, and shows the form again to whoever did not.
        if response.status_code != 302:
            raise RuntimeError(f"{url} answered {response.status_code}")

    def _client(self) -> Client:
        """Return this thread's own client, logged in."""
        if not hasattr(self._tab, "client"):
            self._tab.client = Client(headers={"host": "localhost"})
            self._tab.client.force_login(self._account)
        client: Client = self._tab.client
        return client
