"""The explorer replays exactly, and can fail: it finds each bug that is planted. What it explores is `make chaos`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from config.servers import RedisServer
from tests.recovery.explorer.chooser import Chooser, Script
from tests.recovery.explorer.explore import Explorer, _kind, explorer
from tests.recovery.explorer.planted import BUGS, FOUND_BY
from tests.recovery.explorer.shrink import shortest

pytestmark = [
    pytest.mark.django_db(transaction=True),
    # A process that is killed does not close what it has open, and here its memory is collected by another.
    pytest.mark.filterwarnings("ignore:.* was deleted while still open:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:Exception ignored in.*:pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture
def exploring(redis_server: RedisServer) -> Iterator[Explorer]:
    redis_server.start()
    with explorer(redis_server.url) as made:
        yield made


@pytest.mark.long_on_postgres
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


@pytest.mark.once
@pytest.mark.parametrize("bug", sorted(BUGS))
def test_a_planted_bug_is_found_by_the_faults_that_it_cannot_bear(exploring, bug):
    def violation(seed: int) -> str | None:
        return exploring.run(seed, Chooser(seed, FOUND_BY[bug])).violation

    with BUGS[bug]():
        found = next(filter(violation, range(100)), None)
    assert found is not None, f"{bug} was not found"
    # It was the bug that was found, and nothing else.
    assert not violation(found)


@pytest.mark.once
def test_the_story_of_a_failure_tells_the_least_that_leads_to_it(exploring):
    with BUGS["claims_ignore_next_attempt_at"]():
        failed = next(one for one in map(exploring.run, range(1000)) if one.violation and 10 < len(one.decisions) < 40)
        shortest_trace = exploring.shortest(failed)
        story = exploring.story(shortest_trace)
        for left_out in shortest_trace.decisions:
            rest = [each for each in shortest_trace.decisions if each is not left_out]
            other = exploring.run(failed.seed, Script(rest, failed.limit))
            assert other.violation is None or _kind(other.violation) != _kind(failed.violation)
    assert "was taken while it was backing off" in story
    assert f"The shortest trace has {len(shortest_trace.decisions)} of" in story
    assert all(str(decision) in story for decision in shortest_trace.decisions)
    assert f"make chaos SEED={failed.seed} RUNS=1" in story


@pytest.mark.once
def test_the_shortest_list_that_still_fails():
    assert shortest(list(range(100)), lambda part: {3, 71, 72} <= set(part)) == [3, 71, 72]
    assert shortest([1], lambda part: True) == []
    assert shortest([1, 2], lambda part: False) == [1, 2]
