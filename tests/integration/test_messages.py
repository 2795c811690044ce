"""What may lie in Redis: ids that name declared work. Everything else is refused, logged, and harmless."""

import json
import os
import pickle
import subprocess
import sys
import zlib
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import django_rq
import pytest
from django.contrib import admin
from django.test import Client
from django.urls import include, path
from hypothesis import HealthCheck, example, given
from hypothesis import settings as settings_of_hypothesis
from hypothesis import strategies as st
from redis import Redis
from rq import SimpleWorker
from rq import Worker as RQWorker
from rq.exceptions import NoSuchJobError
from rq.job import Job as RQJob
from rq.serializers import DefaultSerializer, JSONSerializer

from config import BASE_DIR
from config.servers import RedisServer
from jobs import QueueUnavailable, job, queues, registry
from jobs.exceptions import Misconfigured
from jobs.message import MAX_CALL_BYTES, Message
from jobs.models import Claim, Run
from jobs.testing import drain, tick
from jobs.worker import Worker
from tests import database
from tests.cast.jobs import do_keyed, do_task, touch_file
from tests.cast.models import Keyed, Task
from tests.integration.conftest import DEFAULT_LIST, URGENT_LIST

pytestmark = [pytest.mark.long_on_postgres, pytest.mark.django_db(transaction=True)]

# django-rq's own pages, which this project does not mount. They extend the admin's.
urlpatterns = [path("django-rq/", include("django_rq.urls")), path("admin/", admin.site.urls)]

A_WHILE = timedelta(minutes=30)
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def fetch(id: str, redis: Redis) -> Message:
    return Message.fetch(id, connection=redis)


# --- The id is the message --------------------------------------------------------------------------------------------


def test_a_swept_jobs_message_is_its_id_and_nothing_else(task, redis, queued):
    do_task.enqueue(task)
    assert queued() == [f"do_task-{task.pk}"]
    assert set(redis.keys()) == {b"rq:queues", DEFAULT_LIST.encode()}


def test_it_is_rebuilt_from_the_id_alone(task, redis):
    message = fetch(f"do_task-{task.pk}", redis)
    assert message.declared is do_task
    assert (message.pk, message.func_name, message.origin, message.timeout) == (str(task.pk), "do_task", "default", 60)
    assert message.func is do_task


def test_a_schedules_message_is_its_name(redis):
    message = fetch("schedule_tasks", redis)
    assert (message.pk, message.func_name, message.origin) == ("schedule_tasks", "schedule_tasks", "background")


def test_a_hash_behind_a_swept_jobs_id_is_not_even_read(task, redis):
    """So nothing can disagree with the list."""
    redis.hset(f"rq:job:do_task-{task.pk}", mapping={"data": b"nonsense", "timeout": "1", "status": "finished"})
    do_task.enqueue(task)
    assert drain() == {"done": 1}
    assert Task.objects.get().state == "done"


@pytest.mark.parametrize("key", ["a/b", "a b", "ключ 😀", "-7", "_", "do_task-1", "x" * 500, "ü" * 500])
def test_a_row_with_any_key_is_found_again(key, queued):
    Keyed.objects.create(key=key)
    do_keyed.enqueue(key)
    do_keyed.enqueue(Keyed.objects.get())
    assert len(queued()) == 1
    assert drain() == {"done": 1}
    assert Keyed.objects.get().state == "done"


def test_a_plain_calls_arguments_are_in_json(redis, queued):
    touch_file.enqueue("/tmp/ü", fail_times=2)
    [id] = queued(URGENT_LIST)
    assert id.startswith("touch_file-")
    stored = redis.hgetall(f"rq:job:{id}")
    assert json.loads(zlib.decompress(stored[b"data"])) == ["touch_file", None, ["/tmp/ü"], {"fail_times": 2}]
    # The description is logged and listed, and arguments may be private.
    assert stored[b"description"] == id.encode()


# --- Pages that look at the queue -------------------------------------------------------------------------------------


@pytest.fixture
def pages(settings: Any, admin_client: Client) -> Callable[[str], str]:
    settings.ROOT_URLCONF = __name__

    def get(page: str) -> str:
        response = admin_client.get(f"/django-rq/{page}")
        assert response.status_code == 200
        return response.content.decode()

    return get


def test_pages_list_what_is_queued_and_delete_nothing(pages, redis, queued, delayed):
    tasks = [Task.objects.create() for _ in range(3)]
    do_task.enqueue_many(tasks[:2])
    do_task.enqueue_with_jitter(tasks[2], max_wait=A_WHILE)
    touch_file.enqueue("/tmp/x")
    before = (queued(), queued(URGENT_LIST), delayed())

    names = sorted(queues.names())
    listed = pages(f"queues/{names.index('default')}/")
    assert f"do_task-{tasks[0].pk}" in listed
    assert f"do_task-{tasks[1].pk}" in listed
    assert "touch_file-" in pages(f"queues/{names.index('urgent')}/")
    for page in ("", "stats.json", f"queues/{names.index('default')}/details/", f"workers/{names.index('default')}/"):
        pages(page)
    assert f"do_task-{tasks[2].pk}" in pages("schedulers/0/")

    assert (queued(), queued(URGENT_LIST), delayed()) == before


def test_rqs_own_calls_list_what_is_queued_and_delete_nothing(redis, queued):
    tasks = [Task.objects.create() for _ in range(3)]
    do_task.enqueue_many(tasks)
    queue = django_rq.get_queue("default")
    ids = [f"do_task-{task.pk}" for task in tasks]
    assert queue.count == 3
    assert queue.job_ids == ids
    assert [message.id for message in queue.get_jobs()] == ids
    assert queue.fetch_job(ids[0]).pk == str(tasks[0].pk)
    assert queued() == ids


# --- Refused ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def evidence(tmp_path: Path) -> Path:
    """A file that comes to be when something runs that was not declared."""
    return tmp_path / "evidence"


class TouchesWhenUnpickled:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def pack(*data: Any) -> bytes:
    return zlib.compress(json.dumps(data).encode())


REFUSED_IDS = {
    "of no declared job": b"no_such_job-1",
    "of a function": b"os.system",
    "of a function and a key": b"os.system-1",
    "of rq": b"7b0c1e62-44f8-4d0c-8f6e-1f8b7a5f5b01",
    "with a space": b"do_task 1",
    "in no encoding": b"\xff\xfe\x00",
    "in Unicode": "do_täsk-1".encode(),
    "empty": b"",
    "a pickle": pickle.dumps(("os.system", ("true",))),
    "JSON": b'{"job": "do_task", "pk": 1}',
    "very long": b"x" * 1_000_000,
    "of a swept job without a row": b"do_task",
    "of a plain job without a call": b"touch_file",
    "of a call that is gone": b"touch_file-0123456789abcdef",
    "with a malformed key": b"do_task-_zz",
    "with a key's second encoding": b"do_task-_31",
    "with a key in no encoding": b"do_task-_FF",
    "with a key's second spelling": b"do_task-0001",
    "with a key that the model cannot have": b"do_task-abc",
    "with a UUID in capitals": b"do_ticket-7B0C1E62-44F8-4D0C-8F6E-1F8B7A5F5B01",
    "of a sweep with a row": b"schedule_tasks-1",
}


@pytest.mark.parametrize("id", REFUSED_IDS.values(), ids=REFUSED_IDS.keys())
def test_an_id_that_names_nothing_declared_is_dropped_and_logged(id, task, redis, caplog):
    redis.rpush(DEFAULT_LIST, id, f"do_task-{task.pk}")
    # A row that the malformed ids might be taken for.
    Task.objects.create(pk=task.pk + 1)

    assert drain() == {"done": 1}

    [refusal] = [record.getMessage() for record in caplog.records if "Refused" in record.getMessage()]
    assert "from queue default" in refusal
    assert len(refusal) < 1000
    assert [each.state for each in Task.objects.order_by("pk")] == ["done", "pending"]


REFUSED_CALLS = {
    "another function's name": lambda evidence: {"data": pack("os.system", None, [f"touch {evidence}"], {})},
    "a declared job's name that is not the id's": lambda evidence: {"data": pack("do_task", None, [str(evidence)], {})},
    "a pickle": lambda evidence: {"data": zlib.compress(pickle.dumps(TouchesWhenUnpickled(evidence)))},
    "a bare pickle": lambda evidence: {"data": pickle.dumps(TouchesWhenUnpickled(evidence))},
    "an instance": lambda evidence: {"data": pack("touch_file", "os", [str(evidence)], {})},
    "arguments of the wrong type": lambda evidence: {"data": pack("touch_file", None, str(evidence), {})},
    "keywords of the wrong type": lambda evidence: {"data": pack("touch_file", None, [str(evidence)], [])},
    "too few parts": lambda evidence: {"data": pack("touch_file", None, [str(evidence)])},
    "no JSON": lambda evidence: {"data": zlib.compress(b"{")},
    "uncompressed JSON": lambda evidence: {"data": json.dumps(["touch_file", None, [str(evidence)], {}])},
    "JSON too deep": lambda evidence: {"data": zlib.compress(b"[" * 100_000)},
    "more than is allowed": lambda evidence: {
        "data": pack("touch_file", None, [str(evidence)], {"padding": " " * MAX_CALL_BYTES})
    },
    "a bomb": lambda evidence: {"data": zlib.compress(b" " * 30_000_000, 1)},
    "an attempt that is no number": lambda evidence: {
        "data": pack("touch_file", None, [str(evidence)], {}),
        "attempt": "many",
    },
    "no arguments": lambda evidence: {"timeout": "60"},
}


@pytest.mark.parametrize("fields", REFUSED_CALLS.values(), ids=REFUSED_CALLS.keys())
def test_a_call_that_is_malformed_is_dropped_and_logged(fields, evidence, tmp_path, redis, queued, caplog):
    redis.hset("rq:job:touch_file-evil", mapping=fields(evidence))
    redis.rpush(URGENT_LIST, "touch_file-evil")
    touch_file.enqueue(str(tmp_path / "good"))

    assert drain() == {"done": 1}

    assert not evidence.exists()
    assert (tmp_path / "good").exists()
    assert "Refused 'touch_file-evil' from queue urgent: its arguments" in caplog.text


@pytest.mark.parametrize("wrong", [b"text", [b"a list"]], ids=["text", "list"])
def test_a_call_whose_arguments_are_of_the_wrong_redis_type_is_dropped_and_logged(wrong, tmp_path, redis, caplog):
    if isinstance(wrong, bytes):
        redis.set("rq:job:touch_file-evil", wrong)
    else:
        redis.rpush("rq:job:touch_file-evil", *wrong)
    redis.rpush(URGENT_LIST, "touch_file-evil")
    touch_file.enqueue(str(tmp_path / "good"))
    assert drain() == {"done": 1}
    assert "Refused 'touch_file-evil' from queue urgent: its arguments cannot be read" in caplog.text


@pytest.mark.parametrize("serializer", [DefaultSerializer, JSONSerializer])
@pytest.mark.parametrize("id", ["touch_file-evil", "evil"])
def test_a_message_that_rq_wrote_is_refused(serializer, id, evidence, redis, caplog):
    made = RQJob.create(os.system, [f"touch {evidence}"], id=id, connection=redis, serializer=serializer)
    made.save()
    redis.rpush(URGENT_LIST, id)
    assert drain() == {}
    assert not evidence.exists()
    assert "Refused" in caplog.text


def test_callbacks_in_the_hash_are_never_called(evidence, tmp_path, redis, queued):
    touch_file.enqueue(str(tmp_path / "good"))
    [id] = queued(URGENT_LIST)
    for callback in ("success", "failure", "stopped"):
        redis.hset(f"rq:job:{id}", f"{callback}_callback_name", "os.abort")

    message = fetch(id, redis)
    # rq imports what it finds under these names; they are not even read, and would not be imported.
    assert message._success_callback_name is None
    message._success_callback_name = message._failure_callback_name = message._stopped_callback_name = "os.abort"
    assert (message.success_callback, message.failure_callback, message.stopped_callback) == (None, None, None)
    assert drain() == {"done": 1}


def test_pickled_meta_is_never_loaded(evidence, tmp_path, redis, queued):
    touch_file.enqueue(str(tmp_path / "good"))
    [id] = queued(URGENT_LIST)
    redis.hset(f"rq:job:{id}", "meta", pickle.dumps(TouchesWhenUnpickled(evidence)))
    assert django_rq.get_queue("urgent").get_jobs()[0].meta == {}
    assert drain() == {"done": 1}
    assert not evidence.exists()


def test_an_id_that_is_refused_says_why(redis):
    with pytest.raises(NoSuchJobError, match="no job or sweep named 'os' is declared in this project"):
        fetch("os-1", redis)
    with pytest.raises(NoSuchJobError, match="do_task has no schedule"):
        fetch("do_task", redis)
    with pytest.raises(NoSuchJobError, match="its arguments are gone from Redis"):
        fetch("touch_file-1", redis)


@pytest.mark.parametrize(
    "enqueue",
    [
        lambda: django_rq.enqueue(os.system, "true"),
        lambda: django_rq.get_queue("default").enqueue(os.system, "true"),
        lambda: django_rq.get_queue("default").enqueue("os.system", "true"),
        lambda: django_rq.get_queue("default").enqueue(do_task, 1),
        lambda: queues.get("default").enqueue(os.system, "true"),
        lambda: queues.get("default").enqueue_call(os.system, args=("true",)),
        lambda: queues.get("default").enqueue_many([queues.Queue.prepare_data(os.system, args=("true",))]),
        lambda: django_rq.get_scheduler("default").schedule(EPOCH, os.system, args=["true"]),
        lambda: django_rq.get_scheduler("default").enqueue_in(A_WHILE, os.system, "true"),
    ],
)
def test_rqs_own_way_in_is_refused_with_a_sentence(enqueue, redis):
    with pytest.raises(TypeError, match=r"cannot be queued this way\. Declare it with @job, then call \.enqueue"):
        enqueue()
    assert redis.keys("rq:job:*") == []
    assert redis.exists(DEFAULT_LIST, queues.DELAYED_KEY) == 0


def test_what_is_not_declared_leaves_the_delayed_set_and_is_logged(redis, queued, delayed, caplog):
    redis.zadd(queues.DELAYED_KEY, {b"os.system-1": 0, b"no_such_job": 0, b"\xff\x00": 0, b"do_task-1": 0})
    tick()
    assert queued() == ["do_task-1"]
    assert delayed() == {}
    refusals = [record.getMessage() for record in caplog.records if "from the delayed set" in record.getMessage()]
    assert len(refusals) == 3


# --- Keys of the wrong type -------------------------------------------------------------------------------------------


def test_a_list_of_the_wrong_type_costs_a_swept_job_a_warning(task, redis, caplog):
    redis.set(DEFAULT_LIST, "no list")
    do_task.enqueue(task)
    do_task.enqueue_many([task])
    assert caplog.text.count("do_task was not queued, its sweep will do so") == 2
    assert redis.get(DEFAULT_LIST) == b"no list"


def test_a_list_of_the_wrong_type_is_an_error_for_a_plain_job(redis):
    redis.set(URGENT_LIST, "no list")
    with pytest.raises(QueueUnavailable, match="touch_file was not queued"):
        touch_file.enqueue("/tmp/x")


# Ids of every kind: bytes of any sort, and those that begin as a message of this project does.
anything = st.one_of(
    st.binary(max_size=60),
    st.builds(
        lambda name, dash, rest: (name + dash).encode() + rest,
        st.sampled_from(["do_task", "do_keyed", "touch_file", "nightly", "schedule_tasks", ""]),
        st.sampled_from(["-", "", "--", ":"]),
        st.one_of(st.binary(max_size=30), st.from_regex(r"[0-9A-F_]{1,20}", fullmatch=True).map(str.encode)),
    ),
)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=10,
)
fuzzed = settings_of_hypothesis(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@fuzzed
@given(ids=st.lists(anything, min_size=1, max_size=10))
@example(ids=[b"do_task-1"])
def test_whatever_lies_in_a_queue_is_taken_off_it_and_does_no_harm(ids, redis, queued):
    Task.objects.update_or_create(pk=1, defaults={"state": "done", "writes": 0})
    redis.flushall()
    redis.rpush(DEFAULT_LIST, *ids)
    redis.zadd(queues.DELAYED_KEY, dict.fromkeys(ids, 0))
    tick()
    drain()
    assert redis.llen(DEFAULT_LIST) == 0
    assert Task.objects.get(pk=1).writes == 0


@fuzzed
@given(
    data=st.one_of(
        st.binary(max_size=200),
        values.map(lambda value: zlib.compress(json.dumps(value).encode())),
        st.tuples(st.sampled_from(["take_anything", "os.system"]), values, values, values).map(
            lambda call: zlib.compress(json.dumps(call).encode())
        ),
    ),
    attempt=st.one_of(st.none(), st.binary(max_size=10), st.integers().map(lambda number: str(number).encode())),
)
def test_whatever_a_calls_hash_holds_does_no_harm(data, attempt, redis):
    taken = []
    with registry.sandbox():

        @job(max_attempts=2)
        def take_anything(*args, **kwargs):
            taken.append((args, kwargs))

        redis.flushall()
        redis.hset("rq:job:take_anything-x", mapping={"data": data} | ({} if attempt is None else {"attempt": attempt}))
        redis.rpush(DEFAULT_LIST, "take_anything-x")
        outcomes = drain()
    assert redis.llen(DEFAULT_LIST) == 0
    # What was called was what is declared, with what JSON can hold; all else was no message.
    assert outcomes["done"] == len(taken)
    if taken:
        name, _, args, kwargs = json.loads(zlib.decompress(data))
        assert name == "take_anything"
        assert json.dumps([(tuple(args), kwargs)]) == json.dumps(taken)


@pytest.mark.parametrize("kind", [SimpleWorker, RQWorker], ids=lambda kind: kind.__name__)
def test_a_worker_of_another_class_does_nothing_to_a_row(kind, task, redis, queued):
    """It would call the function with a key, and without a claim."""
    do_task.enqueue(task)
    kind([queues.Queue("default", connection=redis)], connection=redis, job_class=Message).work(burst=True)
    assert queued() == []
    assert Task.objects.get().state == "pending"
    assert not Claim.objects.exists()
    assert not Run.objects.exists()


@pytest.mark.parametrize(
    "option",
    [
        {"job_class": RQJob},
        {"job_class": "rq.job.Job"},
        {"queue_class": django_rq.queues.DjangoRQ},
        {"serializer": "rq.serializers.PickleSerializer", "job_class": dict},
        {"serializer": "json.JSONDecoder"},
    ],
    ids=str,
)
def test_a_worker_with_foreign_options_does_not_start(option, redis):
    with pytest.raises(Misconfigured, match=r"This worker cannot run with \w+=.*; leave that option away"):
        Worker(["default"], connection=redis, **option)


def test_a_worker_drops_what_it_does_not_know_and_lives(task, redis, redis_server: RedisServer):
    """The stock command, as a deployment runs it."""
    for id in REFUSED_IDS.values():
        redis.rpush(DEFAULT_LIST, id)
    redis.set("rq:job:touch_file-text", "text")
    redis.rpush(DEFAULT_LIST, "touch_file-text", f"do_task-{task.pk}")
    environment = {
        **os.environ,
        "DJANGO_SETTINGS_MODULE": "tests.settings",
        "DATABASE_URL": database.url(),
        "REDIS_URL": redis_server.url,
    }
    worker = subprocess.run(
        [sys.executable, "manage.py", "rqworker", "--burst", "default"],
        cwd=BASE_DIR,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert worker.returncode == 0
    assert worker.stderr.count("Refused") == len(REFUSED_IDS) + 1, worker.stderr
    assert Task.objects.get().state == "done"
