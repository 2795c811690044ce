"""The pages of operators: to read, to steer a schedule, to send a row back to work, and to learn why it is not ready.

Whoever may view may read. To pause, to run and to send back to work are permissions of their own: without them nothing
of it is offered, and what is sent all the same is refused. Nothing is done by a GET, and all that is done is logged.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime, timedelta
from functools import cache
from typing import Any

from django import forms
from django.contrib import admin, messages
from django.contrib.admin.helpers import ACTION_CHECKBOX_NAME
from django.db import models
from django.db.models import Case, Q, QuerySet, Value, When
from django.http import HttpRequest, HttpResponse
from django.templatetags.static import static
from django.urls import reverse
from django.utils import timezone
from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString
from django.utils.translation import gettext, ngettext
from django.utils.translation import gettext_lazy as _

from jobs import clock, operations, pauses, registry
from jobs.exceptions import QueueUnavailable
from jobs.explain import Explanation, explain, said_of_distance, said_of_pause, said_of_time
from jobs.models import Claim, Operation, Run, Schedule
from jobs.pages import ErrorFilter
from jobs.pauses import Pause
from jobs.steering import (
    PATIENCE,
    STEERING,
    ExplainedAdmin,
    ReadOnly,
    SteeringAdmin,
    buttons,
    dry_run,
    log,
    resume,
    run_now,
)
from jobs.sweep import Sweep, SweepResult

# For the `ModelAdmin` of your own models.
__all__ = ["ExplainedAdmin"]


class JobFilter(admin.SimpleListFilter):
    """By job, from what is declared: asking a history of millions for its distinct jobs would take a while."""

    title = _("job")
    parameter_name = "job"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        return [(each.name, each.name) for each in registry.declared()]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        return queryset.filter(job=self.value()) if self.value() else queryset


def _names_of(model: Any) -> list[str]:
    return [field.name for field in model._meta.fields]


@cache
def _time(field: models.DateTimeField[Any, Any]) -> Callable[[Any], SafeString | None]:
    """Return what shows a time with its zone and how long ago it is; always the same, as the admin compares them."""

    @admin.display(description=field.verbose_name, ordering=field.name, empty_value="-")
    def shown(obj: Any) -> SafeString | None:
        moment: datetime | None = getattr(obj, field.attname)
        if moment is None:
            return None
        now = timezone.now() if timezone.is_aware(moment) else datetime.now()
        texts = (moment.isoformat(), said_of_time(moment), said_of_distance(moment, now))
        return format_html('<time datetime="{}">{}</time> ({})', *texts)

    return shown


class TimesAdmin(admin.ModelAdmin):
    """Shows the times of a row with their zone, where Django would show them without."""

    def get_list_display(self, request: HttpRequest) -> Any:
        return self._with_times(super().get_list_display(request))

    def get_fieldsets(self, request: HttpRequest, obj: Any = None) -> Any:
        fieldsets = super().get_fieldsets(request, obj)
        times = self._times()
        if obj is None or self.has_change_permission(request, obj):
            # A time that can be edited is shown as Django does it.
            shown = self.get_readonly_fields(request, obj)
            times = {name: time for name, time in times.items() if time in shown}
        return [
            (title, {**options, "fields": [times.get(name, name) for name in options["fields"]]})
            for title, options in fieldsets
        ]

    def get_readonly_fields(self, request: HttpRequest, obj: Any = None) -> Any:
        return self._with_times(super().get_readonly_fields(request, obj))

    def _with_times(self, names: Iterable[Any]) -> list[Any]:
        times = self._times()
        return [times.get(name, name) for name in names]

    def _times(self) -> dict[Any, Callable[[Any], SafeString | None]]:
        fields = self.model._meta.fields
        return {field.name: _time(field) for field in fields if isinstance(field, models.DateTimeField)}


# --- Schedules --------------------------------------------------------------------------------------------------------


class PauseForm(forms.Form):
    """Why, and for how long."""

    LONG = {"30m": timedelta(minutes=30), "2h": timedelta(hours=2), "1d": timedelta(days=1), "": None}

    reason = forms.CharField(
        label=_("Reason"), max_length=500, required=False, help_text=_("For whoever wonders why it does not run.")
    )
    how_long = forms.ChoiceField(
        label=_("For how long"),
        choices=[
            ("30m", _("30 minutes")),
            ("2h", _("2 hours")),
            ("1d", _("1 day")),
            ("", _("until somebody resumes it")),
        ],
        required=False,
        initial="2h",
        widget=forms.RadioSelect,
    )


@admin.register(Schedule)
class ScheduleAdmin(SteeringAdmin, TimesAdmin):
    """When each job and sweep runs, and how that went. It can be paused, run now, and run for show."""

    list_display = ["name", "runs_at", "is_enabled", "next_run_at", "last_finished_at", "last_outcome", "last_sweep"]
    search_fields = ["name"]
    fieldsets = [
        (None, {"fields": ["name", "is_enabled", "runs_at", "cron", "limit"]}),
        (
            _("Runs"),
            {
                "fields": [
                    "next_run_at",
                    "due_runs",
                    "settled_runs",
                    "last_enqueued_at",
                    "last_started_at",
                    "last_finished_at",
                    "last_outcome",
                    "last_succeeded_at",
                ]
            },
        ),
        (_("Last sweep"), {"fields": ["matched", "enqueued", "already_queued", "waiting"]}),
    ]
    actions = ["pause", "resume", "run_now", "dry_run"]
    change_form_template = "admin/selfheal/schedule_change_form.html"

    class Media:
        css = {"all": ["jobs/explain.css"]}

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def get_readonly_fields(self, request: HttpRequest, obj: Any = None) -> Any:
        declared = registry.get(obj.name) if obj else None
        steered = {"cron"} if declared and declared.is_scheduled else set()
        if isinstance(declared, Sweep):
            steered.add("limit")
        return self._with_times(["runs_at", "is_enabled", *(n for n in _names_of(Schedule) if n not in steered)])

    def get_object(self, request: HttpRequest, object_id: str, from_field: str | None = None) -> Any:
        # PostgreSQL cannot even be asked for such a name.
        return None if "\0" in object_id else super().get_object(request, object_id, from_field)

    def get_changelist_instance(self, request: HttpRequest) -> Any:
        """Read the pauses of all that is shown at once."""
        changelist = super().get_changelist_instance(request)
        paused = pauses.read()
        for schedule in changelist.result_list:
            schedule.pauses = _that_stop(schedule, paused)
        return changelist

    def save_model(self, request: HttpRequest, obj: Any, form: Any, change: Any) -> None:
        """Write what can be edited, and nothing else: the tick may have moved on since the page was opened."""
        obj.save(update_fields=form.changed_data)

    def render_change_form(self, request: HttpRequest, context: Any, *args: Any, **kwargs: Any) -> HttpResponse:
        if schedule := context.get("original"):
            declared = registry.get(schedule.name)
            offered = []
            if declared is not None and declared.has_switch:
                offered.append("resume" if schedule.name in pauses.read([schedule.name]) else "pause")
            if declared is not None and declared.is_scheduled:
                offered.append("run_now")
            if isinstance(declared, Sweep):
                offered.append("dry_run")
            fields = {ACTION_CHECKBOX_NAME: schedule.pk, "next": request.get_full_path()}
            url = reverse(f"{self.admin_site.name}:selfheal_schedule_changelist")
            context["buttons"] = buttons(request, url, fields, offered)
        return super().render_change_form(request, context, *args, **kwargs)

    @admin.display(description=_("runs at"))
    def runs_at(self, schedule: Schedule) -> str:
        declared = registry.get(schedule.name)
        if declared is None:
            return str(_("no longer declared"))
        if not declared.is_scheduled:
            # What is left of a time when it was.
            return ""
        return (schedule.cron or declared.cron or "").replace(" ", "\N{NO-BREAK SPACE}")

    @admin.display(description=_("enabled"))
    def is_enabled(self, schedule: Any) -> str:
        paused = schedule.pauses if hasattr(schedule, "pauses") else _that_stop(schedule, pauses.read())
        if not paused:
            return format_html('<img src="{}" alt="{}">', static("admin/img/icon-yes.svg"), gettext("enabled"))
        icon = format_html('<img src="{}" alt="{}">', static("admin/img/icon-no.svg"), gettext("paused"))
        return icon + format_html_join("", " {}", ((said_of_pause(pause),) for pause in paused))

    @admin.display(description=_("last sweep"))
    def last_sweep(self, schedule: Schedule) -> str:
        if not schedule.matched:
            return ""
        text = gettext("%(matched)d matched: %(enqueued)d enqueued, %(already_queued)d already, %(waiting)d waiting")
        return text % {name: getattr(schedule, name) for name in SweepResult._fields}

    @admin.action(description=_("Pause the chosen jobs and sweeps…"), permissions=["pause"])
    def pause(self, request: HttpRequest, chosen: Any) -> HttpResponse | None:
        form = PauseForm(request.POST if "confirmed" in request.POST else None)
        if not form.is_valid():
            sentence = gettext("None of these begins before the pause ends; what is at work finishes. Nothing is lost.")
            title = gettext("Pause")
            return self.ask(request, "pause", chosen, title=title, sentence=sentence, rows=chosen, form=form)
        long = PauseForm.LONG[form.cleaned_data["how_long"]]
        until = clock.read() + long if long else None
        for schedule in chosen:
            reason = form.cleaned_data["reason"]
            try:
                pauses.pause(schedule.name, reason=reason, until=until, by=request.user.get_username())
            except ValueError as error:
                self.message_user(request, str(error), messages.WARNING)
                continue
            said = said_of_pause(pauses.read([schedule.name])[schedule.name])
            log(request, [schedule], said)
            self.message_user(request, said, messages.SUCCESS)
        return self.back(request)

    @admin.action(description=_("Resume the chosen jobs and sweeps"), permissions=["pause"])
    def resume(self, request: HttpRequest, chosen: Any) -> HttpResponse | None:
        return self._tell(request, [resume(request, schedule) for schedule in chosen])

    @admin.action(description=_("Run the chosen schedules now"), permissions=["run"])
    def run_now(self, request: HttpRequest, chosen: Any) -> HttpResponse | None:
        return self._tell(request, [run_now(request, schedule) for schedule in chosen])

    @admin.action(description=_("Dry run: what the chosen sweeps would do now"), permissions=["run"])
    def dry_run(self, request: HttpRequest, chosen: Any) -> HttpResponse | None:
        results: list[operations.Result] = []
        until = time.monotonic() + PATIENCE.total_seconds()
        for schedule in chosen:
            if time.monotonic() > until:
                results.append(operations.Result(False, gettext("Whatever else was chosen was not asked about.")))
                break
            try:
                results.append(dry_run(schedule, until))
            except QueueUnavailable as error:
                results.append(operations.Result(False, str(error)))
                # A Redis that hangs would hang for each of them.
                until = 0.0
        return self._tell(request, results)

    def _tell(self, request: HttpRequest, results: list[operations.Result]) -> HttpResponse | None:
        for result in results:
            self.message_user(request, result.sentence, messages.SUCCESS if result.changed else messages.WARNING)
        return self.back(request)


def _that_stop(schedule: Schedule, paused: dict[str, Pause]) -> list[Pause]:
    """Return the pauses that stop it: its own, and of a sweep that of its job."""
    declared = registry.get(schedule.name)
    return [paused[name] for name in sorted(declared.switches) if name in paused] if declared else []


# --- Claims and operations --------------------------------------------------------------------------------------------


class ReadOnlyAdmin(ReadOnly, TimesAdmin):
    """Rows that the library writes. They can be looked at and acted on, not edited, added or deleted."""

    show_full_result_count = False

    def get_fields(self, request: HttpRequest, obj: Any = None) -> Any:
        # The token is what proves that a process holds a claim. It is nobody else's business.
        return [name for name in _names_of(self.model) if name not in ("id", "token")]

    def get_readonly_fields(self, request: HttpRequest, obj: Any = None) -> Any:
        return self._with_times(self.get_fields(request, obj))

    @admin.display(description=_("row"))
    def row(self, obj: Any) -> str:
        return f"{obj.model} {obj.object_pk}"

    @admin.display(description=_("error"))
    def error_line(self, obj: Any) -> str:
        text: str = obj.error if isinstance(obj, Run) else obj.last_error
        line = text.partition("\n")[0]
        return line if len(line) <= 100 else line[:99] + "…"


# Of `ClaimQuerySet.matching`.
STATES = {
    "leased": _("leased"),
    "due": _("may be attempted now"),
    "in_line": _("waits for the job that holds the row"),
    "waiting": _("backing off"),
    "quarantined": _("quarantined"),
    "left_behind": _("no job works it off any more"),
}


class StateFilter(admin.SimpleListFilter):
    title = _("state")
    parameter_name = "state"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, Any]]:
        return list(STATES.items())

    def queryset(self, request: HttpRequest, queryset: Any) -> Any:
        return queryset.matching(state=self.value()) if self.value() in STATES else queryset


@admin.register(Claim)
class ClaimAdmin(ExplainedAdmin, SteeringAdmin, ReadOnlyAdmin):
    """Work that is not settled: who is at it, what it waits for, or why it was set aside."""

    list_display = ["row", "job", "state", "attempts", "crashes", "next_attempt_at", "error_line"]
    list_filter = [StateFilter, JobFilter]
    search_fields = Claim.SEARCHED
    ordering = ["pk"]
    actions = ["queue_now", "release", "quarantine"]

    def explanations(self, obj: Claim, ask_redis: bool = True) -> Iterator[Explanation]:
        """Explain the row that is claimed, for the job that it is claimed for."""
        yield explain(obj.job, obj.object_pk, model=obj.model, ask_redis=ask_redis)

    def return_to(self, request: HttpRequest, obj: Claim) -> str:
        """Where one is afterwards: in the list as it was filtered, since the claim may be settled by then."""
        changelist = reverse(f"{self.admin_site.name}:selfheal_claim_changelist")
        return f"{changelist}?{request.GET.get('_changelist_filters', '')}".rstrip("?")

    def get_search_results(self, request: HttpRequest, queryset: Any, search_term: str) -> tuple[Any, bool]:
        """Search as an operation does."""
        return queryset.matching(search=search_term), False

    def get_queryset(self, request: HttpRequest) -> Any:
        """Ask the clock by which the filter goes, too, in which state each claim is."""
        now = clock.now()
        is_leased = Q(lease_key__isnull=False, lease_expires_at__gt=now)
        states = (
            When(quarantined_at__isnull=False, then=Value("quarantined")),
            When(is_leased, then=Value("leased")),
            When(next_attempt_at__gt=now, then=Value("waiting")),
            When(Claim.objects.all().row_is_leased(), then=Value("in_line")),
        )
        return super().get_queryset(request).annotate(state=Case(*states, default=Value("due")))

    @admin.display(description=_("state"))
    def state(self, claim: Any) -> Any:
        if claim.is_left_behind:
            return STATES["left_behind"]
        return (
            _("leased, its worker stops") if claim.state == "leased" and claim.stopping_since else STATES[claim.state]
        )

    @admin.action(description=_("Queue now: end the backing off of the chosen rows"), permissions=["retry"])
    def queue_now(self, request: HttpRequest, chosen: Any) -> HttpResponse | None:
        return self._operate(request, "queue_now", chosen)

    @admin.action(description=_("Release the chosen rows from quarantine, and queue them"), permissions=["retry"])
    def release(self, request: HttpRequest, chosen: Any) -> HttpResponse | None:
        return self._operate(request, "release", chosen)

    @admin.action(description=_("Quarantine the chosen rows…"), permissions=["retry"])
    def quarantine(self, request: HttpRequest, chosen: Any) -> HttpResponse | None:
        if "confirmed" not in request.POST:
            count = chosen.count()
            sentence = ngettext(
                "%d row is set aside: no job works on it until somebody releases it.",
                "%d rows are set aside: no job works on them until somebody releases them.",
                count,
            )
            title = gettext("Quarantine?")
            rows = chosen[:20]
            return self.ask(request, "quarantine", chosen, title=title, sentence=sentence % count, rows=rows)
        return self._operate(request, "quarantine", chosen)

    def _operate(self, request: HttpRequest, action: str, chosen: Any) -> HttpResponse | None:
        """Do it at once to as many as a request can bear, and have it done to more."""
        pks = list(chosen.values_list("pk", flat=True)[: operations.AT_ONCE + 1])
        if len(pks) > operations.AT_ONCE:
            self._request(request, action)
            return None
        changed = operations.apply(action, Claim.objects.filter(pk__in=pks))
        if action != Operation.Action.QUARANTINE:
            operations.push(changed)
        if changed:
            log(request, changed, str(STEERING[action][1]))
        removed = sum(claim.is_left_behind for claim in changed) if action != Operation.Action.QUARANTINE else 0
        self._say(request, action, len(changed) - removed, removed, len(pks) - len(changed))
        return None

    def _say(self, request: HttpRequest, action: str, changed: int, removed: int, left: int) -> None:
        if action == Operation.Action.QUARANTINE:
            text = ngettext("%d row is quarantined.", "%d rows are quarantined.", changed)
        else:
            text = ngettext("%d row may be attempted again now.", "%d rows may be attempted again now.", changed)
        if changed or not removed:
            self.message_user(request, text % changed, messages.SUCCESS if changed else messages.WARNING)
        if removed:
            text = ngettext(
                "%d claim is removed: no job works it off any more.",
                "%d claims are removed: no job works them off any more.",
                removed,
            )
            self.message_user(request, text % removed, messages.SUCCESS)
        if not left:
            return
        if action == Operation.Action.RELEASE:
            text = ngettext("%d row was not quarantined.", "%d rows were not quarantined.", left)
        else:
            text = ngettext(
                "%d row stays as it is: it is being worked on (pause the job, or wait), or it is quarantined already.",
                "%d rows stay as they are: being worked on (pause the job, or wait), or quarantined already.",
                left,
            )
        self.message_user(request, text % left, messages.WARNING)

    def _request(self, request: HttpRequest, action: str) -> None:
        """Have it done to all that the list shows, in the background."""
        given = {"job": request.GET.get("job"), "state": request.GET.get("state"), "search": request.GET.get("q")}
        criteria = {name: value for name, value in given.items() if value}
        is_known = request.GET.keys() <= {"job", "state", "q", "o", "p"} and criteria.get("state", "due") in STATES
        if request.POST.get("select_across") != "1" or not is_known:
            # Never to more than was seen: another filter than these is none that an operation knows.
            text = gettext("More than %d rows: filter them by job, state and search only, and choose all of them.")
            self.message_user(request, text % operations.AT_ONCE, messages.ERROR)
            return
        operation = operations.request(action, criteria, by=request.user.get_username())
        self.log_addition(request, operation, str(operation))
        page = reverse(f"{self.admin_site.name}:selfheal_operation_change", args=[operation.pk])
        text = gettext("That is done in the background to %d rows:")
        link = format_html('{} <a href="{}">{}</a>', text % operation.total, page, gettext("see how far it has come"))
        self.message_user(request, link, messages.SUCCESS)


@admin.register(Operation)
class OperationAdmin(ReadOnlyAdmin):
    """What operators asked for, and how far it has come."""

    list_display = ["requested_at", "requested_by", "action", "meant", "progress", "changed", "finished_at"]
    list_filter = ["action"]

    def get_fields(self, request: HttpRequest, obj: Any = None) -> Any:
        return ["action", "meant", "requested_by", "requested_at", "total", "changed", "progress", "finished_at"]

    @admin.display(description=_("rows"))
    def meant(self, operation: Operation) -> str:
        """Say which claims are meant."""
        said = ", ".join(f"{name}: {value}" for name, value in operation.filter.items())
        return said or str(_("all claims"))

    @admin.display(description=_("progress"))
    def progress(self, operation: Operation) -> str:
        if operation.finished_at:
            return "100\N{NO-BREAK SPACE}%"
        # Some may match only since it was asked for.
        return f"{min(99, 100 * operation.seen // max(operation.total, 1))}\N{NO-BREAK SPACE}%"


@admin.register(Run)
class RunAdmin(ReadOnlyAdmin):
    """What happened: one line for each attempt that ended."""

    list_display = ["finished_at", "row", "job", "outcome", "error_line"]
    list_filter = ["outcome", JobFilter, "finished_at", ErrorFilter]
    search_fields = ["job", "model", "object_pk", "error", "worker"]
