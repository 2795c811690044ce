"""The rows that say which backups there should be, and for how long. They know no queues: see jobs.py."""

from collections.abc import Collection
from datetime import datetime, timedelta

from django.conf import settings
from django.core.exceptions import ValidationError
from django.db import models
from django.db.models import Exists, OuterRef
from django.utils import timezone

from databases.models import Database
from databases.provisioners import Contents
from jobs import cron

SHORTEST = timedelta(minutes=5)
"""As often as the sweep looks at the policies; more often than that no policy can run."""
LONGEST = timedelta(days=9_999)
"""Longer than any database will last, and short enough to be added to a time."""


class BackupPolicyQuerySet(models.QuerySet["BackupPolicy"]):
    def needs_to_run(self) -> "BackupPolicyQuerySet":
        """Those of which a backup is due, longest due first, and those of which none ever can be: they are disabled."""
        settled = (Database.State.READY, Database.State.FAILED, Database.State.DELETED)
        due = self.filter(is_enabled=True, next_run_at__lte=timezone.now(), database__state__in=settled)
        return due.order_by("next_run_at", "pk")


class BackupPolicy(models.Model):
    """How often a database is backed up, and for how long each backup is kept."""

    database = models.ForeignKey(Database, on_delete=models.PROTECT, related_name="backup_policies")
    every = models.DurationField(null=True, blank=True, help_text="At least five minutes.")
    cron = models.CharField(max_length=100, blank=True, help_text="Instead: five fields, in the time zone of the site.")
    keep_for = models.DurationField(default=timedelta(days=7))
    is_enabled = models.BooleanField("enabled", default=True)
    next_run_at = models.DateTimeField(default=timezone.now)
    created_at = models.DateTimeField(default=timezone.now, editable=False)

    objects = BackupPolicyQuerySet.as_manager()

    class Meta:
        verbose_name_plural = "backup policies"
        indexes = [
            models.Index(fields=["next_run_at", "id"], condition=models.Q(is_enabled=True), name="backups_policies_due")
        ]

    def __str__(self) -> str:
        return f"{self.database}, {self.cron or f'every {self.every}'}"

    def clean(self) -> None:
        if bool(self.cron) == (self.every is not None):
            raise ValidationError({"every": "Say either how often, or when (cron), and not both."})
        if self.every is not None and self.every < SHORTEST:
            raise ValidationError({"every": "A policy runs at most every five minutes. Choose five minutes or more."})
        if self.every is not None and self.every > LONGEST:
            raise ValidationError({"every": f"Choose {LONGEST.days:,} days or less."})
        if self.cron and (len(self.cron.split()) != 5 or cron.problem(self.cron)):
            said = (
                "This is no schedule of five fields that ever comes due. One that does: `15 3 * * *`, at 3:15 each day."
            )
            raise ValidationError({"cron": said})
        if self.keep_for is not None and self.keep_for <= timedelta(0):
            raise ValidationError({"keep_for": "Keep a backup for longer than no time at all."})
        if self.keep_for is not None and self.keep_for > LONGEST:
            raise ValidationError({"keep_for": f"Choose {LONGEST.days:,} days or less."})

    def save_edit(self, edited: Collection[str]) -> None:
        """Save what was edited, and no more: it may be running. Another rhythm begins now, unless a time was said."""
        if {"every", "cron"} & set(edited) and "next_run_at" not in edited:
            self.begin()
            edited = [*edited, "next_run_at"]
        self.save(update_fields=edited)

    def begin(self) -> None:
        """Be due now, or at the first of the times that were said."""
        self.next_run_at = timezone.now()
        if self.cron:
            self.next_run_at = self.next_after(self.next_run_at)

    def next_after(self, moment: datetime) -> datetime:
        """Return when it runs next, after this moment. Runs that were missed before it are not made up for."""
        if self.cron:
            return cron.next_time(self.cron, moment)
        assert self.every is not None
        # On the beat that it has, unless there is none yet.
        missed = max(0, (moment - self.next_run_at) // self.every)
        return self.next_run_at + (missed + 1) * self.every


class BackupQuerySet(models.QuerySet["Backup"]):
    def pending(self) -> "BackupQuerySet":
        """Those to be taken, oldest first. One of a database that is not made yet waits for it."""
        return self.filter(state=Backup.State.PENDING).exclude(database__state=Database.State.PENDING).order_by("pk")

    def needs_clean_up(self) -> "BackupQuerySet":
        """Those that nobody wants any longer: asked to be deleted, or kept for as long as was said.

        Never one that a restore still reads, and of those that have only got old never the last good one of a
        database. Damaged ones are not good ones: they go when their time is over, and nothing else goes for them.
        """
        newer = Backup.objects.filter(
            database=OuterRef("database"), state=Backup.State.READY, taken_at__gt=OuterRef("taken_at")
        )
        being_restored = Restore.objects.filter(backup=OuterRef("pk"), database__state=Database.State.PENDING)
        is_over = models.Q(keep_until__lte=timezone.now())
        replaced = models.Q(state=Backup.State.READY) & is_over & Exists(newer)
        useless = models.Q(state__in=Backup.USELESS) & is_over
        unwanted = models.Q(state=Backup.State.DELETING) | replaced | useless
        return self.filter(unwanted).exclude(Exists(being_restored)).order_by("pk")


class Backup(models.Model):
    """All that was in a database at one moment. Its row goes when its file is gone."""

    class State(models.TextChoices):
        PENDING = "pending"
        READY = "ready"
        """Stored, and verified by loading it once."""
        DAMAGED = "damaged"
        """The file is not what was stored; found when it was to be restored."""
        FAILED = "failed"
        """It cannot be taken any more: its database was deleted before."""
        DELETING = "deleting"

    USELESS = (State.DAMAGED, State.FAILED)

    database = models.ForeignKey(Database, on_delete=models.PROTECT, related_name="backups")
    policy = models.ForeignKey(BackupPolicy, null=True, on_delete=models.SET_NULL, related_name="backups")
    state = models.CharField(max_length=10, choices=State, default=State.PENDING, editable=False)
    error = models.TextField(blank=True, editable=False)
    file = models.CharField(max_length=200, blank=True, editable=False)
    """Its name in the storage `backups`."""
    size = models.PositiveBigIntegerField(null=True, editable=False, help_text="In bytes, as stored.")
    sha256 = models.CharField(max_length=64, blank=True, editable=False)
    contents = models.JSONField(default=dict, editable=False)
    """What was in it: a row count and a checksum of each table."""
    created_at = models.DateTimeField("requested at", default=timezone.now, editable=False)
    taken_at = models.DateTimeField(null=True, editable=False)
    verified_at = models.DateTimeField(null=True, editable=False)
    keep_until = models.DateTimeField(null=True, editable=False, help_text="Empty: until somebody deletes it.")

    objects = BackupQuerySet.as_manager()

    class Meta:
        # Or a system check of Django 6.1 asks SQLite, and a worker that is started while that is away does not start.
        required_db_features = ["supports_json_field"]
        indexes = [
            models.Index(fields=["id"], condition=models.Q(state="pending"), name="backups_pending"),
            models.Index(fields=["id"], condition=models.Q(state="deleting"), name="backups_deleting"),
            models.Index(fields=["keep_until"], condition=models.Q(state="ready"), name="backups_kept"),
            models.Index(
                fields=["keep_until"], condition=models.Q(state__in=["damaged", "failed"]), name="backups_useless"
            ),
            models.Index(fields=["database", "taken_at"], condition=models.Q(state="ready"), name="backups_good"),
        ]

    def __str__(self) -> str:
        return f"backup {self.pk} of {self.database}"

    def become_ready(self, taken_at: datetime, contents: Contents, file: str, size: int, sha256: str) -> None:
        """Say that it is stored and verified. Call it with the row locked and its state looked at.

        It is kept for as long as was said from when it was taken, however long after it was asked for.
        """
        if self.keep_until is not None:
            self.keep_until += taken_at - self.created_at
        self.state, self.taken_at, self.verified_at = self.State.READY, taken_at, timezone.now()
        self.contents, self.file, self.size, self.sha256 = contents, file, size, sha256
        self.save()

    def become_failed(self, error: str) -> None:
        """Say that it can never be taken, and why. Call it with the row locked and its state looked at."""
        self.state, self.error = self.State.FAILED, error
        self.save(update_fields=["state", "error"])

    def become_damaged(self, error: str) -> None:
        """Say that it is no good any more, and how that shows; fine for one that is being deleted."""
        good = type(self).objects.filter(pk=self.pk, state=self.State.READY)
        good.update(state=self.State.DAMAGED, error=error)

    def become_deleting(self) -> None:
        """Say that its file goes: from now on it cannot be restored. Call it with the row locked and looked at."""
        self.state = self.State.DELETING
        self.save(update_fields=["state"])


class Restore(models.Model):
    """Which backup a database is made out of. How far it is says the database itself."""

    database = models.OneToOneField(Database, on_delete=models.PROTECT, related_name="restore")
    # Its backup may be cleaned up when it is done.
    backup = models.ForeignKey(Backup, null=True, on_delete=models.SET_NULL, related_name="restores")
    requested_by = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.PROTECT, related_name="restores")

    def __str__(self) -> str:
        return f"{self.database} out of {self.backup}"
