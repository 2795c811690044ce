"""What must survive Redis: when each sweep runs next, which work is unsettled, and what happened."""

from __future__ import annotations

import functools
import operator
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, ClassVar

from django.core.exceptions import ValidationError
from django.db import models, router
from django.db.models import Exists, F, OuterRef, Q
from django.utils.translation import gettext_lazy as _

from jobs import clock, cron, registry

if TYPE_CHECKING:
    from collections.abc import Iterable


# PostgreSQL does, and so does every SQLite of today. Said so, or a system check asks the database: a worker that is
# started while that is away would not start.
KNOWN_TO_KNOW_JSON = ["supports_json_field"]


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


def validate_limit(limit: int) -> None:
    """Raise `ValidationError` for a limit with which a sweep would find nothing, and say nothing."""
    if limit < 1:
        raise ValidationError(_("Give a number from 1. So that nothing is queued, pause it instead."))


class Schedule(models.Model):
    """One declared job or sweep: when it runs next, and how it went last. Made from the code by `migrate`.

    A run that came due is owed until it has ended. That is state of this row, so no loss of Redis loses a run.
    """

    name = models.CharField(_("name"), max_length=80, primary_key=True)
    cron = models.CharField(
        _("cron"),
        max_length=100,
        blank=True,
        default="",
        db_default="",
        validators=[validate_cron],
        help_text=_("Overrides the schedule in the code, in the same format. Empty: the code's."),
    )
    limit = models.PositiveIntegerField(
        _("limit"),
        null=True,
        blank=True,
        validators=[validate_limit],
        help_text=_("About this many of the sweep's jobs are queued at once. Empty: the code's."),
    )
    next_run_at = models.DateTimeField(_("next run"), null=True, editable=False)
    # Counted, not compared by time: a clock that was ahead for a moment must not hide what comes due until it is past.
    due_runs = models.PositiveBigIntegerField(_("runs that came due"), default=0, db_default=0, editable=False)
    settled_runs = models.PositiveBigIntegerField(_("of these settled"), default=0, db_default=0, editable=False)
    last_enqueued_at = models.DateTimeField(_("last enqueued"), null=True, editable=False)
    last_started_at = models.DateTimeField(_("last started"), null=True, editable=False)
    last_finished_at = models.DateTimeField(_("last finished"), null=True, editable=False)
    last_outcome = models.CharField(
        _("last outcome"), max_length=20, blank=True, default="", db_default="", editable=False
    )
    last_succeeded_at = models.DateTimeField(_("last succeeded"), null=True, editable=False)
    # Who paused it, and why. Whether it is paused is said by its switch alone.
    paused_at = models.DateTimeField(_("paused since"), null=True, editable=False)
    paused_until = models.DateTimeField(_("paused until"), null=True, editable=False)
    paused_by = models.CharField(_("paused by"), max_length=150, blank=True, default="", db_default="", editable=False)
    paused_reason = models.CharField(
        _("reason for the pause"), max_length=500, blank=True, default="", db_default="", editable=False
    )
    matched = models.PositiveIntegerField(_("matched"), default=0, db_default=0, editable=False)
    enqueued = models.PositiveIntegerField(_("enqueued"), default=0, db_default=0, editable=False)
    already_queued = models.PositiveIntegerField(_("already queued"), default=0, db_default=0, editable=False)
    waiting = models.PositiveIntegerField(_("waiting"), default=0, db_default=0, editable=False)

    objects = PrimaryManager.from_queryset(ScheduleQuerySet)()

    class Meta:
        verbose_name = _("schedule")
        verbose_name_plural = _("schedules")
        ordering: ClassVar = ["name"]
        permissions: ClassVar = [
            ("pause_schedule", _("Can pause and resume jobs and sweeps")),
            ("run_schedule", _("Can run sweeps and cron jobs now")),
        ]

    def __str__(self) -> str:
        return self.name

    def start(self) -> dict[str, int]:
        """Note that a run has begun, and return what it settles: what had come due when this was read, not later."""
        type(self).objects.filter(pk=self.pk).update(last_started_at=clock.now())
        return {"settled_runs": self.due_runs}


class Health(Schedule):
    """The page that says whether all is well. Its name is what puts it first in the admin."""

    class Meta:
        proxy = True
        verbose_name = _("health")
        verbose_name_plural = _("at a glance")
        default_permissions = ("view",)


def is_left_behind(job: str, model: str) -> bool:
    """Whether no job of that name works on rows of that model any more."""
    declared = registry.get(job)
    return declared is None or not declared.works_on(model)


class ClaimQuerySet(models.QuerySet["Claim"]):
    def matching(self, *, job: str = "", state: str = "", search: str = "") -> ClaimQuerySet:
        """Those that an operator's filter finds: of this job, in this state, with each word somewhere in their text.

        Raises `KeyError` for a state that there is not, rather than find everything.
        """
        found: ClaimQuerySet = self.filter(job=job) if job else self.all()
        if state:
            found = {
                "leased": found.leased,
                "due": found.due,
                "in_line": found.in_line,
                "waiting": found.waiting,
                "quarantined": found.quarantined,
                "left_behind": found.left_behind,
            }[state]()
        for word in search.split():
            holds = (Q(**{f"{field}__icontains": word}) for field in self.model.SEARCHED)
            found = found.filter(functools.reduce(operator.or_, holds))
        return found

    def leased(self) -> ClaimQuerySet:
        """Those that somebody works on."""
        return self.filter(lease_key__isnull=False, lease_expires_at__gt=clock.now())

    def unleased(self) -> ClaimQuerySet:
        """Those that nobody works on: no lease, or one that has expired."""
        return self.filter(Q(lease_key__isnull=True) | Q(lease_expires_at__lte=clock.now()))

    def due(self) -> ClaimQuerySet:
        """Those that may be attempted now: not leased, for another job neither, not backing off, not quarantined."""
        return self._in_time().exclude(self.row_is_leased())

    def in_line(self) -> ClaimQuerySet:
        """Those that another job is in the way of, which has the row: they are queued when it is free."""
        return self._in_time().filter(self.row_is_leased())

    def _in_time(self) -> ClaimQuerySet:
        return self.unleased().filter(
            Q(next_attempt_at__isnull=True) | Q(next_attempt_at__lte=clock.now()), quarantined_at__isnull=True
        )

    def row_is_leased(self) -> Exists:
        """The condition that somebody works on the row, whichever job that is for."""
        return Exists(type(self)(self.model).leased().filter(model=OuterRef("model"), object_pk=OuterRef("object_pk")))

    def waiting(self) -> ClaimQuerySet:
        """Those that are backing off."""
        return self.unleased().filter(next_attempt_at__gt=clock.now(), quarantined_at__isnull=True)

    def quarantined(self) -> ClaimQuerySet:
        return self.filter(quarantined_at__isnull=False)

    def left_behind(self) -> ClaimQuerySet:
        """Those that no job works off: theirs is not declared any more, or works on rows of another model by now."""
        found = type(self)(self.model, using=self.db).order_by().values_list("job", "model").distinct()
        left = [Q(job=job, model=model) for job, model in found if is_left_behind(job, model)]
        # No name is empty, so there may be none of them and still a statement.
        return self.filter(functools.reduce(operator.or_, left, Q(job="")))

    def of_rows(self, job: str, model: str, pks: Iterable[str]) -> ClaimQuerySet:
        """Those of one job on the rows of a model whose primary keys, as text, are given."""
        return self.filter(job=job, model=model, object_pk__in=pks)

    def can(self, action: str) -> ClaimQuerySet:
        """Those of these to which an operator's action can be done: what is worked on is left alone.

        A run of a schedule is not set aside, which would end its schedule for good: it is paused.
        """
        if action == Operation.Action.RELEASE:
            return self.quarantined()
        idle = self.filter(lease_key__isnull=True, quarantined_at__isnull=True)
        return idle.exclude(model="selfheal.schedule") if action == Operation.Action.QUARANTINE else idle

    def queue_now(self) -> int:
        """End the backing off: the next tick queues these rows. Returns how many; quarantined ones stay as they are."""
        return self.can("queue_now").update(next_attempt_at=None)

    def release(self) -> int:
        """Let quarantined rows be attempted again at once, as if for the first time. Returns how many those were."""
        anew = {"next_attempt_at": None, "attempts": 0, "crashes": 0, "deaths": 0}
        return self.can("release").update(quarantined_at=None, unmatched_since=None, **anew)

    def quarantine(self) -> int:
        """Set rows aside until somebody releases them. Returns how many; those that are worked on stay as they are."""
        return self.can("quarantine").update(quarantined_at=clock.now(), unmatched_since=None)


class Claim(models.Model):
    """Unsettled work on one row. It is written by conditional statements only, and gone when the work is settled.

    The lease is on the row, whichever job holds it; attempts, backing off and quarantine are the job's alone.
    """

    # Where an operator's search looks.
    SEARCHED = ("job", "model", "object_pk", "last_error", "holder")

    job = models.CharField(_("job"), max_length=80)
    model = models.CharField(_("model"), max_length=200)
    object_pk = models.TextField(_("row"))
    lease_key = models.CharField(_("lease"), max_length=250, null=True)  # noqa: DJ001  (NULLs are not equal)
    token = models.CharField(max_length=32, blank=True, default="", db_default="")
    leased_at = models.DateTimeField(_("leased since"), null=True)
    lease_expires_at = models.DateTimeField(_("leased until"), null=True)
    holder = models.CharField(_("held by"), max_length=250, blank=True, default="", db_default="")
    stopping_since = models.DateTimeField(_("its worker told to stop"), null=True)
    attempts = models.PositiveIntegerField(_("failed attempts"), default=0, db_default=0)
    crashes = models.PositiveIntegerField(
        _("crashes"), default=0, db_default=0, help_text=_("Attempts whose process died.")
    )
    deaths = models.PositiveIntegerField(
        _("seen deaths"), default=0, db_default=0, help_text=_("Crashes that the worker saw.")
    )
    next_attempt_at = models.DateTimeField(_("next attempt"), null=True)
    last_error = models.TextField(_("last error"), blank=True, default="", db_default="")
    quarantined_at = models.DateTimeField(_("quarantined"), null=True)
    # Since when a sweep finds that it does not match a quarantined row.
    unmatched_since = models.DateTimeField(_("does not match since"), null=True)
    first_claimed_at = models.DateTimeField(_("first claimed"))

    objects = PrimaryManager.from_queryset(ClaimQuerySet)()

    class Meta:
        verbose_name = _("claim")
        verbose_name_plural = _("claims")
        permissions: ClassVar = [("retry_claim", _("Can queue rows now, quarantine and release them"))]
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

    @property
    def is_left_behind(self) -> bool:
        """Whether no job works it off any more."""
        return is_left_behind(self.job, self.model)


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
    model = models.CharField(_("model"), max_length=200, blank=True, default="", db_default="")
    object_pk = models.TextField(_("row"), blank=True, default="", db_default="")
    outcome = models.CharField(_("outcome"), max_length=20, choices=Outcome)
    error = models.TextField(_("error"), blank=True, default="", db_default="")
    # Of the error, see `jobs.fingerprint`.
    fingerprint = models.CharField(max_length=32, blank=True, default="", db_default="", editable=False)
    traceback = models.TextField(_("traceback"), blank=True, default="", db_default="")
    worker = models.CharField(_("worker"), max_length=100, blank=True, default="", db_default="")
    host = models.CharField(_("host"), max_length=100, blank=True, default="", db_default="")
    pid = models.PositiveIntegerField(_("process"), null=True)
    first_claimed_at = models.DateTimeField(_("first claimed"), null=True)
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
            models.Index(
                fields=["fingerprint", "finished_at"], name="selfheal_run_by_error", condition=~Q(fingerprint="")
            ),
        ]

    def __str__(self) -> str:
        return f"{self.job} of {self.model} {self.object_pk}: {self.outcome}"

    @property
    def took(self) -> str:
        """How long the attempt took, to be read."""
        if self.started_at is None:
            return ""
        seconds = (self.finished_at - self.started_at).total_seconds()
        return f"{seconds:.1f}\N{NO-BREAK SPACE}s" if seconds < 60 else str(timedelta(seconds=round(seconds)))


class Tally(models.Model):
    """How many runs of a job ended in one way within one hour, and how long they took. Counted again from the runs.

    A failure counts with its like: `fingerprint` is that of its error without what differs from row to row. Failures
    older than `KEEP_RUNS`, and all else from a day on, are added up in one tally for each job and outcome, whose hour
    is `BEFORE`.
    """

    BEFORE = datetime(1970, 1, 1, tzinfo=UTC)

    hour = models.DateTimeField(_("hour"))
    job = models.CharField(_("job"), max_length=80)
    outcome = models.CharField(_("outcome"), max_length=20, choices=Run.Outcome)
    fingerprint = models.CharField(max_length=32, blank=True, default="", db_default="")
    error = models.TextField(_("error"), blank=True, default="", db_default="")
    runs = models.PositiveBigIntegerField(_("runs"), default=0, db_default=0)
    # How many of them took up to each of `jobs.tallies.BOUNDS`, from the start of the run, and from the first claim.
    took = models.JSONField(_("took"), default=list, db_default=[])
    settled_after = models.JSONField(_("settled after"), default=list, db_default=[])

    class Meta:
        verbose_name = _("tally")
        verbose_name_plural = _("tallies")
        default_permissions = ()
        required_db_features: ClassVar = KNOWN_TO_KNOW_JSON
        constraints: ClassVar = [
            models.UniqueConstraint(
                fields=["hour", "job", "outcome", "fingerprint"], name="selfheal_one_tally_per_hour"
            ),
        ]

    def __str__(self) -> str:
        return f"{self.job} {self.outcome} {self.hour:%Y-%m-%d %H:00}: {self.runs}"


class Failure(Tally):
    """The page on which failures are seen with their like."""

    class Meta:
        proxy = True
        verbose_name = _("failure")
        verbose_name_plural = _("failures")
        default_permissions = ("view",)


class OperationQuerySet(models.QuerySet["Operation"]):
    def unfinished(self) -> OperationQuerySet:
        return self.filter(finished_at__isnull=True).order_by("pk")


class Operation(models.Model):
    """What an operator wants done with all claims that match a filter: work like any other, done a batch at a time."""

    class Action(models.TextChoices):
        QUEUE_NOW = "queue_now", _("queue now")
        RELEASE = "release", _("release")
        QUARANTINE = "quarantine", _("quarantine")

    action = models.CharField(_("action"), max_length=20, choices=Action, editable=False)
    # The names and values of `ClaimQuerySet.matching`.
    filter = models.JSONField(_("filter"), default=dict, db_default={}, editable=False)
    # Claims that are made later are not meant.
    last_pk = models.BigIntegerField(_("up to claim"), editable=False)
    at_pk = models.BigIntegerField(_("has come to claim"), default=0, db_default=0, editable=False)
    total = models.PositiveBigIntegerField(_("rows"), default=0, db_default=0, editable=False)
    seen = models.PositiveBigIntegerField(_("looked at"), default=0, db_default=0, editable=False)
    changed = models.PositiveBigIntegerField(_("changed"), default=0, db_default=0, editable=False)
    requested_by = models.CharField(
        _("requested by"), max_length=150, blank=True, default="", db_default="", editable=False
    )
    requested_at = models.DateTimeField(_("requested"), editable=False)
    finished_at = models.DateTimeField(_("finished"), null=True, editable=False)

    objects = PrimaryManager.from_queryset(OperationQuerySet)()

    class Meta:
        verbose_name = _("operation")
        verbose_name_plural = _("operations")
        default_permissions = ("view",)
        required_db_features: ClassVar = KNOWN_TO_KNOW_JSON
        ordering: ClassVar = ["-pk"]
        indexes: ClassVar = [
            models.Index(fields=["id"], name="selfheal_operation_unfinished", condition=Q(finished_at__isnull=True)),
        ]

    def __str__(self) -> str:
        return f"{self.get_action_display()} {self.total}"
