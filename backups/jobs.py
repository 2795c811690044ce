"""What makes the world follow the rows: policies become backups, backups become files, and files go again."""

from datetime import timedelta

from django.utils import timezone

from backups import snapshots
from backups.models import Backup, BackupPolicy, BackupPolicyQuerySet, BackupQuerySet
from databases.jobs import giving_up
from databases.models import Database, DatabaseQuerySet
from databases.provisioners import Refused, get_provisioner
from jobs import job, sweep, with_lock


@job(queue="background")
def run_backup_policy(policy: BackupPolicy) -> None:
    """Ask for one backup, and say when the next one is due, in one transaction: exactly one for each due time.

    One that still waits to be taken serves for this time too: a storage that was away for a day costs one backup. A
    policy whose database is gone is disabled.
    """
    with with_lock(policy):
        if policy.database.state != Database.State.READY:
            policy.is_enabled = False
            policy.save(update_fields=["is_enabled"])
            return
        now = timezone.now()
        policy.next_run_at = policy.next_after(now)
        policy.save(update_fields=["next_run_at"])
        if not policy.backups.filter(state=Backup.State.PENDING).exists():
            backup = policy.backups.create(database=policy.database, created_at=now, keep_until=now + policy.keep_for)
            take_backup.enqueue(backup)


@sweep(run_backup_policy, cron="*/5 * * * *", jitter=timedelta(minutes=2))
def schedule_backup_policies() -> BackupPolicyQuerySet:
    return BackupPolicy.objects.needs_to_run()


@job(timeout=timedelta(hours=2))
def take_backup(backup: Backup) -> None:
    """Take it, store it, and verify it: read it back, load it where nobody sees it, and compare what is in it.

    Nothing half done is ever ready. What was stored by an attempt that failed goes at once; what was stored by one that
    was killed has the same name, and goes at the next attempt.
    """
    database = backup.database
    if database.state != Database.State.READY:
        gone = "could never be made" if database.state == Database.State.FAILED else "was deleted before"
        return _give_up(backup, f"The database {database} {gone}.")
    engine, file = get_provisioner(database.engine), snapshots.file_name(backup)
    taken_at = timezone.now()
    with snapshots.scratch(snapshots.scratch_name(backup)) as folder:
        dump = folder / "dump"
        try:
            contents = engine.dump(database.name, dump)
        except Refused as refusal:
            return _give_up(backup, str(refusal))
        packed = snapshots.pack(dump, file)
        _remove_file(backup)
        try:
            stored = snapshots.store(packed, file)
            packed.unlink()
            snapshots.fetch(stored, dump)
            loaded = engine.try_load(dump, snapshots.scratch_name(backup))
            if loaded != contents:
                raise snapshots.Damaged(f"{file} was loaded to verify it, and not all that was taken was in it.")
            with with_lock(backup):
                backup.become_ready(taken_at, contents, stored.file, stored.size, stored.sha256)
        except Exception:
            _remove_file(backup)
            raise


@sweep(take_backup, cron="* * * * *")
def schedule_backups() -> BackupQuerySet:
    return Backup.objects.pending()


@job(timeout=timedelta(hours=2))
def restore_backup(database: Database) -> None:
    """Make a database out of a backup, and see that all is in it.

    A backup whose file is not what was stored is marked as damaged, and the database can never be made out of it.
    """
    backup = database.restore.backup
    if backup is None or not backup.sha256:
        with with_lock(database):
            database.become_failed("The backup that it was to be made out of is gone.")
        return
    engine = get_provisioner(database.engine)
    with giving_up(database):
        with snapshots.scratch(f"{snapshots.scratch_name(backup)}_restore_{database.pk}") as folder:
            try:
                snapshots.fetch(snapshots.Stored(backup.file, backup.size or 0, backup.sha256), folder / "dump")
            except snapshots.Damaged as damage:
                with with_lock(database):
                    backup.become_damaged(str(damage))
                raise Refused(f"The {backup} is damaged. {damage}") from damage
            loaded = engine.load(database.name, folder / "dump", database.password)
        if loaded != backup.contents:
            raise Refused(f"Not all that was in the {backup} was in the database afterwards.")
        made = engine.create(database.name, database.password)
        with with_lock(database):
            database.become_ready(made)


@sweep(restore_backup, cron="* * * * *")
def schedule_restores() -> DatabaseQuerySet:
    return Database.objects.needs_restoring()


@job(queue="background")
def clean_up_backup(backup: Backup) -> None:
    """Remove the file, then the row."""
    with with_lock(backup):
        # Now nobody can ask for its restore any more, and nobody had when the row was locked.
        backup.become_deleting()
    _discard(backup)
    with with_lock(backup):
        backup.delete()


@sweep(clean_up_backup, cron="*/5 * * * *", jitter=timedelta(minutes=30))
def schedule_backup_clean_up() -> BackupQuerySet:
    return Backup.objects.needs_clean_up()


def _give_up(backup: Backup, error: str) -> None:
    _discard(backup)
    with with_lock(backup):
        backup.become_failed(error)


def _discard(backup: Backup) -> None:
    """Remove all that there is of a backup, or of attempts at it that were killed, but for its row."""
    _remove_file(backup)
    snapshots.empty_scratch(backup)
    get_provisioner(backup.database.engine).discard(snapshots.scratch_name(backup))


def _remove_file(backup: Backup) -> None:
    # Under the lock: a process that was frozen, and whose row another one has taken over, must not remove its file.
    with with_lock(backup):
        snapshots.remove(backup)
