"""Redis holds what nobody of ours has put there. Workers and scheduler live, good rows go on, nothing foreign runs."""

import json
import os
import pickle
import signal
import threading
import time
import zlib
from pathlib import Path

import pytest
from rq import Worker
from rq.suspension import suspend

from jobs.models import Run, Schedule
from tests.cast.jobs import do_task, touch_file
from tests.cast.models import Task
from tests.recovery.conftest import SOON, Stack

# About Redis.
pytestmark = pytest.mark.any_database


class Evil:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def go_on(stack: Stack) -> None:
    """Good rows are done, by the sweep and by hints, and no process has died."""
    found, asked_for = Task.objects.create(), Task.objects.create()
    do_task.enqueue(asked_for)
    stack.wait_until_done(found, asked_for)
    assert [stack.runs(task) for task in (found, asked_for)] == [["done"], ["done"]]
    assert stack.exits == []


def test_malformed_messages_in_the_lists(stack: Stack, tmp_path: Path) -> None:
    evil = tmp_path / "evil"
    rubbish: list[bytes] = [
        b"",
        b" ",
        b"-",
        b"bad id",
        b"a:b",
        b"\xff\xfe\x00",
        b"x" * 1_000_000,
        "ночь".encode(),
        pickle.dumps(Evil(evil)),
        zlib.compress(pickle.dumps(("os.mkdir", None, [str(evil)], {}))),
        json.dumps(["os.mkdir", None, [str(evil)], {}]).encode(),
        b"os.system",
        b"os.system-1",
        b"nobody",
        b"nobody-1",
        # Declared, and not like this.
        b"do_task",
        b"do_task-",
        b"do_task-x",
        b"do_task--1",
        b"do_task-_FF",
        b"do_task-_zz",
        b"do_task-1.5",
        b"do_task-" + b"9" * 500,
        b"do_task-999999",
        b"schedule_tasks-1",
        b"touch_file",
        b"touch_file-1",
        b"nightly-1",
    ]
    stack.scheduler()
    stack.worker()
    for queue in ("urgent", "default", "background"):
        stack.client.rpush(f"rq:queue:{queue}", *rubbish)
    go_on(stack)
    for queue in ("urgent", "default"):
        stack.wait_until_drained(queue)
    assert not evil.exists()
    assert not Run.objects.exclude(outcome="done").exists()


def test_malformed_messages_in_the_delayed_set(stack: Stack, tmp_path: Path) -> None:
    evil = tmp_path / "evil"
    good = [Task.objects.create() for _ in range(2)]
    rubbish = [b"", b"bad id", b"\xff\xfe", pickle.dumps(Evil(evil)), b"nobody-1", b"x" * 1_000_000, b"do_task", b"-"]
    stack.client.zadd("rq:scheduler:scheduled_jobs", {message: n for n, message in enumerate(rubbish)})
    stack.client.zadd("rq:scheduler:scheduled_jobs", {f"do_task-{task.pk}": 50 for task in good})
    stack.client.zadd("rq:scheduler:scheduled_jobs", {"nobody-2": float("-inf")})
    stack.scheduler()
    stack.worker()
    stack.wait_until_done(*good)
    go_on(stack)
    assert stack.delayed() == {}
    assert not evil.exists()


def test_hashes_of_other_programs(stack: Stack, tmp_path: Path) -> None:
    """rq's own job hashes, as the base classes or an attacker would write them, behind ids of every kind."""
    evil = tmp_path / "evil"
    task = Task.objects.create()
    payloads = {
        "pickle": zlib.compress(pickle.dumps(("os.mkdir", None, (str(evil),), {}))),
        "evil": zlib.compress(pickle.dumps(Evil(evil))),
        "json": zlib.compress(json.dumps(["os.mkdir", None, [str(evil)], {}]).encode()),
        "method": zlib.compress(json.dumps(["mkdir", "os", [str(evil)], {}]).encode()),
        "bomb": zlib.compress(b"[" * 50_000_000),
        "rubbish": b"rubbish",
    }
    stack.scheduler()
    stack.worker()
    ids = []
    for kind, data in payloads.items():
        for id in (f"{kind}", f"touch_file-{kind}", f"nightly-{kind}", f"schedule_tasks-{kind}", f"do_task-{kind}"):
            fields = {
                "data": data,
                "func_name": "os.mkdir",
                "origin": "default",
                "status": "queued",
                "success_callback_name": "os.abort",
                "created_at": "2020-01-01T00:00:00Z",
                "meta": data,
            }
            stack.client.hset(f"rq:job:{id}", mapping=fields)
            ids.append(id)
    stack.client.hset(f"rq:job:do_task-{task.pk}", mapping={"data": payloads["pickle"], "status": "nonsense"})
    stack.client.set("rq:job:touch_file-text", "a string where a hash should be")
    # Many of them: they must not cost the worker a pause each, as a Redis would that does not answer.
    stack.client.rpush("rq:queue:default", *ids, *["touch_file-text"] * 20, f"do_task-{task.pk}")
    stack.wait_until_done(task)
    stack.wait_until_drained()
    go_on(stack)
    assert not evil.exists()
    assert set(Run.objects.values_list("job", "outcome")) == {("do_task", "done")}
    assert stack.delayed() == {}


def test_a_call_that_is_none(stack: Stack, tmp_path: Path) -> None:
    """Well-formed calls of what is declared, and cannot be called like this."""
    stack.scheduler()
    stack.worker()
    for name in ("schedule_tasks", "do_task", "nightly"):
        data = zlib.compress(json.dumps([name, None, [], {}]).encode())
        stack.client.hset(f"rq:job:{name}-forged", mapping={"data": data})
        stack.client.rpush("rq:queue:default", f"{name}-forged")
    stack.wait_until_drained()
    go_on(stack)
    # Nothing keeps coming back.
    stack.wait_for(lambda: not stack.delayed(), "the delayed set empty")
    assert "Traceback" not in stack.log("worker")


@pytest.mark.parametrize(
    "key",
    [
        "rq:queue:urgent",
        "rq:queue:default",
        "rq:queue:background",
        "rq:queues",
        "rq:scheduler:scheduled_jobs",
        "rq:workers",
        "rq:workers:default",
    ],
)
def test_a_key_of_the_wrong_type(stack: Stack, key: str) -> None:
    stack.scheduler()
    stack.worker()
    stack.wait_for_sweeps(1)
    stack.client.pipeline().delete(key).hset(key, "rub", "bish").execute()
    go_on(stack)
    file = stack.folder / "touched"
    touch_file.enqueue(str(file))
    stack.wait_for(file.exists, "a plain call")
    # And the page that lists the workers finds them again.
    stack.wait_for(lambda: [each.pid for each in Worker.all(connection=stack.client)] == [stack.pid()], "registered")
    assert stack.client.type(key) != b"hash"


def test_rubbish_that_never_ends_keeps_no_worker(stack: Stack) -> None:
    """Each comes before the worker has waited in vain. It stands in for a scheduler all the same, and obeys."""
    enough = threading.Event()

    def push() -> None:
        while not enough.wait(0.5):
            stack.client.rpush("rq:queue:default", "rubbish")

    pushing = threading.Thread(target=push)
    pushing.start()
    try:
        stack.worker(ticks=True)
        go_on(stack)
        pid = stack.pid()
        os.kill(pid, signal.SIGTERM)
        stack.wait_until_gone(pid, SOON)
    finally:
        enough.set()
        pushing.join()


def test_a_worker_does_not_know_rqs_switch(stack: Stack) -> None:
    """Whoever can write to Redis could turn it, and neither a page nor a probe would say so."""
    suspend(stack.client)
    stack.scheduler()
    stack.worker()
    go_on(stack)


def test_what_hides_rows_and_ticks(stack: Stack) -> None:
    """Everything is said to be on its way next year, or to be done by somebody else."""
    next_year = time.time() + 365 * 86_400
    hidden = Task.objects.create()
    ids = [f"do_task-{pk}" for pk in range(hidden.pk, hidden.pk + 1000)]
    schedules = Schedule.objects.values_list("name", flat=True)
    stack.client.zadd("rq:scheduler:scheduled_jobs", dict.fromkeys([*ids, *schedules, "schedule_tasks"], next_year))
    stack.client.set("selfheal:ticked", next_year)
    stack.client.expireat("selfheal:ticked", int(next_year))
    stack.worker(ticks=True)
    stack.wait_until_done(hidden)
    go_on(stack)
    stack.wait_for(lambda: not stack.delayed(), "the delayed set empty")
    assert "Dropped 1000 ids from the delayed set" in stack.log("worker")
