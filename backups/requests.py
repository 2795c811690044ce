"""What users ask for: the row first, then a hint to the queue, as in databases/requests.py."""

from django.contrib.auth.models import User
from django.core.exceptions import ValidationError
from django.db import transaction

from backups.jobs import clean_up_backup, restore_backup, take_backup
from backups.models import Backup, Restore
from databases.models import Database


def request_backup(database: Database) -> Backup:
    """Have a backup taken now; it is kept until somebody deletes it."""
    backup = Backup.objects.create(database=database)
    take_backup.enqueue(backup)
    return backup


def request_restore(backup: Backup, name: str, user: User) -> Database:
    """Have a new branch of this name made out of a backup.

    Raises ValidationError for a name that cannot be had, and for a backup that is not ready, or not any more.
    """
    source = backup.database
    restored = Database(
        name=name, owner=source.owner, engine=source.engine, parent=source, origin=Database.Origin.BACKUP
    )
    restored.full_clean()
    with transaction.atomic():
        # The row stays locked: it is cleaned up either before this, or after the restore.
        if Backup.objects.select_for_update().filter(pk=backup.pk, state=Backup.State.READY).first() is None:
            raise ValidationError("Only a backup that is ready can be restored.")
        restored.save(force_insert=True)
        Restore.objects.create(database=restored, backup=backup, requested_by=user)
        restore_backup.enqueue(restored)
    return restored


def request_backup_deletion(backup: Backup) -> None:
    """Have a backup deleted, also while it is being taken; fine for one that is being deleted, or gone, already."""
    Backup.objects.filter(pk=backup.pk).update(state=Backup.State.DELETING)
    clean_up_backup.enqueue(backup.pk)
