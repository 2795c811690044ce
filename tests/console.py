"""What the tests of the console share: somebody's rows in every state, and the address of every page about them."""

from datetime import timedelta
from typing import NamedTuple

from django.contrib.auth.models import User
from django.core.files.base import ContentFile
from django.core.files.storage import storages
from django.utils import timezone

from backups.models import Backup, BackupPolicy, Restore
from databases.models import Database, DeployRequest
from jobs.models import Claim

State, Engine, Origin = Database.State, Database.Engine, Database.Origin
Deploy = DeployRequest.State


class Everything(NamedTuple):
    shop: Database
    trial: Database
    deploy: DeployRequest
    policy: BackupPolicy
    backup: Backup
    # Every page, by a name for it.
    pages: dict[str, str]


def claim(job: str, row: Database | DeployRequest | Backup, error: str) -> Claim:
    """Say that the last attempt at a row failed."""
    now = timezone.now()
    return Claim.objects.create(
        job=job,
        model=row._meta.label_lower,
        object_pk=str(row.pk),
        last_error=error,
        attempts=3,
        next_attempt_at=now + timedelta(minutes=2),
        first_claimed_at=now,
    )


def everything(owner: User, prefix: str = "shop") -> Everything:
    now = timezone.now()

    def database(name: str = "", state: str = State.READY, **fields: object) -> Database:
        made = {"ready_at": now - timedelta(minutes=3), "size": 7_900_000, "path": f"127.0.0.1:5432/{prefix}{name}"}
        return Database.objects.create(
            name=f"{prefix}{name}",
            owner=owner,
            state=state,
            created_at=now - timedelta(minutes=3, seconds=4),
            **{"engine": Engine.POSTGRESQL, **(made if state == State.READY else {}), **fields},
        )

    shop = database()
    of_shop = {"parent": shop, "origin": Origin.COPY}
    trial = database("_trial", **of_shop)
    waiting = database("_waiting", State.PENDING, **of_shop, sessions_end_at=now + timedelta(minutes=8, seconds=50))
    claim(
        "create_branch",
        waiting,
        f"InUse: The database '{shop}' can only be copied while nobody is connected to it, and it is in use by "
        f"psql of {shop} from 127.0.0.1 since 2026-11-24 18:03:00+00.",
    )
    copied = database(
        "_copied",
        **of_shop,
        sessions_end_at=now - timedelta(minutes=4),
        ended_sessions=f"psql of {shop} from 127.0.0.1 since 2026-11-24 18:03:00+00",
    )
    failed = database("_failed", State.FAILED, **of_shop, error=f"There is no database {shop} any more to copy.")
    going = database("_going", State.DELETING, engine=Engine.SQLITE)
    gone = database("_gone", State.DELETED, engine=Engine.SQLITE, deleted_at=now - timedelta(days=2))

    def deploy(state: str, sql: str, **fields: object) -> DeployRequest:
        return DeployRequest.objects.create(
            branch=trial, target=shop, requested_by=owner, state=state, sql=sql, created_at=now, **fields
        )

    done = deploy(Deploy.DEPLOYED, "CREATE TABLE customers (id bigint PRIMARY KEY);", deployed_at=now, confirmed_at=now)
    refused = deploy(
        Deploy.FAILED,
        "ALTER TABLE customers ADD COLUMN id bigint;",
        error='ERROR: column "id" of relation "customers" already exists\nLINE 1: ALTER TABLE customers ADD COLUMN id',
    )
    running = deploy(
        Deploy.DEPLOYING, "ALTER TABLE customers ADD COLUMN email text;\nCREATE INDEX ON customers (email);"
    )
    queued = deploy(Deploy.PENDING, "ALTER TABLE customers ADD COLUMN phone text;")
    withdrawn = deploy(Deploy.WITHDRAWN, "ALTER TABLE customers ADD COLUMN fax text;")
    differs = deploy(
        Deploy.DEPLOYED,
        "ALTER TABLE customers ADD COLUMN street text;",
        deployed_at=now,
        error=f"The schema of {shop} is not the one that deploy 6 into {shop} has left there.",
    )

    policy = BackupPolicy.objects.create(database=shop, every=timedelta(hours=6))
    BackupPolicy.objects.create(database=shop, cron="15 3 * * *", keep_for=timedelta(days=30), is_enabled=False)
    file = storages["backups"].save(f"{shop}-1.dump", ContentFile(b"what was in it\n" * 10_000))
    backup = Backup.objects.create(
        database=shop,
        policy=policy,
        state=Backup.State.READY,
        file=file,
        size=150_000,
        sha256="3a7bd3e2360a3d29eea436fcfb7e44c735d117c42d1c1835420b6b9942dd4f1b",
        contents={"customers": [12_408, "a1"], "orders": [90_211, "b2"]},
        taken_at=now - timedelta(hours=2),
        verified_at=now - timedelta(hours=2),
        keep_until=now + timedelta(days=7),
    )
    damaged = Backup.objects.create(
        database=shop,
        state=Backup.State.DAMAGED,
        size=1_000,
        taken_at=now,
        error="It is 1,000 bytes long, and was stored with 150,000.",
    )
    taking = Backup.objects.create(database=shop)
    claim("take_backup", taking, "OSError: [Errno 28] No space left on device: /a/secret/place")
    restored = database("_restored", parent=shop, origin=Origin.BACKUP)
    Restore.objects.create(database=restored, backup=backup, requested_by=owner)

    pages = {
        "databases": "/",
        "deleted": "/?deleted",
        "new_database": "/new/",
        "database": f"/databases/{shop}/",
        "database_waiting": f"/databases/{waiting}/",
        "database_copied": f"/databases/{copied}/",
        "database_failed": f"/databases/{failed}/",
        "database_going": f"/databases/{going}/",
        "database_gone": f"/databases/{gone}/",
        "connection": f"/databases/{shop}/connection/",
        "new_branch": f"/databases/{shop}/branch/",
        "delete_database": f"/databases/{shop}/delete/",
        "deploys": "/deploys/",
        "new_deploy": f"/deploys/new/?branch={trial}",
        "deploy_done": f"/deploys/{done.pk}/",
        "deploy_failed": f"/deploys/{refused.pk}/",
        "deploy_running": f"/deploys/{running.pk}/",
        "deploy_queued": f"/deploys/{queued.pk}/",
        "deploy_withdrawn": f"/deploys/{withdrawn.pk}/",
        "deploy_differs": f"/deploys/{differs.pk}/",
        "withdraw_deploy": f"/deploys/{queued.pk}/withdraw/",
        "backups": f"/databases/{shop}/backups/",
        "backups_empty": f"/databases/{trial}/backups/",
        "new_policy": f"/databases/{shop}/backups/policy/",
        "policy": f"/policies/{policy.pk}/",
        "backup": f"/backups/{backup.pk}/",
        "backup_taking": f"/backups/{taking.pk}/",
        "backup_damaged": f"/backups/{damaged.pk}/",
        "restore": f"/backups/{backup.pk}/restore/",
        "delete_backup": f"/backups/{backup.pk}/delete/",
    }
    return Everything(shop, trial, running, policy, backup, pages)
