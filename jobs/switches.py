"""Feature flags that stop one job type: waffle's switches, read from the database itself.

Waffle's own check goes through Django's cache, where a flip can stay unseen for five minutes.
"""

from collections.abc import Iterable

from django.db import router
from django.utils.translation import gettext as _
from waffle import get_waffle_switch_model

PREFIX = "disable_"


def disabled(names: Iterable[str]) -> set[str]:
    """Return those of the names whose switch is on, in one query. A missing switch means enabled."""
    wanted = {PREFIX + name for name in names}
    Switch = get_waffle_switch_model()
    primary = Switch.objects.using(router.db_for_write(Switch))
    on = primary.filter(name__in=wanted, active=True).values_list("name", flat=True)
    return {name.removeprefix(PREFIX) for name in on}


def create_missing(names: Iterable[str], using: str, tables: Iterable[str]) -> None:
    """Create a switch, off, for each name that has none, so that the admin lists them all before the first incident."""
    Switch = get_waffle_switch_model()
    if not router.allow_migrate_model(using, Switch) or Switch._meta.db_table not in tables:
        return
    note = _("Turn on to stop %(name)s everywhere within seconds. Nothing is lost; turn off to catch up.")
    Switch.objects.using(using).bulk_create(
        [Switch(name=PREFIX + name, note=note % {"name": name}) for name in names], ignore_conflicts=True
    )
