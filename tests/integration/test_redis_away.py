"""Redis refuses or hangs: who waits, for how long, who is told, and what is left behind."""

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import pytest
from django.db import transaction
from django.urls import reverse

from config.servers import RedisServer
from jobs import QueueUnavailable, enqueue, queues, scheduler
from jobs import resolver as names
from jobs.conf import conf
from jobs.models import Schedule
from jobs.testing import perform, tick
from tests.cast.jobs import do_task, schedule_tasks, touch_file
from tests.cast.models import Task
from tests.integration.conftest import BACKGROUND_LIST
from tests.integration.test_enqueue import PLAIN, SWEPT
from tests.machine import within

pytestmark = [pytest.mark.long_on_postgres, pytest.mark.django_db(transaction=True)]


@pytest.fixture(autouse=True)
def _short_timeout(settings: Any) -> None:
    """So that on a busy machine there is still a second's worth of difference between one wait and several."""
    settings.JOBS = {**settings.JOBS, "REDIS_TIMEOUT": timedelta(milliseconds=200)}


@pytest.fixture(params=["refusing_redis", "hanging_redis"])
def away(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue(request.param) or request.param)


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What the library has logged as a warning or worse."""
    return lambda: [
        record.getMessage()
        for record in caplog.records
        if record.name == "selfheal" and record.levelno >= logging.WARNING
    ]


@pytest.mark.usefixtures("away")
@pytest.mark.parametrize("enqueue", SWEPT.values(), ids=SWEPT.keys())
def test_a_row_is_saved_within_a_second_and_there_is_one_warning(enqueue, warnings):
    with within(1), transaction.atomic():
        task = Task.objects.create()
        enqueue(task)
    assert Task.objects.filter(pk=task.pk).exists()
    [warning] = warnings()
    assert "do_task was not queued, its sweep will do so: Redis did not answer" in warning


@pytest.mark.usefixtures("away")
@pytest.mark.parametrize("enqueue", PLAIN.values(), ids=PLAIN.keys())
def test_a_plain_call_is_refused_within_a_second(enqueue):
    with within(1), pytest.raises(QueueUnavailable, match="touch_file was not queued, because Redis did not answer"):
        enqueue()


@pytest.mark.usefixtures("away")
@pytest.mark.parametrize("enqueue", PLAIN.values(), ids=PLAIN.keys())
def test_a_plain_call_in_a_transaction_is_lost_and_nobody_else_is(enqueue, warnings):
    """Who committed is not told, nor are those who wait for the commit too: all is well with them."""
    sent: list[str] = []
    with within(1):
        with transaction.atomic():
            Task.objects.create(name="saved")
            for _ in range(20):
                enqueue()
            transaction.on_commit(lambda: sent.append("the receipt"))
        assert sent == ["the receipt"]
    assert Task.objects.filter(name="saved").exists()
    assert len(warnings()) == 20
    for warning in warnings():
        assert "After the commit of its transaction: touch_file was not queued, because Redis did not ans" in warning


@pytest.mark.parametrize("enqueue", [*SWEPT.values(), lambda task: touch_file.enqueue("/tmp/x")])
def test_nor_is_anybody_else_lost_with_what_fails_in_another_way(enqueue, task, monkeypatch, warnings):
    def fail(*args: Any, **options: Any) -> None:
        raise RuntimeError("a bug")

    for name in ("push_id", "push_ids", "run_script"):
        monkeypatch.setattr(f"jobs.enqueue.{name}", fail)
    sent: list[str] = []
    with transaction.atomic():
        enqueue(task)
        transaction.on_commit(lambda: sent.append("the receipt"))
    assert sent == ["the receipt"]
    assert warnings() == ["After the commit of its transaction: a bug"]
    with pytest.raises(RuntimeError):
        enqueue(task)


@pytest.mark.parametrize("has_connected", [True, False])
def test_with_the_default_settings_it_is_a_second_too(has_connected, settings, request, warnings):
    del settings.JOBS
    queues._connect.cache_clear()
    if has_connected:
        do_task.enqueue(1)
    request.getfixturevalue("hanging_redis")
    with within(1):
        do_task.enqueue(2)
    assert len(warnings()) == 1


@pytest.mark.usefixtures("hanging_redis")
@pytest.mark.parametrize("in_transaction", [True, False])
def test_a_request_that_queues_a_hundred_rows_does_not_wait_a_hundred_times(in_transaction, warnings):
    began = time.monotonic()
    with transaction.atomic() if in_transaction else nullcontext():
        for _ in range(100):
            do_task.enqueue(Task.objects.create())
    elapsed = time.monotonic() - began
    assert Task.objects.count() == 100
    # After each wait nobody waits for twice as long. A slow machine gets past that more than once.
    assert 1 <= len(warnings()) <= 1 + elapsed / (2 * conf.REDIS_TIMEOUT.total_seconds())


@pytest.mark.usefixtures("hanging_redis")
def test_nor_do_many_requests_at_once(race):
    pks = [Task.objects.create().pk for _ in range(8)]
    with within(2):
        race(*[lambda pk=pk: do_task.enqueue(pk) for pk in pks])


def test_redis_back_the_next_row_is_queued(task, hanging_redis, redis_server: RedisServer, queued):
    do_task.enqueue(task)
    redis_server.thaw()
    deadline = time.monotonic() + 5
    # What did not come through in time may still arrive, now that Redis goes on; then once, and not as well as this.
    while not queued() and time.monotonic() < deadline:
        do_task.enqueue(task)
    assert queued() == [f"do_task-{task.pk}"]


def test_redis_started_again_the_next_row_is_queued_at_once(redis_server: RedisServer, queued):
    tasks = [Task.objects.create() for _ in range(3)]
    do_task.enqueue(tasks[0])
    redis_server.kill()
    do_task.enqueue(tasks[1])
    redis_server.start()
    # The connections from before are dead. Nobody should notice.
    do_task.enqueue(tasks[2])
    touch_file.enqueue("/tmp/x")
    assert queued() == [f"do_task-{tasks[2].pk}"]


def test_after_a_failover_nobody_stays_with_the_old_primary(redis_server: RedisServer, redis, queued):
    """It is a replica now, and has left open the connections that it had."""
    tasks = [Task.objects.create() for _ in range(2)]
    do_task.enqueue(tasks[0])
    connection = queues.get("default").connection
    before = connection.client_id()
    redis.replicaof("127.0.0.1", redis_server.port + 1)
    try:
        do_task.enqueue(tasks[1])
        assert connection.client_id() != before
        enqueue._Hint._hanging_until.clear()
        with pytest.raises(QueueUnavailable, match="It is a replica by now"):
            touch_file.enqueue("/tmp/x")
    finally:
        redis.replicaof("no", "one")
    enqueue._Hint._hanging_until.clear()
    do_task.enqueue(tasks[1])
    assert len(queued()) == 2


@pytest.mark.parametrize("how", ["hang", "refuse"])
def test_sentinels_that_do_not_answer_are_given_up_too(how, settings, warnings):
    with ExitStack() as open_sockets:
        sentinels = []
        for _ in range(40):
            each = open_sockets.enter_context(closing(socket.socket()))
            each.bind(("127.0.0.1", 0))
            if how == "hang":
                each.listen()
            sentinels.append(each.getsockname())
        config = {"SENTINELS": sentinels, "MASTER_NAME": "shop", "DB": 0, "SOCKET_TIMEOUT": 0.5}
        settings.RQ_QUEUES = {**settings.RQ_QUEUES, "default": config}
        with within(1):
            do_task.enqueue(Task.objects.create())
        with within(0.3):
            do_task.enqueue(Task.objects.create())
    assert len(warnings()) == 1 or how == "refuse"
    enqueue._Hint._hanging_until.clear()


# --- The way there ----------------------------------------------------------------------------------------------------

HOST = "redis.shop.example"


class Resolver:
    """What the name server says of HOST, once it is `open`; until then it hangs."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.asked = 0
        self.addresses: list[str] = []
        self.seconds = 5.0

    def answer(self, host: str, port: int, *args: Any) -> list[Any]:
        if host != HOST:
            return ask_the_real_one(host, port, *args)
        self.asked += 1
        self.open.wait(self.seconds)
        if not self.addresses:
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in self.addresses]

    def wait_until_idle(self) -> None:
        for thread in threading.enumerate():
            if thread.name == "selfheal-resolver":
                thread.join(10)


ask_the_real_one = socket.getaddrinfo


@pytest.fixture
def resolver(monkeypatch, settings, redis_server: RedisServer) -> Iterator[Resolver]:
    """Every queue is on HOST, with the settings as they are by default, and nobody has connected yet."""
    resolver = Resolver()
    monkeypatch.setattr("socket.getaddrinfo", resolver.answer)
    settings.RQ_QUEUES = {
        name: {**queue, "URL": f"redis://{HOST}:{redis_server.port}/0"} for name, queue in settings.RQ_QUEUES.items()
    }
    del settings.JOBS
    queues._connect.cache_clear()
    enqueue._Hint._hanging_until.clear()
    yield resolver
    resolver.open.set()
    resolver.wait_until_idle()
    enqueue._Hint._hanging_until.clear()
    names._said.clear()


@contextmanager
def full(address: str, port: int) -> Iterator[None]:
    """A server that is too busy to accept anybody: its connections hang."""
    with ExitStack() as sockets:
        server = sockets.enter_context(closing(socket.socket()))
        server.bind((address, port))
        server.listen(0)
        for _ in range(4):
            other = sockets.enter_context(closing(socket.socket()))
            other.setblocking(False)
            other.connect_ex((address, port))
        yield


@pytest.mark.parametrize("enqueue", SWEPT.values(), ids=SWEPT.keys())
def test_a_name_server_that_hangs_is_waited_for_once(enqueue, resolver, warnings):
    with within(1), transaction.atomic():
        enqueue(Task.objects.create())
    assert len(warnings()) == 1
    with within(1):
        for _ in range(50):
            enqueue(Task.objects.create())
    assert Task.objects.count() == 51
    # Nor does each leave a thread behind that waits for it.
    assert resolver.asked == 1


def test_a_tick_has_the_time_that_it_needs(resolver, task, redis, monkeypatch):
    """Each is a process of its own, and what it has learnt is gone with it."""
    monkeypatch.setattr(names, "patience", 0.0)
    monkeypatch.setattr(scheduler, "TICK_SECONDS", 12.0)
    resolver.addresses = ["127.0.0.1"]
    resolver.seconds = 1.0
    ticking = scheduler.Scheduler(connection=redis)
    assert ticking._tick("") == ""
    assert redis.exists(scheduler.TICKED_KEY)


def test_a_plain_call_waits_for_it_once_too(resolver):
    with within(1):
        for _ in range(50):
            with pytest.raises(QueueUnavailable, match="touch_file was not queued, because Redis did not answer: "):
                touch_file.enqueue("/tmp/x")


def test_a_name_server_that_is_slow_is_good_enough_for_the_next(resolver, task, queued):
    do_task.enqueue(task)
    assert queued() == []
    resolver.addresses = ["127.0.0.1"]
    resolver.open.set()
    resolver.wait_until_idle()
    # It is as slow as before.
    resolver.open.clear()
    enqueue._Hint._hanging_until.clear()
    with within(1):
        do_task.enqueue(task)
    assert queued() == [f"do_task-{task.pk}"]


@pytest.mark.parametrize("how", ["hangs", "refuses"])
def test_what_it_said_before_holds_while_it_does_not_answer(how, resolver, task, queued):
    resolver.addresses = ["127.0.0.1"]
    resolver.open.set()
    do_task.enqueue(Task.objects.create())
    resolver.addresses = []
    if how == "hangs":
        resolver.open.clear()
    # A worker's child too, which has connected to nothing.
    queues.get("default").connection.connection_pool.disconnect()
    with within(1):
        do_task.enqueue(task)
    assert f"do_task-{task.pk}" in queued()


def test_it_is_asked_again_after_a_fork(resolver):
    """Those who ask in the parent are not in its child."""
    with pytest.raises(TimeoutError):
        names.addresses(HOST, 1, 0, 0.05)
    resolver.addresses = ["127.0.0.1"]
    if not (pid := os.fork()):
        resolver.open = threading.Event()
        resolver.open.set()
        os._exit(len(names.addresses(HOST, 1, 0, 5)))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1


@pytest.mark.parametrize("kind", ["redis", "rediss"])
def test_all_addresses_of_a_name_are_given_up_together(kind, resolver, redis_server: RedisServer, settings, warnings):
    settings.RQ_QUEUES["default"] = {"URL": f"{kind}://{HOST}:{redis_server.port}/0"}
    resolver.addresses = [f"127.0.0.{n}" for n in range(2, 14)]
    resolver.open.set()
    with ExitStack() as servers:
        for address in resolver.addresses:
            servers.enter_context(full(address, redis_server.port))
        with within(1):
            do_task.enqueue(Task.objects.create())
        with within(0.2):
            do_task.enqueue(Task.objects.create())
    assert len(warnings()) == 1


def test_one_address_that_hangs_does_not_keep_anybody_from_the_next(resolver, redis_server, task, queued):
    resolver.addresses = ["127.0.0.2", "127.0.0.1"]
    resolver.open.set()
    with full("127.0.0.2", redis_server.port), within(1):
        do_task.enqueue(task)
    assert queued() == [f"do_task-{task.pk}"]


def test_one_that_does_not_greet_is_given_up_over_tls_too(resolver, redis_server: RedisServer, settings, warnings):
    settings.RQ_QUEUES["default"] = {"URL": f"rediss://{HOST}:{redis_server.port}/0"}
    resolver.addresses = ["127.0.0.1"]
    resolver.open.set()
    redis_server.freeze()
    try:
        with within(1):
            do_task.enqueue(Task.objects.create())
    finally:
        redis_server.thaw()
    assert len(warnings()) == 1


def test_pages_and_probes_do_not_wait_for_a_name_server(resolver, admin_client):
    for page in (reverse("admin:app_list", args=["selfheal"]), "/readyz"):
        with within(1):
            admin_client.get(page)


def test_the_sweep_brings_what_was_not_queued(refusing_redis, redis_server: RedisServer, queued):
    task = Task.objects.create()
    do_task.enqueue(task)
    redis_server.start()
    assert schedule_tasks.sweep().enqueued == 1
    assert queued() == [f"do_task-{task.pk}"]


@pytest.mark.usefixtures("away", "task")
@pytest.mark.parametrize("dry_run", [True, False])
def test_a_sweep_says_that_redis_did_not_answer(dry_run):
    with within(1), pytest.raises(QueueUnavailable, match="schedule_tasks was not queued, because Redis did not"):
        schedule_tasks.sweep(dry_run=dry_run)


@pytest.mark.usefixtures("away")
def test_a_row_can_be_worked_on_all_the_same(task):
    """Only the message was in Redis, and that has been popped."""
    assert perform(do_task, task) == "done"


def test_a_tick_takes_what_is_due_and_the_next_one_with_redis_pushes_it(away, redis_server: RedisServer, queued):
    Schedule.objects.filter(name="schedule_tasks").update(next_run_at="2020-01-01T00:00Z")
    with within(5), pytest.raises(Exception):  # noqa: B017, PT011  (one error of Redis, or a group of them)
        tick()
    schedule = Schedule.objects.get(name="schedule_tasks")
    assert schedule.next_run_at.year > 2020
    assert schedule.last_enqueued_at is not None

    redis_server.thaw()
    redis_server.start()
    tick()
    # Pushed by this tick, or by the one before: its command may have waited in the socket of a Redis that hung.
    assert queued(BACKGROUND_LIST).count("schedule_tasks") == 1


def test_the_redis_of_another_queue_does_not_matter(settings: Any, task, queued):
    settings.RQ_QUEUES["urgent"] = {"URL": "redis://127.0.0.1:1/0"}
    do_task.enqueue(task)
    with pytest.raises(QueueUnavailable):
        touch_file.enqueue("/tmp/x")
    assert queued() == [f"do_task-{task.pk}"]
