"""The demo's verdict is worth something: with the lease taken out of the library, its ledger says so."""

import os
import re
import subprocess
import sys

import pytest

from config import BASE_DIR

# Sweeps look every second, and the user asks for less than the workers can do: a row at work is nearly always the only
# one that a sweep could queue again, and there is a free worker to take it.
SMALL = ["--databases", "18", "--rate", "1.5", "--stories", "0", "--cron", "* * * * * *", "--time-limit", "60"]


def run_demo(home, settings: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "demo", "--home", str(home), "--settings", settings, *SMALL, "--seed", "1", *options],
        cwd=BASE_DIR,
        env={**os.environ, "TEST_JOBS": '{"TICK": 0.5}'},
        capture_output=True,
        text=True,
        timeout=120,
    )


# The demo brings a SQLite file of its own.
pytestmark = pytest.mark.once


def test_with_the_lease_no_row_is_worked_by_two_at_once(home):
    demo = run_demo(home, "tests.settings", "--disasters", "worker-killed,child-killed")
    assert demo.returncode == 0, demo.stdout + demo.stderr
    assert "Created 18, ready 17, deleted 1, lost 0, worked by two at once 0." in demo.stdout


@pytest.mark.long
def test_without_the_lease_the_ledger_catches_two_on_one_row(home):
    # Without the lease it is up to chance whether two meet. With a backlog they do not, since a row at work is then not
    # the first that is queued again: the user asks for so little that also a machine that is busy with something else
    # has none.
    idle = ["--databases", "14", "--rate", "0.5", "--disasters", "none"]
    for _ in range(3):
        demo = run_demo(home, "tests.recovery.settings_without_lease", *idle)
        if demo.returncode:
            break
    assert demo.returncode == 1, demo.stdout + demo.stderr
    [at_once] = re.findall(r"worked by two at once (\d+)\.", demo.stdout)
    assert int(at_once) > 0
    # And with evidence: the row, both processes, and for how long.
    assert re.search(r"demo_\d{4}: process \d+ \(\w+\) .* process \d+ \(\w+\) started; together for \d", demo.stdout)


@pytest.mark.long
def test_a_killed_demo_leaves_nothing_that_the_next_one_trips_over(home):
    killed = subprocess.Popen(
        [sys.executable, "-m", "demo", "--home", str(home), "--databases", "50"],
        cwd=BASE_DIR,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert killed.stdout
    try:
        next(line for line in killed.stdout if re.search(r"ready +[1-9]", line))
    finally:
        killed.kill()
        killed.communicate()
    demo = run_demo(home, "tests.settings", "--databases", "6", "--rate", "6", "--disasters", "none")
    assert demo.returncode == 0, demo.stdout + demo.stderr
