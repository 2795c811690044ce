"""Ordinary models of somebody's project, of every kind that there is. They know nothing of queues."""

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
    state = models.CharField(max_length=20, default="pending", db_index=True)
    writes = models.PositiveIntegerField(default=0)

    objects = TaskQuerySet.as_manager()

    def __str__(self) -> str:
        return f"{self.name or self.pk} ({self.behaviour})"


class Keyed(models.Model):
    """Rows whose primary keys are text, as strangers have them."""

    key = models.CharField(primary_key=True, max_length=500)
    state = models.CharField(max_length=20, default="pending", db_index=True)

    def __str__(self) -> str:
        return self.key


class Ticket(models.Model):
    id = models.UUIDField(primary_key=True, default=uuid.uuid4)
    state = models.CharField(max_length=20, default="pending", db_index=True)

    def __str__(self) -> str:
        return str(self.id)


class Stateful(models.Model):
    state = models.CharField(max_length=20, default="pending", db_index=True)

    class Meta:
        abstract = True

    def __str__(self) -> str:
        return f"{self.pk}: {self.state}"


class Account(Stateful):
    """Whole numbers, negative ones too."""

    number = models.IntegerField(primary_key=True)


class Price(Stateful):
    """A primary key that can be written in more than one way: 1, 1.0 and 1.00 are one row's."""

    amount = models.DecimalField(primary_key=True, max_digits=8, decimal_places=2)


class Seat(Stateful):
    """A primary key of several columns."""

    pk = models.CompositePrimaryKey("hall", "number", "booked_on")
    hall = models.CharField(max_length=100)
    number = models.IntegerField()
    booked_on = models.DateField()


class Passport(Stateful):
    """A primary key that is another row's."""

    ticket = models.OneToOneField(Ticket, models.CASCADE, primary_key=True)


class Vehicle(Stateful):
    """A row that may be half of another; its state is in this half."""

    wheels = models.IntegerField(default=4)


class Truck(Vehicle):
    load = models.IntegerField(default=0)


class UrgentTask(Task):
    """The same rows as a task's, under another name."""

    class Meta:
        proxy = True


class NotHidden(models.Manager):
    def get_queryset(self) -> models.QuerySet["Secret"]:
        return super().get_queryset().filter(hidden=False)


class Secret(Stateful):
    """Its default manager hides what the sweep finds."""

    hidden = models.BooleanField(default=True)

    objects = NotHidden()
    everything = models.Manager()  # noqa: DJ012  (a manager too)


class Parcel(Stateful):
    """Has relations to join, and an order of its own: the heaviest first."""

    vehicle = models.ForeignKey(Vehicle, models.CASCADE, null=True)
    weight = models.IntegerField(default=1)

    class Meta:
        ordering = ["-weight"]


class Sticker(models.Model):
    parcel = models.ForeignKey(Parcel, models.CASCADE, related_name="stickers")
    colour = models.CharField(max_length=20)

    def __str__(self) -> str:
        return self.colour
