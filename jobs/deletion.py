"""How the library deletes rows of its own: by one statement, whatever the project around it listens to."""

from typing import Any

from django.db import router
from django.db.models import QuerySet


def delete(rows: QuerySet[Any]) -> int:
    """Delete rows that nothing refers to, and tell no receiver of signals. Returns how many those were.

    As soon as anybody in the project listens to `post_delete`, Django's own `delete()` reads every row first, whole:
    a history with all its tracebacks. And what it then deletes is what it has read, and not what still matches.
    """
    # Of no rows at all there is no statement, and no number.
    return int(rows._raw_delete(router.db_for_write(rows.model)) or 0)
