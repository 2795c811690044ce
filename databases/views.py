"""The console: what people see of their databases, and where they ask for more. Nobody sees anybody else's.

A request writes a row, and never waits for what becomes of it: the pages show that while it happens.
"""

from collections.abc import Iterable
from datetime import timedelta
from typing import Any

from django.contrib import messages
from django.contrib.auth.decorators import login_required
from django.contrib.auth.models import User
from django.core.paginator import Paginator
from django.db.models import Model, Q, QuerySet
from django.http import HttpRequest, HttpResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.utils import timezone
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_http_methods, require_safe

from databases.forms import DatabaseForm, DeletionForm, DeployForm, NameForm
from databases.models import Database, DatabaseQuerySet, DeployRequest
from databases.provisioners import InUse, ProvisioningError
from databases.requests import (
    request_branch,
    request_creation,
    request_deletion,
    request_deploy,
    request_withdrawal,
)
from jobs.message import label
from jobs.models import Claim

PAGE = 20
"""How many rows a list shows at once."""
LATEST = 5
"""How many deploys a database's own page shows."""
CHANGING = {"pending", "deleting", "checking", "deploying"}
"""The states that do not last: a page with one of them keeps itself fresh."""

asks = require_http_methods(["GET", "HEAD", "POST"])
"""A page that asks on GET and does it on POST."""


class Request(HttpRequest):
    """Of somebody who is logged in."""

    user: User


def own(request: Request) -> DatabaseQuerySet:
    return Database.objects.filter(owner=request.user)


def own_deploys(request: Request) -> QuerySet[DeployRequest]:
    return DeployRequest.objects.filter(target__owner=request.user)


def posted(request: HttpRequest) -> Any:
    """Return what a form is filled with: nothing, until it was sent."""
    return request.POST if request.method == "POST" else None


def changing(*rows: Any) -> bool:
    return any(row.state in CHANGING for row in rows)


def listed(request: HttpRequest, rows: QuerySet) -> dict[str, Any]:
    """Return one page of rows, and whether any of them is changing."""
    page = Paginator(rows, PAGE).get_page(request.GET.get("page"))
    return {"page": page, "changing": changing(*page)}


def trouble(row: Model, *jobs: Q) -> Claim | None:
    """Return the claim of a row whose last attempt failed, and why: of any job, or of these."""
    claims = Claim.objects.filter(*jobs, model=label(type(row)), object_pk=str(row.pk)).exclude(last_error="")
    return claims.order_by("-pk").first()


def words(claim: Claim | None) -> str:
    """Return what an engine said was in the way. What any other error says is for operators."""
    kind, _, said = claim.last_error.partition("\n")[0].partition(": ") if claim else ("", "", "")
    return said if kind in {ProvisioningError.__name__, InUse.__name__} else ""


# --- Databases --------------------------------------------------------------------------------------------------------


@require_safe
@login_required
def databases(request: Request) -> HttpResponse:
    is_deleted = Q(state=Database.State.DELETED)
    gone = "deleted" in request.GET
    rows = own(request).filter(is_deleted if gone else ~is_deleted).select_related("parent").order_by("-pk")
    return render(request, "databases/databases.html", {**listed(request, rows), "gone": gone})


@asks
@login_required
def new_database(request: Request) -> HttpResponse:
    form = DatabaseForm(posted(request), instance=Database(owner=request.user))
    if form.is_valid() and form.ask(request_creation):
        return redirect("database", form.instance.name)
    return render(request, "databases/new_database.html", {"form": form})


@require_safe
@login_required
def database(request: Request, name: str) -> HttpResponse:
    database = get_object_or_404(own(request).select_related("parent"), name=name)
    branches = own(request).filter(parent=database).exclude(state=Database.State.DELETED).order_by("-pk")
    deploys = own_deploys(request).filter(target=database).select_related("branch").order_by("-pk")[:LATEST]
    deletion = Q(job="delete_database")
    claim = trouble(database, deletion if database.state == Database.State.DELETING else ~deletion)
    context = {
        "database": database,
        "deploys": deploys,
        **listed(request, branches),
        "claim": claim if changing(database) else None,
        "words": words(claim),
    }
    context["changing"] = context["changing"] or changing(database, *deploys)
    return render(request, "databases/database.html", context)


@asks
@never_cache
@login_required
def connection(request: Request, name: str) -> HttpResponse:
    """Say how to connect; the password only to whoever asks for it, in an answer that nobody keeps."""
    database = get_object_or_404(own(request), name=name)
    if database.state != Database.State.READY:
        return redirect("database", name)
    is_shown = request.method == "POST"
    url = f"postgresql://{database}:{database.password}@{database.path}" if is_shown else ""
    context = {"database": database, "is_shown": is_shown, "url": url}
    return render(request, "databases/connection.html", context)


@asks
@login_required
def new_branch(request: Request, name: str) -> HttpResponse:
    parent = get_object_or_404(own(request), name=name)
    if parent.state != Database.State.READY:
        messages.warning(request, f"{parent} is not ready, so there is nothing yet, or no more, to branch from.")
        return redirect("database", name)
    form = NameForm(posted(request), instance=Database(owner=request.user, engine=parent.engine, parent=parent))
    if form.is_valid() and form.ask(request_branch):
        return redirect("database", form.instance.name)
    return render(request, "databases/new_branch.html", {"form": form, "parent": parent})


@asks
@login_required
def delete_database(request: Request, name: str) -> HttpResponse:
    database = get_object_or_404(own(request), name=name)
    if database.state not in Database.DELETABLE:
        return redirect("database", name)
    form = DeletionForm(database.name, posted(request))
    if form.is_valid():
        request_deletion(own(request).filter(pk=database.pk))
        return redirect("database", name)
    return render(request, "databases/delete_database.html", {"form": form, "database": database})


# --- Deploys ----------------------------------------------------------------------------------------------------------


@require_safe
@login_required
def deploys(request: Request) -> HttpResponse:
    rows = own_deploys(request).select_related("branch", "target").order_by("-pk")
    return render(request, "databases/deploys.html", listed(request, rows))


@asks
@login_required
def new_deploy(request: Request) -> HttpResponse:
    ready = own(request).filter(state=Database.State.READY).select_related("parent").order_by("name")
    branch = next((database for database in ready if database.name == request.GET.get("branch")), None)
    initial = {"branch": branch, "target": branch.parent_id} if branch else {}
    form = DeployForm(ready, posted(request), initial=initial, instance=DeployRequest(requested_by=request.user))
    if form.is_valid():
        request_deploy(form.instance)
        return redirect("deploy", form.instance.pk)
    return render(request, "databases/new_deploy.html", {"form": form, "is_possible": len(ready) > 1})


@require_safe
@login_required
def deploy(request: Request, pk: int) -> HttpResponse:
    deploy = get_object_or_404(own_deploys(request).select_related("branch", "target"), pk=pk)
    claim = trouble(deploy) if changing(deploy) else None
    context = {
        "deploy": deploy,
        "steps": steps(deploy),
        # Those into one database go one after the other.
        "earlier": DeployRequest.objects.open().filter(target=deploy.target_id, pk__lt=pk).first(),
        "claim": claim,
        "words": words(claim),
        "changing": changing(deploy) or is_being_checked(deploy),
    }
    return render(request, "databases/deploy.html", context)


@asks
@login_required
def withdraw_deploy(request: Request, pk: int) -> HttpResponse:
    deploy = get_object_or_404(own_deploys(request).select_related("branch", "target"), pk=pk)
    form = DeletionForm(deploy.target.name, posted(request))
    if deploy.state == DeployRequest.State.PENDING and not form.is_valid():
        return render(request, "databases/withdraw_deploy.html", {"form": form, "deploy": deploy})
    if not (form.is_valid() and request_withdrawal(deploy)):
        messages.warning(request, "Only a deploy that has not begun can be withdrawn.")
    return redirect("deploy", pk)


def is_being_checked(deploy: DeployRequest) -> bool:
    """Whether somebody may be about to look at what was deployed. That look may get lost, and nobody waits for it."""
    since = deploy.deployed_at
    return since is not None and deploy.confirmed_at is None and timezone.now() - since < timedelta(minutes=1)


def steps(deploy: DeployRequest) -> Iterable[dict[str, Any]]:
    """Return the states that a deploy goes through, and which of them are behind it."""
    State = DeployRequest.State
    order = [State.PENDING, State.CHECKING, State.DEPLOYING, State.DEPLOYED]
    place = order.index(State(deploy.state)) if deploy.state in order else -1
    return [
        {"state": state, "is_done": at < place or place == len(order) - 1, "is_now": at == place < len(order) - 1}
        for at, state in enumerate(order)
    ]
