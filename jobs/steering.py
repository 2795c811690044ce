"""What the pages of operators have in common: actions that take a permission each, buttons, and the way back.

And the section that the page of any row gets: why its background work is not done, and the button that mends it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from django.contrib import admin, messages
from django.contrib.admin.helpers import ACTION_CHECKBOX_NAME
from django.contrib.admin.models import CHANGE, LogEntry
from django.contrib.admin.options import IS_POPUP_VAR
from django.contrib.admin.utils import quote, unquote
from django.core.exceptions import BadRequest, PermissionDenied, ValidationError
from django.db import OperationalError, connections, router, transaction
from django.db.models import QuerySet
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseNotAllowed, HttpResponseRedirect
from django.template.response import TemplateResponse
from django.urls import URLPattern, path, reverse
from django.utils.http import url_has_allowed_host_and_scheme
from django.utils.translation import gettext
from django.utils.translation import gettext_lazy as _

from jobs import operations, pauses, registry
from jobs.explain import Explanation, explain
from jobs.job import Job
from jobs.models import Claim, Schedule
from jobs.sweep import Sweep, SweepResult

# How long the page waits for a dry run, of whatever was chosen. The last statement may take as long again.
PATIENCE = timedelta(milliseconds=400)

# What can be done, the permission that it takes, and what its button says.
STEERING: dict[str, tuple[str, Any]] = {
    "queue_now": ("selfheal.retry_claim", _("Queue now")),
    "release": ("selfheal.retry_claim", _("Release from quarantine, and queue")),
    "quarantine": ("selfheal.retry_claim", _("Quarantine")),
    "resume": ("selfheal.pause_schedule", _("Resume")),
    "pause": ("selfheal.pause_schedule", _("Pause")),
    "run_now": ("selfheal.run_schedule", _("Run now")),
    "run_sweep": ("selfheal.run_schedule", _("Run the sweep now")),
    "dry_run": ("selfheal.run_schedule", _("Dry run")),
}


def refuse_nul(request: HttpRequest) -> None:
    """Raise `BadRequest` for a NUL in any parameter: no text holds one, and PostgreSQL cannot even be asked for it."""
    given = (text for query in (request.GET, request.POST) for _, texts in query.lists() for text in texts)
    if any("\0" in text for text in given):
        raise BadRequest("A parameter contains a NUL.")


class ReadOnly(admin.ModelAdmin):
    """What can be looked at, and not edited, added or deleted."""

    class Media:
        css = {"all": ["jobs/explain.css"]}

    def changelist_view(self, request: HttpRequest, extra_context: dict[str, Any] | None = None) -> HttpResponse:
        refuse_nul(request)
        return super().changelist_view(request, extra_context)

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False


class SteeringAdmin(admin.ModelAdmin):
    """Actions, each with a permission of its own, and the way back from them."""

    def has_retry_permission(self, request: HttpRequest) -> bool:
        return request.user.has_perm("selfheal.retry_claim")

    def has_pause_permission(self, request: HttpRequest) -> bool:
        return request.user.has_perm("selfheal.pause_schedule")

    def has_run_permission(self, request: HttpRequest) -> bool:
        return request.user.has_perm("selfheal.run_schedule")

    def changelist_view(self, request: HttpRequest, extra_context: dict[str, Any] | None = None) -> HttpResponse:
        """Refuse an action that one may not do. Django would say that none was selected.

        And one on what can be no row: of that Django would ask the database all the same.
        """
        refuse_nul(request)
        for pk in request.POST.getlist(ACTION_CHECKBOX_NAME):
            try:
                self.opts.pk.clean(pk, None)
            except ValidationError as error:
                raise BadRequest("What was selected is no row.") from error
        asked = set(request.POST.getlist("action")) & set(self.actions or ())
        if asked - self.get_actions(request).keys():
            raise PermissionDenied
        return super().changelist_view(request, extra_context)

    def ask(self, request: HttpRequest, action: str, chosen: QuerySet[Any], **context: Any) -> HttpResponse:
        """Show a page on which an action is confirmed, or told more, and which sends it again."""
        across = request.POST.get("select_across", "0")
        pks = [row.pk for row in (chosen[:1] if across == "1" else chosen)]
        hidden = [("action", action), ("select_across", across), ("next", request.POST.get("next", ""))]
        context = {
            **self.admin_site.each_context(request),
            "opts": self.opts,
            "label": STEERING[action][1],
            "hidden": [*hidden, *((ACTION_CHECKBOX_NAME, pk) for pk in pks)],
            "back": _safe(request, request.POST.get("next")) or request.get_full_path(),
            "media": self.media,
            **context,
        }
        return TemplateResponse(request, "admin/selfheal/ask.html", context)

    def back(self, request: HttpRequest) -> HttpResponse | None:
        """Go back to the page whose button was pressed; from the list's own actions, to the list as it was filtered."""
        url = _safe(request, request.POST.get("next"))
        return HttpResponseRedirect(url) if url else None


def buttons(request: HttpRequest, url: str, fields: dict[str, Any], actions: list[str]) -> list[dict[str, Any]]:
    """Return those of the buttons that one may press: each a form of its own, which sends these fields."""
    return [
        {"label": STEERING[action][1], "url": url, "fields": {**fields, "action": action}}
        for action in actions
        if request.user.has_perm(STEERING[action][0])
    ]


def _safe(request: HttpRequest, url: str | None) -> str:
    allowed = url_has_allowed_host_and_scheme(url, {request.get_host()}, require_https=request.is_secure())
    return url if url and allowed else ""


class ExplainedAdmin(admin.ModelAdmin):
    """Adds to the change page of a row why its background work is not done, and the button that mends it.

    For the `ModelAdmin` of any model that a sweep feeds: `class InvoiceAdmin(ExplainedAdmin)`. What it shows takes the
    permission to view claims, and its history that to view runs.
    """

    Media = ReadOnly.Media

    def explanations(self, obj: Any, ask_redis: bool = True) -> Iterator[Explanation]:
        """Explain the row for each job that works on rows of its kind."""
        for each in registry.declared():
            if isinstance(each, Job) and each.is_swept and isinstance(obj, _rows_of(each)):
                explanation = explain(each, obj, ask_redis=ask_redis)
                # What hangs for one of them would hang for the next.
                ask_redis = ask_redis and not explanation.redis_is_away
                yield explanation

    def return_to(self, request: HttpRequest, obj: Any) -> str:
        """Where one is after a button was pressed: on this page again."""
        return request.get_full_path()

    def get_urls(self) -> list[URLPattern]:
        view = self.admin_site.admin_view(self.steer_view)
        return [path("<path:object_id>/steer/", view, name=self._steer_name), *super().get_urls()]

    @property
    def _steer_name(self) -> str:
        return f"{self.opts.app_label}_{self.opts.model_name}_steer"

    def render_change_form(self, request: HttpRequest, context: Any, *args: Any, **kwargs: Any) -> HttpResponse:
        """Add the section below the page, whichever template that has."""
        response = super().render_change_form(request, context, *args, **kwargs)
        obj = context.get("original")
        is_shown = obj is not None and IS_POPUP_VAR not in request.GET and request.user.has_perm("selfheal.view_claim")
        if is_shown and isinstance(response, TemplateResponse) and response.template_name:
            explained = [(each, self._buttons(request, obj, each)) for each in self.explanations(obj)]
            if explained:
                response.context_data = {
                    **(response.context_data or {}),
                    "explained": explained,
                    "shows_runs": request.user.has_perm("selfheal.view_run"),
                    "page": response.resolve_template(response.template_name),
                }
                response.template_name = "admin/selfheal/explained.html"
        return response

    def _buttons(self, request: HttpRequest, obj: Any, explanation: Explanation) -> list[Any]:
        remedy, claim = explanation.verdict.remedy, explanation.claim
        offered: list[str] = [remedy] if remedy else []
        if explanation.is_needed and not (claim and (claim.lease_key or claim.quarantined_at)):
            offered.append("quarantine")
        url = reverse(f"{self.admin_site.name}:{self._steer_name}", args=[quote(obj.pk)])
        return buttons(request, url, {"job": explanation.job, "next": self.return_to(request, obj)}, offered)

    def steer_view(self, request: HttpRequest, object_id: str) -> HttpResponse:
        """Do what a button says, log it, and go back."""
        if request.method != "POST":
            return HttpResponseNotAllowed(["POST"])
        action = request.POST.get("action", "")
        if not (action in STEERING and request.user.has_perm(STEERING[action][0])):
            raise PermissionDenied
        obj = self.get_object(request, unquote(object_id))
        if not self.has_view_permission(request, obj):
            raise PermissionDenied
        back = _safe(request, request.POST.get("next")) or reverse(f"{self.admin_site.name}:index")
        if obj is None:
            # A claim that is settled meanwhile, say.
            self.message_user(request, gettext("It is not there any more."), messages.WARNING)
            return HttpResponseRedirect(back)
        named = (each for each in self.explanations(obj, ask_redis=False) if each.job == request.POST.get("job"))
        explanation = next(named, None)
        if explanation is None or not explanation.sweep:
            raise Http404
        for result in self._steer(request, obj, action, explanation):
            self.message_user(request, result.sentence, messages.SUCCESS if result.changed else messages.WARNING)
        return HttpResponseRedirect(back)

    def _steer(
        self, request: HttpRequest, obj: Any, action: str, explanation: Explanation
    ) -> Iterator[operations.Result]:
        job = registry.get(explanation.job)
        assert isinstance(job, Job)
        match action:
            case "queue_now" | "release" | "quarantine":
                result = operations.apply_to_row(action, job, explanation.pk, by=request.user.get_username())
                if result.changed:
                    self.log_change(request, obj, f"{job.name}: {STEERING[action][1]}")
                yield result
            case "resume":
                for schedule in Schedule.objects.filter(pk__in=explanation.paused):
                    yield resume(request, schedule)
            case "run_sweep":
                for schedule in Schedule.objects.filter(pk=explanation.sweep):
                    yield run_now(request, schedule)
            case _:
                raise Http404


def _rows_of(job: Job) -> Any:
    """Return the class of the rows that a job works on; nothing's, if its sweep cannot tell."""
    try:
        return job.model._meta.concrete_model
    except Exception:
        return ()


def resume(request: HttpRequest, schedule: Schedule) -> operations.Result:
    """End a pause, and log who did so."""
    try:
        was_paused = pauses.resume(schedule.name)
    except ValueError as error:
        return operations.Result(False, str(error))
    if not was_paused:
        return operations.Result(False, gettext("%s was not paused.") % schedule)
    log(request, [schedule], gettext("Resumed."))
    return operations.Result(True, gettext("%s is resumed; the next tick and its sweep catch up.") % schedule)


def run_now(request: HttpRequest, schedule: Schedule) -> operations.Result:
    """Owe a run from now on, and log who asked for it."""
    declared = registry.get(schedule.name)
    if declared is None or not declared.is_scheduled:
        return operations.Result(False, gettext("%s has no schedule: it runs for its rows, or when called.") % schedule)
    Schedule.objects.filter(pk=schedule.pk).owe()
    log(request, [schedule], gettext("Asked for a run."))
    if pauses.read(declared.switches):
        return operations.Result(True, gettext("A run of %s is owed; it begins when the pause ends.") % schedule)
    return operations.Result(True, gettext("A run of %s is owed; the next tick queues it.") % schedule)


def dry_run(schedule: Schedule, until: float) -> operations.Result:
    """Say what a sweep would do now, as far as can be told until then, in the time of `time.monotonic()`."""
    declared = registry.get(schedule.name)
    if not isinstance(declared, Sweep):
        return operations.Result(False, gettext("%s is no sweep.") % schedule)
    found = SweepResult()

    def note(so_far: SweepResult) -> bool:
        nonlocal found
        found = so_far
        return time.monotonic() > until

    try:
        with _limited(router.db_for_write(Claim), until), _limited(declared.queryset().db, until):
            declared.sweep(dry_run=True, on_batch=note)
    except OperationalError:
        if time.monotonic() < until:
            raise
    if time.monotonic() < until:
        text = gettext("%(name)s would queue %(enqueued)d, skip %(already_queued)d queued, %(waiting)d waiting.")
    else:
        text = gettext(
            "%(name)s would queue at least %(enqueued)d, skip at least %(already_queued)d queued, and at least "
            "%(waiting)d waiting. To count them all takes longer: manage.py jobs sweep %(name)s --dry-run."
        )
    return operations.Result(True, text % {"name": schedule.name, **found._asdict()})


@contextmanager
def _limited(alias: str, until: float) -> Iterator[None]:
    """End each statement on a database that goes on for longer. What is written in here is taken back."""
    connection = connections[alias]
    if connection.vendor == "sqlite":
        connection.ensure_connection()
        connection.connection.set_progress_handler(lambda: time.monotonic() > until, 10_000)
        try:
            yield
        finally:
            connection.connection.set_progress_handler(None, 0)
        return
    if connection.vendor != "postgresql":
        # Its statements end when they do; between two of them the sweep is asked to.
        yield
        return
    left = max(1, math.ceil((until - time.monotonic()) * 1000))
    with transaction.atomic(alias):
        with connection.cursor() as cursor:
            cursor.execute("SELECT set_config('statement_timeout', %s, true)", [str(left)])
        yield
        # With it the limit, in a transaction that was there before.
        transaction.set_rollback(True, alias)


def log(request: HttpRequest, rows: list[Any], message: str) -> None:
    """Note in the admin's log what was done to these, and by whom."""
    LogEntry.objects.log_actions(str(request.user.pk), rows, CHANGE, message)
