"""A user of the console, who asks for databases and changes their mind about some of them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from random import Random

from django.contrib.auth import get_user_model
from django.db import connections
from django.test import Client
from django.urls import reverse

from backups.models import Backup
from databases.models import Database
from demo.ledger import Event
from demo.rows import clock
from demo.story import Story

LOOK = 0.5
STORY_EVERY = 7.0
"""Seconds from the beginning of one story to that of the next, so that the disasters find each step of them."""
TABS = 8
"""Requests that may be open at once: one that takes long does not keep the user from the next."""


class User:
    """Posts the console's own forms, through all of Django, at a steady rate. Call `play()` twenty times a second.

    `wanted` says of each name asked for how its row should end. A tenth are deleted again once their creation began;
    another tenth are on PostgreSQL. Meanwhile so many `stories` unfold on each engine.
    """

    def __init__(self, databases: int, rate: float, stories: int, random: Random) -> None:
        self.names = [f"demo_{number:04d}" for number in range(1, databases + 1)]
        self.wanted: dict[str, str] = {}
        self.slowest = 0.0
        self._rate = rate
        self._regrets = set(random.sample(self.names, databases // 10))
        self._account = get_user_model().objects.create_superuser("demo", password=None)
        self._tabs = ThreadPoolExecutor(TABS, thread_name_prefix="tab")
        self._tab = threading.local()
        self._asked: list[Future[None]] = []
        self._began = self._looked_at = clock()
        self.stories = [
            Story(f"story_{engine[0]}{number}", engine, self)
            for number in range(1, stories + 1)
            for engine in ("sqlite", "postgresql")
        ]

    def play(self, ledger: list[Event]) -> None:
        """Ask for whatever is due by now."""
        while len(self.wanted) < min(len(self.names), (clock() - self._began) * self._rate):
            name = self.names[len(self.wanted)]
            self.wanted[name] = "ready"
            self.create(name, "sqlite" if len(self.wanted) % 10 else "postgresql")
        for name in self._regrets.intersection(event.row for event in ledger):
            self._regrets.remove(name)
            self.wanted[name] = "deleted"
            self._ask(self._delete, name)
        if clock() >= self._looked_at + LOOK:
            self._looked_at = clock()
            for begun in self.stories[: int((clock() - self._began) / STORY_EVERY)]:
                begun.play()

    @property
    def is_done(self) -> bool:
        """Whether everything was asked for, and each request answered."""
        everything = len(self.wanted) == len(self.names) and not self._regrets and all(s.is_over for s in self.stories)
        return everything and all(request.done() for request in self._asked)

    @property
    def failures(self) -> list[str]:
        """What became of the requests that were not answered as a user hopes."""
        return [repr(error) for request in self._asked if request.done() and (error := request.exception())]

    def leave(self) -> None:
        self._tabs.shutdown(cancel_futures=True)

    # Each returns before it is answered.

    def create(self, name: str, engine: str) -> None:
        self._ask(self._create, name, engine)

    def branch(self, parent: str, name: str) -> None:
        self._ask(self._branch, parent, name)

    def deploy(self, branch: str, target: str, sql: str) -> None:
        self._ask(self._deploy, branch, target, sql)

    def back_up(self, name: str) -> None:
        self._ask(self._back_up, name)

    def restore(self, name: str, restored: str) -> None:
        self._ask(self._restore, name, restored)

    def _ask(self, request: Callable[..., None], *arguments: str) -> None:
        self._asked.append(self._tabs.submit(request, *arguments))

    def _create(self, name: str, engine: str) -> None:
        self._post(reverse("new_database"), {"name": name, "engine": engine})

    def _delete(self, name: str) -> None:
        self._post(reverse("delete_database", args=[name]), {"typed": name})

    def _branch(self, parent: str, name: str) -> None:
        self._post(reverse("new_branch", args=[parent]), {"name": name})

    def _deploy(self, branch: str, target: str, sql: str) -> None:
        self._post(reverse("new_deploy"), {"branch": pk(branch), "target": pk(target), "sql": sql})

    def _back_up(self, name: str) -> None:
        self._post(reverse("backups", args=[name]), {})

    def _restore(self, name: str, restored: str) -> None:
        backup = Backup.objects.values_list("pk", flat=True).get(database__name=name)
        self._post(reverse("restore", args=[backup]), {"name": restored})

    def _post(self, url: str, form: dict[str, object]) -> None:
        began = clock()
        try:
            response = self._client().post(url, form)
        finally:
            # As at the end of any request in production.
            connections.close_all()
        self.slowest = max(self.slowest, clock() - began)
        # The console sends whoever succeeded on to another page, and shows the form again to whoever did not.
        if response.status_code != 302:
            raise RuntimeError(f"{url} answered {response.status_code}")

    def _client(self) -> Client:
        """Return this thread's own client, logged in."""
        if not hasattr(self._tab, "client"):
            self._tab.client = Client(headers={"host": "localhost"})
            self._tab.client.force_login(self._account)
        client: Client = self._tab.client
        return client


def pk(name: str) -> int:
    found: int = Database.objects.values_list("pk", flat=True).get(name=name)
    return found
