"""Tallies: what happened hour by hour, counted from the runs as often as one likes."""

import math
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from jobs import clock, tallies
from jobs.fingerprint import fingerprint
from jobs.jobs import selfheal_prune, selfheal_tally
from jobs.models import Run, Schedule, Tally
from jobs.tallies import BOUNDS, HOUR
from jobs.testing import drain, tick

pytestmark = pytest.mark.django_db(transaction=True)

NOON = datetime(2026, 5, 1, 12, tzinfo=UTC)
NOW = NOON + timedelta(minutes=30)


def run(after: timedelta = timedelta(0), *, took: float = 0.02, waited: float = 0.5, **values: Any) -> Run:
    """A run that ended some time after noon."""
    ended = NOON + after
    times = {
        "finished_at": ended,
        "started_at": ended - timedelta(seconds=took),
        "first_claimed_at": ended - timedelta(seconds=waited),
    }
    values = {"job": "do_task", "outcome": "done", **times, **values}
    return Run.objects.create(fingerprint=fingerprint(values.get("error", "")), **values)


def count(counted_at: datetime | None = NOW, now: datetime = NOW) -> int:
    with clock.fixed(now):
        return tallies.count(counted_at)


def counted(**filters: Any) -> dict[tuple[str, ...], int]:
    rows = Tally.objects.filter(**filters)
    return {(f"{row.hour:%d %H}", row.job, row.outcome, row.error.partition(":")[0]): row.runs for row in rows}


def test_runs_are_counted_by_hour_job_outcome_and_error_however_often():
    run(-timedelta(seconds=1))
    run()
    run(timedelta(minutes=29))
    run(job="nightly")
    for number in range(3):
        run(outcome="failed", error=f"ValueError: row {number} has no name")
    run(outcome="failed", error="KeyError: 'x'")
    expected = {
        ("01 11", "do_task", "done", ""): 1,
        ("01 12", "do_task", "done", ""): 2,
        ("01 12", "nightly", "done", ""): 1,
        ("01 12", "do_task", "failed", "ValueError"): 3,
        ("01 12", "do_task", "failed", "KeyError"): 1,
    }
    for _ in range(2):
        count(None)
        assert counted() == expected
    # What is not true any more is written over.
    Run.objects.filter(error__startswith="KeyError").delete()
    run(timedelta(minutes=1))
    count()
    expected[("01 12", "do_task", "done", "")] = 3
    del expected[("01 12", "do_task", "failed", "KeyError")]
    assert counted() == expected


def test_how_long_it_took_is_a_histogram():
    for seconds in (0.004, 0.02, 0.02, 2, 9000):
        run(took=seconds, waited=2 * seconds)
    run(started_at=None, first_claimed_at=None)
    count()
    [tally] = Tally.objects.all()
    assert tally.runs == 6
    assert dict(zip(BOUNDS, tally.took, strict=True)) == {
        0.01: 1, 0.03: 3, 0.1: 3, 0.3: 3, 1: 3, 3: 4, 10: 4, 30: 4, 100: 4, 300: 4, 1000: 4, 3600: 4, math.inf: 5
    }  # fmt: skip
    assert tally.settled_after[:6] == [1, 1, 3, 3, 3, 3]


@pytest.mark.parametrize("seconds", [0.004, 0.05, 0.7, 25, 2900])
def test_a_quantile_is_wrong_by_less_than_its_bounds_are_apart(seconds):
    for factor in (0.98, 0.99, 1, 1.01, 1.02):
        run(took=seconds * factor)
    count()
    estimate = tallies.quantile(Tally.objects.get().took, 0.5)
    assert estimate is not None
    assert seconds / 3.6 < estimate < seconds * 3.6 or (seconds < 0.01 and 0 < estimate <= 0.01)


def test_the_quantile_of_nothing_and_of_what_is_beyond_the_last_bound():
    assert tallies.quantile([], 0.5) is None
    assert tallies.quantile([0] * len(BOUNDS), 0.5) is None
    assert tallies.quantile([0] * (len(BOUNDS) - 1) + [7], 0.5) == 3600


def test_errors_that_are_many_are_counted_together(monkeypatch):
    monkeypatch.setattr(tallies, "MOST_ERRORS", 2)
    # Words are no particulars: each of these is an error of its own.
    for times, word in ((3, "often"), (2, "sometimes"), (1, "once"), (1, "rarely")):
        for _ in range(times):
            run(outcome="failed", error=f"Error {word}")
    run(job="nightly", outcome="failed", error="Error rarely")
    count()
    of_task = Tally.objects.filter(job="do_task").values_list("error", "runs", "fingerprint")
    assert {(error, runs) for error, runs, _ in of_task} == {("Error often", 3), ("Error sometimes", 2), ("", 2)}
    assert {mark for error, _, mark in of_task if not error} == {tallies.OTHER}
    assert counted(job="nightly") == {("01 12", "nightly", "failed", "Error rarely"): 1}


def test_what_an_outage_kept_from_being_counted_is_counted_after_it():
    run(-3 * HOUR)
    assert count(counted_at=NOON - 3 * HOUR, now=NOON - 3 * HOUR + timedelta(minutes=1)) == 2
    run(-3 * HOUR + timedelta(minutes=59))
    run(-2 * HOUR)
    assert count(counted_at=NOON - 3 * HOUR + timedelta(minutes=11)) == 4
    assert counted() == {("01 09", "do_task", "done", ""): 2, ("01 10", "do_task", "done", ""): 1}
    # One that was broken off goes on where it was, and does not begin again with the oldest.
    run(-9 * HOUR)
    assert count(counted_at=None, now=NOON) == 4


def test_what_a_clock_that_was_ahead_has_counted_hides_nothing():
    count(counted_at=NOON, now=NOON + 6 * HOUR)
    run(HOUR)
    run(3 * HOUR)
    for hours in range(1, 5):
        count(counted_at=NOON + 6 * HOUR, now=NOON + hours * HOUR)
    assert counted() == {("01 13", "do_task", "done", ""): 1, ("01 15", "do_task", "done", ""): 1}


def test_an_hour_is_counted_again_while_its_last_runs_may_still_be_committing():
    assert count(counted_at=NOON + timedelta(minutes=5), now=NOON + timedelta(minutes=6)) == 2
    assert count(counted_at=NOON + timedelta(minutes=11), now=NOON + timedelta(minutes=12)) == 1


def test_an_hour_whose_runs_are_deleted_already_keeps_its_tally(settings):
    settings.JOBS = {**settings.JOBS, "KEEP_RUNS": 2 * HOUR}
    old = run(-3 * HOUR)
    count(None, now=NOON - 2 * HOUR)
    old.delete()
    count(NOON - 4 * HOUR)
    assert counted() == {("01 09", "do_task", "done", ""): 1}


def test_old_tallies_are_added_up_and_no_total_becomes_less(settings, monkeypatch):
    monkeypatch.setattr(tallies, "BATCH", 2)
    settings.JOBS = {**settings.JOBS, "KEEP_RUNS": 24 * HOUR}
    for days in (1, 2, 3):
        run(-days * 24 * HOUR, took=2)
        run(-days * 24 * HOUR, outcome="failed", error=f"Error {'abc'[days - 1]}")
    run()
    for days in range(4):
        with clock.fixed(NOW - days * 24 * HOUR):
            tallies.count_hour(NOON - days * 24 * HOUR)
    for _ in range(2):
        with clock.fixed(NOW):
            selfheal_prune()
        assert counted() == {
            ("01 00", "do_task", "done", ""): 2,
            ("01 00", "do_task", "failed", ""): 2,
            ("30 12", "do_task", "done", ""): 1,
            ("30 12", "do_task", "failed", "Error a"): 1,
            ("01 12", "do_task", "done", ""): 1,
        }
    assert Tally.objects.get(hour=Tally.BEFORE, outcome="done").took[BOUNDS.index(1) : BOUNDS.index(10)] == [0, 2]


def test_what_is_no_failure_is_added_up_after_a_day_and_never_counted_twice():
    run(-2 * HOUR)
    run()
    run(outcome="failed", error="Error a")
    count(None)
    # Not counted yet, when the counting stops for three days.
    run(timedelta(minutes=40))
    later = NOW + timedelta(days=3)
    with clock.fixed(later):
        selfheal_prune()
    assert counted() == {
        ("01 00", "do_task", "done", ""): 1,
        ("01 12", "do_task", "done", ""): 1,
        ("01 12", "do_task", "failed", "Error a"): 1,
    }
    count(counted_at=NOW, now=later)
    run(timedelta(days=3))
    count(counted_at=later, now=later)
    with clock.fixed(later):
        selfheal_prune()
    assert counted(outcome="done") == {("01 00", "do_task", "done", ""): 3, ("04 12", "do_task", "done", ""): 1}


def test_it_is_a_cron_job_that_leaves_no_trace_of_itself():
    Run.objects.create(job="do_task", outcome="done", finished_at=clock.read())
    Schedule.objects.filter(name=selfheal_tally.name).owe()
    assert "selfheal_tally" in tick()
    drain()
    assert Tally.objects.get().runs == 1
    assert Schedule.objects.get(name="selfheal_tally").last_succeeded_at is not None
    assert not Run.objects.filter(job="selfheal_tally").exists()


def test_two_who_count_at_the_same_moment_write_the_same(race):
    for number in range(20):
        run(job=f"job_{number % 4}", outcome="failed", error="no")
    race(*[lambda: tallies.count_hour(NOON)] * 3)
    assert sum(counted().values()) == 20
    assert Tally.objects.count() == 4
