"""The rows that say which databases there should be, and what to change in them. They know no queues: see jobs.py."""

import secrets
import uuid
from datetime import timedelta

from django.conf import settings
from django.core.exceptions import ValidationError
from django.core.validators import RegexValidator
from django.db import models
from django.utils import timezone

from databases.provisioners import NAME_PATTERN, Provisioned


def new_password() -> str:
    return secrets.token_urlsafe(24)


RESERVED = {"none", "postgres", "public", "template0", "template1"}
"""Names that a database or a role of PostgreSQL cannot have, beside those that begin with `pg_`."""


class DatabaseQuerySet(models.QuerySet["Database"]):
    def pending(self) -> "DatabaseQuerySet":
        """Those that are not made yet, oldest first."""
        return self.filter(state=Database.State.PENDING).order_by("pk")

    def needs_creating(self) -> "DatabaseQuerySet":
        """Those to be made out of nothing."""
        return self.pending().filter(origin=Database.Origin.EMPTY)

    def needs_branching(self) -> "DatabaseQuerySet":
        """Those to be made as copies of their parents, once these are made themselves."""
        return self.pending().filter(origin=Database.Origin.COPY).exclude(parent__state=Database.State.PENDING)

    def needs_restoring(self) -> "DatabaseQuerySet":
        """Those to be made out of a backup; the app that keeps the backups does it."""
        return self.pending().filter(origin=Database.Origin.BACKUP)

    def deleting(self) -> "DatabaseQuerySet":
        """Those that are to be deleted and still may exist, oldest first."""
        return self.filter(state=Database.State.DELETING).order_by("pk")

    def request_deletion(self) -> int:
        """Mark these for deletion, and return how many were not marked before.

        One conditional statement, so that it neither undoes a deletion that has happened meanwhile nor is overwritten
        by a creation that is about to finish: that one locks the row and looks at its state again.
        """
        return self.filter(state__in=Database.DELETABLE).update(state=Database.State.DELETING)


class Database(models.Model):
    """One database of a user, from the wish to the grave: a row is never deleted, and its name is never used again.

    A name that came back could be hit by a late deletion of its first bearer. A branch is a database too, one that
    began as a copy of its parent, or of a backup of it; from then on they have nothing in common.
    """

    class State(models.TextChoices):
        PENDING = "pending"
        READY = "ready"
        FAILED = "failed"
        """It can never be made; `error` says why."""
        DELETING = "deleting"
        DELETED = "deleted"

    DELETABLE = (State.PENDING, State.READY, State.FAILED)

    class Engine(models.TextChoices):
        SQLITE = "sqlite", "SQLite"
        POSTGRESQL = "postgresql", "PostgreSQL"

    class Origin(models.TextChoices):
        """What it is made out of."""

        EMPTY = "empty"
        COPY = "copy"
        BACKUP = "backup"

    name = models.CharField(
        max_length=63,
        unique=True,
        validators=[
            RegexValidator(NAME_PATTERN, "Use lower-case letters, digits and underscores, and begin with a letter.")
        ],
        error_messages={"unique": "There is or was a database of this name. Names are not used twice; choose another."},
    )
    owner = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.PROTECT, related_name="databases")
    engine = models.CharField(max_length=10, choices=Engine, default=Engine.SQLITE)
    origin = models.CharField(max_length=10, choices=Origin, default=Origin.EMPTY, editable=False)
    parent = models.ForeignKey(
        "self", null=True, on_delete=models.PROTECT, related_name="branches", editable=False, verbose_name="branch of"
    )
    state = models.CharField(max_length=10, choices=State, default=State.PENDING, editable=False)
    error = models.TextField(blank=True, editable=False)
    password = models.CharField(max_length=50, default=new_password, editable=False)
    """Of the role that owns it, where the engine has roles. Shown to its owner alone, and nowhere by the way."""
    created_at = models.DateTimeField("requested at", default=timezone.now, editable=False)
    sessions_end_at = models.DateTimeField(null=True, editable=False)
    """When those are cut off who are connected to its parent, and keep it from being copied as long as they are."""
    ended_sessions = models.TextField(blank=True, editable=False)
    """Who was."""
    ready_at = models.DateTimeField(null=True, editable=False)
    deleted_at = models.DateTimeField(null=True, editable=False)
    size = models.PositiveBigIntegerField(null=True, editable=False, help_text="In bytes, when it was made.")
    path = models.CharField(max_length=500, blank=True, editable=False)

    objects = DatabaseQuerySet.as_manager()

    class Meta:
        # The two sweeps read these once a minute, however many databases are ready or gone.
        indexes = [
            models.Index(fields=["id"], condition=models.Q(state="pending"), name="databases_pending"),
            models.Index(fields=["id"], condition=models.Q(state="deleting"), name="databases_deleting"),
        ]

    def __str__(self) -> str:
        return self.name

    def clean(self) -> None:
        if self.engine == self.Engine.POSTGRESQL and (self.name.startswith("pg_") or self.name in RESERVED):
            raise ValidationError({"name": "PostgreSQL keeps this name for itself. Choose another."})

    def request_deletion(self) -> bool:
        """Mark it for deletion, also while it is being created. Returns False when it was marked, or gone, already."""
        was_marked = type(self).objects.filter(pk=self.pk).request_deletion()
        self.refresh_from_db(fields=["state", "deleted_at"])
        return bool(was_marked)

    @property
    def ends_sessions(self) -> bool:
        return self.sessions_end_at is not None and self.sessions_end_at <= timezone.now()

    def wait_for_sessions(self, patience: timedelta) -> None:
        """Have sessions in its parent ended so long after it was first in their way. Call it with the row locked."""
        if self.sessions_end_at is None:
            self.sessions_end_at = timezone.now() + patience
            self.save(update_fields=["sessions_end_at"])

    def become_ready(self, made: Provisioned) -> None:
        """Say that it can be used. Call it with the row locked and its state looked at."""
        self.state = self.State.READY
        self.ready_at = timezone.now()
        self.path, self.size, self.ended_sessions = made.path, made.size, made.ended
        self.save(update_fields=["state", "ready_at", "path", "size", "ended_sessions"])

    def become_failed(self, error: str) -> None:
        """Say that it can never be made, and why. Call it with the row locked and its state looked at."""
        self.state, self.error = self.State.FAILED, error
        self.save(update_fields=["state", "error"])

    def become_deleted(self) -> None:
        """Say that nothing is left of it. Call it with the row locked and its state looked at."""
        self.state = self.State.DELETED
        self.deleted_at = timezone.now()
        self.path, self.size, self.password = "", None, ""
        self.save(update_fields=["state", "deleted_at", "path", "size", "password"])


class DeployRequestQuerySet(models.QuerySet["DeployRequest"]):
    def open(self) -> "DeployRequestQuerySet":
        """Those that are neither deployed, nor failed, nor withdrawn, oldest first."""
        return self.filter(state__in=DeployRequest.OPEN).order_by("pk")

    def needs_deploying(self) -> "DeployRequestQuerySet":
        """The oldest open one of each target: one database is changed once at a time, in the order asked.

        Not before both databases are made.
        """
        earlier = DeployRequest.objects.open().filter(target=models.OuterRef("target"), pk__lt=models.OuterRef("pk"))
        unmade = models.Q(branch__state=Database.State.PENDING) | models.Q(target__state=Database.State.PENDING)
        return self.open().filter(~models.Exists(earlier)).exclude(unmade)


class DeployRequest(models.Model):
    """A change of a schema, tried on a branch and then made in another database: exactly once, or not at all.

    What tells whether it was made is neither this row nor the queue but the target itself: the change and a row with
    `marker` are committed there together.
    """

    class State(models.TextChoices):
        PENDING = "pending"
        CHECKING = "checking"
        """Being tried on the branch."""
        DEPLOYING = "deploying"
        DEPLOYED = "deployed"
        FAILED = "failed"
        WITHDRAWN = "withdrawn"
        """Nobody wanted it any more before it began."""

    OPEN = (State.PENDING, State.CHECKING, State.DEPLOYING)

    branch = models.ForeignKey(Database, on_delete=models.PROTECT, related_name="trials", help_text="Tried here first.")
    target = models.ForeignKey(Database, on_delete=models.PROTECT, related_name="deploys", help_text="Deployed here.")
    sql = models.TextField("SQL")
    requested_by = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.PROTECT, related_name="deploys")
    marker = models.UUIDField(default=uuid.uuid4, unique=True, editable=False)
    state = models.CharField(max_length=10, choices=State, default=State.PENDING, editable=False)
    error = models.TextField(blank=True, editable=False)
    created_at = models.DateTimeField("requested at", default=timezone.now, editable=False)
    deployed_at = models.DateTimeField(null=True, editable=False)
    schema = models.CharField(max_length=64, blank=True, editable=False)
    """A digest of the target's schema, taken in the transaction that made the change."""
    confirmed_at = models.DateTimeField(null=True, editable=False)
    """When the target was looked at afterwards, and had that schema."""

    objects = DeployRequestQuerySet.as_manager()

    class Meta:
        indexes = [
            models.Index(
                fields=["target", "id"],
                condition=models.Q(state__in=["pending", "checking", "deploying"]),
                name="databases_open_deploys",
            )
        ]

    def __str__(self) -> str:
        return f"deploy {self.pk} into {self.target}"

    def request_withdrawal(self) -> bool:
        """Withdraw it, unless it has begun. Returns False when it has.

        One conditional statement: a deploy that is about to begin locks the row and looks at its state again.
        """
        waiting = type(self).objects.filter(pk=self.pk, state=self.State.PENDING)
        was_withdrawn = waiting.update(state=self.State.WITHDRAWN)
        self.refresh_from_db(fields=["state"])
        return bool(was_withdrawn)

    def become(self, state: State) -> None:
        """Say how far it is. Call it with the row locked and its state looked at."""
        self.state = state
        self.save(update_fields=["state"])

    def become_deployed(self, schema: str) -> None:
        """Say that the target is changed. Call it with the row locked and its state looked at."""
        self.state, self.schema, self.deployed_at = self.State.DEPLOYED, schema, timezone.now()
        self.save(update_fields=["state", "schema", "deployed_at"])

    def become_failed(self, error: str) -> None:
        """Say that it is never made, and why. Call it with the row locked and its state looked at."""
        self.state, self.error = self.State.FAILED, error
        self.save(update_fields=["state", "error"])

    def clean(self) -> None:
        if self.branch_id and self.branch_id == self.target_id:
            raise ValidationError({"target": "Choose another database than the branch on which it is tried."})
        if self.branch_id and self.target_id and self.branch.engine != self.target.engine:
            raise ValidationError({"target": "The branch and the target must be of the same engine."})
