"""Cron expressions: five fields, or six with seconds last, in Django's time zone."""

from datetime import UTC, datetime, timedelta, tzinfo
from functools import lru_cache

from croniter import croniter
from croniter.croniter import CroniterError
from django.utils import timezone
from django.utils.translation import gettext as _

# No zone puts its clocks forward by more than this.
LONGEST_CHANGE = timedelta(hours=2)


def problem(expression: str) -> str | None:
    """Return why the expression cannot be used, in a sentence, or None."""
    fields = len(expression.split()) if isinstance(expression, str) else 0
    if fields not in (5, 6):
        text = _("%(expression)r is no cron expression: give five fields, or six with seconds last.")
        return text % {"expression": expression}
    try:
        next_time(expression, datetime.now(UTC))
    except (CroniterError, ValueError, KeyError, TypeError) as error:
        text = _("%(expression)r is no cron expression that ever comes due: %(error)s")
        return text % {"expression": expression, "error": error}
    return None


def next_time(expression: str, after: datetime) -> datetime:
    """Return the first moment after the given one that the expression names in Django's time zone, as UTC.

    When the clocks change, an expression whose hours are numbers comes due once for each time of day that it names: in
    the hour that comes twice, the first time; in the one that is left out, as much later as the clocks went forward.
    One whose hours begin with `*` goes by the time that passes.
    """
    # Nothing comes due within a second or, where there is no field for them, within a minute. So of the many that ask
    # in the same minute, tick after tick, one computes.
    after = after.astimezone(UTC).replace(microsecond=0)
    if len(expression.split()) < 6:
        after = after.replace(second=0)
    return _next_time(expression, after, timezone.get_default_timezone())


# By moments in UTC: of the two times of day that the end of summer gives one name to, Python takes one for the other.
@lru_cache(maxsize=1024)
def _next_time(expression: str, after: datetime, zone: tzinfo) -> datetime:
    local = timezone.localtime(after, zone)
    if expression.split()[1].startswith("*"):
        return _next(expression, local).astimezone(UTC)
    # What the clocks would show had they not just gone forward: what they left out may still have to come.
    unchanged = after + _offset(after - LONGEST_CHANGE, zone)
    time_of_day = min(local.replace(tzinfo=None), unchanged.replace(tzinfo=None))
    while True:
        time_of_day = _next(expression, time_of_day)
        # As if the clocks had not changed yet, whether this time comes twice or not at all.
        moment = time_of_day.replace(tzinfo=zone, fold=0).astimezone(UTC)
        if moment > after:
            return moment


def count_until(expression: str, first: datetime, last: datetime, most: int) -> int:
    """Return how often the expression comes due from the first of these moments, where it does, to the last."""
    count = 0
    while first <= last and count < most:
        count += 1
        first = next_time(expression, first)
    return count


def _offset(moment: datetime, zone: tzinfo) -> timedelta:
    return timezone.localtime(moment, zone).utcoffset() or timedelta(0)


def _next(expression: str, after: datetime) -> datetime:
    moment: datetime = croniter(expression, after).get_next(datetime)
    return moment
