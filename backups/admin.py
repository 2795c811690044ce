"""Backups in the admin: say which there should be, have one taken or deleted, see how each fares."""

from typing import Any

from django.contrib import admin, messages
from django.contrib.admin.models import CHANGE, LogEntry
from django.contrib.admin.widgets import AdminSplitDateTime
from django.db.models import DateTimeField
from django.forms import ModelForm
from django.http import HttpRequest, HttpResponse
from django.template.defaultfilters import filesizeformat
from django.template.response import TemplateResponse
from django.urls import reverse
from django.utils.translation import gettext_lazy as _
from django.utils.translation import ngettext

from backups.models import Backup, BackupPolicy, BackupPolicyQuerySet, BackupQuerySet, Restore
from backups.requests import request_backup, request_backup_deletion
from jobs.admin import ExplainedAdmin, TimesAdmin
from jobs.steering import ReadOnly


@admin.register(BackupPolicy)
class BackupPolicyAdmin(ExplainedAdmin, TimesAdmin):
    list_display = ["database", "every", "cron", "keep_for", "is_enabled", "next_run_at"]
    list_filter = ["is_enabled"]
    list_select_related = ["database"]
    search_fields = ["database__name", "database__owner__username"]
    ordering = ["-pk"]
    autocomplete_fields = ["database"]
    fields = ["database", "every", "cron", "keep_for", "is_enabled", "next_run_at"]
    actions = ["enable", "disable"]
    # Django gives the two inputs of a time no label.
    formfield_overrides = {DateTimeField: {"widget": AdminSplitDateTime(attrs={"aria-label": _("Next run at")})}}

    def get_readonly_fields(self, request: HttpRequest, obj: BackupPolicy | None = None) -> list[str]:
        return [] if obj is None else ["database"]

    def save_model(self, request: HttpRequest, obj: BackupPolicy, form: ModelForm, change: bool) -> None:
        if change:
            obj.save_edit(form.changed_data)
        else:
            obj.save()

    @admin.action(description=_("Enable the chosen policies"), permissions=["change"])
    def enable(self, request: HttpRequest, queryset: BackupPolicyQuerySet) -> None:
        self._switch(request, queryset, True)

    @admin.action(description=_("Disable the chosen policies"), permissions=["change"])
    def disable(self, request: HttpRequest, queryset: BackupPolicyQuerySet) -> None:
        self._switch(request, queryset, False)

    def _switch(self, request: HttpRequest, queryset: BackupPolicyQuerySet, is_enabled: bool) -> None:
        changed = list(queryset.exclude(is_enabled=is_enabled))
        said = "Enabled." if is_enabled else "Disabled."
        LogEntry.objects.log_actions(str(request.user.pk), changed, CHANGE, said)
        BackupPolicy.objects.filter(pk__in=[policy.pk for policy in changed]).update(is_enabled=is_enabled)
        text = ngettext("%d policy is changed.", "%d policies are changed.", len(changed)) % len(changed)
        self.message_user(request, text, messages.SUCCESS if changed else messages.WARNING)


@admin.register(Backup)
class BackupAdmin(ExplainedAdmin, TimesAdmin):
    """To add one is to have one taken. Nobody edits or deletes a row, which is the truth about its file."""

    list_display = ["pk", "database", "state", "file_size", "taken_at", "verified_at", "keep_until"]
    list_display_links = ["pk", "database"]
    list_filter = ["state", "taken_at"]
    list_select_related = ["database"]
    search_fields = ["database__name", "database__owner__username"]
    ordering = ["-pk"]
    autocomplete_fields = ["database"]
    actions = ["delete_chosen"]

    @admin.display(description=_("size"), ordering="size", empty_value="-")
    def file_size(self, backup: Backup) -> str | None:
        return None if backup.size is None else filesizeformat(backup.size)

    def get_fields(self, request: HttpRequest, obj: Backup | None = None) -> list[Any]:
        if obj is None:
            return ["database"]
        about = ["database", "policy", "state", "error", "file", "file_size", "sha256"]
        return [*about, "created_at", "taken_at", "verified_at", "keep_until"]

    def get_readonly_fields(self, request: HttpRequest, obj: Backup | None = None) -> list[Any]:
        return [] if obj is None else self._with_times(self.get_fields(request, obj))

    def save_model(self, request: HttpRequest, obj: Backup, form: ModelForm, change: bool) -> None:
        if not change:
            obj.pk = request_backup(obj.database).pk

    def has_delete_permission(self, request: HttpRequest, obj: Backup | None = None) -> bool:
        """ "May delete" means: may ask for the deletion."""
        return False

    def has_request_deletion_permission(self, request: HttpRequest) -> bool:
        return request.user.has_perm("backups.delete_backup")

    @admin.action(description=_("Delete the chosen backups"), permissions=["request_deletion"])
    def delete_chosen(self, request: HttpRequest, queryset: BackupQuerySet) -> HttpResponse | None:
        chosen = list(queryset.exclude(state=Backup.State.DELETING).select_related("database"))
        if chosen and "confirmed" not in request.POST:
            context = {
                **self.admin_site.each_context(request),
                "title": _("Delete backups?"),
                "opts": self.opts,
                "chosen": chosen,
                "back": reverse("admin:backups_backup_changelist"),
                "action": "delete_chosen",
            }
            return TemplateResponse(request, "backups/delete_backups.html", context)
        LogEntry.objects.log_actions(str(request.user.pk), chosen, CHANGE, "Asked for its deletion.")
        for backup in chosen:
            request_backup_deletion(backup)
        text = ngettext("%d backup will be deleted.", "%d backups will be deleted.", len(chosen)) % len(chosen)
        self.message_user(request, text, messages.SUCCESS if chosen else messages.WARNING)
        return None


@admin.register(Restore)
class RestoreAdmin(ReadOnly):
    """Which databases were made out of which backups. How far each is says the database's page."""

    list_display = ["database", "backup", "requested_by"]
    list_select_related = ["database", "backup__database", "requested_by"]
    search_fields = ["database__name", "requested_by__username"]
    ordering = ["-pk"]
