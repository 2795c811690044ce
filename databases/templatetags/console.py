"""How the console writes times and states."""

from datetime import datetime, timedelta
from typing import Any

from django import template
from django.utils import timezone
from django.utils.formats import date_format
from django.utils.html import format_html
from django.utils.safestring import SafeString
from django.utils.timesince import timesince

register = template.Library()

# What each state looks like; its word says it too.
LOOKS = {
    "ready": "good",
    "deployed": "good",
    "pending": "busy",
    "checking": "busy",
    "deploying": "busy",
    "deleting": "busy",
    "failed": "bad",
    "damaged": "bad",
}


@register.filter
def ago(moment: datetime | None) -> str | SafeString:
    """Write a time as seen from now, such as 3 minutes ago, with the time itself, and its zone, for whoever asks."""
    if moment is None:
        return "\N{EN DASH}"
    now = timezone.now()
    away = timesince(moment, now, depth=1) if moment <= now else timesince(now, moment, depth=1)
    if abs(now - moment) < timedelta(minutes=1):
        text = "just now" if moment <= now else "in less than a minute"
    else:
        text = f"{away} ago" if moment <= now else f"in {away}"
    return format_html('<time datetime="{}" title="{}">{}</time>', moment.isoformat(), _exactly(moment), text)


@register.filter
def exactly(moment: datetime) -> SafeString:
    """Write a time in full, with its zone."""
    return format_html('<time datetime="{}">{}</time>', moment.isoformat(), _exactly(moment))


@register.filter
def state(row: Any) -> SafeString:
    """Write the state that a row is in."""
    return format_html('<span class="state {}">{}</span>', LOOKS.get(row.state, "quiet"), row.state)


@register.filter
def span(duration: timedelta) -> str:
    """Write a duration as it was asked for, such as 6 hours or 30 days."""
    for unit in ("day", "hour", "minute"):
        number, rest = divmod(duration, timedelta(**{f"{unit}s": 1}))
        if not rest:
            return f"{number} {unit}" if number == 1 else f"{number} {unit}s"
    return str(duration)


def _exactly(moment: datetime) -> str:
    local = timezone.localtime(moment)
    return f"{date_format(local, 'DATETIME_FORMAT')} {local:%Z}"
