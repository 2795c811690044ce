"""Pauses: a switch that is on, with who turned it on, why, and until when."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from django.db import connection
from django.utils.translation import trans_real
from waffle import get_waffle_switch_model, switch_is_active

from jobs import clock, job, pauses, scheduler, switches
from jobs.models import Schedule
from jobs.pauses import Pause
from jobs.testing import drain, tick
from tests.cast.jobs import do_task, schedule_tasks
from tests.cast.models import Task

pytestmark = pytest.mark.django_db(transaction=True)

NOON = datetime(2026, 5, 1, 12, tzinfo=UTC)
AN_HOUR = timedelta(hours=1)


def waffles_admin(name: str, on: bool) -> None:
    """Flip a switch as waffle's own admin does."""
    switch, _ = get_waffle_switch_model().objects.get_or_create(name=f"disable_{name}")
    switch.active = on
    switch.save()


def noted(name: str) -> list[Any]:
    return [getattr(Schedule.objects.get(pk=name), field) for field in pauses.UNPAUSED]


def test_a_pause_stops_it_and_says_who_and_why(task):
    with clock.fixed(NOON):
        pauses.pause("do_task", reason="The disk is full.", until=NOON + AN_HOUR, by="ada")
    assert pauses.read() == {"do_task": Pause("do_task", NOON, NOON + AN_HOUR, "ada", "The disk is full.")}
    assert switches.disabled(["do_task"]) == {"do_task"}
    assert schedule_tasks.sweep().matched == 0
    assert pauses.resume("do_task")
    assert pauses.read() == {}
    assert noted("do_task") == list(pauses.UNPAUSED.values())
    assert not pauses.resume("do_task")
    assert schedule_tasks.sweep().enqueued == 1


def test_waffles_own_functions_see_a_pause_at_once():
    """Their cache must hear of it."""
    assert not switch_is_active("disable_do_task")
    pauses.pause("do_task")
    assert switch_is_active("disable_do_task")
    pauses.resume("do_task")
    assert not switch_is_active("disable_do_task")


def test_a_switch_or_a_schedule_that_is_missing_is_made():
    get_waffle_switch_model().objects.all().delete()
    Schedule.objects.all().delete()
    pauses.pause("do_task", by="ada")
    assert pauses.read()["do_task"].by == "ada"


def test_pausing_twice_replaces_the_reason_and_the_end():
    with clock.fixed(NOON):
        pauses.pause("do_task", reason="one", until=NOON + AN_HOUR, by="ada")
    with clock.fixed(NOON + timedelta(minutes=1)):
        pauses.pause("do_task", reason="two", by="bob")
    assert pauses.read()["do_task"] == Pause("do_task", NOON + timedelta(minutes=1), None, "bob", "two")
    tick(now=NOON + 2 * AN_HOUR)
    assert "do_task" in pauses.read()


def test_the_tick_ends_a_pause_and_pushes_what_it_held_up_in_the_same_breath(nothing_else, queued):
    @job(cron="0 * * * *")
    def hourly():
        pass

    tick(now=NOON)
    with clock.fixed(NOON):
        pauses.pause("hourly", until=NOON + timedelta(minutes=90))
    assert tick(now=NOON + AN_HOUR) == []
    assert tick(now=NOON + timedelta(minutes=90)) == ["hourly"]
    assert pauses.read() == {}
    assert drain() == {"done": 1}


def test_a_pause_from_waffles_admin_is_one_by_somebody_unknown_and_has_no_end():
    waffles_admin("do_task", on=True)
    [pause] = pauses.read().values()
    assert (pause.until, pause.by, pause.reason) == (None, "", "")
    assert pause.since == get_waffle_switch_model().objects.get(name="disable_do_task").modified
    tick()
    assert pauses.read() == {"do_task": pause}


@pytest.mark.parametrize("ticks_between", [True, False])
def test_a_pause_from_waffles_admin_inherits_nothing(ticks_between):
    """Ended there and made again there: within one tick, too, it is another pause."""
    with clock.fixed(NOON):
        pauses.pause("do_task", reason="old", until=NOON + AN_HOUR, by="ada")
    waffles_admin("do_task", on=False)
    if ticks_between:
        tick(now=NOON + timedelta(minutes=1))
        assert noted("do_task") == list(pauses.UNPAUSED.values())
    waffles_admin("do_task", on=True)
    assert pauses.read()["do_task"].reason == ""
    tick(now=NOON + 2 * AN_HOUR)
    assert "do_task" in pauses.read()
    assert noted("do_task") == list(pauses.UNPAUSED.values())


@pytest.mark.parametrize("again", ["here", "in waffle's admin"])
def test_who_pauses_while_a_tick_ends_an_older_pause_stays_paused(again, monkeypatch):
    """The tick has read that the pause is over; then somebody pauses again; then the tick goes on."""
    with clock.fixed(NOON):
        pauses.pause("do_task", reason="old", until=NOON + AN_HOUR)
    end = pauses._end

    def late(schedule: Schedule, now: datetime) -> None:
        if again == "here":
            pauses.pause("do_task", reason="new")
        else:
            waffles_admin("do_task", on=True)
        end(schedule, now)

    monkeypatch.setattr(pauses, "_end", late)
    tick(now=NOON + 2 * AN_HOUR)
    assert pauses.read()["do_task"].reason == ("new" if again == "here" else "")


def test_of_two_who_pause_and_one_who_ends_it_the_last_is_believed_whole(race):
    """Never the switch of one with the reason of another."""
    for number in range(5):
        with clock.fixed(NOON):
            pauses.pause("do_task", reason="old", until=NOON + AN_HOUR)
        race(
            lambda number=number: pauses.pause("do_task", reason=f"a {number}", by="ada"),
            lambda number=number: pauses.pause("do_task", reason=f"b {number}", by="bob"),
            lambda: pauses.end_due(scheduler._schedules(), NOON + AN_HOUR),
        )
        pause = pauses.read()["do_task"]
        assert (pause.reason, pause.by) in {(f"a {number}", "ada"), (f"b {number}", "bob")}
        assert noted("do_task")[0] == pause.since


@pytest.mark.parametrize(
    ("name", "sentence"),
    [("do_tasks", "No job or sweep named 'do_tasks' is declared"), ("touch_file", "touch_file cannot be paused")],
)
def test_what_has_no_switch_cannot_be_paused(name, sentence):
    for change in (pauses.pause, pauses.resume):
        with pytest.raises(ValueError, match=sentence):
            change(name)


def test_what_is_refused_in_the_admin_is_said_in_the_operators_language(admin_client, monkeypatch, settings):
    monkeypatch.setattr(trans_real.translation("de"), "gettext", lambda text: f"auf Deutsch: {text}")
    settings.LANGUAGE_CODE = "de"
    schedules = "/admin/selfheal/schedule/"
    Schedule.objects.get_or_create(name="touch_file")
    pause = {"action": "pause", "_selected_action": "touch_file", "confirmed": "yes", "how_long": "30m"}
    said = admin_client.post(schedules, pause, follow=True).content.decode()
    assert "Auf Deutsch: touch_file cannot be paused" in said
    for expression, sentence in (("hourly", "is no cron expression: give five"), ("0 0 30 2 *", "that ever comes due")):
        said = admin_client.post(
            f"{schedules}schedule_tasks/change/", {"cron": expression, "limit": ""}
        ).content.decode()
        assert f"auf Deutsch: &#x27;{expression}&#x27; is no cron expression" in said
        assert sentence in said


def test_an_end_that_has_passed_is_refused():
    with clock.fixed(NOON), pytest.raises(ValueError, match="would be over already"):
        pauses.pause("do_task", until=NOON)
    assert pauses.read() == {}


def test_a_tick_with_nothing_noted_asks_nothing_more(django_assert_num_queries):
    waffles_admin("do_task", on=True)
    schedules = scheduler._schedules()
    with django_assert_num_queries(0):
        pauses.end_due(schedules, NOON)
    pauses.pause("do_task")
    schedules = scheduler._schedules()
    with django_assert_num_queries(1):
        pauses.end_due(schedules, NOON)


def test_nothing_that_was_paused_is_lost(queued):
    pauses.pause("do_task")
    task = Task.objects.create()
    do_task.enqueue(task)
    assert queued() == []
    pauses.resume("do_task")
    schedule_tasks.sweep()
    assert drain()["done"] == 1
    assert connection.in_atomic_block is False
