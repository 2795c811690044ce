"""Cron expressions: five fields or six, in Django's time zone."""

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from django.core.exceptions import ValidationError
from django.utils import timezone

from jobs import cron
from jobs.models import validate_cron


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


def test_without_time_zones_the_fields_are_local(settings):
    settings.USE_TZ = False
    assert cron.next_time("0 12 * * *", datetime(2026, 5, 1, 13)) == datetime(2026, 5, 2, 12)


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
