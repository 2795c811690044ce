"""Fresh schedules are explored at every run of the tests, and the explorer proves that it can fail."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from config.servers import RedisServer
from tests.recovery.explorer.chooser import Script
from tests.recovery.explorer.explore import Explorer, explorer
from tests.recovery.explorer.planted import BUGS
from tests.recovery.explorer.shrink import shortest

pytestmark = pytest.mark.django_db(transaction=True)

# Together 1,000, shared by the processes that run the tests.
SHARES, SCHEDULES = 20, 50
# From where seeds are drawn; pytest-randomly has seeded the ordinary chance alike in each process.
FRESH = random.SystemRandom()


@pytest.fixture
def exploring(redis_server: RedisServer) -> Iterator[Explorer]:
    redis_server.start()
    with explorer(redis_server.url) as made:
        yield made


@pytest.mark.parametrize("share", range(SHARES))
def test_whatever_happens_every_promise_holds(exploring, share):
    first = FRESH.randrange(10**9)
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


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found_and_its_trace_is_short(exploring, bug):
    with BUGS[bug]():
        for seed in range(1000):
            schedule = exploring.run(seed)
            if schedule.violation:
                break
        assert schedule.violation, f"{bug} was not found"
        found = exploring.shortest(schedule)
        assert found.violation
        assert len(found.decisions) <= 12
    assert not exploring.run(seed).violation


def test_the_shortest_list_that_still_fails():
    assert shortest(list(range(100)), lambda part: {3, 71, 72} <= set(part)) == [3, 71, 72]
    assert shortest([1], lambda part: True) == []
    assert shortest([1, 2], lambda part: False) == [1, 2]
