"""What a job costs the database: every statement of its life, in order, each for a reason."""

from typing import Any

import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext

from jobs import claims
from jobs.claims import Attempt
from jobs.models import Claim
from jobs.testing import perform
from tests.cast.jobs import do_task, schedule_tasks
from tests.cast.models import Task

pytestmark = pytest.mark.django_db(transaction=True)

CLAIM, RUN, SCHEDULE, SWITCH, TASK = "selfheal_claim", "selfheal_run", "selfheal_schedule", "waffle_switch", "cast_task"


def kind(statement: str) -> str:
    """Return what a statement does, and to which table: `SELECT cast_task`."""
    words = statement.replace('"', " ").split()
    verb = "LOCK" if "FOR UPDATE" in statement or "WHERE 1 = 0" in statement else words[0]
    tables = [word for word in words if word in (CLAIM, RUN, SCHEDULE, SWITCH, TASK)]
    return " ".join([verb, *tables[:1]])


class Statements(CaptureQueriesContext):
    @property
    def kinds(self) -> list[str]:
        return [kind(query["sql"]) for query in self.captured_queries]


def test_every_statement_of_a_job_that_succeeds(task):
    with Statements(connection) as statements:
        assert perform(do_task, task) == "done"
    assert statements.kinds == [
        # Whether the job is switched off, asked without a cache, so that a flip is seen at once.
        f"SELECT {SWITCH}",
        # The claim, and its commit: from here on nobody else works on the row.
        f"INSERT {CLAIM}",
        # Not before the claim: what the row says now can be changed by nobody else's attempt.
        f"SELECT {TASK}",
        # `with_lock`: the row is locked ...
        "BEGIN",
        f"LOCK {TASK}",
        # ... and read only then: a SELECT that waits for a lock may answer from before it waited.
        f"SELECT {TASK}",
        # The job's own write. Was that all? A success whose row still needs the work is written down as one.
        f"UPDATE {TASK}",
        f"SELECT {TASK}",
        # The claim is still ours, is renewed, and stays so until the commit. Last: nobody waits for it meanwhile.
        f"UPDATE {CLAIM}",
        "COMMIT",
        # The end: claim and history in one transaction, so that neither is there without the other.
        "BEGIN",
        f"DELETE {CLAIM}",
        f"INSERT {RUN}",
        "COMMIT",
        # Does another job wait for the row, which is free now?
        f"SELECT {CLAIM}",
    ]


def test_a_copy_of_what_is_done_costs_seven_and_leaves_nothing(task):
    Task.objects.update(state="done")
    with Statements(connection) as statements:
        assert perform(do_task, task) == "not_needed"
    assert statements.kinds == [
        f"SELECT {SWITCH}",
        f"INSERT {CLAIM}",
        f"SELECT {TASK}",
        "BEGIN",
        f"DELETE {CLAIM}",
        "COMMIT",
        f"SELECT {CLAIM}",
    ]


def test_a_copy_of_what_is_in_work_writes_nothing(task):
    claims.take(Attempt(do_task, "cast.task", str(task.pk), worker="another"))
    before = list(Claim.objects.values())
    with Statements(connection) as statements:
        assert perform(do_task, task) == "busy"
    assert list(Claim.objects.values()) == before
    assert statements.kinds == [
        f"SELECT {SWITCH}",
        # The claim, refused by a unique key. Then: has the lease on the row run out, and has this job a claim on it?
        f"INSERT {CLAIM}",
        f"SELECT {CLAIM}",
        f"SELECT {CLAIM}",
        # It has: taken if it is free and due. In a transaction, or savepoint, that another job's lease may break.
        "BEGIN",
        f"UPDATE {CLAIM}",
        "COMMIT",
        # It was not. Why?
        f"SELECT {CLAIM}",
    ]


@pytest.mark.parametrize("rows", [0, 1, 5000])
def test_a_sweep_asks_the_database_as_often_for_five_thousand_rows_as_for_one(rows):
    Task.objects.bulk_create([Task() for _ in range(rows)])
    with Statements(connection) as statements:
        assert schedule_tasks.sweep().enqueued == rows
    # Switched off? An operator's limit? Claims that must be left alone or settled? And the rows.
    assert [each.replace("DECLARE", "SELECT") for each in statements.kinds] == [
        f"SELECT {SWITCH}",
        f"SELECT {CLAIM}",
        f"SELECT {SCHEDULE}",
        f"SELECT {TASK}",
    ]


@pytest.mark.postgres
def test_only_what_ends_an_attempt_does_not_wait_for_the_disk(task):
    """A claim that a crash took back would let two work on one row, and the row's own write is the truth."""
    waits: dict[str, str] = {}

    def note(execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
        result = execute(sql, params, many, context)
        # Asked after the statement, since it is the commit that waits or does not.
        if (what := kind(sql)) in (f"INSERT {CLAIM}", f"UPDATE {CLAIM}", f"UPDATE {TASK}", f"INSERT {RUN}"):
            with connection.connection.cursor() as cursor:
                waits[what] = cursor.execute("SHOW synchronous_commit").fetchone()[0]
        return result

    with connection.execute_wrapper(note):
        assert perform(do_task, task) == "done"
    assert waits == {
        f"INSERT {CLAIM}": "on",
        f"UPDATE {CLAIM}": "on",
        f"UPDATE {TASK}": "on",
        f"INSERT {RUN}": "off",
    }
    with connection.cursor() as cursor:
        cursor.execute("SHOW synchronous_commit")
        assert cursor.fetchone() == ("on",)
