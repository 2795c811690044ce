"""Databases in the admin: ask for one, see how it fares, have it deleted. No row is ever deleted here."""

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

from databases.models import Database, DatabaseQuerySet
from databases.requests import request_creation, request_deletion

NAMED = 20
"""How many databases a message names."""


@admin.register(Database)
class DatabaseAdmin(admin.ModelAdmin):
    list_display = ["name", "owner", "state", "file_size", "created_at", "ready_at", "deleted_at"]
    list_filter = ["state", "created_at"]
    list_select_related = ["owner"]
    search_fields = ["name", "owner__username"]
    ordering = ["-pk"]
    autocomplete_fields = ["owner"]
    actions = ["delete_chosen"]

    @admin.display(description="size", ordering="size", empty_value="-")
    def file_size(self, database: Database) -> str | None:
        return None if database.size is None else filesizeformat(database.size)

    def get_fields(self, request: HttpRequest, obj: Database | None = None) -> list[Any]:
        if obj is None:
            return ["name", "owner"]
        return ["name", "owner", "state", "path", "file_size", "created_at", "ready_at", "deleted_at"]

    def get_readonly_fields(self, request: HttpRequest, obj: Database | None = None) -> list[str]:
        return [] if obj is None else [field for field in self.get_fields(request, obj) if field != "owner"]

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
        asked = by_state[Database.State.PENDING] + by_state[Database.State.READY]

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
