"""Schedules, claims and runs in the admin: to read, to steer a schedule, to send a row back to work."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from django.contrib import admin, messages
from django.db.models import Case, QuerySet, Value, When
from django.http import HttpRequest, HttpResponse
from django.utils.translation import gettext, ngettext
from django.utils.translation import gettext_lazy as _

from jobs import clock, registry, switches
from jobs.job import Job
from jobs.models import Claim, Run, Schedule
from jobs.sweep import SweepResult


class JobFilter(admin.SimpleListFilter):
    """By job, from what is declared: asking a history of millions for its distinct jobs would take a while."""

    title = _("job")
    parameter_name = "job"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        return [(each.name, each.name) for each in registry.declared()]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        return queryset.filter(job=self.value()) if self.value() else queryset


class ReadOnlyAdmin(admin.ModelAdmin):
    """Rows that the library writes. They can be looked at and acted on, not edited, added or deleted."""

    show_full_result_count = False

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def get_fields(self, request: HttpRequest, obj: Any = None) -> Any:
        # The token is what proves that a process holds a claim. It is nobody else's business.
        return [field.name for field in self.model._meta.fields if field.name not in ("id", "token")]

    def get_readonly_fields(self, request: HttpRequest, obj: Any = None) -> Any:
        return self.get_fields(request, obj)

    @admin.display(description=_("row"))
    def row(self, obj: Any) -> str:
        return f"{obj.model}\N{NO-BREAK SPACE}{obj.object_pk}"

    @admin.display(description=_("error"))
    def error_line(self, obj: Any) -> str:
        text: str = obj.error if isinstance(obj, Run) else obj.last_error
        line = text.partition("\n")[0]
        return line if len(line) <= 100 else line[:99] + "…"


@admin.register(Schedule)
class ScheduleAdmin(admin.ModelAdmin):
    """When each job and sweep runs. Its cron and its limit can be overridden; how it went can be read."""

    list_display = ["name", "runs_at", "is_enabled", "next_run_at", "last_finished_at", "last_outcome", "last_sweep"]
    search_fields = ["name"]
    fields = [field.name for field in Schedule._meta.fields]
    readonly_fields = [field.name for field in Schedule._meta.fields if field.name not in ("cron", "limit")]
    actions = ["run_now"]

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def get_queryset(self, request: HttpRequest) -> Any:
        disabled = switches.disabled(each.name for each in registry.declared())
        enabled = Case(When(name__in=disabled, then=Value(False)), default=Value(True))
        return super().get_queryset(request).annotate(enabled=enabled)

    def save_model(self, request: HttpRequest, obj: Any, form: Any, change: Any) -> None:
        """Write what can be edited, and nothing else: the tick may have moved on since the page was opened."""
        obj.save(update_fields=["cron", "limit"])

    @admin.display(description=_("cron"))
    def runs_at(self, schedule: Schedule) -> str:
        declared = registry.get(schedule.name)
        if declared is None:
            return str(_("no longer declared"))
        return (schedule.cron or declared.cron or "").replace(" ", "\N{NO-BREAK SPACE}")

    @admin.display(description=_("enabled"), boolean=True)
    def is_enabled(self, schedule: Any) -> bool:
        return bool(schedule.enabled)

    @admin.display(description=_("last sweep"))
    def last_sweep(self, schedule: Schedule) -> str:
        if not schedule.matched:
            return ""
        text = gettext("%(matched)d matched: %(enqueued)d enqueued, %(already_queued)d were, %(waiting)d waiting")
        return text % {name: getattr(schedule, name) for name in SweepResult._fields}

    @admin.action(description=_("Run the chosen schedules now"), permissions=["change"])
    def run_now(self, request: HttpRequest, chosen: Any) -> None:
        names = [each.name for each in registry.declared() if each.is_scheduled]
        owed = chosen.filter(name__in=names)
        count = owed.owe()
        for schedule in owed:
            self.log_change(request, schedule, [{"changed": {"fields": ["last_enqueued_at"]}}])
        text = ngettext(
            "%d run is owed; the next tick queues it.", "%d runs are owed; the next tick queues them.", count
        )
        self.message_user(request, text % count, messages.SUCCESS if count else messages.WARNING)


class StateFilter(admin.SimpleListFilter):
    title = _("state")
    parameter_name = "state"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, Any]]:
        return [
            ("leased", _("leased")),
            ("due", _("may be attempted now")),
            ("waiting", _("backing off")),
            ("quarantined", _("quarantined")),
        ]

    def queryset(self, request: HttpRequest, queryset: Any) -> Any:
        match self.value():
            case "leased":
                return queryset.filter(lease_expires_at__gt=clock.now())
            case "due":
                return queryset.due()
            case "waiting":
                return queryset.unleased().filter(next_attempt_at__gt=clock.now(), quarantined_at__isnull=True)
            case "quarantined":
                return queryset.filter(quarantined_at__isnull=False)
        return queryset


@admin.register(Claim)
class ClaimAdmin(ReadOnlyAdmin):
    """Work that is not settled: who is at it, what it waits for, or why it was set aside."""

    list_display = ["row", "job", "state", "attempts", "crashes", "next_attempt_at", "error_line"]
    list_filter = [StateFilter, JobFilter]
    search_fields = ["job", "model", "object_pk", "last_error", "holder"]
    ordering = ["pk"]
    actions = ["queue_now", "release"]

    @admin.display(description=_("state"))
    def state(self, claim: Claim) -> Any:
        if claim.quarantined_at:
            return _("quarantined")
        if claim.lease_key:
            return _("leased, its worker stops") if claim.stopping_since else _("leased")
        return _("backing off") if claim.next_attempt_at else _("waiting for a worker")

    @admin.action(description=_("Queue now: end the backing off of the chosen rows"), permissions=["change"])
    def queue_now(self, request: HttpRequest, chosen: Any) -> None:
        self._send_back(request, chosen.filter(quarantined_at__isnull=True), chosen.queue_now)

    @admin.action(description=_("Release the chosen rows from quarantine, and queue them"), permissions=["change"])
    def release(self, request: HttpRequest, chosen: Any) -> None:
        self._send_back(request, chosen.filter(quarantined_at__isnull=False), chosen.release)

    def response_change(self, request: HttpRequest, obj: Claim) -> HttpResponse:
        """Do what the button on its page says."""
        chosen = Claim.objects.filter(pk=obj.pk)
        if "_release" in request.POST:
            self.release(request, chosen)
        elif "_queue_now" in request.POST:
            self.queue_now(request, chosen)
        return self.response_post_save_change(request, obj)

    def log_change(self, request: HttpRequest, obj: Any, message: Any) -> Any:
        """Log the buttons and actions, not that a page without a field was sent."""
        return super().log_change(request, obj, message) if message else None

    def save_model(self, request: HttpRequest, obj: Any, form: Any, change: Any) -> None:
        """Write nothing: claims change by conditional statements only."""

    def _send_back(self, request: HttpRequest, chosen: Any, change: Any) -> None:
        """Change the claims, which is what counts, and give their rows a push, which saves waiting for the tick."""
        rows: dict[str, list[str]] = defaultdict(list)
        for claim in chosen:
            rows[claim.job].append(claim.object_pk)
            self.log_change(request, claim, [{"changed": {"fields": ["next_attempt_at", "quarantined_at"]}}])
        count = change()
        for name, pks in rows.items():
            if isinstance(job := registry.get(name), Job) and job.is_swept:
                job.enqueue_many(pks)
        text = ngettext("%d row may be attempted again now.", "%d rows may be attempted again now.", count)
        self.message_user(request, text % count, messages.SUCCESS if count else messages.WARNING)


@admin.register(Run)
class RunAdmin(ReadOnlyAdmin):
    """What happened: one line for each attempt that ended."""

    list_display = ["finished_at", "row", "job", "outcome", "error_line"]
    list_filter = ["outcome", JobFilter, "finished_at"]
    search_fields = ["job", "model", "object_pk", "error", "worker"]

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False
