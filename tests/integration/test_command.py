"""`manage.py jobs …`: what it does, what it prints, and how it says that something is wrong."""

import json
import re
import subprocess
from collections.abc import Callable
from datetime import timedelta
from io import StringIO
from typing import Any

import pytest
from django.core.management import CommandError, call_command
from django.utils import timezone

from config import BASE_DIR
from config.stack import manage
from jobs import claims, operations, pauses, registry
from jobs.claims import Attempt
from jobs.jobs import selfheal_operate
from jobs.management.commands.jobs import operator
from jobs.models import Claim, Operation
from jobs.testing import perform, tick
from tests.cast.jobs import do_task, schedule_tasks
from tests.cast.models import Task

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def command() -> Callable[..., str]:
    """Call the command, and return what it prints."""

    def command(*arguments: Any) -> str:
        out = StringIO()
        call_command("jobs", *map(str, arguments), stdout=out, no_color=True)
        return out.getvalue()

    return command


def claim(task: Task, **values: Any) -> Claim:
    identity = {"job": "do_task", "model": "cast.task", "object_pk": str(task.pk)}
    return Claim.objects.create(**identity, first_claimed_at=timezone.now(), **values)


def test_status_shows_every_queue_job_and_sweep(command, at_work, task):
    said = command("status")
    assert said.startswith("All is well.\n")
    assert "last tick 0:00:0" in said
    assert re.search(r"^default +0 +1$", said, re.MULTILINE)
    claim(task, quarantined_at=timezone.now(), last_error="Killed by SIGKILL")
    do_task.enqueue(Task.objects.create())
    said = command("status")
    assert re.search(r"^default +1 +1$", said, re.MULTILINE)
    assert re.search(r"^do_task +swept +quarantined +0 +0 +0 +1 +0 +0$", said, re.MULTILINE)
    assert {each.name for each in registry.declared()} <= set(re.findall(r"^\w+", said, re.MULTILINE))
    assert "\x1b" not in said
    found = json.loads(command("status", "--json"))
    assert found["problems"][0]["code"] == "quarantined"


@pytest.mark.usefixtures("at_work")
def test_check_ends_with_a_code_when_something_is_wrong(command, task):
    assert command("check") == "All is well.\n"
    claim(task, quarantined_at=timezone.now())
    out = StringIO()
    with pytest.raises(CommandError, match="All is not well"):
        call_command("jobs", "check", stdout=out, no_color=True)
    assert "do_task" in out.getvalue()


def test_status_with_redis_away_says_so(command, refusing_redis):
    said = command("status")
    assert re.search(r"^critical  .*Redis", said, re.MULTILINE)
    assert re.search(r"^default +\? +\?$", said, re.MULTILINE)


def test_watch_looks_again_until_ctrl_c(command, monkeypatch):
    waits = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("jobs.management.commands.jobs.time.sleep", sleep)
    assert len([json.loads(line) for line in command("status", "--watch", "--json").splitlines()]) == 3


def test_sweep_sweeps_and_counts(command, queued):
    Task.objects.bulk_create([Task() for _ in range(3)])
    assert command("sweep", "schedule_tasks", "--dry-run").split("  ")[1].startswith("3 matched: 3 would be enqueued")
    assert queued() == []
    assert "3 matched: 3 enqueued, 0 queued already, 0 waiting" in command("sweep", "schedule_tasks")
    assert len(queued()) == 3
    pauses.pause("do_task", by="ada")
    lines = command("sweep", "--all").splitlines()
    assert [line.split()[1] for line in lines] == sorted(line.split()[1] for line in lines)
    assert lines[0].startswith(f"[1/{len(lines)}] ")
    assert any("do_task is paused by ada" in line for line in lines)


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_a_sweep_shows_how_far_it_is(monkeypatch):
    Task.objects.bulk_create([Task() for _ in range(4)])
    monkeypatch.setattr(schedule_tasks, "batch_size", 1)
    out = Terminal()
    call_command("jobs", "sweep", "schedule_tasks", stdout=out, no_color=True)
    *frames, shown = out.getvalue().split("\x1b[K")
    drawn = [frame.rpartition("schedule_tasks  ")[2] for frame in frames[:-1]]
    assert drawn == [
        "#######.......................  1 of 4",
        "###############...............  2 of 4",
        "######################........  3 of 4",
        "##############################  4 of 4",
    ]
    # What stays on the line is the result, behind the name.
    assert frames[-1] == "\rschedule_tasks  "
    assert shown == "4 matched: 4 enqueued, 0 queued already, 0 waiting\n"


def test_sweep_with_redis_away_fails(command, refusing_redis):
    with pytest.raises(CommandError, match=r"\d+ of \d+ could not be swept"):
        command("sweep", "--all")


def test_explain_says_why_and_what_to_type(command, task):
    tick()
    claim(task, crashes=3, quarantined_at=timezone.now(), last_error="Killed by SIGKILL")
    said = command("explain", "do_task", task.pk)
    assert said.startswith("It is quarantined")
    assert "!!  Claim     Quarantined since" in said
    assert said.endswith(f"\nTo mend it: manage.py jobs retry do_task {task.pk}\n")
    command("retry", "do_task", task.pk)
    Task.objects.update(behaviour="always_raise")
    perform(do_task, task)
    said = command("explain", "do_task", task.pk)
    assert "failed" in said
    assert "RuntimeError" in said
    pauses.pause("schedule_tasks")
    assert command("explain", "do_task", task.pk).endswith("\nTo mend it: manage.py jobs resume schedule_tasks\n")


def test_pause_and_resume(command):
    before = timezone.now()
    said = command("pause", "do_task", "--for", "30m", "--reason", "The disk is full.")
    assert said.startswith(f"do_task is paused by {operator()} since")
    pause = pauses.read()["do_task"]
    assert (pause.by, pause.reason) == (operator(), "The disk is full.")
    assert timedelta(minutes=29) < pause.until - before < timedelta(minutes=31)
    command("pause", "do_task")
    assert pauses.read()["do_task"].until is None
    assert command("resume", "do_task") == "do_task is resumed.\n"
    assert command("resume", "do_task") == "do_task was not paused.\n"
    assert pauses.read() == {}


def test_retry_takes_rows_as_they_are(command, queued):
    waiting, aside, fresh = (Task.objects.create() for _ in range(3))
    claim(waiting, attempts=2, next_attempt_at=timezone.now() + timedelta(hours=1))
    claim(aside, quarantined_at=timezone.now(), crashes=3)
    said = command("retry", "do_task", waiting.pk, aside.pk, fresh.pk)
    assert said.splitlines()[1] == f"{aside.pk}: The row is released, and queued."
    assert queued() == [f"do_task-{task.pk}" for task in (waiting, aside, fresh)]
    assert list(Claim.objects.order_by("pk").values_list("attempts", "next_attempt_at", "quarantined_at")) == [
        (2, None, None),
        (0, None, None),
    ]


def test_retry_of_all_is_an_operation_when_there_are_many(command, monkeypatch):
    for number in range(7):
        task = Task.objects.create()
        aside, soon = timezone.now(), timezone.now() + timedelta(hours=1)
        claim(task, **({"quarantined_at": aside} if number < 3 else {"next_attempt_at": soon, "attempts": 1}))
    assert command("retry", "do_task", "--quarantined").startswith("3 of 3 that were quarantined")
    assert Claim.objects.waiting().count() == 4
    monkeypatch.setattr(operations, "AT_ONCE", 2)
    said = command("retry", "do_task", "--all")
    operation = Operation.objects.get()
    assert said == f"4 rows are waiting: done in the background, as operation {operation.pk}.\n"
    assert operation.requested_by == operator()
    perform(selfheal_operate, operation)
    assert not Claim.objects.waiting().exists()


def test_quarantine_sets_a_row_aside_and_says_when_it_cannot(command, task):
    assert "is quarantined until" in command("quarantine", "do_task", task.pk)
    assert perform(do_task, task) == "quarantined"
    other = Task.objects.create()
    claims.take(Attempt(do_task, "cast.task", str(other.pk)))
    with pytest.raises(CommandError, match="Nothing was done to 1 of 1"):
        command("quarantine", "do_task", other.pk)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["sweep"], "Name one sweep, or pass --all"),
        (["sweep", "schedule_task"], "No sweep named 'schedule_task' is declared. Did you mean 'schedule_tasks'?"),
        (["sweep", "do_task"], "do_task is a job. Its sweep is schedule_tasks."),
        (["explain", "schedule_tasks", 1], "The job that it feeds is do_task"),
        (["explain", "touch_file", 1], "works on no rows"),
        (["explain", "do_task", "one"], "'one' is no primary key"),
        (["pause", "touch_file"], "touch_file cannot be paused"),
        (["pause", "do_tusk"], "Did you mean 'do_task'"),
        (["pause", "do_task", "--for", "soon"], "'soon' is no duration"),
        (["pause", "do_task", "--for", "0m"], "'0m' is no duration"),
        (["resume", "xyz"], "No job or sweep named 'xyz' is declared.$"),
        (["retry", "do_task"], "Give primary keys, or --all"),
        (["retry", "do_task", 1, "--all"], "Give primary keys, or --all"),
        (["retry", "do_task", 7], "Nothing was done to 1 of 1: 7"),
    ],
    ids=str,
)
def test_what_is_wrong_is_said_in_a_sentence(command, arguments, sentence):
    with pytest.raises(CommandError, match=sentence):
        command(*arguments)


def test_a_process_ends_with_a_code_and_without_colours_where_nobody_sees_them():
    ended = subprocess.run(manage("jobs", "pause", "creat_database"), capture_output=True, text=True, cwd=BASE_DIR)
    assert ended.returncode == 1
    said = "CommandError: No job or sweep named 'creat_database' is declared. Did you mean 'create_database'?"
    assert ended.stderr.splitlines()[-1] == said
