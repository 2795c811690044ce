"""`make bench`, with few rows: it measures on both databases, writes what it found, and fails for a missed bar."""

import subprocess
import sys

import pytest

from benchmarks.figures import Figure, table
from config import BASE_DIR

# They bring their own.
pytestmark = pytest.mark.once


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_it_measures_on_both_databases_and_writes_its_results(tmp_path):
    results = tmp_path / "RESULTS.md"
    few = ["--most", "110000", "--lives", "9", "--megabytes", "8"]
    command = [sys.executable, "-m", "benchmarks", *few, "--results", str(results)]
    ran = subprocess.run(command, cwd=BASE_DIR, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    written = results.read_text()
    # How fast it is on a machine that runs other tests beside it proves nothing.
    missed = "**missed**" in written
    assert bool(ran.returncode) == missed, ran.stderr
    assert ("Bars that were missed: " in ran.stderr) == missed
    for section in ("## Pushes", "## Backups", "## SQLite", "## PostgreSQL"):
        assert section in written
    assert "A backup of 8 MB, taken and verified" in written
    for figure in (
        "1,100 due backup policies queued",
        "A sweep of 100,000 rows, all queued",
        "An idle sweep over 110,000 rows, median",
        "bytes a row",
    ):
        assert written.count(figure) >= 2


def test_a_figure_knows_whether_its_bar_is_met():
    assert Figure("memory", 64.0, "MB", at_most=64).is_met
    assert not Figure("memory", 64.1, "MB", at_most=64).is_met
    assert Figure("speed", 40.0, "times", at_least=40).is_met
    assert not Figure("speed", 39.9, "times", at_least=40).is_met
    assert Figure("statements", 13.0, "").is_met


def test_the_table_says_what_was_missed():
    assert table(
        [Figure("memory", 65.25, "MB", at_most=64), Figure("rows", 10_000_000, ""), Figure("time", 0.456, "s")]
    ) == (
        "| measured |     figure | bar                       |\n"
        "|----------|-----------:|---------------------------|\n"
        "| memory   |    65.2 MB | **missed**: at most 64 MB |\n"
        "| rows     | 10,000,000 |                           |\n"
        "| time     |     0.46 s |                           |"
    )
