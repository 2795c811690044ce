"""Versions side by side: the code of before on the tables of today, and ours beside tables that are not of today."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from django.apps import apps
from django.db import connection
from django.db.migrations.loader import MigrationLoader
from django.utils import timezone

from config import BASE_DIR
from jobs.jobs import selfheal_operations
from jobs.models import Claim, Operation, Run, Schedule
from jobs.testing import drain, perform, tick
from tests import database
from tests.cast.jobs import do_task
from tests.cast.models import Task

pytestmark = pytest.mark.django_db(transaction=True)

LOADER = MigrationLoader(None)
*EARLIER, NEWEST = sorted(name for app, name in LOADER.graph.nodes if app == "selfheal")
OURS = [model for model in apps.get_app_config("selfheal").get_models() if not model._meta.proxy]

# Without these a row says nothing, and each is as old as its table: there is no version that leaves one out.
IDENTITY = {
    "selfheal_claim": {"job", "model", "object_pk", "first_claimed_at"},
    "selfheal_run": {"job", "outcome", "finished_at"},
    "selfheal_tally": {"hour", "job", "outcome"},
    "selfheal_operation": {"action", "last_pk", "requested_at"},
}


def models_at(migration: str) -> dict[str, Any]:
    """Our models as the code was when this was the newest migration."""
    return LOADER.project_state(("selfheal", migration)).apps.all_models["selfheal"]


# --- The code of before -----------------------------------------------------------------------------------------------


def must_be_given(table: str) -> set[str]:
    """The columns, save the primary key, without which the database takes no row."""
    with connection.cursor() as cursor:
        if connection.vendor == "sqlite":
            cursor.execute(f"PRAGMA table_info({table})")
            return {name for _, name, _, notnull, default, pk in cursor if notnull and default is None and not pk}
        cursor.execute(
            "SELECT attname FROM pg_attribute LEFT JOIN pg_index ON indrelid = attrelid AND indisprimary "
            "WHERE attrelid = %s::regclass AND attnum > 0 AND attnotnull AND NOT atthasdef AND NOT attisdropped "
            "AND attidentity = '' AND attnum <> ALL (indkey)",
            [table],
        )
        return {name for (name,) in cursor}


@pytest.mark.parametrize("model", OURS)
def test_the_database_itself_knows_what_to_write_where_code_of_before_writes_nothing(model):
    table = model._meta.db_table
    assert must_be_given(table) == IDENTITY.get(table, set())
    oldest = next(models for name in EARLIER if model._meta.model_name in (models := models_at(name)))
    columns = {field.column for field in oldest[model._meta.model_name]._meta.concrete_fields}
    assert columns >= IDENTITY.get(table, set())


@pytest.mark.parametrize("version", EARLIER)
def test_code_of_before_works_on_in_the_tables_of_today(version):
    """A worker that is not restarted yet writes every row that it did, and the code of today goes on with it."""
    old, now = models_at(version), timezone.now()
    task = Task.objects.create()
    work = {"job": "do_task", "model": "cast.task", "object_pk": str(task.pk)}
    Schedule.objects.all().delete()
    old["schedule"].objects.create(name="nightly", due_runs=1)
    old["run"].objects.create(**work, outcome="failed", error="ValueError", finished_at=now)
    old["claim"].objects.create(**work, attempts=1, first_claimed_at=now)
    if "tally" in old:
        old["tally"].objects.create(hour=now, job="do_task", outcome="failed", runs=1)
        old["operation"].objects.create(action="queue_now", last_pk=Claim.objects.get().pk, requested_at=now)
    assert "nightly" in tick()
    selfheal_operations.sweep()
    drain()
    assert Schedule.objects.get(name="nightly").last_outcome == "done"
    assert not Operation.objects.unfinished().exists()
    assert perform(do_task, task) in ("done", "not_needed")
    assert Task.objects.get().state == "done"
    assert not Claim.objects.exists()
    assert set(Run.objects.filter(job="do_task").values_list("outcome", flat=True)) == {"failed", "done"}


# --- The tables of before ---------------------------------------------------------------------------------------------


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[str]:
    """The URL of a database with nothing in it."""
    if connection.vendor == "sqlite":
        yield f"sqlite:///{tmp_path / 'fresh.sqlite3'}"
        return
    name = f"{connection.settings_dict['NAME']}_fresh"
    with connection.cursor() as cursor:
        cursor.execute(f'CREATE DATABASE "{name}"')
        yield database.url(NAME=name)
        cursor.execute(f'DROP DATABASE "{name}" WITH (FORCE)')


def manage(url: str, code: str) -> str:
    """Run code in a process of manage.py that has this database."""
    environment = {**os.environ, "DATABASE_URL": url, "DJANGO_SETTINGS_MODULE": "tests.settings"}
    command = [sys.executable, str(BASE_DIR / "manage.py"), "shell", "-v", "0", "-c", code]
    ended = subprocess.run(command, env=environment, cwd=BASE_DIR, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_migrating_another_app_or_back_asks_nothing_of_tables_that_are_not_of_today(fresh):
    said = manage(
        fresh,
        """
from django.core.management import call_command
from jobs import registry
from jobs.models import Schedule
from waffle.models import Switch

# Before there is any table of ours, beside those of the first version, and without a column of the switches.
for target in [
    ["auth"], ["waffle", "0001"], ["selfheal", "0001"], ["auth"], ["backups"], ["waffle"], ["selfheal"],
    ["selfheal", "0001"], ["backups"], ["flush"], ["selfheal", "zero"], ["auth"], [],
]:
    if target == ["flush"]:
        call_command("flush", verbosity=0, interactive=False)
    else:
        call_command("migrate", *target, verbosity=0)
print(Schedule.objects.count() == len(registry.declared()), Switch.objects.exists())
""",
    )
    assert said.split() == ["True", "True"]


def test_a_dump_can_be_loaded_where_migrate_has_numbered_the_switches_otherwise(fresh, tmp_path):
    said = manage(
        fresh,
        f"""
from django.core.management import call_command
from django.utils import timezone
from jobs.models import Claim
from waffle.models import Switch

call_command("migrate", verbosity=0)
Switch.objects.filter(name="disable_nightly").delete()
Switch.objects.create(name="disable_nightly", active=True)
Claim.objects.create(job="do_task", model="cast.task", object_pk="1", first_claimed_at=timezone.now())
dumped = {str(tmp_path / "dump.json")!r}
options = dict(use_natural_primary_keys=True, use_natural_foreign_keys=True, exclude=["django_rq"])
call_command("dumpdata", output=dumped, verbosity=0, **options)
call_command("flush", interactive=False, verbosity=0)
call_command("loaddata", dumped, verbosity=0)
print(Claim.objects.count(), *Switch.objects.filter(active=True).values_list("name", flat=True))
""",
    )
    assert said.split() == ["1", "disable_nightly"]
