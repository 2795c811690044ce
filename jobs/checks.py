"""What a project can get wrong, found at start, each with what to do about it."""

from __future__ import annotations

from typing import Any

from django.conf import settings
from django.core.checks import CheckMessage, Error, register
from django.utils.module_loading import import_string

from jobs import conf, registry

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
    rq = getattr(settings, "RQ", {})
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
