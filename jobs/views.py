"""What machines ask: whether this process lives, whether work gets done, and the metrics.

Each answers within a second, whatever hangs. They say names of jobs and queues, and nothing that is secret; still,
do not let the world ask.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as Late
from typing import Any, TypeVar, cast

from django.db import connections
from django.http import Http404, HttpRequest, HttpResponse, JsonResponse
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_safe

from jobs import health

T = TypeVar("T")

# A little more than Redis may take.
PATIENCE_SECONDS = health.PATIENCE.total_seconds() + 0.2


@require_safe
@never_cache
def healthz(request: HttpRequest) -> HttpResponse:
    """Answer, which is all that it takes to be alive: no database and no Redis are asked."""
    return HttpResponse("ok\n", content_type="text/plain; charset=utf-8")


@require_safe
@never_cache
def readyz(request: HttpRequest) -> JsonResponse:
    """Answer 200 while work gets done, 503 while it does not, and say what is missing in either case.

    There must be the database and each Redis, a worker for each queue that something declared uses, and of each sweep
    that is not paused a success within two of its intervals.
    """
    found = _read(health.read)
    if found is None:
        return JsonResponse({"ready": False, "database": "does not answer in time"}, status=503)
    checks: dict[str, Any] = {
        "database": "answers" if found.database.is_up else "does not answer",
        "redis": "answers" if all(server.is_up for server in found.redis) else "does not answer",
        "late_sweeps": [item.name for item in found.items if item.kind == "sweep" and item.is_late],
        "queues_without_worker": [queue.name for queue in found.queues if queue.used_by and queue.workers == 0],
    }
    is_ready = all(check in ("answers", []) for check in checks.values())
    return JsonResponse({"ready": is_ready, **checks}, status=200 if is_ready else 503)


@require_safe
@never_cache
def metrics(request: HttpRequest) -> HttpResponse:
    """Answer with the metrics, as Prometheus reads them; 404 when its library is not installed."""
    try:
        from jobs.metrics import CONTENT_TYPE, read
    except ImportError as error:
        raise Http404(f"{error}: pip install 'django-selfheal[prometheus]'") from None
    found = _read(read)
    if found is None:
        return HttpResponse("The database does not answer in time.\n", status=503, content_type="text/plain")
    return HttpResponse(found, content_type=CONTENT_TYPE)


_lock = threading.Lock()
_readings: dict[Callable[[], Any], Future[Any]] = {}


def _read(what: Callable[[], T]) -> T | None:
    """Return what this function reads, or None when that takes too long.

    Whoever asks meanwhile waits for the same reading: a database that hangs holds one thread for each page, however
    often somebody asks, and that one does not keep the process from ending.
    """
    with _lock:
        reading = _readings.get(what)
        if reading is None or reading.done():
            _readings[what] = reading = Future()
            threading.Thread(target=_fulfil, args=(reading, what), name="selfheal-read", daemon=True).start()
    try:
        return cast(T, reading.result(PATIENCE_SECONDS))
    except Late:
        return None


def _fulfil(reading: Future[T], what: Callable[[], T]) -> None:
    try:
        found = what()
    except BaseException as error:
        reading.set_exception(error)
    else:
        reading.set_result(found)
    finally:
        connections.close_all()
