"""What users ask for: the row first, then a hint to the queue. The admin calls these, and so does whoever plays a user.

The hint goes out when the transaction commits. If it gets lost, the sweep finds the row within a minute.
"""

from databases.jobs import create_database, delete_database
from databases.models import Database, DatabaseQuerySet


def request_creation(database: Database) -> None:
    """Save a new database and have it made."""
    database.save(force_insert=True)
    create_database.enqueue(database)


def request_deletion(database: Database) -> bool:
    """Have a database deleted. Returns False when that was asked for already."""
    if not database.request_deletion():
        return False
    delete_database.enqueue(database)
    return True


def request_deletions(databases: DatabaseQuerySet) -> int:
    """Have many databases deleted, with one hint for all. Returns for how many it was not asked for already."""
    marked = databases.request_deletion()
    delete_database.enqueue_many(databases.deleting())
    return marked
