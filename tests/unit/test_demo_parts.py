"""The demo's other parts, each by itself: what it counts, what it measures, what it prints."""

import io
import sqlite3

import psutil
import pytest
from django.contrib.auth import get_user_model

from config.stack import StackError
from databases.models import Database
from demo import provisioner, rows
from demo.__main__ import MARKER, claim, empty
from demo.disasters import DISASTERS, Strike, read_plan
from demo.ledger import parse
from demo.rows import Row, Snapshot, rows_of
from demo.screen import Screen, table
from demo.story import ROWS, STEPS, Story

pytestmark = pytest.mark.once


def test_the_rows_in_the_queue_are_found_by_their_messages():
    lists = [[b"schedule_databases", b"create_database-7"], [b"deploy-12", b"create_database-x", b"\xff-1"]]
    assert rows_of(lists) == {Row("Database", 7), Row("DeployRequest", 12)}


def test_a_row_that_nothing_is_about_to_work_on_is_stranded():
    states = {1: "pending", 2: "pending", 3: "deleting", 4: "ready", 5: "deleted"}
    snapshot = Snapshot(states=states, queued=frozenset({1, 4}), running={2: "token"})
    assert snapshot.unfinished == {1, 2, 3}
    assert snapshot.stranded == {3}


def test_a_row_moves_when_it_is_queued_or_finished_or_run_under_another_claim():
    states = {1: "pending", 2: "pending", 3: "pending", 4: "ready"}
    snapshot = Snapshot(states=states, queued=frozenset({1}), running={2: "old"})
    assert [snapshot.is_moving(pk) for pk in (1, 2, 3, 4)] == [True, True, False, True]
    assert not snapshot.is_moving(2, apart_from="old")
    assert snapshot.is_moving(2, apart_from="older")


def test_a_strike_lasts_until_the_last_row_is_back():
    strike = Strike("Redis emptied", at=10)
    strike.add({1, 2})
    strike.look(Snapshot(at=11, states={1: "pending", 2: "pending"}, queued=frozenset({1})))
    assert strike.out_of_work_for is None
    strike.look(Snapshot(at=15, states={1: "pending", 2: "pending"}, queued=frozenset({2})))
    assert strike.out_of_work_for == 5
    assert Strike("hit nobody", at=10).out_of_work_for == 0


def test_a_broken_claim_is_not_work_until_somebody_else_takes_the_row():
    strike = Strike("worker and its child killed", at=10)
    strike.hit[1] = "dead"
    strike.look(Snapshot(at=11, states={1: "pending"}, queued=frozenset(), running={1: "dead"}))
    assert strike.out_of_work_for is None
    strike.look(Snapshot(at=70, states={1: "pending"}, queued=frozenset(), running={1: "alive"}))
    assert strike.out_of_work_for == 60


def test_a_file_is_missing_sound_or_neither(tmp_path, settings):
    settings.DATABASES_FOLDER = tmp_path / "no such folder"
    assert rows.inspect_folder("a") == "missing"
    settings.DATABASES_FOLDER = tmp_path
    with sqlite3.connect(tmp_path / "a.sqlite3") as connection:
        connection.execute("CREATE TABLE t (x)")
    connection.close()
    assert rows.inspect_folder("a") == "sound"
    (tmp_path / "b.sqlite3").write_bytes(b"not a database" * 100)
    assert rows.inspect_folder("b") == "file is not a database"
    (tmp_path / ".c.making").touch()
    assert rows.inspect_folder("c") == "gone but for .c.making"
    (tmp_path / "ab.sqlite3-wal").touch()
    assert rows.inspect_folder("b2") == "missing"


@pytest.mark.django_db
def test_what_belongs_to_no_row_is_found(tmp_path, settings):
    settings.DATABASES_FOLDER, settings.BACKUPS_SCRATCH = tmp_path / "databases", tmp_path / "scratch"
    owner = get_user_model().objects.create_user("ada")
    Database.objects.create(name="shop", owner=owner, state=Database.State.READY)
    for folder in (settings.DATABASES_FOLDER, settings.BACKUPS_SCRATCH):
        folder.mkdir()
    for name in ("shop.sqlite3", "shop.sqlite3-wal", ".shop.making", "old.sqlite3"):
        (settings.DATABASES_FOLDER / name).touch()
    (settings.BACKUPS_SCRATCH / "backup_7").touch()
    assert rows.remains() == [
        "in scratch backup_7",
        "the database's file .shop.making",
        "the database's file old.sqlite3",
    ]


def test_a_story_is_the_same_only_when_its_rows_are_and_its_change_was_made_once(monkeypatch):
    def told(restored: dict) -> str:
        story = Story("a", "sqlite", user=None)
        story.done, story.restored = [step for step in STEPS if step != "the same rows"], "b"
        monkeypatch.setattr(rows, "read", lambda name, engine: source if name == "a" else restored)
        story.compare()
        return story.why_untold

    source = {"orders": (ROWS, "sum")}
    assert told(source) == ""
    assert told({"orders": (ROWS, "other sum")}).startswith("b holds")
    source = {"orders": (2 * ROWS, "sum")}
    assert told(source) == "its change was made 2 times"


def test_the_rows_of_both_engines_are_read_and_summed(tmp_path, settings, postgres):
    settings.DATABASES_FOLDER = tmp_path
    with sqlite3.connect(tmp_path / "a.sqlite3") as connection:
        connection.execute("CREATE TABLE t (x)")
        connection.execute("INSERT INTO t VALUES (1), (2)")
    connection.close()
    assert rows.read("a", "sqlite")["t"][0] == 2
    assert rows.read("postgres", "postgresql") == {}


def test_the_provisioner_does_the_work_and_writes_it_down(tmp_path, monkeypatch, settings):
    settings.DATABASES_FOLDER = tmp_path / "databases"
    monkeypatch.setenv("SELFHEAL_LEDGER", str(tmp_path / "ledger"))
    monkeypatch.setattr(provisioner, "SECONDS", (0.0, 0.01))
    engine = provisioner.sqlite()
    engine.create("demo_0001")
    assert rows.inspect_folder("demo_0001") == "sound"
    engine.delete("demo_0001")
    assert rows.inspect_folder("demo_0001") == "missing"

    events = parse((tmp_path / "ledger").read_bytes())
    assert [(event.kind, event.verb) for event in events] == [
        ("start", "create"),
        ("end", "create"),
        ("start", "delete"),
        ("end", "delete"),
    ]
    assert {event.process for event in events} == {(psutil.Process().pid, psutil.Process().create_time())}
    assert sorted(event.at for event in events) == [event.at for event in events]


def test_work_that_raises_ends_too(tmp_path, monkeypatch):
    monkeypatch.setenv("SELFHEAL_LEDGER", str(tmp_path / "ledger"))
    monkeypatch.setattr(provisioner, "SECONDS", (0.0, 0.0))
    with pytest.raises(RuntimeError), provisioner.at_work("create", "a"):
        raise RuntimeError
    assert [event.kind for event in parse((tmp_path / "ledger").read_bytes())] == ["start", "end"]


def test_a_plan_is_all_none_or_what_it_names():
    assert read_plan("all") == list(DISASTERS)
    assert read_plan("none") == []
    assert read_plan("worker-killed, redis-emptied") == ["worker-killed", "redis-emptied"]
    with pytest.raises(StackError, match="no disaster flood"):
        read_plan("redis-emptied,flood")


def test_the_demo_empties_its_own_folder_and_no_other(tmp_path):
    (tmp_path / "novel.txt").touch()
    with pytest.raises(StackError, match="holds something else"):
        claim(tmp_path)
    home = tmp_path / "new"
    claim(home)
    (home / "ledger").touch()
    (home / "databases").mkdir()
    (home / "databases" / "demo_0001.sqlite3").touch()
    claim(home)
    empty(home)
    assert [file.name for file in home.iterdir()] == [MARKER]


def test_columns_line_up():
    assert table(["disaster", "hit"], [["flood", "7"], ["earthquake", "1000"]]).splitlines() == [
        "disaster     hit",
        "──────────  ────",
        "flood          7",
        "earthquake  1000",
    ]


def test_a_pipe_gets_a_progress_line_now_and_then_and_the_last_one_at_the_end():
    out = io.StringIO()
    screen = Screen(out)
    for count in range(100):
        screen.progress(f"ready {count}")
    screen.say("⚡ Redis emptied")
    screen.end_progress()
    assert out.getvalue().splitlines() == ["ready 0", "⚡ Redis emptied", "ready 99"]


def test_a_terminal_keeps_the_progress_line_below_what_happened():
    out = io.StringIO()
    out.isatty = lambda: True
    screen = Screen(out)
    screen.progress("ready 1")
    screen.say("⚡ Redis emptied")
    assert out.getvalue() == "\r\x1b[2Kready 1\r\x1b[2K⚡ Redis emptied\nready 1"
