"""How PostgreSQL finds the rows of a sweep, by the partial index, however many rows need nothing; and how claims."""

import re
from typing import Any

import pytest
from django.contrib.auth import get_user_model
from django.db import connection
from django.test.utils import CaptureQueriesContext

from backups.jobs import (
    schedule_backup_clean_up,
    schedule_backup_policies,
    schedule_backups,
    schedule_restores,
)
from databases.jobs import schedule_branches, schedule_database_deletions, schedule_databases
from databases.models import Database
from jobs.models import Claim
from jobs.sweep import Sweep
from tests.cast.jobs import schedule_tasks
from tests.cast.models import Task

pytestmark = [pytest.mark.postgres, pytest.mark.django_db(transaction=True)]

MANY = 50_000


@pytest.fixture
def many_ready(db: None) -> None:
    """A table of rows that need nothing, and what the planner knows about it."""
    owner = get_user_model().objects.create_user("owner")
    with connection.cursor() as cursor:
        cursor.execute(
            "INSERT INTO databases_database (name, owner_id, engine, origin, state, error, ended_sessions, password, "
            "created_at, path) SELECT 'db_' || n, %s, 'sqlite', 'empty', 'ready', '', '', '', now(), '' "
            "FROM generate_series(1, %s) n",
            [owner.pk, MANY],
        )
        cursor.execute("ANALYZE databases_database")


@pytest.fixture
def many_kept(many_ready: None) -> None:
    """Of each of them a policy that is not due, and a backup that is kept for longer."""
    with connection.cursor() as cursor:
        cursor.execute(
            "INSERT INTO backups_backuppolicy (database_id, every, cron, keep_for, is_enabled, next_run_at, created_at)"
            "SELECT id, '1 day', '', '7 days', true, now() + '1 hour', now() FROM databases_database"
        )
        cursor.execute(
            "INSERT INTO backups_backup (database_id, policy_id, state, error, file, sha256, contents, created_at, "
            "taken_at, keep_until) SELECT database_id, id, 'ready', '', '', '', '{}', now(), now(), now() + '1 day' "
            "FROM backups_backuppolicy"
        )
        cursor.execute("ANALYZE backups_backuppolicy, backups_backup")


def plans(sweep: Sweep) -> list[str]:
    """Return how each statement that a sweep sends about its rows would be executed."""
    table = sweep.fed_model._meta.db_table
    with CaptureQueriesContext(connection) as queries:
        sweep.sweep()
    asked = [query["sql"] for query in queries if f'FROM "{table}"' in query["sql"]]
    assert asked
    with connection.cursor() as cursor:
        explained = []
        for statement in asked:
            cursor.execute(f"EXPLAIN {statement}")
            explained.append("\n".join(line for (line,) in cursor.fetchall()))
    return explained


@pytest.fixture(params=[False, True], ids=["cursors of the server", "none of them"])
def cursors(request: Any, monkeypatch: Any) -> None:
    monkeypatch.setitem(connection.settings_dict, "DISABLE_SERVER_SIDE_CURSORS", request.param)


@pytest.mark.usefixtures("cursors", "many_ready")
@pytest.mark.parametrize(
    ("sweep", "index"),
    [
        (schedule_databases, "databases_pending"),
        (schedule_branches, "databases_pending"),
        (schedule_database_deletions, "databases_deleting"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_an_idle_sweep_reads_the_index_alone(sweep, index):
    for explained in plans(sweep):
        assert re.search(rf"Index (Only )?Scan using {index}", explained), explained
        assert "Seq Scan" not in explained


@pytest.mark.usefixtures("many_kept")
@pytest.mark.parametrize(
    ("sweep", "indexes"),
    [
        (schedule_backup_policies, ["backups_policies_due"]),
        (schedule_backups, ["backups_pending"]),
        (schedule_restores, ["databases_pending"]),
        (schedule_backup_clean_up, ["backups_deleting", "backups_kept", "backups_useless"]),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_those_of_the_backups_do_too(sweep, indexes):
    for explained in plans(sweep):
        assert all(re.search(rf"Scan (using|on) {index}", explained) for index in indexes), explained
        # Of what is found there each other table is asked by its key; none is read from one end to the other.
        assert "Seq Scan" not in explained.replace("Seq Scan on backups_restore", ""), explained


@pytest.mark.usefixtures("cursors", "many_ready")
def test_so_does_one_that_also_looks_at_unsettled_claims():
    database = Database.objects.first()
    Claim.objects.create(
        job="create_database", model="databases.database", object_pk=str(database.pk), first_claimed_at="2026-01-01T00Z"
    )
    for explained in plans(schedule_databases):
        assert "Index" in explained, explained
        assert "Seq Scan" not in explained
    assert not Claim.objects.exists()


@pytest.mark.usefixtures("cursors")
def test_a_backlog_is_queued_in_batches_with_and_without_cursors_of_the_server(queued):
    Task.objects.bulk_create([Task() for _ in range(2500)])
    assert schedule_tasks.sweep() == (2500, 2500, 0, 0)
    assert schedule_tasks.sweep() == (2500, 0, 2500, 0)
    assert len(queued()) == 2500


@pytest.mark.parametrize(
    ("asked", "index"),
    [({"token": "token 7"}, "selfheal_claim_by_token"), ({"lease_key": "lease 7"}, "selfheal_one_lease_per_row")],
    ids=["by token", "by lease"],
)
def test_a_claim_is_found_by_an_index(asked, index):
    with connection.cursor() as cursor:
        cursor.execute(
            "INSERT INTO selfheal_claim (job, model, object_pk, lease_key, token, holder, attempts, crashes, deaths, "
            "last_error, first_claimed_at) SELECT 'do_task', 'cast.task', n, 'lease ' || n, 'token ' || n, "
            "'', 0, 0, 0, '', now() FROM generate_series(1, %s) n",
            [MANY],
        )
        cursor.execute("ANALYZE selfheal_claim")
    explained = Claim.objects.filter(**asked).explain()
    assert f"Index Scan using {index}" in explained, explained
