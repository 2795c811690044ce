"""What must survive Redis: when each sweep runs next, which work is unsettled, and what happened."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from django.core.exceptions import ValidationError
from django.db import models, router
from django.db.models import F, Q
from django.utils.translation import gettext_lazy as _

from jobs import clock, cron

if TYPE_CHECKING:
    from collections.abc import Iterable


class PrimaryManager(models.Manager):
    """Reads from the database that is written to. A replica would be asked who holds a row, and answer the past."""

    def get_queryset(self) -> models.QuerySet[Any]:
        queryset = super().get_queryset()
        return queryset.using(self._db or router.db_for_write(self.model))


class ScheduleQuerySet(models.QuerySet["Schedule"]):
    def owed(self) -> ScheduleQuerySet:
        """Those whose run came due and has not ended yet, whether or not a message about it still exists."""
        return self.filter(due_runs__gt=F("settled_runs"))

    def owe(self) -> int:
        """Owe a run of each from now on. Returns how many schedules that were."""
        return self.update(due_runs=F("due_runs") + 1, last_enqueued_at=clock.now())


def validate_cron(expression: str) -> None:
    """Raise `ValidationError` with the reason when the cron expression cannot be read."""
    if problem := cron.problem(expression):
        raise ValidationError(problem)


class Schedule(models.Model):
    """One declared job or sweep: when it runs next, and how it went last. Made from the code by `migrate`.

    A run that came due is owed until it has ended. That is state of this row, so no loss of Redis loses a run.
    """

    name = models.CharField(_("name"), max_length=80, primary_key=True)
    cron = models.CharField(
        _("cron"),
        max_length=100,
        blank=True,
        validators=[validate_cron],
        help_text=_("Overrides the schedule in the code, in the same format. Empty: the code's."),
    )
    limit = models.PositiveIntegerField(
        _("limit"),
        null=True,
        blank=True,
        help_text=_("About this many of the sweep's jobs are queued at once. Empty: the code's."),
    )
    next_run_at = models.DateTimeField(_("next run"), null=True, editable=False)
    # Counted, not compared by time: a clock that was ahead for a moment must not hide what comes due until it is past.
    due_runs = models.PositiveBigIntegerField(_("runs that came due"), default=0, editable=False)
    settled_runs = models.PositiveBigIntegerField(_("of these settled"), default=0, editable=False)
    last_enqueued_at = models.DateTimeField(_("last enqueued"), null=True, editable=False)
    last_started_at = models.DateTimeField(_("last started"), null=True, editable=False)
    last_finished_at = models.DateTimeField(_("last finished"), null=True, editable=False)
    last_outcome = models.CharField(_("last outcome"), max_length=20, blank=True, editable=False)
    matched = models.PositiveIntegerField(_("matched"), default=0, editable=False)
    enqueued = models.PositiveIntegerField(_("enqueued"), default=0, editable=False)
    already_queued = models.PositiveIntegerField(_("already queued"), default=0, editable=False)
    waiting = models.PositiveIntegerField(_("waiting"), default=0, editable=False)

    objects = PrimaryManager.from_queryset(ScheduleQuerySet)()

    class Meta:
        verbose_name = _("schedule")
        verbose_name_plural = _("schedules")
        ordering: ClassVar = ["name"]

    def __str__(self) -> str:
        return self.name

    def start(self) -> dict[str, int]:
        """Note that a run has begun, and return what it settles: what had come due when this was read, not later."""
        type(self).objects.filter(pk=self.pk).update(last_started_at=clock.now())
        return {"settled_runs": self.due_runs}


class ClaimQuerySet(models.QuerySet["Claim"]):
    def unleased(self) -> ClaimQuerySet:
        """Those that nobody works on: no lease, or one that has expired."""
        return self.filter(Q(lease_key__isnull=True) | Q(lease_expires_at__lte=clock.now()))

    def due(self) -> ClaimQuerySet:
        """Those that may be attempted now: not leased, not backing off, not quarantined."""
        return self.unleased().filter(
            Q(next_attempt_at__isnull=True) | Q(next_attempt_at__lte=clock.now()), quarantined_at__isnull=True
        )

    def of_rows(self, job: str, model: str, pks: Iterable[str]) -> ClaimQuerySet:
        """Those of one job on the rows of a model whose primary keys, as text, are given."""
        return self.filter(job=job, model=model, object_pk__in=pks)

    def queue_now(self) -> int:
        """End the backing off: the next tick queues these rows. Returns how many; quarantined ones stay as they are."""
        return self.filter(lease_key__isnull=True, quarantined_at__isnull=True).update(next_attempt_at=None)

    def release(self) -> int:
        """Let quarantined rows be attempted again at once, as if for the first time. Returns how many those were."""
        return self.filter(quarantined_at__isnull=False).update(
            quarantined_at=None, next_attempt_at=None, attempts=0, crashes=0, deaths=0
        )


class Claim(models.Model):
    """Unsettled work on one row. It is written by conditional statements only, and gone when the work is settled.

    The lease is on the row, whichever job holds it; attempts, backing off and quarantine are the job's alone.
    """

    job = models.CharField(_("job"), max_length=80)
    model = models.CharField(_("model"), max_length=200)
    object_pk = models.TextField(_("row"))
    lease_key = models.CharField(_("lease"), max_length=250, null=True)  # noqa: DJ001  (NULLs are not equal)
    token = models.CharField(max_length=32, blank=True)
    leased_at = models.DateTimeField(_("leased since"), null=True)
    lease_expires_at = models.DateTimeField(_("leased until"), null=True)
    holder = models.CharField(_("held by"), max_length=250, blank=True)
    stopping_since = models.DateTimeField(_("its worker told to stop"), null=True)
    attempts = models.PositiveIntegerField(_("failed attempts"), default=0)
    crashes = models.PositiveIntegerField(_("crashes"), default=0, help_text=_("Attempts whose process died."))
    deaths = models.PositiveIntegerField(_("seen deaths"), default=0, help_text=_("Crashes that the worker saw."))
    next_attempt_at = models.DateTimeField(_("next attempt"), null=True)
    last_error = models.TextField(_("last error"), blank=True)
    quarantined_at = models.DateTimeField(_("quarantined"), null=True)
    first_claimed_at = models.DateTimeField(_("first claimed"))

    objects = PrimaryManager.from_queryset(ClaimQuerySet)()

    class Meta:
        verbose_name = _("claim")
        verbose_name_plural = _("claims")
        constraints: ClassVar = [
            models.UniqueConstraint(fields=["job", "model", "object_pk"], name="selfheal_one_claim_per_job_and_row"),
            # Not `unique=True`, nor `db_index=True` below: on PostgreSQL either makes a second index, for LIKE.
            models.UniqueConstraint(fields=["lease_key"], name="selfheal_one_lease_per_row"),
        ]
        indexes: ClassVar = [
            models.Index(fields=["token"], name="selfheal_claim_by_token"),
            models.Index(fields=["job", "next_attempt_at"], name="selfheal_claim_due"),
            models.Index(fields=["model", "object_pk"], name="selfheal_claim_by_row"),
        ]

    def __str__(self) -> str:
        return f"{self.job} of {self.model} {self.object_pk}"


class Run(models.Model):
    """One attempt that ended, and how. Appended, never changed; pruned after `KEEP_RUNS`."""

    class Outcome(models.TextChoices):
        DONE = "done", _("done")
        FAILED = "failed", _("failed")
        CRASHED = "crashed", _("crashed")
        INTERRUPTED = "interrupted", _("interrupted by a shutdown")
        LOST = "lost", _("lost its lease")
        RESOLVED = "resolved", _("resolved")

    job = models.CharField(_("job"), max_length=80)
    model = models.CharField(_("model"), max_length=200, blank=True)
    object_pk = models.TextField(_("row"), blank=True)
    outcome = models.CharField(_("outcome"), max_length=20, choices=Outcome)
    error = models.TextField(_("error"), blank=True)
    traceback = models.TextField(_("traceback"), blank=True)
    worker = models.CharField(_("worker"), max_length=100, blank=True)
    host = models.CharField(_("host"), max_length=100, blank=True)
    pid = models.PositiveIntegerField(_("process"), null=True)
    started_at = models.DateTimeField(_("started"), null=True)
    finished_at = models.DateTimeField(_("finished"))

    class Meta:
        verbose_name = _("run")
        verbose_name_plural = _("runs")
        ordering: ClassVar = ["-finished_at"]
        indexes: ClassVar = [
            models.Index(fields=["job", "finished_at"], name="selfheal_run_by_job"),
            models.Index(fields=["model", "object_pk"], name="selfheal_run_by_row"),
            models.Index(fields=["finished_at"], name="selfheal_run_by_time"),
        ]

    def __str__(self) -> str:
        return f"{self.job} of {self.model} {self.object_pk}: {self.outcome}"
