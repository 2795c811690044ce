"""The console's pages about backups: policies, backups, and what can be had out of them."""

from pathlib import PurePath

from django.contrib import messages
from django.contrib.auth.decorators import login_required
from django.core.files.storage import storages
from django.db.models import QuerySet
from django.http import FileResponse, HttpResponse, HttpResponseBase
from django.shortcuts import get_object_or_404, redirect, render
from django.utils import timezone
from django.views.decorators.http import require_safe

from backups.forms import PolicyForm
from backups.models import Backup, BackupPolicy
from backups.requests import request_backup, request_backup_deletion, request_restore
from databases.forms import DeletionForm, NameForm
from databases.models import Database
from databases.views import Request, asks, changing, listed, own, posted, trouble, words


def own_backups(request: Request) -> QuerySet[Backup]:
    return Backup.objects.filter(database__owner=request.user).select_related("database")


@asks
@login_required
def backups(request: Request, name: str) -> HttpResponse:
    """Show the backups of a database, and what takes them; on POST, have one taken now."""
    database = get_object_or_404(own(request), name=name)
    if request.method == "POST":
        if database.state == Database.State.READY:
            request_backup(database)
        else:
            messages.warning(request, f"{database} is not ready, so there is nothing yet, or no more, to back up.")
        return redirect("backups", name)
    context = {
        **listed(request, Backup.objects.filter(database=database).select_related("policy").order_by("-pk")),
        "database": database,
        "policies": BackupPolicy.objects.filter(database=database).order_by("pk"),
    }
    return render(request, "backups/backups.html", context)


@asks
@login_required
def new_policy(request: Request, name: str) -> HttpResponse:
    database = get_object_or_404(own(request).exclude(state=Database.State.DELETED), name=name)
    return _policy(request, BackupPolicy(database=database))


@asks
@login_required
def policy(request: Request, pk: int) -> HttpResponse:
    policies = BackupPolicy.objects.filter(database__owner=request.user).select_related("database")
    return _policy(request, get_object_or_404(policies, pk=pk))


def _policy(request: Request, policy: BackupPolicy) -> HttpResponse:
    form = PolicyForm(posted(request), instance=policy)
    if form.is_valid():
        form.save()
        return redirect("backups", policy.database.name)
    return render(request, "backups/policy.html", {"form": form, "database": policy.database, "policy": policy})


@require_safe
@login_required
def backup(request: Request, pk: int) -> HttpResponse:
    backup = get_object_or_404(own_backups(request).select_related("policy"), pk=pk)
    restored = own(request).filter(restore__backup=backup).order_by("-pk")
    claim = trouble(backup) if changing(backup) else None
    context = {**listed(request, restored), "backup": backup, "claim": claim, "words": words(claim)}
    context["changing"] = context["changing"] or changing(backup)
    return render(request, "backups/backup.html", context)


@require_safe
@login_required
def download(request: Request, pk: int) -> HttpResponseBase:
    """Send the file as it is stored, a piece at a time."""
    backup = get_object_or_404(own_backups(request), pk=pk, state=Backup.State.READY)
    assert backup.taken_at
    moment = timezone.localtime(backup.taken_at)
    name = f"{backup.database}-{moment:%Y-%m-%d-%H%M%S}{''.join(PurePath(backup.file).suffixes)}"
    try:
        file = storages["backups"].open(backup.file)
    except OSError:
        messages.error(request, "The file cannot be read just now. Try again in a minute.")
        return redirect("backup", pk)
    return FileResponse(file, as_attachment=True, filename=name)


@asks
@login_required
def restore(request: Request, pk: int) -> HttpResponse:
    backup = get_object_or_404(own_backups(request), pk=pk)
    if backup.state != Backup.State.READY:
        messages.warning(request, "Only a backup that is ready can be restored.")
        return redirect("backup", pk)
    form = NameForm(posted(request), instance=Database(owner=request.user, engine=backup.database.engine))
    if form.is_valid() and form.ask(lambda database: request_restore(backup, database.name, request.user)):
        return redirect("database", form.instance.name)
    return render(request, "backups/restore.html", {"form": form, "backup": backup})


@asks
@login_required
def delete_backup(request: Request, pk: int) -> HttpResponse:
    backup = get_object_or_404(own_backups(request), pk=pk)
    if backup.state == Backup.State.DELETING:
        return redirect("backup", pk)
    form = DeletionForm(backup.database.name, posted(request))
    if form.is_valid():
        request_backup_deletion(backup)
        return redirect("backups", backup.database.name)
    return render(request, "backups/delete_backup.html", {"form": form, "backup": backup})
