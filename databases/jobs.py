"""What makes the world follow the rows: one job for each kind of work, one sweep that finds the rows which need it."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from django.utils import timezone

from databases.models import Database, DatabaseQuerySet, DeployRequest, DeployRequestQuerySet
from databases.provisioners import InUse, Refused, get_provisioner
from jobs import Backoff, QueueUnavailable, job, sweep, with_lock

logger = logging.getLogger(__name__)

SESSIONS_END_AFTER = timedelta(minutes=10)
"""How long a branch waits, where it has to, until nobody is connected to its parent."""

CHANGE_TIMEOUT = timedelta(minutes=10)
"""How long a change may take, in each of the two databases in which it is made."""


@contextmanager
def giving_up(database: Database) -> Iterator[None]:
    """Mark a database as failed when it can never be made, and leave nothing of it behind."""
    try:
        yield
    except Refused as refused:
        # Under the lock: a process that was frozen, and is refused late, must not remove what another one has made.
        with with_lock(database):
            get_provisioner(database.engine).delete(database.name)
            database.become_failed(str(refused))


@job(timeout=timedelta(minutes=10))
def create_database(database: Database) -> None:
    """Make the real database. A deletion that is asked for meanwhile wins: then the row is left as it is."""
    provisioner = get_provisioner(database.engine)
    with giving_up(database):
        made = provisioner.create(database.name, database.password)
        with with_lock(database):
            database.become_ready(made)


@job(timeout=timedelta(minutes=10))
def delete_database(database: Database) -> None:
    """Remove the real database, or what there is of it."""
    get_provisioner(database.engine).delete(database.name)
    with with_lock(database):
        database.become_deleted()


@sweep(create_database, cron="* * * * *")
def schedule_databases() -> DatabaseQuerySet:
    return Database.objects.needs_creating()


@sweep(delete_database, cron="* * * * *")
def schedule_database_deletions() -> DatabaseQuerySet:
    return Database.objects.deleting()


@job(timeout=timedelta(minutes=30), backoff=Backoff(first=timedelta(seconds=5), cap=timedelta(minutes=1)))
def create_branch(branch: Database) -> None:
    """Copy the parent. One that is deleted before cannot be copied any more.

    An engine that copies only what nobody is connected to tries again, and says who is. Once that has gone on for
    `SESSIONS_END_AFTER`, it ends their sessions.
    """
    provisioner, parent = get_provisioner(branch.engine), branch.parent
    assert parent
    with giving_up(branch):
        require(parent)
        try:
            made = provisioner.copy(parent.name, branch.name, branch.password, branch.ends_sessions)
        except InUse:
            # From here on, and not since the branch was asked for: nobody may have been here meanwhile.
            with with_lock(branch):
                branch.wait_for_sessions(SESSIONS_END_AFTER)
            raise
        with with_lock(branch):
            branch.become_ready(made)


@sweep(create_branch, cron="* * * * *")
def schedule_branches() -> DatabaseQuerySet:
    return Database.objects.needs_branching()


@job(timeout=timedelta(minutes=30))
def deploy(request: DeployRequest) -> None:
    """Try the change on the branch, then make it in the target, each exactly once.

    Killed at any moment, it finds out from the databases themselves how far it had come.
    """
    try:
        schema = tried_and_made(request)
    except Refused as refused:
        with with_lock(request):
            request.become_failed(str(refused))
    else:
        with with_lock(request):
            request.become_deployed(schema)
        try:
            check_deployment_status.enqueue(request.pk)
        except QueueUnavailable as error:
            logger.warning("Nobody looks again at the schema of %s after %s: %s", request.target, request, error)
    # Whoever waits for its turn need not wait for the sweep as well.
    deploy.enqueue_many(DeployRequest.objects.needs_deploying().filter(target=request.target))


def tried_and_made(request: DeployRequest) -> str:
    """Make the change where it has not been made yet, and return a digest of the target's schema. Raises Refused."""
    if request.state != DeployRequest.State.DEPLOYING:
        require(request.branch)
        require(request.target)
        with with_lock(request):
            request.become(DeployRequest.State.CHECKING)
        # Another marker than the target's: that may be a copy of this very branch.
        change(request.branch, f"{request.marker} tried", request.sql)
        with with_lock(request):
            request.become(DeployRequest.State.DEPLOYING)
    require(request.target)
    return change(request.target, str(request.marker), request.sql)


def require(database: Database) -> None:
    """See that a database can be used. Raises Refused for one that never can again."""
    if database.state != Database.State.READY:
        raise Refused(f"The database {database} cannot be used any more: it is {database.get_state_display().lower()}.")


def change(database: Database, marker: str, sql: str) -> str:
    """Make a change unless it is made already, and return a digest of the schema. Raises Refused, and says where."""
    try:
        return get_provisioner(database.engine).deploy(database.name, database.password, marker, sql, CHANGE_TIMEOUT)
    except Refused as refused:
        raise Refused(f"In {database}: {refused}") from refused


@sweep(deploy, cron="* * * * *")
def schedule_deploys() -> DeployRequestQuerySet:
    return DeployRequest.objects.needs_deploying()


@job(queue="urgent", unique_for=timedelta(minutes=1), unique_until="start", max_attempts=5)
def check_deployment_status(deployment_id: int) -> None:
    """See that the target has the schema that was asked for.

    After a later deploy into the same target nobody can tell any more, and the request stays unconfirmed. When somebody
    else has changed it, the request says so, and SchemaDiffers is raised.
    """
    request = DeployRequest.objects.select_related("target").get(pk=deployment_id)
    changing = (DeployRequest.State.DEPLOYING, DeployRequest.State.DEPLOYED)
    later = DeployRequest.objects.filter(target=request.target, pk__gt=request.pk, state__in=changing)
    is_deployed = request.state == DeployRequest.State.DEPLOYED
    if not is_deployed or request.target.state != Database.State.READY or later.exists():
        return
    if get_provisioner(request.target.engine).schema(request.target.name) != request.schema:
        differs = f"The schema of {request.target} is not the one that {request} has left there."
        DeployRequest.objects.filter(pk=request.pk).update(error=differs)
        raise SchemaDiffers(differs)
    DeployRequest.objects.filter(pk=request.pk).update(confirmed_at=timezone.now(), error="")


class SchemaDiffers(Exception):
    """A database was changed by somebody else right after a deploy."""
