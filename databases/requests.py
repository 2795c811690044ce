"""What users ask for: the row first, then a hint to the queue. The admin calls these, and so does whoever plays a user.

The hint goes out when the transaction commits. If it gets lost, the sweep finds the row within a minute.
"""

from databases.jobs import create_database, delete_database
from databases.models import Database, DatabaseQuerySet


def request_creation(database: Database) -> None:
    """Save a new database and have it made."""
    database.save(force_insert=True)
    create_database.enqueue(database)


def request_deletion(databases: DatabaseQuerySet) -> None:
    """Have databases deleted; fine for those that are being deleted, or gone, already.

    Do not choose them by their state, which this changes before it looks at them again.
    """
    databases.request_deletion()
    delete_database.enqueue_many(databases.deleting())
