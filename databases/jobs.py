"""What makes the world follow the rows: one job for each kind of work, one sweep that finds the rows which need it."""

from datetime import timedelta

from databases.models import Database, DatabaseQuerySet
from databases.provisioners import get_provisioner
from jobs import job, sweep, with_lock


@job(timeout=timedelta(minutes=10))
def create_database(database: Database) -> None:
    """Make the real database. A deletion that is asked for meanwhile wins: then the row is left as it is."""
    made = get_provisioner().create(database.name)
    with with_lock(database):
        database.become_ready(made)


@job(timeout=timedelta(minutes=10))
def delete_database(database: Database) -> None:
    """Remove the real database, or what there is of it."""
    get_provisioner().delete(database.name)
    with with_lock(database):
        database.become_deleted()


@sweep(create_database, cron="* * * * *")
def schedule_databases() -> DatabaseQuerySet:
    return Database.objects.pending()


@sweep(delete_database, cron="* * * * *")
def schedule_database_deletions() -> DatabaseQuerySet:
    return Database.objects.deleting()
