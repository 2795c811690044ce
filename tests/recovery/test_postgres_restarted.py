"""PostgreSQL is restarted, killed and frozen while everybody is at work, and nobody else is restarted for it."""

import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from django.contrib.auth import get_user_model
from django.core.handlers.wsgi import WSGIHandler
from django.db import Error as DatabaseError
from django.db import connection, connections
from django.test import Client, RequestFactory

from config.servers import PostgresServer, postgres_binary
from tests import database
from tests.cast.models import Task
from tests.machine import within
from tests.recovery.conftest import LEASE, Stack, wait_for

pytestmark = [pytest.mark.postgres, pytest.mark.usefixtures("own_postgres")]

PLAIN: dict[str, Any] = {}
KEPT = {"CONN_MAX_AGE": 600}
# As behind a PgBouncer that gives out its sessions transaction by transaction.
KEPT_FOR_EVER = {"CONN_MAX_AGE": None, "DISABLE_SERVER_SIDE_CURSORS": True}


@pytest.fixture
def own_postgres(transactional_db: None, tmp_path: Path) -> Iterator[PostgresServer]:
    """A server for this test alone, with a copy of the test's database. The test itself looks there, too."""
    settings = connection.settings_dict
    shared = settings.copy()
    with PostgresServer(tmp_path / "postgres") as server:
        copied = subprocess.run([postgres_binary("pg_dump"), database.url()], capture_output=True, check=True).stdout
        subprocess.run([postgres_binary("psql"), "--quiet", server.url], input=copied, capture_output=True, check=True)
        connections.close_all()
        url = urlsplit(server.url)
        settings.update(NAME="postgres", PORT=str(url.port), PASSWORD=url.password)
        try:
            yield server
        finally:
            connections.close_all()
            settings.update(shared)


def begin(stack: Stack, of_the_connection: dict[str, Any]) -> list[Task]:
    """Start everything, and wait until it is in the middle of its work."""
    tasks = [Task.objects.create(seconds=0.3) for _ in range(16)]
    environment = {"TEST_DATABASE": json.dumps(of_the_connection)}
    stack.scheduler(**environment)
    stack.worker("one", **environment)
    stack.worker("two", **environment)
    stack.wait_for(lambda: Task.objects.filter(state="done").count() >= 3, "three are done")
    # What the test itself holds would end with the server.
    connections.close_all()
    return tasks


def assert_nothing_was_lost(stack: Stack, tasks: list[Task], before: dict[str, int]) -> None:
    later = Task.objects.create()
    stack.wait_until_done(*tasks, later)
    assert {stack.writes(task) for task in [*tasks, later]} == {1}
    assert not any(stack.at_once(task) for task in tasks)
    # And none of them was replaced.
    assert stack.exits == []
    assert {name: stack.pid(name) for name in before} == before


@pytest.mark.parametrize(
    ("how", "of_the_connection"),
    [
        pytest.param("restarted", PLAIN, id="restarted", marks=pytest.mark.long),
        pytest.param("restarted", KEPT_FOR_EVER, id="restarted and kept for ever", marks=pytest.mark.long),
        pytest.param("killed", PLAIN, id="killed", marks=pytest.mark.long),
        pytest.param("killed", KEPT, id="killed and kept"),
    ],
)
def test_under_load(stack: Stack, own_postgres: PostgresServer, how: str, of_the_connection: dict[str, Any]) -> None:
    tasks = begin(stack, of_the_connection)
    before = {name: stack.pid(name) for name in stack.supervisor.names}
    if how == "restarted":
        own_postgres.restart()
    else:
        own_postgres.kill()
        stack.wait_for(lambda: "A tick failed" in stack.log("scheduler"), "the scheduler has noticed")
        own_postgres.start()
    assert_nothing_was_lost(stack, tasks, before)


def test_frozen_for_less_than_a_lease(stack: Stack, own_postgres: PostgresServer) -> None:
    """It costs time, and nothing else: all sessions go on."""
    tasks = begin(stack, PLAIN)
    before = {name: stack.pid(name) for name in stack.supervisor.names}
    own_postgres.freeze()
    frozen_at = time.monotonic()
    stack.wait_for(lambda: time.monotonic() > frozen_at + LEASE / 3, "a third of a lease")
    own_postgres.thaw()
    assert_nothing_was_lost(stack, tasks, before)


def test_frozen_for_longer_than_a_lease(stack: Stack, own_postgres: PostgresServer) -> None:
    """Whoever can no longer know that the row is theirs ends; the others wait, and go on."""
    slow = Task.objects.create(seconds=3 * LEASE)
    tasks = begin(stack, PLAIN)
    before = {name: stack.pid(name) for name in stack.supervisor.names}
    child = stack.child_at_work(slow)
    Task.objects.filter(pk=slow.pk).update(seconds=0)
    connections.close_all()
    own_postgres.freeze()
    frozen_at = time.monotonic()
    gone_at = stack.wait_until_gone(child.pid)
    assert gone_at - frozen_at < LEASE
    own_postgres.thaw()
    assert_nothing_was_lost(stack, [slow, *tasks], before)


@pytest.mark.parametrize("of_the_connection", [PLAIN, KEPT, KEPT_FOR_EVER], ids=["plain", "kept", "kept for ever"])
def test_requests(own_postgres: PostgresServer, of_the_connection: dict[str, Any], monkeypatch: Any) -> None:
    """Each fails while it is away, none hangs; from the second after it is back they are answered."""
    for name, value in of_the_connection.items():
        monkeypatch.setitem(connection.settings_dict, name, value)
    browser = Client()
    browser.force_login(get_user_model().objects.create_superuser("operator"))
    cookie = "; ".join(f"{name}={morsel.value}" for name, morsel in browser.cookies.items())
    application = WSGIHandler()

    def get() -> int:
        statuses: list[str] = []
        request = RequestFactory().get("/admin/selfheal/schedule/", headers={"cookie": cookie})
        response = application(request.environ, lambda status, headers: statuses.append(status))
        response.close()
        return int(statuses[0].split()[0])

    assert get() == 200
    own_postgres.kill()
    for _ in range(3):
        with within(1):
            assert get() == 500
    own_postgres.start()
    get()
    assert get() == 200
    own_postgres.restart()
    get()
    assert get() == 200


def test_what_was_committed_survives_a_kill(own_postgres: PostgresServer) -> None:
    for _ in range(5):
        Task.objects.create()
        own_postgres.kill()
        with suppress(DatabaseError):
            Task.objects.count()
        connections.close_all()
        own_postgres.start()
    wait_for(lambda: Task.objects.count() == 5, "five tasks")
