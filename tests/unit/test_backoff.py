"""How long a failed row waits, and how work is spread out. Chance is passed in."""

from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs import Backoff
from jobs.backoff import spread

pytestmark = pytest.mark.once

SECOND = timedelta(seconds=1)
durations = st.timedeltas(min_value=timedelta(milliseconds=1), max_value=timedelta(days=400))
chances = st.floats(min_value=0, max_value=1, exclude_max=True)


def longest() -> float:
    return 1.0


def shortest() -> float:
    return 0.0


def test_each_delay_is_twice_the_one_before_up_to_the_cap():
    backoff = Backoff(first=10 * SECOND, cap=60 * SECOND)
    assert [backoff.delay(attempt, longest) / SECOND for attempt in range(1, 7)] == [10, 20, 40, 60, 60, 60]


def test_chance_shortens_a_delay_by_half_at_most():
    backoff = Backoff(first=10 * SECOND, cap=60 * SECOND)
    assert [backoff.delay(attempt, shortest) / SECOND for attempt in range(1, 6)] == [5, 10, 20, 30, 30]
    assert backoff.delay(1, lambda: 0.5) == 7.5 * SECOND


def test_rows_that_failed_together_do_not_return_together():
    assert len({Backoff().delay(1) for _ in range(20)}) > 10


def test_the_defaults_begin_with_ten_seconds_and_end_at_an_hour():
    assert Backoff() == Backoff(first=timedelta(seconds=10), cap=timedelta(hours=1))
    assert Backoff().delay(1, longest) == timedelta(seconds=10)
    assert Backoff().delay(10**9, longest) == timedelta(hours=1)


def test_a_first_delay_above_the_cap_is_cut_to_it():
    assert Backoff(first=timedelta(hours=2), cap=timedelta(hours=1)).delay(1, longest) == timedelta(hours=1)


@given(attempt=st.integers(min_value=-1, max_value=10**30), first=durations, cap=durations, chance=chances)
def test_no_attempt_overflows_or_leaves_the_bounds(attempt, first, cap, chance):
    delay = Backoff(first, cap).delay(attempt, lambda: chance)
    slack = timedelta(microseconds=1)
    assert min(first, cap) / 2 - slack <= delay <= cap + slack


@given(min_wait=durations, more=durations, chance=chances)
def test_a_spread_wait_stays_in_its_range(min_wait, more, chance):
    assert min_wait <= spread(min_wait + more, min_wait, lambda: chance) <= min_wait + more


def test_a_spread_wait_reaches_both_ends():
    assert spread(10 * SECOND, 2 * SECOND, shortest) == 2 * SECOND
    assert spread(10 * SECOND, 2 * SECOND, longest) == 10 * SECOND
    assert spread(SECOND, SECOND) == SECOND


@pytest.mark.parametrize(
    ("max_wait", "min_wait"), [(SECOND, 2 * SECOND), (SECOND, -SECOND), (-SECOND, -2 * SECOND)], ids=str
)
def test_an_empty_or_negative_range_is_refused(max_wait, min_wait):
    with pytest.raises(ValueError, match="The wait must go from zero or more up to max_wait"):
        spread(max_wait, min_wait)


@pytest.mark.parametrize(("max_wait", "min_wait"), [(60, timedelta(0)), (SECOND, 0), (None, SECOND)], ids=str)
def test_a_wait_without_a_unit_is_refused(max_wait, min_wait):
    with pytest.raises(TypeError, match="max_wait and min_wait must be timedeltas"):
        spread(max_wait, min_wait)
