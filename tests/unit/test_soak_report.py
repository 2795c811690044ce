"""What the soak makes of what it saw: writes, requests, heals, memory, keys. Each must be able to say no."""

import pytest

from config.stack import StackError
from demo.ledger import Ending, Interval, Process
from demo.rows import Snapshot
from soak.audit import Write, bad
from soak.disasters import DISASTERS, read_kinds
from soak.observer import Heals, Measured, group_of
from soak.report import Verdict, at_once, failed, grown, heals, percentile, piled_up, thirds
from soak.user import Request, undisturbed, wanted

pytestmark = pytest.mark.once

A_LIFE = [
    Write("a", "", "pending", "user"),
    Write("a", "pending", "ready", "7", "7"),
    Write("a", "ready", "deleting", "user"),
    Write("a", "deleting", "deleted", "9", "9"),
]


# --- Writes -----------------------------------------------------------------------------------------------------------


def test_a_life_without_bad_writes():
    assert list(bad(A_LIFE)) == []
    changed_mind = [A_LIFE[0], Write("a", "pending", "deleting", "user"), A_LIFE[3]]
    assert list(bad(changed_mind)) == []


@pytest.mark.parametrize(
    ("write", "why"),
    [
        (Write("a", "pending", "ready", "8", "8"), "a: pending to ready, by 8 at , for the second time"),
        (Write("a", "pending", "deleting", "user"), "a: pending to deleting, by user at , for the second time"),
        (Write("a", "ready", "ready", "8", "8"), "a: ready to ready, by 8 at , which no step leads to"),
        (Write("a", "deleting", "ready", "8", "8"), "a: deleting to ready, by 8 at , which no step leads to"),
        (Write("a", "deleted", "deleting", "user"), "a: deleted to deleting, by user at , which no step leads to"),
        (Write("b", "pending", "ready", "8", "9"), "b: pending to ready, by 8 at , while 9 held the lease"),
        (Write("b", "pending", "ready", "8"), "b: pending to ready, by 8 at , while nobody held the lease"),
    ],
)
def test_a_bad_write(write, why):
    assert list(bad([*A_LIFE, write])) == [why]


# --- At once ----------------------------------------------------------------------------------------------------------


def test_two_at_once_count_unless_one_of_them_was_frozen_for_long():
    one, two = Process(1, 0.0), Process(2, 0.0)
    attempts = [Interval("a", "create", one, 0, 70, "end"), Interval("a", "create", two, 60, 62, "end")]
    assert len(at_once(attempts, {}, margin=5)) == 1
    assert len(at_once(attempts, {one: 3.0}, margin=5)) == 1
    assert at_once(attempts, {one: 65.0}, margin=5) == []


# --- The user ---------------------------------------------------------------------------------------------------------


def asked(verb, name, began=0.0, ended=1.0, error=""):
    return Request(verb, name, began, ended, error)


def test_what_was_answered_is_wanted_and_what_failed_if_it_was_committed():
    requests = [
        asked("create", "answered"),
        asked("create", "committed", error="cut off"),
        asked("create", "never committed", error="cut off"),
    ]
    assert wanted(requests, set(), {"committed": 1}) == {"answered": "ready", "committed": "ready"}


def test_a_deletion_that_failed_is_wanted_if_it_was_committed():
    requests = [
        *(asked("create", name) for name in "abc"),
        asked("delete", "a", began=2),
        asked("delete", "b", began=2, error="cut off"),
        asked("delete", "c", began=2, error="cut off"),
    ]
    assert wanted(requests, {"b"}, dict.fromkeys("abc")) == {"a": "deleted", "b": "deleted", "c": "ready"}


def test_a_deletion_that_overtook_its_creation_found_nothing():
    requests = [asked("delete", "a", began=0.5, ended=0.6), asked("create", "a", began=0, ended=1)]
    assert wanted(requests, set(), {"a": 1}) == {"a": "ready"}
    assert wanted(requests, {"a"}, {"a": 1}) == {"a": "deleted"}


def test_a_request_that_failed_counts_unless_something_was_wrong_with_the_database_meanwhile():
    requests = [
        asked("create", "a", 0, 5, "OperationalError"),
        asked("create", "b", 10, 10.4),
        asked("delete", "c", 20, 20.2, "RedisError: it was away"),
    ]
    assert undisturbed(requests, [(4, 6)]) == requests[1:]
    assert undisturbed(requests, [(10.1, 10.2), (1, 2)]) == requests[2:]
    assert undisturbed(requests, [(5, 10), (10.4, 20)]) == requests
    assert failed(undisturbed(requests, [(4, 6)])) == requests[2:]


# --- Heals ------------------------------------------------------------------------------------------------------------


def at(second, queued=frozenset(), running=(), **states):
    return Snapshot(
        at=second,
        states={int(name[1:]): state for name, state in states.items()},
        queued=queued if queued is None else frozenset(queued),
        running=dict.fromkeys(running, "token"),
    )


def test_a_heal_lasts_from_the_first_look_to_the_one_that_finds_the_row_in_work():
    heals = Heals()
    heals.look(at(0, queued={1}, _1="pending"), set())
    heals.look(at(1, _1="pending"), set())
    heals.look(at(2, _1="pending"), set())
    assert heals.stranded == 1
    heals.look(at(3, queued={1}, _1="pending"), set())
    assert (heals.stranded, heals.spans) == (0, [2])


@pytest.mark.parametrize("found", [at(9, running=[1], _1="pending"), at(9, _1="ready")])
def test_a_row_that_is_leased_or_finished_is_found_too(found):
    heals = Heals()
    for second in (0, 1):
        heals.look(at(second, _1="pending"), set())
    heals.look(found, set())
    assert heals.spans == [9]


def test_neither_a_moment_between_two_looks_nor_backing_off_is_out_of_work():
    heals = Heals()
    heals.look(at(0, _1="pending", _2="pending"), {2})
    heals.look(at(1, running=[1], _1="pending", _2="pending"), {2})
    assert (heals.stranded, heals.spans) == (0, [])


def test_while_redis_does_not_answer_only_new_rows_are_known_to_be_out_of_work():
    heals = Heals()
    heals.look(at(0, queued={1}, _1="pending"), set())
    heals.look(at(1, queued=None, _1="pending", _2="pending"), set())
    assert heals.stranded == 1
    heals.look(at(3, queued=(), _1="pending", _2="pending"), set())
    assert heals.stranded == 2
    for second in (5, 6):
        heals.look(at(second, queued={1, 2}, _1="pending", _2="pending"), set())
    # The first one for two seconds, at one look; the second for four.
    assert heals.spans == [4]


def test_figures_of_heals():
    assert percentile([], 0.5) == 0
    assert percentile([3, 1, 2], 0.5) == 2
    assert percentile(range(1, 101), 0.99) == 100
    assert heals([1.0, 2.0, 9.0]) == ("Out of work and found again: 3 times; median 2.0 s, p99 9.0 s, worst 9.0 s.")


# --- What must not grow -----------------------------------------------------------------------------------------------


def test_memory_is_compared_by_thirds_and_without_the_start():
    assert thirds([1, 60, 60, 60, 70, 70, 70, 80, 80, 80]) == (60, 80)
    assert thirds([5]) == (5, 5)
    assert list(grown({"worker": [30, *[60] * 12, *[70] * 12]}, ["worker"])) == []
    assert list(grown({"worker": [30, *[60] * 12, *[71] * 12]}, ["worker"])) == ["worker from 60.0 to 71.0 MB"]
    # A short run says nothing: it may just have been starting.
    assert list(grown({"worker": [30, 90]}, ["worker"])) == []
    assert list(grown({"other": [30, 90]}, ["worker"])) == ["worker was never measured"]


def test_keys_that_expire_may_be_many():
    assert list(piled_up({"rq:worker:*": (500, 4500, 0), "rq:workers": (1, 9, 1)})) == []
    [said] = piled_up({"rq:workers": (1, 900, 1)})
    assert said == "rq:workers in Redis: 1 keys with 900 entries, 1 of which never expire"
    assert len(list(piled_up({"rq:job:*": (900, 1, 900)}))) == 1


def test_ids_in_the_names_of_keys():
    assert group_of("rq:worker:0123456789abcdef0123456789abcdef") == "rq:worker:*"
    assert group_of("rq:job:create_database-42") == "rq:job:create_database-*"
    assert group_of("rq:queue:default") == "rq:queue:default"


def test_most_and_last():
    assert Measured().then(3).then(7).then(5) == Measured(most=7, last=5)


# --- The verdict ------------------------------------------------------------------------------------------------------


def test_a_proof_is_what_nothing_speaks_against():
    verdict = Verdict(endings={"a": Ending("ready", "sound"), "b": Ending("deleted", "missing")})
    assert verdict.is_proof
    assert list(verdict.evidence()) == []
    assert verdict.summary == ("2 rows, ready 1, deleted 1; lost 0, at once 0, bad writes 0, quarantined 0.")


@pytest.mark.parametrize(
    "found",
    [
        {"lost": {"a": "should be ready, is pending"}},
        {"at_once": ["a: together"]},
        {"bad_writes": ["a: ready to ready"]},
        {"unrecorded": ["a"]},
        {"quarantined": ["1"]},
        {"failed": ["10.0 s: to create a: cut off"]},
        {"unasked": ["worker-1 (7) ended by itself with code 0"]},
        {"grown": ["worker-1 from 60.0 to 71.0 MB"]},
        {"never_struck": ["redis emptied"]},
    ],
    ids=lambda found: next(iter(found)),
)
def test_whatever_is_wrong_is_told_and_no_proof(found):
    verdict = Verdict(**found)
    assert not verdict.is_proof
    title, evidence = verdict.evidence()
    assert title.endswith(":")
    [said] = next(iter(found.values()))
    assert said in evidence


def test_kinds_are_all_none_or_what_is_named():
    assert read_kinds("all") == list(DISASTERS)
    assert read_kinds("none") == []
    assert read_kinds("child frozen, redis emptied") == ["child frozen", "redis emptied"]
    with pytest.raises(StackError, match="no disaster flood"):
        read_kinds("redis emptied,flood")
