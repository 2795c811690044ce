"""Schedules of faults are explored at every run of the tests, and the explorer proves that it can fail."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from django.db import connection

from config.servers import RedisServer
from tests.recovery.explorer.chooser import Script
from tests.recovery.explorer.explore import Explorer, explorer
from tests.recovery.explorer.planted import BUGS
from tests.recovery.explorer.shrink import shortest

pytestmark = [
    pytest.mark.django_db(transaction=True),
    # A process that is killed does not close what it has open, and here its memory is collected by another.
    pytest.mark.filterwarnings("ignore:.* was deleted while still open:ResourceWarning"),
]

# Always the same, so that what fails is the doing of whoever changed something. `make chaos` explores fresh ones.
SHARES, SCHEDULES = 20, 50 if connection.vendor == "sqlite" else 10


@pytest.fixture
def exploring(redis_server: RedisServer) -> Iterator[Explorer]:
    redis_server.start()
    with explorer(redis_server.url) as made:
        yield made


@pytest.mark.parametrize("share", range(SHARES))
def test_whatever_happens_every_promise_holds(exploring, share):
    first = share * SCHEDULES
    for seed in range(first, first + SCHEDULES):
        schedule = exploring.run(seed)
        if schedule.violation:
            pytest.fail(exploring.story(schedule), pytrace=False)


@pytest.mark.parametrize("seed", [1, 2, 3, 4, 5])
def test_a_seed_replays_exactly(exploring, seed):
    one, other = exploring.run(seed), exploring.run(seed)
    assert one.log == other.log
    assert one.decisions == other.decisions


def test_a_trace_replays_exactly(exploring):
    """The decisions that a seed made, as a script."""
    one = exploring.run(7)
    other = exploring.run(7, Script(one.decisions, one.limit))
    assert one.log == other.log


@pytest.mark.sqlite
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(exploring, bug):
    with BUGS[bug]():
        found = next((seed for seed in range(1000) if exploring.run(seed).violation), None)
    assert found is not None, f"{bug} was not found"
    # It was the bug that was found, and nothing else.
    assert not exploring.run(found).violation


@pytest.mark.sqlite
def test_the_story_of_a_failure_tells_the_least_that_leads_to_it(exploring):
    """A row that backs off, and a message about it, is all that this one needs; the seed has struck in many ways."""
    with BUGS["claims_ignore_next_attempt_at"]():
        failed = next(one for one in map(exploring.run, range(1000)) if one.violation and len(one.decisions) > 10)
        story = exploring.story(failed)
    assert "was taken while it was backing off" in story
    shortest_trace = re.search(rf"The shortest trace has (\d+) of {len(failed.decisions)} decisions", story)
    assert shortest_trace
    assert int(shortest_trace[1]) <= 4
    assert f"make chaos SEED={failed.seed} RUNS=1" in story


def test_the_shortest_list_that_still_fails():
    assert shortest(list(range(100)), lambda part: {3, 71, 72} <= set(part)) == [3, 71, 72]
    assert shortest([1], lambda part: True) == []
    assert shortest([1, 2], lambda part: False) == [1, 2]
