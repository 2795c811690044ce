"""What users ask for: the row first, then a hint to the queue. The admin calls these, and so does whoever plays a user.

The hint goes out when the transaction commits. If it gets lost, the sweep finds the row within a minute.
"""

from databases.jobs import create_branch, create_database, delete_database, deploy
from databases.models import Database, DatabaseQuerySet, DeployRequest


def request_creation(database: Database) -> None:
    """Save a new database and have it made."""
    database.save(force_insert=True)
    create_database.enqueue(database)


def request_branch(branch: Database) -> None:
    """Save a new database that is to be a copy of its parent, and have it made."""
    assert branch.parent
    branch.origin, branch.engine = Database.Origin.COPY, branch.parent.engine
    branch.save(force_insert=True)
    create_branch.enqueue(branch)


def request_deploy(request: DeployRequest) -> None:
    """Save a new deploy request and have it deployed, after those into the same database that were asked for before."""
    request.save(force_insert=True)
    deploy.enqueue(request)


def request_withdrawal(request: DeployRequest) -> bool:
    """Have a deploy not made, and let the next one into the same database go on. Returns False when it has begun."""
    was_withdrawn = request.request_withdrawal()
    deploy.enqueue_many(DeployRequest.objects.needs_deploying().filter(target=request.target_id))
    return was_withdrawn


def request_deletion(databases: DatabaseQuerySet) -> None:
    """Have databases deleted; fine for those that are being deleted, or gone, already.

    Do not choose them by their state, which this changes before it looks at them again.
    """
    databases.request_deletion()
    delete_database.enqueue_many(databases.deleting())
