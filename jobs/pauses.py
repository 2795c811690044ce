"""Pauses: one job or sweep stopped for a while, by somebody, for a reason.

Its switch alone says whether it is paused. The row of its schedule only says who paused it, why and until when, and
that of one flip of the switch, the one at `paused_at`: whatever anybody changes in waffle's own admin is another pause,
or none, and takes over neither the reason nor the end.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from django.apps import apps
from django.db import router, transaction
from django.utils.translation import gettext as _

from jobs import clock, registry, switches

if TYPE_CHECKING:
    from jobs.models import Schedule, ScheduleQuerySet

logger = logging.getLogger("selfheal")

UNPAUSED: dict[str, Any] = {"paused_at": None, "paused_until": None, "paused_by": "", "paused_reason": ""}


@dataclass(frozen=True)
class Pause:
    """What is known of a pause. Of one that was made in waffle's admin, only since when."""

    name: str
    since: datetime
    until: datetime | None = None
    by: str = ""
    reason: str = ""


def pause(name: str, *, reason: str = "", until: datetime | None = None, by: str = "") -> None:
    """Stop a job or sweep everywhere within seconds, until the given time or for ever. What is at work finishes.

    Pausing what is paused replaces the reason and the end. Raises `ValueError` for a name that has no switch, and for
    an end that has passed.
    """
    _check(name)
    now = clock.read()
    if until is not None and until <= now:
        text = _("A pause of %(name)s until %(time)s would be over already; give a time that is to come.")
        raise ValueError(text % {"name": name, "time": until})
    noted = {"paused_at": now, "paused_until": until, "paused_by": by[:150], "paused_reason": reason[:500]}
    with transaction.atomic(_database()):
        # The row first, and its lock is held until the switch is committed: who ends an older pause meanwhile waits
        # here, and then finds another one than they read.
        if not _schedules().filter(pk=name).update(**noted):
            _schedules().create(name=name, **noted)
        switches.turn_on(name, at=now)


def resume(name: str) -> bool:
    """End a pause, whoever made it: the job or sweep catches up. Returns whether there was one.

    Raises `ValueError` for a name that has no switch.
    """
    _check(name)
    with transaction.atomic(_database()):
        _schedules().filter(pk=name).update(**UNPAUSED)
        return switches.turn_off(name, at=clock.read())


def end_due(schedules: Iterable[Schedule], now: datetime) -> None:
    """End the pauses whose time is over, and forget what was noted of those that somebody ended in waffle's admin.

    The schedules are as the caller has read them; if none of them was paused, this asks nothing.
    """
    noted = [schedule for schedule in schedules if schedule.paused_at]
    if not noted:
        return
    # Read after the rows: a row is written before its switch is turned on, so a pause that was read has its switch on.
    since = switches.disabled_since(schedule.name for schedule in noted)
    for schedule in noted:
        is_over = schedule.paused_until is not None and schedule.paused_until <= now
        if is_over or since.get(schedule.name) != schedule.paused_at:
            _end(schedule, now)


def _end(schedule: Schedule, now: datetime) -> None:
    with transaction.atomic(_database()):
        as_read = {"pk": schedule.pk, "paused_at": schedule.paused_at}
        # The switch goes off only if nobody has touched it since: a pause that was made in waffle's admin has no end.
        is_ours = _schedules().filter(**as_read).update(**UNPAUSED)
        if is_ours and switches.turn_off(schedule.name, at=now, since=schedule.paused_at):
            logger.info("The pause of %s is over.", schedule.name)


def read(names: Iterable[str] | None = None) -> dict[str, Pause]:
    """Return what is paused, of these names or of all that is declared. One query, or two if anything is."""
    since = switches.disabled_since(names if names is not None else [each.name for each in registry.declared()])
    noted = {schedule.name: schedule for schedule in _schedules().filter(pk__in=since)} if since else {}
    return {name: describe(name, at, noted.get(name)) for name, at in since.items()}


def describe(name: str, since: datetime, noted: Schedule | None) -> Pause:
    """Return what its schedule's row says of a pause, which is nothing if what is noted there is of another one."""
    if noted is None or noted.paused_at != since:
        return Pause(name, since)
    return Pause(name, since, noted.paused_until, noted.paused_by, noted.paused_reason)


def _check(name: str) -> None:
    declared = registry.get(name)
    if declared is None:
        raise ValueError(_("No job or sweep named %r is declared in this project.") % name)
    if not declared.has_switch:
        text = _("%s cannot be paused: it runs when it is called, on no schedule and for no sweep.")
        raise ValueError(text % name)


def _schedules() -> ScheduleQuerySet:
    schedules: ScheduleQuerySet = apps.get_model("selfheal", "Schedule").objects.all()
    return schedules


def _database() -> str:
    return router.db_for_write(apps.get_model("selfheal", "Schedule"))
