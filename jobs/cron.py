"""Cron expressions: five fields, or six with seconds last, in Django's time zone."""

from datetime import datetime

from croniter import croniter
from croniter.croniter import CroniterError
from django.utils import timezone


def problem(expression: str) -> str | None:
    """Return why the expression cannot be used, in a sentence, or None."""
    fields = len(expression.split()) if isinstance(expression, str) else 0
    if fields not in (5, 6):
        return f"{expression!r} is no cron expression: give five fields, or six with seconds last."
    try:
        next_time(expression, timezone.now())
    except (CroniterError, ValueError, KeyError, TypeError) as error:
        return f"{expression!r} is no cron expression that ever comes due: {error}"
    return None


def next_time(expression: str, after: datetime) -> datetime:
    """Return the first moment after the given one that the expression names, in Django's time zone."""
    local = timezone.localtime(after, timezone.get_default_timezone()) if timezone.is_aware(after) else after
    moment: datetime = croniter(expression, local).get_next(datetime)
    return moment
