"""A backup and a restore, with worker and child killed in the middle of each, and the scheduler too."""

from datetime import timedelta

import pytest
from django.core.files.storage import storages
from django.utils import timezone

from backups.jobs import run_backup_policy, take_backup
from backups.models import Backup, BackupPolicy
from backups.requests import request_restore
from databases.jobs import create_database
from databases.models import Database
from databases.provisioners import get_provisioner
from jobs.models import Claim, Run, Schedule
from tests.engines import ON_ITS_OWN
from tests.recovery.conftest import Stack
from tests.recovery.traps import Trap

ENGINES = {
    "sqlite": "databases.provisioners.sqlite.SQLiteProvisioner",
    "postgresql": "databases.provisioners.postgresql.PostgreSQLProvisioner",
}


@pytest.fixture(params=ON_ITS_OWN)
def database(request, stack: Stack, settings, django_user_model) -> Database:
    """A database that is ready, and in the same places for the processes and for the test."""
    home = stack.folder / "home"
    settings.DATABASES_FOLDER, settings.BACKUPS_SCRATCH = home / "databases", home / "scratch"
    options = {"location": home / "backups"}
    backups = {"BACKEND": "django.core.files.storage.FileSystemStorage", "OPTIONS": options}
    settings.STORAGES = {**settings.STORAGES, "backups": backups}
    if request.param == "postgresql":
        request.getfixturevalue("postgres")
    # Often, as everything here.
    for name in ("schedule_backups", "schedule_restores"):
        Schedule.objects.update_or_create(name=name, defaults={"cron": "*/2 * * * * *", "next_run_at": timezone.now()})
    owner = django_user_model.objects.create_user("ada")
    database = Database.objects.create(name="shop", owner=owner, engine=request.param)
    create_database(database)
    return database


@pytest.fixture
def places(settings, database) -> dict[str, str]:
    """What the processes have to be told about the server."""
    names = ("DATABASES_POSTGRES_URL", "DATABASES_POSTGRES_BIN")
    return {name: getattr(settings, name) for name in names}


def outcomes(job: str) -> list[str]:
    return list(Run.objects.filter(job=job).order_by("pk").values_list("outcome", flat=True))


def nothing_is_left_behind(stack: Stack) -> bool:
    files = sorted(Backup.objects.values_list("file", flat=True))
    return storages["backups"].listdir("")[1] == files and list((stack.folder / "home/scratch").iterdir()) == []


def test_worker_child_and_scheduler_killed_while_a_backup_is_taken(stack, database, places):
    policy = BackupPolicy.objects.create(database=database, every=timedelta(hours=1))
    run_backup_policy.enqueue(policy)
    trap = Trap("after", "backups.snapshots.store", with_parent=True)
    stack.worker(trap=trap, **places)
    stack.wait_until_sprung(trap)
    # It is stored, and nobody has seen whether it is any good.
    assert Backup.objects.get().state == Backup.State.PENDING
    stack.scheduler(**places)
    stack.wait_until_up("scheduler")
    stack.kill(stack.pid("scheduler"))

    stack.wait_for(lambda: Backup.objects.get().state == Backup.State.READY, "the backup ready")
    stack.wait_for(lambda: not Claim.objects.exists(), "all settled")
    assert outcomes("take_backup") == ["crashed", "done"]
    assert outcomes("run_backup_policy") == ["done"]
    policy.refresh_from_db()
    assert policy.next_run_at > timezone.now()
    assert nothing_is_left_behind(stack)


def test_worker_and_child_killed_while_it_is_restored(stack, database, places):
    backup = Backup.objects.create(database=database)
    take_backup(backup)
    branch = request_restore(backup, "again", database.owner)
    trap = Trap("after", f"{ENGINES[database.engine]}.load", with_parent=True)
    stack.worker(trap=trap, **places)
    stack.wait_until_sprung(trap)
    stack.scheduler(**places)

    stack.wait_for(lambda: Database.objects.get(pk=branch.pk).state == Database.State.READY, "the branch ready")
    stack.wait_for(lambda: not Claim.objects.exists(), "all settled")
    assert outcomes("restore_backup") == ["crashed", "done"]
    engine = get_provisioner(database.engine)
    assert engine.schema("again") == engine.schema("shop")
    assert nothing_is_left_behind(stack)
