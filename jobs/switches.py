"""Feature flags that stop one job type: waffle's switches, read from the database itself.

Waffle's own check goes through Django's cache, where a flip can stay unseen for five minutes.
"""

from collections.abc import Iterable
from datetime import datetime
from typing import Any

from django.db import router, transaction
from django.utils.translation import gettext as _
from waffle import get_waffle_switch_model

PREFIX = "disable_"


def disabled(names: Iterable[str]) -> set[str]:
    """Return those of the names whose switch is on, in one query. A missing switch means enabled."""
    return set(disabled_since(names))


def disabled_since(names: Iterable[str]) -> dict[str, datetime]:
    """Return those of the names whose switch is on, with when it was last changed. In one query."""
    wanted = {PREFIX + name for name in names}
    Switch = get_waffle_switch_model()
    primary = Switch.objects.using(_database())
    on = primary.filter(name__in=wanted, active=True).values_list("name", "modified")
    return {name.removeprefix(PREFIX): modified for name, modified in on}


def turn_on(name: str, at: datetime) -> None:
    """Turn a switch on, or have it be on again, and say on it that this was at the given time."""
    Switch = get_waffle_switch_model()
    switch = Switch(name=PREFIX + name, active=True, modified=at)
    # Not saved, which would give it a time of its own.
    Switch.objects.using(_database()).bulk_create(
        [switch], update_conflicts=True, unique_fields=["name"], update_fields=["active", "modified"]
    )
    _tell_cache(switch)


def turn_off(name: str, at: datetime, since: datetime | None = None) -> bool:
    """Turn a switch off, with `since` only if nobody has changed it since then. Returns whether it was on."""
    Switch = get_waffle_switch_model()
    on = Switch.objects.using(_database()).filter(name=PREFIX + name, active=True)
    was_on = bool((on if since is None else on.filter(modified=since)).update(active=False, modified=at))
    _tell_cache(Switch(name=PREFIX + name))
    return was_on


def _database() -> str:
    return router.db_for_write(get_waffle_switch_model())


def _tell_cache(switch: Any) -> None:
    """Have waffle's own functions, which a project may use too, see the change. Their cache may be away."""
    transaction.on_commit(switch.flush, using=_database(), robust=True)


def model() -> Any:
    """The model of the switches, which a project may have replaced by one of its own."""
    return get_waffle_switch_model()


def create_missing(names: Iterable[str], using: str) -> None:
    """Create a switch, off, for each name that has none, so that the admin lists them all before the first incident."""
    Switch = get_waffle_switch_model()
    note = _("Turn on to stop %(name)s everywhere within seconds. Nothing is lost; turn off to catch up.")
    Switch.objects.using(using).bulk_create(
        [Switch(name=PREFIX + name, note=note % {"name": name}) for name in names], ignore_conflicts=True
    )
