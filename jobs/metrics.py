"""How it is going, for Prometheus. This module alone imports prometheus_client, which is the extra `prometheus`.

Labels are names of what is declared, of queues and of outcomes, so there are never more than the code has.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from jobs import health, tallies
from jobs.health import Health, Item

CONTENT_TYPE = CONTENT_TYPE_LATEST


def read() -> bytes:
    """Return the metrics in Prometheus' text format. What could not be read is left out, and not 0."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collected(health.read()))
    return generate_latest(registry)


class _Collected:
    def __init__(self, health: Health) -> None:
        self.health = health

    def collect(self) -> Iterator[Metric]:
        yield from _servers(self.health)
        yield from _queues(self.health)
        if self.health.database.is_up:
            yield from _gauges(self.health.items)
            yield from _totals([item.name for item in self.health.items])


def _gauge(name: str, what: str, values: Iterable[tuple[str, float | None]], label: str = "name") -> Metric:
    family = GaugeMetricFamily(f"selfheal_{name}", what, labels=[label])
    for each, value in values:
        if value is not None:
            family.add_metric([each], value)
    return family


def _servers(health: Health) -> Iterator[Metric]:
    yield GaugeMetricFamily("selfheal_database_up", "Whether the database answers.", health.database.is_up)
    up = all(server.is_up for server in health.redis)
    yield GaugeMetricFamily("selfheal_redis_up", "Whether every Redis that RQ_QUEUES names answers.", up)
    if health.ticking.last_tick_at is not None:
        age = (health.at - health.ticking.last_tick_at).total_seconds()
        yield GaugeMetricFamily("selfheal_tick_age_seconds", "How long ago somebody ticked.", max(0.0, age))
    for severity in ("critical", "warning"):
        count = sum(problem.severity == severity for problem in health.problems)
        yield GaugeMetricFamily(f"selfheal_{severity}_problems", f"Problems of severity {severity}.", count)


def _queues(health: Health) -> Iterator[Metric]:
    depths = ((queue.name, queue.depth) for queue in health.queues)
    yield _gauge("queue_depth", "Jobs that wait in the queue.", depths, "queue")
    workers = ((queue.name, queue.workers) for queue in health.queues)
    yield _gauge("queue_workers", "Workers that serve the queue.", workers, "queue")


def _gauges(items: list[Item]) -> Iterator[Metric]:
    sweeps = [item for item in items if item.kind == "sweep"]
    swept = [item for item in items if item.kind == "swept"]
    found = ((item.feeds, item.last_sweep.get("matched")) for item in sweeps)
    yield _gauge("needs_work", "Rows that the last sweep found to need work, about up to its limit.", found)
    queued = (
        (item.feeds, item.last_sweep.get("enqueued", 0) + item.last_sweep.get("already_queued", 0)) for item in sweeps
    )
    yield _gauge("queued", "Of these, rows whose work was queued when the last sweep ended.", queued)
    for name in ("leased", "due", "backing_off", "quarantined"):
        counts = ((item.name, getattr(item, name)) for item in swept)
        yield _gauge(name, f"Rows whose claim is {name.replace('_', ' ')}.", counts)
    in_vain = ((item.name, item.still_needed) for item in swept)
    yield _gauge("still_needed", "Successes of the last hour after which the row still needed work.", in_vain)
    took = ((item.name, item.last_took) for item in sweeps)
    yield _gauge("sweep_duration_seconds", "How long the last sweep took.", took)
    succeeded = ((item.name, at.timestamp()) for item in items if (at := item.last_succeeded_at))
    yield _gauge("last_success_timestamp_seconds", "When a sweep or cron job last succeeded.", succeeded)
    late = ((item.name, item.is_late) for item in items if item.cron)
    yield _gauge("late", "Whether it has not succeeded for two of its intervals.", late)
    paused = ((item.name, item.pause is not None) for item in items)
    yield _gauge("paused", "Whether it is switched off.", paused)


def _totals(names: list[str]) -> Iterator[Metric]:
    """Sum up all tallies, those that are folded too: so what is counted never becomes less."""
    runs = CounterMetricFamily("selfheal_runs", "Attempts that ended.", labels=["name", "outcome"])
    for job, outcome, count in tallies.outcomes(names):
        runs.add_metric([job, outcome], count)
    yield runs
    took = HistogramMetricFamily(
        "selfheal_run_duration_seconds", "How long attempts took that succeeded.", labels=["name"]
    )
    bounds = ["+Inf" if bound == math.inf else str(bound) for bound in tallies.BOUNDS]
    for job, histogram in tallies.times(names).items():
        took.add_metric([job], list(zip(bounds, histogram, strict=True)), sum_value=None)
    yield took
