"""A cast of small jobs, named for what they do to you."""

import asyncio
import json
import os
import re
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from django.db import DatabaseError, connection, transaction
from django.db.models import QuerySet

from jobs import Backoff, job, sweep, with_lock
from tests.cast.models import Keyed, Task, Ticket

# Real processes sweep every two seconds; in the unit tests nothing ticks by itself.
EVERY_OTHER_SECOND = "* * * * * */2"
SOON = Backoff(first=timedelta(seconds=1), cap=timedelta(seconds=2))


def note(event: str, task: Task, job: str = "do_task") -> None:
    """Write to the ledger, which is outside the library and outside the database, in one append."""
    if path := os.environ.get("CAST_LEDGER"):
        line = {"event": event, "job": job, "task": task.pk, "pid": os.getpid(), "at": time.monotonic()}
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.write(descriptor, (json.dumps(line) + "\n").encode())
        os.close(descriptor)


def _execute(statement: str) -> None:
    with connection.cursor() as cursor:
        cursor.execute(statement)


# What a job leaves behind in its process, by the behaviour of its row.
LEAVINGS: dict[str, Callable[[], object]] = {
    "leave_autocommit_off": lambda: transaction.set_autocommit(False),
    "leave_atomic_open": lambda: transaction.atomic().__enter__(),
    "leave_begun": lambda: _execute("BEGIN"),
    "leave_broken": lambda: connection.connection.close() if connection.connection else None,
    "leave_loop_running": lambda: asyncio._set_running_loop(asyncio.new_event_loop()),
    "leave_role": lambda: _execute("SET ROLE cast_stranger"),
    "leave_search_path": lambda: _execute("SET search_path TO nowhere"),
    "leave_timeout": lambda: _execute("SET statement_timeout = '1ms'"),
}


@job(backoff=SOON, timeout=timedelta(seconds=float(os.environ.get("CAST_TIMEOUT", "60"))))
def do_task(task: Task) -> None:
    """Do what the row says, then write that it is done."""
    note("start", task)
    if task.behaviour == "always_raise":
        raise RuntimeError(f"task {task.pk} cannot succeed")
    if task.behaviour == "raise_once" and not Path(f"{os.environ['CAST_LEDGER']}.{task.pk}").exists():
        Path(f"{os.environ['CAST_LEDGER']}.{task.pk}").touch()
        raise RuntimeError(f"task {task.pk} fails once")
    if leave := LEAVINGS.get(task.behaviour.removesuffix("_and_return")):
        leave()
        if task.behaviour.endswith("_and_return"):
            return
        raise RuntimeError(f"task {task.pk} fails, and has left something behind")
    if task.behaviour == "kill_my_process":
        os.kill(os.getpid(), signal.SIGKILL)
    if task.behaviour == "swallow_everything":
        while True:
            try:
                time.sleep(1)
            except Exception:
                note("swallowed", task)
    if task.behaviour == "never_let_go":
        # One call that backtracks for years, and holds the interpreter's lock: no other thread, no signal handler runs.
        re.match(r"(a+)+$", "a" * 60 + "b")
    time.sleep(task.seconds)
    if task.behaviour == "write_without_lock":
        Task.objects.filter(pk=task.pk).update(writes=task.writes + 1)
    try:
        if task.behaviour != "leave_pending":
            with with_lock(task):
                task.state = "done"
                task.writes += 1
                task.save(update_fields=["state", "writes"])
    except DatabaseError:
        # The database is away. This process lives, and has given up.
        note("end", task)
        raise
    note("end", task)


@sweep(do_task, cron=EVERY_OTHER_SECOND)
def schedule_tasks() -> QuerySet[Task]:
    return Task.objects.pending()


@job(backoff=SOON, max_attempts=3)
def delete_task(task: Task) -> None:
    """Another job that wants the same row."""
    note("start", task, "delete_task")
    time.sleep(task.seconds)
    with with_lock(task):
        task.state = "deleted"
        task.save(update_fields=["state"])
    note("end", task, "delete_task")


@sweep(delete_task, cron=EVERY_OTHER_SECOND)
def schedule_task_deletions() -> QuerySet[Task]:
    return Task.objects.deleting()


@job
def do_keyed(keyed: Keyed) -> None:
    with with_lock(keyed):
        keyed.state = "done"
        keyed.save(update_fields=["state"])


@sweep(do_keyed, cron="0 0 1 1 *")
def schedule_keyed() -> QuerySet[Keyed]:
    return Keyed.objects.filter(state="pending")


@job
def do_ticket(ticket: Ticket) -> None:
    with with_lock(ticket):
        ticket.state = "done"
        ticket.save(update_fields=["state"])


@sweep(do_ticket, cron="0 0 1 1 *")
def schedule_tickets() -> QuerySet[Ticket]:
    return Ticket.objects.filter(state="pending")


@job(queue="urgent", backoff=SOON, max_attempts=3)
def touch_file(path: str, fail_times: int = 0, seconds: float = 0, kill: bool = False) -> None:
    """A plain job: adds a line to a file for each attempt, and fails the first few."""
    file = Path(path)
    with file.open("a") as lines:
        lines.write(f"{os.getpid()}\n")
    attempts = len(file.read_text().splitlines())
    if kill:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(seconds)
    if attempts <= fail_times:
        raise RuntimeError(f"attempt {attempts} fails")


@job(queue="urgent", unique_for=timedelta(minutes=1), unique_until="start")
def unique_until_start(number: int) -> None:
    pass


@job(queue="urgent", unique_for=timedelta(minutes=1))
def unique_until_done(number: int, fail: bool = False) -> None:
    if fail:
        raise RuntimeError("fails")


@job(cron="17 3 * * *", backoff=SOON, max_attempts=2)
def nightly() -> None:
    """A cron job that is no sweep. Fails while the file named in the environment exists."""
    if (path := os.environ.get("CAST_NIGHTLY_FAILS")) and Path(path).exists():
        raise RuntimeError("the night is dark")
