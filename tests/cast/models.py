"""An ordinary model of somebody's project. It knows nothing of queues."""

import uuid

from django.db import models


class TaskQuerySet(models.QuerySet["Task"]):
    def pending(self) -> "TaskQuerySet":
        return self.filter(state="pending").order_by("pk")

    def deleting(self) -> "TaskQuerySet":
        return self.filter(state="deleting").order_by("pk")


class Task(models.Model):
    """A row to be worked on. `behaviour` says what its job does to you; see jobs.py."""

    name = models.CharField(max_length=100, blank=True)
    behaviour = models.CharField(max_length=40, default="succeed")
    seconds = models.FloatField(default=0)
    state = models.CharField(max_length=20, default="pending")
    writes = models.PositiveIntegerField(default=0)

    objects = TaskQuerySet.as_manager()

    def __str__(self) -> str:
        return f"{self.name or self.pk} ({self.behaviour})"


class Keyed(models.Model):
    """Rows whose primary keys are text, as strangers have them."""

    key = models.CharField(primary_key=True, max_length=500)
    state = models.CharField(max_length=20, default="pending")

    def __str__(self) -> str:
        return self.key


class Ticket(models.Model):
    id = models.UUIDField(primary_key=True, default=uuid.uuid4)
    state = models.CharField(max_length=20, default="pending")

    def __str__(self) -> str:
        return str(self.id)
