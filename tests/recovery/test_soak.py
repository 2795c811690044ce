"""The soak itself, short: it passes with the library as it is, and it fails, saying why, with a bug planted in it."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest

from config import BASE_DIR

# It brings servers of its own.
pytestmark = pytest.mark.once

SMALL = {
    "--minutes": "0.4",
    "--workers": "4",
    "--rate": "1.5",
    "--every": "2",
    "--cron": "* * * * * *",
    "--seed": "1",
}
INTERVALS = {"LEASE": 6, "HEARTBEAT": 1, "TICK": 0.5}


def start(home, **options: str) -> subprocess.Popen[str]:
    given = SMALL | {f"--{name}": value for name, value in options.items()}
    return subprocess.Popen(
        [sys.executable, "-m", "soak", "--home", str(home), *(word for pair in given.items() for word in pair)],
        cwd=BASE_DIR,
        env={**os.environ, "SOAK_JOBS": json.dumps(INTERVALS)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def soak(home, **options: str) -> tuple[int, str]:
    running = start(home, **options)
    said, _ = running.communicate(timeout=200)
    return running.returncode, said


@pytest.mark.parametrize(
    ("minutes", "kinds"),
    [
        ("0.15", "redis emptied,postgres killed,worker and child killed"),
        pytest.param(
            "0.4",
            "redis emptied,redis restarted with data,redis full,postgres killed,postgres network cut,"
            "redis network half closed,child frozen,worker and child killed,no scheduler",
            marks=pytest.mark.long,
        ),
    ],
    ids=["short", "all kinds"],
)
def test_with_the_library_as_it_is(home, minutes, kinds):
    code, said = soak(home, minutes=minutes, disasters=kinds)
    assert code == 0, said
    [rows] = re.findall(r"(\d+) rows, ready \d+, deleted \d+; lost 0, at once 0, bad writes 0, quarantined 0\.", said)
    assert int(rows) >= 5
    assert re.search(r"worker-1 \(never killed\) +\d+ +\d+\.\d MB", said)


@pytest.mark.long
def test_without_the_lease_two_are_at_one_row(home, monkeypatch):
    # Sweeps queue again what is being worked on, a free worker takes it, and no heartbeat ends the first one so soon.
    # Few rows, so that workers are free: behind all of them, what was queued again would wait until its row has ended.
    monkeypatch.setitem(INTERVALS, "HEARTBEAT", 3)
    code, said = soak(home, settings="tests.recovery.soak_without_lease", disasters="none", rate="0.2", minutes="0.6")
    assert code == 1, said
    assert int(re.search(r"at once (\d+)", said)[1]) > 0
    # And with evidence: the row, both processes, and for how long.
    assert re.search(r"soak_\d+: process \d+ \(\w+\) .* process \d+ \(\w+\) started; together for \d", said)


@pytest.mark.long
def test_without_a_look_at_claim_and_state_writes_are_bad(home):
    code, said = soak(home, settings="tests.recovery.soak_without_look", disasters="child frozen", minutes="0.8")
    assert code == 1, said
    assert int(re.search(r"bad writes (\d+)", said)[1]) > 0
    assert re.search(r"Bad writes:\n  soak_\d+: ", said)


@pytest.mark.long
def test_a_request_that_fails_because_redis_is_away_is_no_proof(home):
    code, said = soak(home, settings="tests.recovery.soak_that_needs_redis", disasters="redis down")
    assert code == 1, said
    assert re.search(
        r"Requests that failed while the database was there:\n  \d+\.\d s: to \w+ soak_\d+: \w+Error", said
    )
    # The rows are sound: what failed was said to a user whose transaction had been committed.
    assert "; lost 0, at once 0, bad writes 0, quarantined 0." in said


def test_stopped_in_the_middle_it_leaves_no_process_behind(home):
    running = start(home, minutes="5")
    assert running.stdout
    try:
        next(line for line in running.stdout if "⚡" in line)
        running.send_signal(signal.SIGTERM)
        said, _ = running.communicate(timeout=60)
    finally:
        running.kill()
    assert running.returncode == 130, said
    assert "No process is left." in said
