"""What is measured. Each of these runs in a process of its own, so that its memory is its own."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import resource
import sqlite3
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import timedelta
from typing import Any

import rq
from django.contrib.auth import get_user_model
from django.core.management import call_command
from django.db import connection
from django.test.utils import CaptureQueriesContext
from redis import Redis

from backups.jobs import restore_backup, schedule_backup_policies, take_backup
from backups.models import Backup, BackupPolicy
from backups.requests import request_restore
from benchmarks.figures import Figure
from databases.jobs import create_database, schedule_databases
from databases.models import Database
from databases.provisioners import Provisioned
from jobs import clock, health, job, registry, scheduler, sweep, tallies, worker
from jobs.models import Claim, Run, Schedule
from jobs.testing import perform

BATCH = 1000


class NothingToDo:
    """A provisioner that makes nothing, so that what remains is the cost of the job around it."""

    def create(self, name: str, password: str = "") -> Provisioned:
        return Provisioned(path=name, size=0)

    def delete(self, name: str) -> None:
        pass


def ready(pk: int) -> None:
    """What the job of plain rq does: the one statement that has to be made durable."""
    Database.objects.filter(pk=pk).update(state="ready")


def fill(state: str, rows: int) -> None:
    """Bring the table to this many rows, and tell the planner about them."""
    call_command("migrate", verbosity=0)
    owner, _ = get_user_model().objects.get_or_create(username="owner")
    first = Database.objects.count() + 1
    if first > rows:
        return
    with connection.cursor() as cursor:
        cursor.execute(
            "INSERT INTO databases_database "
            "(id, name, owner_id, engine, origin, state, error, ended_sessions, password, created_at, path) SELECT "
            f"n, 'db_' || n, %s, 'sqlite', 'empty', %s, '', '', '', CURRENT_TIMESTAMP, '' FROM ({numbers()}) AS of_all",
            [owner.pk, state, first, rows],
        )
        cursor.execute("VACUUM ANALYZE" if connection.vendor == "postgresql" else "ANALYZE")
    assert Database.objects.count() == rows


def numbers() -> str:
    """Return the statement that counts from one number to another."""
    if connection.vendor == "postgresql":
        return "SELECT generate_series(%s, %s) AS n"
    return "WITH RECURSIVE of(n) AS (SELECT %s UNION ALL SELECT n + 1 FROM of WHERE n < %s) SELECT n FROM of"


def empty() -> None:
    """Leave no row in the table, and no trace of those that there were."""
    with connection.cursor() as cursor:
        if connection.vendor == "postgresql":
            cursor.execute("TRUNCATE databases_database CASCADE")
        else:
            cursor.execute("DELETE FROM databases_database")
            cursor.execute("VACUUM")


def pushes() -> Iterator[Figure]:
    """Ours, which look for each id first, beside rq's, which look for nothing; in one process, on one Redis."""
    many, few = 100_000, 1_000
    plain = rq.Queue("compared", connection=redis())
    thousands = [range(start, start + BATCH) for start in range(0, 10 * BATCH, BATCH)]

    def ours() -> None:
        create_database.enqueue_many(range(1, many + 1))
        assert redis().llen("rq:queue:default") == many

    def in_thousands() -> None:
        for pks in thousands:
            plain.enqueue_many([plain.prepare_data(ready, (pk,)) for pk in pks])

    def one_by_one() -> None:
        for pk in range(few):
            plain.enqueue(ready, pk)

    def ours_one_by_one() -> None:
        for pk in range(1, few + 1):
            create_database.enqueue(pk)

    Schedule.objects.filter(pk=schedule_databases.name).update(limit=2 * many)
    a_row = best(ours, before=redis().flushall) / many
    a_row_again = best(ours) / many
    redis().flushall()
    rq_in_thousands = best(in_thousands, before=redis().flushall) / (10 * BATCH)
    rq_one_by_one = best(one_by_one, before=redis().flushall) / few
    ours_a_row = best(ours_one_by_one, before=redis().flushall) / few
    redis().flushall()
    yield Figure("`enqueue_many` against rq's, in thousands", rq_in_thousands / a_row, "times", at_least=40)
    yield Figure("`enqueue_many` against rq's `enqueue`, one by one", rq_one_by_one / a_row, "times", at_least=200)
    yield Figure("`enqueue_many`, all of them queued already, against rq's", rq_in_thousands / a_row_again, "times")
    yield Figure("`enqueue`, which asks the database three times, against rq's", rq_one_by_one / ours_a_row, "times")


def idle() -> Iterator[Figure]:
    """A sweep that finds nothing to do, among many rows."""
    rows = Database.objects.count()
    schedule_databases.sweep()
    seconds = []
    for _ in range(200):
        with timed() as each:
            assert schedule_databases.sweep().matched == 0
        seconds.append(each.seconds)
    yield Figure(f"An idle sweep over {rows:,} rows, median", statistics.median(seconds) * 1000, "ms", at_most=5)
    yield Figure("… the slowest of 200", max(seconds) * 1000, "ms")


def due(policies: int) -> Iterator[Figure]:
    """A sweep of backup policies that are all due at once, each of another database."""
    day = BackupPolicy._meta.get_field("every").get_db_prep_value(timedelta(days=1), connection)
    with connection.cursor() as cursor:
        cursor.execute(
            "INSERT INTO backups_backuppolicy (database_id, every, cron, keep_for, is_enabled, next_run_at, created_at)"
            f" SELECT n, %s, '', %s, %s, CURRENT_TIMESTAMP, CURRENT_TIMESTAMP FROM ({numbers()}) AS numbered",
            [day, day, True, 1, policies],
        )
        cursor.execute("ANALYZE backups_backuppolicy")

    def queue_them() -> None:
        assert schedule_backup_policies.sweep().enqueued == policies

    yield Figure(f"{policies:,} due backup policies queued", best(queue_them, before=redis().flushall), "s", at_most=1)
    redis().flushall()
    BackupPolicy.objects.all().delete()


def large(megabytes: int) -> None:
    """Make a database of this size, of what cannot be compressed."""
    call_command("migrate", verbosity=0)
    database = Database.objects.create(name="large", owner=get_user_model().objects.create_user("owner"))
    create_database(database)
    with closing(sqlite3.connect(database.path, isolation_level=None)) as user:
        user.execute("CREATE TABLE blobs (id INTEGER PRIMARY KEY, blob BLOB)")
        user.execute(
            "WITH RECURSIVE of(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM of WHERE n < ?) "
            "INSERT INTO blobs SELECT n, randomblob(4000) FROM of",
            [megabytes * 256],
        )


def backup(megabytes: int) -> Iterator[Figure]:
    """That database: its backup taken, stored and verified, and restored."""
    database = Database.objects.get()
    taken = Backup.objects.create(database=database)
    with timed() as taking:
        assert perform(take_backup, taken) == "done"
    branch = request_restore(Backup.objects.get(), "restored", database.owner)
    with timed() as restoring:
        assert perform(restore_backup, branch) == "done"
    assert Database.objects.filter(state=Database.State.READY).count() == 2
    yield Figure(f"A backup of {megabytes:,} MB, taken and verified", taking.seconds, "s")
    yield Figure("… its memory", taking.megabytes, "MB", at_most=100)
    yield Figure("… restored and compared", restoring.seconds, "s")
    yield Figure("… its memory, beyond that", restoring.megabytes, "MB", at_most=100)


def life() -> Iterator[Figure]:
    """One job after the other: its statements, and its whole time in a worker beside that of plain rq."""
    pks = list(Database.objects.pending().values_list("pk", flat=True))
    rows = len(pks) // 3
    in_process, ours, theirs = pks[:rows], pks[rows : 2 * rows], pks[2 * rows :]
    with CaptureQueriesContext(connection) as queries:
        assert perform(create_database, in_process[0]) == "done"
    with timed() as performing:
        for pk in in_process[1:]:
            assert perform(create_database, Database.objects.get(pk=pk)) == "done"
    connection.close()
    create_database.enqueue_many(ours)
    with timed() as working:
        worker.Worker(["default"], connection=redis()).work(burst=True)
    plain = rq.Queue("compared", connection=redis())
    plain.enqueue_many([plain.prepare_data(ready, (pk,)) for pk in theirs])
    connection.close()
    with timed() as working_plainly:
        rq.Worker([plain], connection=redis()).work(burst=True, logging_level="ERROR")
    assert not Database.objects.filter(pk__in=pks, state="pending").exists()
    assert Run.objects.filter(outcome="done").count() == 2 * rows
    assert not Claim.objects.exists()
    redis().flushall()
    yield Figure("Statements of a job: switch, claim, read, `with_lock`, settle", len(queries), "")
    yield Figure("… their time", performing.seconds / (rows - 1) * 1000, "ms")
    yield Figure("Jobs a second in one worker", rows / working.seconds, "")
    yield Figure("… against rq's worker, whose job is one UPDATE", working_plainly.seconds / working.seconds, "times")


def backlog() -> Iterator[Figure]:
    """A sweep with its usual limit, from an empty queue, and then with as many queued as it admits."""

    def twice() -> None:
        assert schedule_databases.sweep().enqueued == schedule_databases.limit
        assert schedule_databases.sweep().already_queued == schedule_databases.limit

    yield Figure("time", best(twice, before=redis().flushall), "s")
    yield Figure("memory", most_megabytes(), "MB")
    redis().flushall()


def whole() -> Iterator[Figure]:
    """A sweep whose limit admits every row: from an empty queue, and again with all of them queued."""
    rows = Database.objects.pending().count()
    Schedule.objects.filter(pk=schedule_databases.name).update(limit=rows + 1)
    used = redis().info("memory")["used_memory"]
    with timed() as first:
        assert schedule_databases.sweep().enqueued == rows
    a_row = (redis().info("memory")["used_memory"] - used) / rows
    with timed() as second:
        assert schedule_databases.sweep().already_queued == rows
    Schedule.objects.filter(pk=schedule_databases.name).update(limit=None)
    redis().flushall()
    yield Figure(f"A sweep of {rows:,} rows, none queued", first.seconds, "s", at_most=5)
    yield Figure("… its memory", first.megabytes, "MB", at_most=64)
    yield Figure("… Redis's memory", a_row, "bytes a row", at_most=40)
    yield Figure(f"A sweep of {rows:,} rows, all queued", second.seconds, "s", at_most=5)
    yield Figure("… its memory", second.megabytes, "MB", at_most=250)


def storm() -> Iterator[Figure]:
    """Redis lost while the work of twenty jobs was queued: one tick, and one worker for what that pushes."""
    types, rows = 20, Database.objects.pending().count()
    each = rows // types
    registry._declared.clear()
    for number in range(types):
        lost = Database.objects.filter(pk__gt=number * each, pk__lte=(number + 1) * each)
        sweep(job(name=f"work_{number}")(ready), cron="* * * * *", name=f"schedule_work_{number}")(lost.pending)
    scheduler.tick()
    Schedule.objects.update(next_run_at=clock.read())
    redis().flushall()
    with timed() as healing:
        assert len(scheduler.tick()) == types
        worker.Worker(["background"], connection=redis()).work(burst=True)
    assert redis().llen("rq:queue:default") == types * each
    redis().flushall()
    yield Figure(f"{rows:,} lost rows of {types} jobs, all queued again", healing.seconds, "s", at_most=60)


def glance(runs: int) -> Iterator[Figure]:
    """The health page with a hundred jobs, whose runs fill a day, beside the rows that are there."""
    types, hours, rows = 100, 24, Database.objects.count()
    registry._declared.clear()
    for number in range(types // 2):
        sweep(job(name=f"work_{number}")(ready), cron="* * * * *", name=f"schedule_work_{number}")(
            Database.objects.pending
        )
    scheduler.tick()
    now = clock.read()
    Run.objects.all().delete()
    for hour in range(hours):
        ended = now - timedelta(hours=hour)
        times: list[Any] = [ended - timedelta(seconds=3), ended - timedelta(seconds=0.2), ended]
        with connection.cursor() as cursor:
            cursor.execute(
                "INSERT INTO selfheal_run (job, model, object_pk, outcome, error, fingerprint, traceback, worker, "
                "host, first_claimed_at, started_at, finished_at) SELECT 'work_' || (n %% 50), 'databases.database', "
                "'' || n, CASE WHEN n %% 20 = 0 THEN 'failed' ELSE 'done' END, '', '', '', '', '', %s, %s, %s "
                f"FROM ({numbers()}) AS numbered",
                [*times, 1, runs // hours],
            )
    with connection.cursor() as cursor:
        cursor.execute("VACUUM ANALYZE" if connection.vendor == "postgresql" else "ANALYZE")
    with timed() as counting:
        counted = tallies.count(None)
    Claim.objects.bulk_create(
        Claim(job=f"work_{pk % 50}", model="databases.database", object_pk=str(pk), first_claimed_at=now)
        for pk in range(10_000)
    )
    found = health.read()
    assert sum(map(sum, (item.done for item in found.items))) > 0
    assert len(found.items) == types
    figure = f"At a glance, {types} jobs and sweeps, {Run.objects.count():,} runs, 10,000 claims, {rows:,} rows"
    yield Figure(figure, best(health.read) * 1000, "ms", at_most=500)
    yield Figure("… counting these runs, an hour at a time", counting.seconds / counted * 1000, "ms an hour")
    Claim.objects.all().delete()


def best(action: Callable[[], object], before: Callable[[], object] = lambda: None) -> float:
    """Return the seconds of the quickest of three: what else the machine does only ever adds to them."""
    seconds = []
    for _ in range(3):
        before()
        with timed() as each:
            action()
        seconds.append(each.seconds)
    return min(seconds)


class Timed:
    seconds: float
    megabytes: float


@contextmanager
def timed() -> Iterator[Timed]:
    """Measure how long it takes, and by how much the most memory that the process ever had grows."""
    result = Timed()
    before = most_megabytes()
    began = time.perf_counter()
    yield result
    result.seconds = time.perf_counter() - began
    result.megabytes = most_megabytes() - before


def most_megabytes() -> float:
    """Return the most memory that this process has had so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def redis() -> Redis:
    return Redis.from_url(os.environ["REDIS_URL"])


MEASURES: dict[str, Callable[..., Iterator[Figure] | None]] = {
    each.__name__: each for each in (fill, empty, pushes, idle, due, large, backup, life, backlog, whole, storm, glance)
}


def main(name: str, *arguments: str) -> None:
    """Measure, and print the figures as JSON. The environment names the servers."""
    logging.disable(logging.WARNING)
    measured = MEASURES[name](*(int(each) if each.isdigit() else each for each in arguments))
    print(json.dumps([dataclasses.asdict(figure) for figure in measured or ()]))
