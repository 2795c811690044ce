"""The two pages that are no table of a model: at a glance, and failures with their like."""

from __future__ import annotations

from typing import Any

from django.contrib import admin
from django.core.exceptions import PermissionDenied
from django.core.paginator import Paginator
from django.db.models import F, Q, QuerySet
from django.http import HttpRequest, HttpResponse
from django.template.response import TemplateResponse
from django.utils.translation import gettext_lazy as _

from jobs import clock, health, registry, tallies
from jobs.models import Failure, Health
from jobs.steering import ReadOnly, refuse_nul

# How many errors are on one page.
PER_PAGE = 50


class ErrorFilter(admin.SimpleListFilter):
    """Runs with one error, whatever else they are. It is chosen by a link from the failures, not from a list."""

    title = _("error")
    parameter_name = "error"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, Any]]:
        chosen = request.GET.get(self.parameter_name)
        return [(chosen, _("the chosen one"))] if chosen else []

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        return queryset.filter(fingerprint=self.value()) if self.value() else queryset


class Page(ReadOnly):
    """A page of its own in the admin, where a model's list would be. It is read, and nothing on it is changed."""

    template = ""

    def get_urls(self) -> list[Any]:
        # No page of one row, none to add one.
        return super().get_urls()[:1]

    def changelist_view(self, request: HttpRequest, extra_context: Any = None) -> HttpResponse:
        """Show the page to whoever may see it."""
        refuse_nul(request)
        if not self.has_view_permission(request):
            raise PermissionDenied
        context = {**self.admin_site.each_context(request), "opts": self.opts, **self.content(request)}
        response = TemplateResponse(request, self.template, context)
        response["Cache-Control"] = "no-store"
        return response

    def content(self, request: HttpRequest) -> dict[str, Any]:
        raise NotImplementedError


@admin.register(Health)
class HealthPage(Page):
    """Whether all is well, and if not, what is wrong and what to do."""

    template = "jobs/health.html"

    def content(self, request: HttpRequest) -> dict[str, Any]:
        found = health.read()
        # What needs somebody's eye first, the others by name.
        items = sorted(found.items, key=lambda item: (item.state in ("well", "paused"), item.name))
        kinds = {kind: [item for item in items if item.kind == kind] for kind in ("sweep", "swept", "cron", "plain")}
        return {"title": _("At a glance"), "health": found, **kinds}


@admin.register(Failure)
class FailurePage(Page):
    """What fails, and how often: one line for each error of a job, however many rows have it."""

    template = "jobs/failures.html"

    def content(self, request: HttpRequest) -> dict[str, Any]:
        now = clock.read()
        period = request.GET.get("period", "")
        period = period if period in tallies.PERIODS else "day"
        words, job = request.GET.get("q", "").strip(), request.GET.get("job", "")
        often = f"last_{period}"
        errors = tallies.errors(now).filter(**{f"{often}__gt": 0}).order_by(F(often).desc(), "job", "fingerprint")
        if job:
            errors = errors.filter(job=job)
        for word in words.split():
            errors = errors.filter(Q(job__icontains=word) | Q(sample__icontains=word))
        page = Paginator(errors, PER_PAGE).get_page(request.GET.get("p"))
        rows: list[dict[str, Any]] = list(page)
        unsettled = health.unsettled() if rows else {}
        for row in rows:
            row["unsettled"] = unsettled.get(row["job"], {})
        return {
            "title": _("Failures"),
            "now": now,
            "since": {name: tallies.last(hours, now) for name, hours in tallies.PERIODS.items()},
            "periods": [("hour", _("last hour")), ("day", _("last day")), ("week", _("last week"))],
            "period": period,
            "words": words,
            "job": job,
            "jobs": [each.name for each in registry.declared()],
            "errors": rows,
            "page": page,
            "other": tallies.OTHER,
        }
