"""The ledger's verdict, on ledgers written by hand."""

from math import inf

import pytest

from demo.ledger import Ending, Event, Process, clashes, intervals, lost, open_starts, parse, unrecorded

pytestmark = pytest.mark.once

ONE, OTHER = Process(101, 1.0), Process(202, 2.0)


def started(process: Process, row: str, at: float, verb: str = "create") -> Event:
    return Event("start", verb, row, *process, at=at, wall=1e9 + at)


def ended(process: Process, row: str, at: float, verb: str = "create") -> Event:
    return Event("end", verb, row, *process, at=at, wall=1e9 + at)


def test_a_line_reads_back_as_the_event_that_was_written():
    event = started(ONE, 'a "quoted"\nname', at=3.25)
    assert parse(event.line()) == [event]
    assert event.line().count(b"\n") == 1


def test_a_line_that_is_still_being_written_is_left_for_later():
    first, second = started(ONE, "a", at=1), ended(ONE, "a", at=2)
    assert parse(first.line() + second.line()[:-5]) == [first]
    assert parse(second.line()[:-1]) == []


def test_a_start_pairs_with_the_end_of_its_own_process():
    events = [started(ONE, "a", 1), started(OTHER, "b", 2), ended(OTHER, "b", 3), ended(ONE, "a", 4)]
    assert [(found.row, found.start, found.end, found.closed_by) for found in intervals(events, {})] == [
        ("a", 1, 4, "end"),
        ("b", 2, 3, "end"),
    ]


def test_a_start_without_an_end_closes_at_the_death_of_its_process():
    [found] = intervals([started(ONE, "a", 1)], {ONE: 5.5, OTHER: 2.0})
    assert (found.end, found.closed_by) == (5.5, "death")


def test_a_start_without_end_or_death_is_still_open():
    [found] = intervals([started(ONE, "a", 1)], {})
    assert (found.end, found.closed_by) == (inf, None)


def test_a_death_before_the_start_makes_no_negative_interval():
    [found] = intervals([started(ONE, "a", 5)], {ONE: 4.9})
    assert (found.start, found.end) == (5, 5)


def test_a_reused_pid_is_another_process():
    reborn = Process(ONE.pid, 99.0)
    found = intervals([started(ONE, "a", 1), started(reborn, "b", 3), ended(reborn, "b", 4)], {ONE: 2})
    assert [(one.row, one.end) for one in found] == [("a", 2), ("b", 4)]


def test_events_of_two_processes_may_reach_the_file_in_any_order():
    events = [ended(ONE, "a", 2), started(OTHER, "a", 3), started(ONE, "a", 1)]
    assert [(one.start, one.end) for one in intervals(events, {})] == [(1, 2), (3, inf)]
    assert clashes(intervals(events, {})) == []


def test_two_processes_on_one_row_are_caught_with_the_evidence():
    events = [
        started(ONE, "a", 1),
        started(OTHER, "a", 2, "delete"),
        ended(ONE, "a", 3.5),
        ended(OTHER, "a", 4, "delete"),
    ]
    [clash] = clashes(intervals(events, {}))
    assert str(clash) == (
        "a: process 101 (create) was at it for 1.00 s when process 202 (delete) started; together for 1.50 s"
    )


def test_an_attempt_that_never_ended_clashes_with_the_next():
    assert len(clashes(intervals([started(ONE, "a", 1), started(OTHER, "a", 50)], {}))) == 1


def test_the_next_attempt_after_a_death_is_no_clash():
    assert clashes(intervals([started(ONE, "a", 1), started(OTHER, "a", 2)], {ONE: 1.9})) == []


def test_one_after_the_other_is_no_clash_even_when_they_touch():
    events = [started(ONE, "a", 1), ended(ONE, "a", 2), started(OTHER, "a", 2), ended(OTHER, "a", 3)]
    assert clashes(intervals(events, {})) == []


def test_two_rows_at_once_are_no_clash():
    assert clashes(intervals([started(ONE, "a", 1), started(OTHER, "b", 1)], {})) == []


def test_a_long_attempt_clashes_with_each_of_the_short_ones_inside_it():
    events = [started(ONE, "a", 1)]
    for at in (2, 4):
        events += [started(OTHER, "a", at), ended(OTHER, "a", at + 1)]
    assert len(clashes(intervals(events, {ONE: 10}))) == 2


def test_open_starts_tell_what_each_process_is_at():
    events = [
        started(ONE, "a", 1),
        ended(ONE, "a", 2),
        started(ONE, "b", 3),
        started(OTHER, "c", 1),
        ended(OTHER, "c", 2),
    ]
    assert {process: event.row for process, event in open_starts(events).items()} == {ONE: "b"}


def test_a_row_that_got_what_was_asked_is_not_lost():
    endings = {"a": Ending("ready", "sound"), "b": Ending("deleted", "missing")}
    assert lost({"a": "ready", "b": "deleted"}, endings) == {}


def test_a_row_is_lost_when_it_is_unfinished_gone_or_ended_in_the_other_state():
    endings = {"a": Ending("pending", "missing"), "b": Ending("ready", "sound")}
    assert lost({"a": "ready", "b": "deleted", "c": "ready"}, endings) == {
        "a": "should be ready, is pending",
        "b": "should be deleted, is ready",
        "c": "should be ready, but there is no such row",
    }


def test_a_row_is_lost_when_its_file_tells_another_story():
    endings = {
        "a": Ending("ready", "missing"),
        "b": Ending("ready", "file is not a database"),
        "c": Ending("deleted", "sound"),
    }
    assert lost({"a": "ready", "b": "ready", "c": "deleted"}, endings) == {
        "a": "is ready, so its file should be sound, but is missing",
        "b": "is ready, so its file should be sound, but is file is not a database",
        "c": "is deleted, so its file should be missing, but is sound",
    }


def test_a_finished_row_of_which_the_ledger_knows_nothing_is_no_proof():
    events = [
        started(ONE, "a", 1),
        ended(ONE, "a", 2),
        started(ONE, "b", 3),
        started(OTHER, "c", 1),
        ended(OTHER, "c", 2),
    ]
    wanted = {"a": "ready", "b": "ready", "c": "deleted", "d": "ready"}
    assert unrecorded(wanted, intervals(events, {ONE: 4})) == {"b", "c", "d"}
