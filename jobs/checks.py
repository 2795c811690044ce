"""What a project can get wrong, found at start, each with what to do about it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from datetime import timedelta
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from django.apps import apps
from django.conf import settings
from django.core.checks import CheckMessage, Error, register
from django.core.checks import Warning as Warn
from django.db import connections, router
from django.db.models import Q, QuerySet
from django.utils.module_loading import import_string
from redis.exceptions import RedisError
from rq.exceptions import TimeoutFormatError

from jobs import conf, queues, registry
from jobs.sweep import Sweep

CLASSES = {
    "JOB_CLASS": "jobs.message.Message",
    "QUEUE_CLASS": "jobs.queues.Queue",
    "WORKER_CLASS": "jobs.worker.Worker",
    "SCHEDULER_CLASS": "jobs.scheduler.Scheduler",
}


@register("selfheal")
def check_declarations(**kwargs: Any) -> list[CheckMessage]:
    """Every job and sweep, as declared in the apps' jobs modules."""
    problems = [(each, number, sentence) for each in registry.declared() for number, sentence in each.problems()]
    problems += [(each, "E001", sentence) for each, sentence in registry.refused()]
    return [
        Error(f"{each.origin}: {sentence}", obj=each, id=f"selfheal.{number}") for each, number, sentence in problems
    ]


@register("selfheal")
def check_settings(**kwargs: Any) -> list[CheckMessage]:
    """JOBS, and the classes that django-rq must use for the promises to hold."""
    errors: list[CheckMessage] = [Error(sentence, id="selfheal.E008") for sentence in conf.problems()]
    given = getattr(settings, "RQ", None)
    rq = given if isinstance(given, dict) else {}
    for option, path in CLASSES.items():
        given = rq.get(option)
        try:
            found = import_string(given) if isinstance(given, str) else given
        except ImportError:
            found = None
        if not (isinstance(found, type) and issubclass(found, import_string(path))):
            errors.append(
                Error(
                    f"RQ[{option!r}] is {given!r}.",
                    hint=f'Set RQ = {{"{option}": "{path}", ...}}, or a subclass of it.',
                    id="selfheal.E007",
                )
            )
    return errors


@register("selfheal")
def check_surroundings(**kwargs: Any) -> list[CheckMessage]:
    """The apps, the time and the database that this one stands on, and another package of its name that it hides.

    One that hides this one cannot be told of here: then nothing of this is imported.
    """
    found: list[CheckMessage] = [
        Error(
            f"{name!r} is not in INSTALLED_APPS.",
            hint='INSTALLED_APPS += ["django_rq", "waffle", "jobs"]',
            id="selfheal.E010",
        )
        for name in ("django_rq", "waffle")
        if not apps.is_installed(name)
    ]
    if not settings.USE_TZ:
        found.append(
            Error(
                "USE_TZ is False: by the clocks of a time zone, an hour comes twice each year, and leases go by time.",
                hint="Set USE_TZ = True. What that changes for the rest of the project, Django's documentation says.",
                id="selfheal.E013",
            )
        )
    claims = connections[router.db_for_write(apps.get_model("selfheal", "Claim"))]
    if claims.vendor not in ("postgresql", "sqlite"):
        found.append(
            Error(
                f"The database {claims.alias!r} is {claims.display_name}, and claims cannot be kept there.",
                hint="Route the app selfheal to PostgreSQL or SQLite in DATABASE_ROUTERS; its rows may stay.",
                id="selfheal.E011",
            )
        )
    ours = Path(__file__).with_name("__init__.py").resolve()
    specs = [PathFinder.find_spec("jobs", [folder]) for folder in dict.fromkeys(sys.path)]
    others = {Path(spec.origin).resolve() for spec in specs if spec is not None and spec.origin} - {ours}
    return found + [
        Warn(f"{other} cannot be imported: {ours} hides it.", hint="Give it another name.", id="selfheal.W013")
        for other in sorted(others)
    ]


@register("selfheal")
def check_sweeps(**kwargs: Any) -> list[CheckMessage]:
    """Sweeps that will read their whole table every time.

    Simple and on the safe side: only fields that are compared with something are looked at, and one that an index
    begins with, or has as its condition, is enough. What else a queryset does, this cannot judge.
    """
    return [
        Warn(
            f"{sweep.origin}: no index of {rows.model._meta.label} helps to find its rows, by {', '.join(fields)}.",
            hint=f"Add one to Meta.indexes, such as {_index_on(fields)}",
            obj=sweep,
            id="selfheal.W011",
        )
        for sweep, rows in _sweeps()
        if (fields := _unindexed(rows))
    ]


@register("selfheal")
def check_timeouts(**kwargs: Any) -> list[CheckMessage]:
    """Time limits of queues that are none, and long work in a queue that was set up for shorter work."""
    found: list[CheckMessage] = []
    longest: dict[str, int] = {}
    for name, config in getattr(settings, "RQ_QUEUES", {}).items():
        given = config.get("DEFAULT_TIMEOUT") if isinstance(config, dict) else None
        try:
            longest[name] = 0 if given is None else queues.default_timeout(name)
        except (TimeoutFormatError, TypeError, ValueError, OverflowError, AssertionError):
            longest[name] = -1
        if longest[name] < 0:
            found.append(
                Error(
                    f"The DEFAULT_TIMEOUT of the queue {name!r} is {given!r}, and work without an end is never ended.",
                    hint='Give it in seconds, or as in "2h", and a job that takes longer its own timeout=.',
                    id="selfheal.E012",
                )
            )
    for each in registry.declared():
        most = longest.get(each.queue, 0) if isinstance(each.queue, str) else 0
        if most > 0 and isinstance(each.timeout, timedelta) and each.timeout.total_seconds() > most:
            found.append(
                Warn(
                    f"{each.origin}: its timeout, {each.timeout}, is longer than the DEFAULT_TIMEOUT of the queue "
                    f"{each.queue!r}, {most} seconds; what is queued behind it may wait that long.",
                    hint="Pass another queue=, with workers of its own, or raise DEFAULT_TIMEOUT in RQ_QUEUES.",
                    obj=each,
                    id="selfheal.W012",
                )
            )
    return found


@register("selfheal", deploy=True)
def check_redis(**kwargs: Any) -> list[CheckMessage]:
    """What `check --deploy` asks every Redis: whether it is there, and whether it keeps what it was given."""
    found: list[CheckMessage] = []
    for connection in queues.connections():
        options = connection.connection_pool.connection_kwargs
        where = f"Redis at {options.get('host') or options.get('path')}:{options.get('port', '')}"
        try:
            policy = connection.info("memory").get("maxmemory_policy", "noeviction")
        except RedisError as error:
            hint = "Start it, or correct RQ_QUEUES. Until it answers, no job is performed; none is lost but plain ones."
            found.append(Warn(f"{where} does not answer: {error}", hint=hint, id="selfheal.W015"))
            continue
        if policy != "noeviction":
            hint = "CONFIG SET maxmemory-policy noeviction, there and in its configuration; use another one as a cache."
            sentence = f"{where} throws data away when its memory is full ({policy}): queues, and calls of plain jobs."
            found.append(Warn(sentence, hint=hint, id="selfheal.W014"))
    return found


@register("selfheal", deploy=True)
def check_databases(**kwargs: Any) -> list[CheckMessage]:
    """Databases of claims and of rows that cannot lock one row."""
    aliases = {router.db_for_write(apps.get_model("selfheal", "Claim")), *(rows.db for _, rows in _sweeps())}
    return [
        Warn(
            f"The database {alias!r} ({connections[alias].display_name}) cannot lock a row: each of its writers locks "
            "everything, and all of them have to be on one machine.",
            hint="Use PostgreSQL, unless this is a small deployment on one machine.",
            id="selfheal.W016",
        )
        for alias in sorted(aliases)
        if not connections[alias].features.has_select_for_update
    ]


def _sweeps() -> Iterator[tuple[Sweep, QuerySet[Any]]]:
    """Yield the sweeps with their rows. What is wrong with the others, `check_declarations` says."""
    for each in registry.declared():
        if isinstance(each, Sweep):
            try:
                rows = each.queryset()
            except Exception:
                continue
            yield each, rows


def _unindexed(rows: QuerySet[Any]) -> dict[str, str]:
    """Return the names of the fields that the rows are found by, and how, if no index can help; otherwise nothing."""
    fields: dict[str, str] = {}
    for condition in _leaves(rows.query.where):
        field = getattr(getattr(condition, "lhs", None), "target", None)
        if field is None or _is_indexed(field):
            return {}
        fields.setdefault(field.name, getattr(condition, "lookup_name", "exact"))
    return fields


def _index_on(fields: dict[str, str]) -> str:
    """Return an index by which rows can be found that are found by these fields."""
    # What is due by now is a range that moves with the time, and the condition of an index does not.
    ranges = [name for name, lookup in fields.items() if lookup in ("lt", "lte", "gt", "gte", "range")]
    fixed = [name for name in fields if name not in ranges]
    of = f'fields=["{[*ranges, "id"][0]}"]'
    if not fixed:
        return f'models.Index({of}, name="...").'
    return (
        f'models.Index({of}, condition=models.Q({fixed[0]}=...), name="..."): '
        "a partial index holds nothing but the rows that need work."
    )


def _leaves(node: Any) -> Iterator[Any]:
    for child in getattr(node, "children", [node]):
        yield from _leaves(child) if hasattr(child, "children") else [child]


def _is_indexed(field: Any) -> bool:
    options = field.model._meta
    if field.db_index or field.unique or any(field.name == fields[0] for fields in options.unique_together):
        return True
    for index in [*options.indexes, *options.constraints]:
        names = [name.lstrip("-") for name in getattr(index, "fields", ())]
        pairs = [each for each in _leaves(getattr(index, "condition", None) or Q()) if isinstance(each, tuple)]
        conditions = [lookup.partition("__")[0] for lookup, _ in pairs]
        if getattr(index, "expressions", ()) or field.name in [*names[:1], *conditions]:
            return True
    return False
