"""Cron expressions: five fields or six, in Django's time zone."""

from datetime import UTC, datetime, timedelta
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest
from django.core.exceptions import ValidationError
from django.utils import timezone

from jobs import cron
from jobs.models import validate_cron

pytestmark = pytest.mark.any_database


def utc(*moment: int) -> datetime:
    return datetime(*moment, tzinfo=UTC)


def test_five_fields_come_due_on_the_minute():
    assert cron.next_time("* * * * *", utc(2026, 5, 1, 12, 0, 30)) == utc(2026, 5, 1, 12, 1)
    assert cron.next_time("17 3 * * *", utc(2026, 5, 1, 3, 17)) == utc(2026, 5, 2, 3, 17)


def test_a_sixth_field_is_seconds():
    assert cron.next_time("* * * * * */10", utc(2026, 5, 1, 12, 0, 31)) == utc(2026, 5, 1, 12, 0, 40)
    assert cron.next_time("30 6 * * * 15", utc(2026, 5, 1, 12)) == utc(2026, 5, 2, 6, 30, 15)


def test_the_fields_are_in_djangos_time_zone(settings):
    settings.TIME_ZONE = "Asia/Tokyo"
    assert cron.next_time("0 12 * * *", utc(2026, 5, 1, 0, 0)) == utc(2026, 5, 1, 3, 0)


def test_a_time_zone_that_a_request_activated_changes_nothing(settings):
    settings.TIME_ZONE = "UTC"
    with timezone.override("Asia/Tokyo"):
        assert cron.next_time("0 12 * * *", utc(2026, 5, 1, 0, 0)) == utc(2026, 5, 1, 12, 0)


@pytest.mark.parametrize(
    ("after", "hours"), [(utc(2026, 3, 27, 12), 24), (utc(2026, 3, 28, 12), 23), (utc(2026, 10, 24, 12), 25)], ids=str
)
def test_a_day_is_as_long_as_the_clocks_make_it(settings, after, hours):
    """Berlin changes its clocks in the nights before 29 March and 25 October 2026."""
    settings.TIME_ZONE = "Europe/Berlin"
    before = cron.next_time("30 12 * * *", after - timedelta(hours=2)).astimezone(UTC)
    following = cron.next_time("30 12 * * *", before).astimezone(UTC)
    assert following - before == timedelta(hours=hours)
    assert following.astimezone(ZoneInfo("Europe/Berlin")).strftime("%H:%M") == "12:30"


@pytest.mark.parametrize("night", [utc(2026, 3, 29), utc(2026, 10, 25)], ids=str)
def test_every_minute_is_every_minute_also_while_the_clocks_change(settings, night):
    settings.TIME_ZONE = "Europe/Berlin"
    for minute in range(180):
        now = night + timedelta(minutes=minute)
        assert cron.next_time("* * * * *", now).astimezone(UTC) == now + timedelta(minutes=1)


def test_a_time_of_day_that_comes_twice_is_two_moments(settings):
    settings.TIME_ZONE = "Europe/Berlin"
    first = datetime(2026, 10, 25, 2, 30, tzinfo=ZoneInfo("Europe/Berlin"))
    assert cron.next_time("* * * * *", first) == utc(2026, 10, 25, 0, 31)
    assert cron.next_time("* * * * *", first.replace(fold=1)) == utc(2026, 10, 25, 1, 31)


@pytest.mark.parametrize("expression", ["* * * * *", "*/7 * * * *", "30 2 * * *", "0 0 1 * *", "30 2 * * * */25"])
def test_what_is_known_of_a_minute_holds_in_all_of_it(settings, expression):
    """At each second of the minutes at which Berlin's clocks change or come due, as if nobody had asked before."""
    settings.TIME_ZONE = "Europe/Berlin"
    for hour, minute in [(0, 29), (0, 30), (0, 59), (1, 0), (1, 29), (1, 30), (23, 59)]:
        for second in range(60):
            after = utc(2026, 10, 24 if hour == 23 else 25, hour, minute, second).replace(microsecond=second * 16_000)
            afresh = cron._next_time.__wrapped__(expression, after, timezone.get_default_timezone())
            assert cron.next_time(expression, after) == afresh > after


def moments(expression: str, after: datetime, days: int) -> list[datetime]:
    """Every moment at which the expression comes due, in these days."""
    found, now = [], after
    while (now := cron.next_time(expression, now)) <= after + timedelta(days=days):
        found.append(now)
    return found


# The days around both changes of the clocks, where they go forward at two, at midnight, and by half an hour.
CHANGES = [
    ("Europe/Berlin", utc(2026, 3, 27, 12), utc(2026, 10, 23, 12)),
    ("America/Santiago", utc(2026, 9, 4, 18), utc(2026, 4, 3, 18)),
    ("Australia/Sydney", utc(2026, 10, 2, 3), utc(2026, 4, 3, 3)),
    ("Australia/Lord_Howe", utc(2026, 10, 2, 3), utc(2026, 4, 3, 3)),
]


@pytest.mark.parametrize(("zone", "forward", "back"), CHANGES)
@pytest.mark.parametrize("hour", [0, 1, 2, 3])
@pytest.mark.parametrize("minute", [0, 15, 30, 59])
def test_a_time_of_day_comes_due_once_a_day_whatever_the_clocks_do(settings, zone, forward, back, hour, minute):
    settings.TIME_ZONE = zone
    for noon in (forward, back):
        due = [moment.astimezone(ZoneInfo(zone)) for moment in moments(f"{minute} {hour} * * *", noon, 4)]
        assert len({moment.date() for moment in due}) == len(due) == 4
        late = [moment for moment in due if (moment.hour, moment.minute) != (hour, minute)]
        # At most on the one day on which there is no such time: later, by as much as the clocks went forward.
        assert len(late) <= (noon == forward)
        for moment in late:
            change = moment.utcoffset() - (moment - timedelta(hours=3)).astimezone(moment.tzinfo).utcoffset()
            unchanged = moment.astimezone(UTC) + moment.utcoffset() - change
            assert (unchanged.hour, unchanged.minute) == (hour, minute)


@pytest.mark.parametrize(("zone", "forward", "back"), CHANGES)
def test_several_times_in_the_hour_that_is_left_out_all_come(settings, zone, forward, back):
    settings.TIME_ZONE = zone
    for noon in (forward, back):
        assert len(moments("*/20 0-3 * * *", noon, 4)) in (4 * 12, 4 * 12 - 3, 4 * 12 - 2, 4 * 12 - 1)


@pytest.mark.parametrize(("zone", "forward", "back"), CHANGES)
def test_hours_with_a_star_go_by_the_time_that_passes(settings, zone, forward, back):
    settings.TIME_ZONE = zone
    for noon in (forward, back):
        due = moments("*/15 * * * *", noon, 4)
        assert {following - one for one, following in pairwise(due)} == {timedelta(minutes=15)}


def test_how_often_it_came_due():
    noon = utc(2026, 5, 1, 12)
    assert cron.count_until("0 * * * *", noon, noon + timedelta(hours=3), 1000) == 4
    assert cron.count_until("0 * * * *", noon, noon + timedelta(hours=3, minutes=59), 1000) == 4
    assert cron.count_until("0 * * * *", noon, noon - timedelta(seconds=1), 1000) == 0
    assert cron.count_until("* * * * * *", noon, noon + timedelta(days=365), 1000) == 1000


@pytest.mark.parametrize("expression", ["* * * * *", "*/5 0-6 1,15 * mon-fri", "* * * * * */2", "0 0 29 2 *"])
def test_what_comes_due_is_no_problem(expression):
    assert cron.problem(expression) is None
    validate_cron(expression)


@pytest.mark.parametrize(
    "expression", ["", "* * * *", "* * * * * * *", "@daily", "every minute", "61 * * * *", "0 0 30 2 *", "a b c d e"]
)
def test_what_never_comes_due_is_refused_in_a_sentence(expression):
    assert f"{expression!r} is no cron expression" in cron.problem(expression)
    with pytest.raises(ValidationError, match="is no cron expression"):
        validate_cron(expression)


@pytest.mark.parametrize("expression", [60, None, b"* * * * *"])
def test_what_is_no_text_is_refused_too(expression):
    assert "is no cron expression: give five fields" in cron.problem(expression)
