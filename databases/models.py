"""The rows that say which databases there should be. They know nothing of queues: see jobs.py."""

from django.conf import settings
from django.core.validators import RegexValidator
from django.db import models
from django.utils import timezone

from databases.provisioners import NAME_PATTERN, Provisioned


class DatabaseQuerySet(models.QuerySet["Database"]):
    def pending(self) -> "DatabaseQuerySet":
        """Those that are not made yet, oldest first."""
        return self.filter(state=Database.State.PENDING).order_by("pk")

    def deleting(self) -> "DatabaseQuerySet":
        """Those that are to be deleted and still may exist, oldest first."""
        return self.filter(state=Database.State.DELETING).order_by("pk")

    def request_deletion(self) -> int:
        """Mark these for deletion, and return how many were not marked before.

        One conditional statement, so that it neither undoes a deletion that has happened meanwhile nor is overwritten
        by a creation that is about to finish: that one locks the row and looks at its state again.
        """
        return self.filter(state__in=[Database.State.PENDING, Database.State.READY]).update(
            state=Database.State.DELETING
        )


class Database(models.Model):
    """One database of a user, from the wish to the grave: a row is never deleted, and its name is never used again.

    A name that came back could be hit by a late deletion of its first bearer.
    """

    class State(models.TextChoices):
        PENDING = "pending"
        READY = "ready"
        DELETING = "deleting"
        DELETED = "deleted"

    name = models.CharField(
        max_length=63,
        unique=True,
        validators=[
            RegexValidator(NAME_PATTERN, "Use lower-case letters, digits and underscores, and begin with a letter.")
        ],
        error_messages={"unique": "There is or was a database of this name. Names are not used twice; choose another."},
    )
    owner = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.PROTECT, related_name="databases")
    state = models.CharField(max_length=10, choices=State, default=State.PENDING, editable=False)
    created_at = models.DateTimeField("requested at", default=timezone.now, editable=False)
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

    def request_deletion(self) -> bool:
        """Mark it for deletion, also while it is being created. Returns False when it was marked, or gone, already."""
        was_marked = type(self).objects.filter(pk=self.pk).request_deletion()
        self.refresh_from_db(fields=["state", "deleted_at"])
        return bool(was_marked)

    def become_ready(self, made: Provisioned) -> None:
        """Say that it can be used. Call it with the row locked and its state looked at."""
        self.state = self.State.READY
        self.ready_at = timezone.now()
        self.path, self.size = made.path, made.size
        self.save(update_fields=["state", "ready_at", "path", "size"])

    def become_deleted(self) -> None:
        """Say that nothing is left of it. Call it with the row locked and its state looked at."""
        self.state = self.State.DELETED
        self.deleted_at = timezone.now()
        self.path, self.size = "", None
        self.save(update_fields=["state", "deleted_at", "path", "size"])
