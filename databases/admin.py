"""Databases and deploys in the admin: ask for a database, see how all fare, have one deleted. No row ever goes."""

from collections import defaultdict
from typing import Any

from django.contrib import admin, messages
from django.contrib.admin.models import CHANGE, LogEntry
from django.core.exceptions import PermissionDenied
from django.forms import ModelForm
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect
from django.shortcuts import get_object_or_404
from django.template.defaultfilters import filesizeformat
from django.template.response import TemplateResponse
from django.urls import URLPattern, path, reverse

from databases.models import Database, DatabaseQuerySet, DeployRequest
from databases.requests import request_creation, request_deletion
from jobs.admin import ExplainedAdmin, TimesAdmin
from jobs.steering import ReadOnly

NAMED = 20
"""How many databases a message names."""


@admin.register(Database)
class DatabaseAdmin(ExplainedAdmin, TimesAdmin):
    list_display = ["name", "owner", "engine", "parent", "state", "file_size", "created_at", "ready_at", "deleted_at"]
    list_filter = ["state", "engine", "origin", "created_at"]
    list_select_related = ["owner", "parent"]
    search_fields = ["name", "owner__username"]
    ordering = ["-pk"]
    autocomplete_fields = ["owner"]
    actions = ["delete_chosen"]

    @admin.display(description="size", ordering="size", empty_value="-")
    def file_size(self, database: Database) -> str | None:
        return None if database.size is None else filesizeformat(database.size)

    def get_fields(self, request: HttpRequest, obj: Database | None = None) -> list[Any]:
        if obj is None:
            return ["name", "owner", "engine"]
        # Not the password, which is its owner's business.
        made = ["engine", "origin", "parent", "state", "error", "path", "file_size"]
        waited = ["created_at", "sessions_end_at", "ended_sessions", "ready_at", "deleted_at"]
        return ["name", "owner", *made, *waited]

    def get_readonly_fields(self, request: HttpRequest, obj: Database | None = None) -> list[Any]:
        return [] if obj is None else self._with_times(set(self.get_fields(request, obj)) - {"owner"})

    def get_changeform_initial_data(self, request: HttpRequest) -> dict[str, Any]:
        return {"owner": request.user.pk, **super().get_changeform_initial_data(request)}

    def save_model(self, request: HttpRequest, obj: Database, form: ModelForm, change: bool) -> None:
        if change:
            # Only what was edited: a job may have changed the state since this page read the row.
            obj.save(update_fields=form.changed_data)
        else:
            request_creation(obj)

    def has_delete_permission(self, request: HttpRequest, obj: Database | None = None) -> bool:
        """Nobody deletes a row, which is the truth about its database. "May delete" means: may ask for the deletion."""
        return False

    def has_request_deletion_permission(self, request: HttpRequest) -> bool:
        return request.user.has_perm("databases.delete_database")

    @admin.action(description="Delete chosen databases", permissions=["request_deletion"])
    def delete_chosen(self, request: HttpRequest, queryset: DatabaseQuerySet) -> HttpResponse | None:
        if "confirmed" not in request.POST:
            return self._ask(request, queryset, reverse("admin:databases_database_changelist"), action="delete_chosen")
        self._delete(request, queryset)
        return None

    def get_urls(self) -> list[URLPattern]:
        view = self.admin_site.admin_view(self.delete_one)
        return [path("<int:pk>/delete-database/", view, name="databases_database_delete_database"), *super().get_urls()]

    def delete_one(self, request: HttpRequest, pk: int) -> HttpResponse:
        """The page behind the button of one database: asks on GET, does it on POST."""
        if not self.has_request_deletion_permission(request):
            raise PermissionDenied
        chosen = Database.objects.filter(pk=pk)
        get_object_or_404(chosen)
        back = reverse("admin:databases_database_change", args=[pk])
        if request.method != "POST":
            return self._ask(request, chosen, back)
        self._delete(request, chosen)
        return HttpResponseRedirect(back)

    def change_view(
        self, request: HttpRequest, object_id: str, form_url: str = "", extra_context: dict[str, Any] | None = None
    ) -> HttpResponse:
        may_delete = self.has_request_deletion_permission(request)
        return super().change_view(request, object_id, form_url, {**(extra_context or {}), "may_delete": may_delete})

    def _ask(self, request: HttpRequest, chosen: DatabaseQuerySet, back: str, action: str = "") -> HttpResponse:
        context = {
            **self.admin_site.each_context(request),
            "title": "Delete databases?",
            "opts": self.opts,
            "chosen": chosen,
            "back": back,
            "action": action,
        }
        return TemplateResponse(request, "databases/delete_databases.html", context)

    def _delete(self, request: HttpRequest, chosen: DatabaseQuerySet) -> None:
        by_state: dict[str, list[Database]] = defaultdict(list)
        for database in chosen:
            by_state[database.state].append(database)
        asked = [database for state in Database.DELETABLE for database in by_state[state]]

        LogEntry.objects.log_actions(str(request.user.pk), asked, CHANGE, "Asked for its deletion.")
        request_deletion(Database.objects.filter(pk__in=[database.pk for database in asked]))

        for databases, said, level in (
            (asked, "Will be deleted", messages.SUCCESS),
            (by_state[Database.State.DELETING], "Being deleted already", messages.WARNING),
            (by_state[Database.State.DELETED], "Deleted already", messages.WARNING),
        ):
            if databases:
                more = f" and {len(databases) - NAMED} more" if len(databases) > NAMED else ""
                self.message_user(request, f"{said}: {', '.join(map(str, databases[:NAMED]))}{more}.", level)


@admin.register(DeployRequest)
class DeployRequestAdmin(ExplainedAdmin, ReadOnly, TimesAdmin):
    """What is to be changed, or was. It can be looked at, and neither edited nor deleted."""

    list_display = ["id", "branch", "target", "state", "requested_by", "created_at", "deployed_at", "confirmed_at"]
    list_filter = ["state", "created_at"]
    list_select_related = ["branch", "target", "requested_by"]
    search_fields = ["branch__name", "target__name", "requested_by__username", "marker"]
    ordering = ["-pk"]

    def get_fields(self, request: HttpRequest, obj: DeployRequest | None = None) -> list[Any]:
        said = ["branch", "target", "sql", "requested_by", "state", "error"]
        return [*said, "created_at", "deployed_at", "confirmed_at", "schema", "marker"]

    def get_readonly_fields(self, request: HttpRequest, obj: DeployRequest | None = None) -> list[Any]:
        return self._with_times(self.get_fields(request, obj))
