"""How the operators' pages write times, durations and the shape of a day."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from django import template
from django.utils import timezone
from django.utils.formats import date_format
from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString
from django.utils.translation import gettext as _

from jobs import health

register = template.Library()

# Of a sparkline, in its own units: for each hour a bar.
BAR, GAP, HEIGHT = 4, 1, 20
UNKNOWN = "\N{EN DASH}"


@register.filter
def seconds(value: float | None) -> str:
    """Write a duration, such as 340 ms; a dash for one that is not known."""
    return UNKNOWN if value is None else health.duration(value)


@register.filter
def ago(moment: datetime | None, now: datetime) -> str | SafeString:
    """Write a time as seen from now, such as 3 min ago, with the time itself, and its zone, for whoever asks for it."""
    if moment is None:
        return UNKNOWN
    difference = now - moment
    if abs(difference) < timedelta(seconds=1):
        text = _("now")
    elif difference > timedelta(0):
        text = _("%(duration)s ago") % {"duration": health.duration(difference)}
    else:
        text = _("in %(duration)s") % {"duration": health.duration(-difference)}
    return format_html('<time datetime="{}" title="{}">{}</time>', moment.isoformat(), _exactly(moment), text)


@register.filter
def in_hour(hour: datetime) -> SafeString:
    """Write the hour in which something was, with its zone."""
    local = timezone.localtime(hour)
    return format_html('<time datetime="{}">{}</time>', hour.isoformat(), f"{local:%Y-%m-%d %H:00 %Z}")


def _exactly(moment: datetime) -> str:
    local = timezone.localtime(moment)
    return f"{date_format(local, 'DATETIME_FORMAT')} {local:%Z}"


@register.simple_tag
def sparkline(item: health.Item) -> SafeString:
    """Draw how many attempts were done and failed in each of the last 24 hours; as a text, how many it were in all.

    Of a sweep, how many failed: those that did not are not kept.
    """
    done, failed = sum(item.done), sum(item.failed)
    most = max(map(sum, zip(item.done, item.failed, strict=True)))
    if not most:
        text = _("none in 24 h") if item.kind == "sweep" else _("nothing in 24 h")
        return format_html('<span class="quiet">{}</span>', text)
    if item.kind == "sweep":
        text = _("24 hours: %(failed)s failed, at most %(most)s an hour")
    else:
        text = _("24 hours: %(done)s done, %(failed)s failed, at most %(most)s an hour")
    text %= {
        "done": f"{done:,}",
        "failed": f"{failed:,}",
        "most": f"{most:,}",
    }
    width = len(item.done) * (BAR + GAP) - GAP
    bars = [
        bar for place, hour in enumerate(zip(item.done, item.failed, strict=True)) for bar in _bars(place, *hour, most)
    ]
    return format_html(
        '<svg class="sparkline" role="img" aria-label="{}" width="{}" height="{}" viewBox="0 0 {} {}">'
        "<title>{}</title>{}</svg>",
        text,
        width,
        HEIGHT,
        width,
        HEIGHT,
        text,
        format_html_join("", '<rect class="{}" x="{}" y="{}" width="{}" height="{}"/>', bars),
    )


def _bars(place: int, done: int, failed: int, most: int) -> list[tuple[Any, ...]]:
    """Return the two parts of an hour's bar: what failed stands on what was done, and neither is too low to be seen."""
    high = [max(1.5, (HEIGHT - 2) * runs / most) if runs else 0 for runs in (done, failed)]
    x = place * (BAR + GAP)
    if not any(high):
        return [("none", x, HEIGHT - 1, BAR, 1)]
    return [
        (kind, x, round(HEIGHT - above - part, 1), BAR, round(part, 1))
        for kind, above, part in (("done", 0, high[0]), ("failed", high[0], high[1]))
        if part
    ]
