"""Both engines, on real files and a real server: what each has to do, and what it does not let itself be made do."""

import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from databases.provisioners import ProvisioningError, Refused
from tests.engines import Engine, password_of

CHANGE = "CREATE TABLE visits (id integer); INSERT INTO orders VALUES (7, 'of a deploy', 0, NULL);"


def made_by_the_change(engine: Engine, name: str = "shop") -> tuple[bool, int]:
    orders = engine.ask(name, "SELECT count(*) FROM orders WHERE id = 7")
    return engine.has(name, "visits"), orders[0][0]


def test_from_nothing_to_a_copy_and_a_backup_and_back_to_nothing(engine, tmp_path):
    dump = tmp_path / "dump"
    engine.fill("shop")

    engine.copy("shop", "branch")
    engine.provisioner.delete("shop")
    in_it = engine.provisioner.dump("branch", dump)
    assert {name: rows for name, (rows, _) in in_it.items() if name != "about"} == {
        "orders": 3,
        "untouched": 0,
        "selfheal_deploys": 1,
    }
    assert dump.stat().st_mode & 0o077 == 0
    before = engine.everything()
    assert engine.provisioner.try_load(dump, "scratch_1") == in_it
    assert engine.everything() == before
    assert engine.provisioner.load("restored", dump, password_of("restored")) == in_it

    for name in ("branch", "restored"):
        with engine.user(name) as user:
            assert user.execute("SELECT item FROM teapots").fetchall() == [("a teapot; blue",)]
            user.execute("INSERT INTO orders VALUES (4, 'of its own', 0, NULL)")
            user.execute("DROP VIEW teapots")
            user.execute("ALTER TABLE orders ADD COLUMN note text")
        engine.provisioner.delete(name)
    assert engine.everything() == set()


def test_schema_and_contents_change_when_they_change(engine, tmp_path):
    engine.fill("shop")
    engine.copy("shop", "branch")
    schema, in_it = engine.provisioner.schema("shop"), engine.provisioner.dump("shop", tmp_path / "dump")
    assert engine.provisioner.schema("branch") == schema
    engine.do("branch", "UPDATE orders SET photo = NULL WHERE id = 2")
    engine.do("branch", "DROP INDEX by_item")
    assert engine.provisioner.schema("branch") != schema
    of_branch = engine.provisioner.dump("branch", tmp_path / "dump")
    assert [name for name in in_it if in_it[name] != of_branch[name]] == ["orders"]


def test_what_is_there_is_left_as_it_is(engine):
    engine.fill("shop")
    engine.copy("shop", "branch")
    for name in ("shop", "branch"):
        engine.do(name, "DELETE FROM orders WHERE id = 1")
    engine.create("shop")
    engine.copy("shop", "branch")
    assert (
        engine.ask("shop", "SELECT count(*) FROM orders")
        == [(2,)]
        == engine.ask("branch", "SELECT count(*) FROM orders")
    )


def test_a_dump_that_is_not_whole_is_refused(engine, tmp_path):
    dump = tmp_path / "dump"
    engine.fill("shop")
    engine.deploy(
        "shop", "".join(f"INSERT INTO orders VALUES ({n}, 'item {n * n}', {n}, NULL);" for n in range(10, 999))
    )
    engine.provisioner.dump("shop", dump)
    whole = dump.read_bytes()
    middle = len(whole) // 2
    before = engine.everything()
    for damaged in (
        b"",
        b"no dump at all" * 1_000,
        whole[:middle],
        whole[: middle - 400] + b"\0" * 800 + whole[middle + 400 :],
    ):
        dump.write_bytes(damaged)
        with pytest.raises(Refused, match="no whole dump"):
            engine.provisioner.try_load(dump, "scratch_1")
        with pytest.raises(Refused, match="no whole dump"):
            engine.provisioner.load("restored", dump, password_of("restored"))
        engine.provisioner.delete("restored")
        assert engine.everything() == before


def test_what_is_gone_can_neither_be_copied_nor_changed_nor_looked_at(engine, tmp_path):
    for what in (
        lambda: engine.copy("gone", "branch"),
        lambda: engine.deploy("gone", CHANGE),
        lambda: engine.provisioner.schema("gone"),
        lambda: engine.provisioner.dump("gone", tmp_path / "dump"),
    ):
        with pytest.raises(Refused, match="There is no database 'gone' any more"):
            what()
    engine.provisioner.delete("branch")
    engine.provisioner.discard("never_tried")
    assert engine.everything() == set()


# --- Changes ----------------------------------------------------------------------------------------------------------


def test_a_change_is_made_once(engine):
    engine.fill("shop")
    schema = engine.deploy("shop", CHANGE)
    assert made_by_the_change(engine) == (True, 1)
    assert engine.provisioner.schema("shop") == schema
    engine.do("shop", "CREATE TABLE later (id integer)")
    assert engine.deploy("shop", CHANGE) == schema
    assert made_by_the_change(engine) == (True, 1)


def test_two_that_make_the_same_change_at_once_make_it_once(engine, race, db):
    """As when one was frozen for longer than its lease. PostgreSQL ends the earlier one, which says so."""
    engine.fill("shop")

    def deploy() -> str:
        while True:
            with suppress(ProvisioningError):
                return engine.deploy("shop", CHANGE)

    assert len(set(race(deploy, deploy))) == 1
    assert made_by_the_change(engine) == (True, 1)


def test_a_change_ends_no_transaction(engine):
    engine.fill("shop")
    for statement in (
        "COMMIT",
        "; commit",
        "ROLLBACK; CREATE TABLE x (id integer)",
        "-- COMMIT is\nEND",
        "/* a comment */ BEGIN",
        "SAVEPOINT here",
        "RELEASE here",
    ):
        with pytest.raises(Refused, match="made in one transaction, which"):
            engine.deploy("shop", f"{CHANGE}\n{statement};")
        assert made_by_the_change(engine) == (False, 0)


def test_a_change_that_fails_half_way_has_changed_nothing(engine):
    engine.fill("shop")
    schema = engine.provisioner.schema("shop")
    with pytest.raises(Refused, match="no_such"):
        engine.deploy("shop", f"{CHANGE} ALTER TABLE no_such ADD COLUMN x integer; CREATE TABLE y (id integer)")
    assert made_by_the_change(engine) == (False, 0)
    assert engine.provisioner.schema("shop") == schema
    engine.deploy("shop", CHANGE)
    assert made_by_the_change(engine) == (True, 1)


def test_a_change_that_drops_everything_is_still_made_once(engine):
    engine.fill("shop")
    if engine.name == "sqlite":
        tables = "orders", "untouched", "about", "selfheal_deploys"
        everything = "DROP VIEW teapots; " + "; ".join(f"DROP TABLE {table}" for table in tables)
    else:
        everything = "DROP SCHEMA public CASCADE"
    schema = engine.deploy("shop", everything)
    engine.do("shop", "CREATE TABLE orders (id integer)")
    assert engine.deploy("shop", everything) == schema
    assert engine.has("shop", "orders")


def test_a_change_that_waits_for_somebody_else_is_given_up(engine):
    engine.fill("shop")
    with engine.user("shop") as other:
        other.execute("BEGIN")
        other.execute("DELETE FROM orders")
        # SQLite cannot say for whom, nor end a frozen attempt: it tries again.
        raised = ProvisioningError if engine.name == "sqlite" else Refused
        with pytest.raises(raised, match=r"waited [\d.]+ seconds for .* given up"):
            engine.deploy("shop", f"{CHANGE} ALTER TABLE orders ADD COLUMN note text", seconds=1)
        other.execute("ROLLBACK")
    assert made_by_the_change(engine) == (False, 0)
    engine.deploy("shop", CHANGE)


def test_a_change_that_takes_too_long_is_given_up(engine):
    engine.fill("shop")
    endless = "WITH RECURSIVE n (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n) SELECT count(*) FROM n"
    begun = time.monotonic()
    with pytest.raises(Refused, match=r"took longer than 0.5 seconds"):
        engine.deploy("shop", f"{CHANGE} {endless}", seconds=0.5)
    assert time.monotonic() - begun < 5
    assert made_by_the_change(engine) == (False, 0)


def test_a_change_of_a_thousand_statements(engine):
    engine.create("shop")
    engine.deploy("shop", "".join(f"CREATE TABLE t{n} (id integer);\n" for n in range(1_000)))
    assert engine.has("shop", "t999")


def test_what_stands_between_the_semicolons_of_a_body_is_not_taken_apart(engine):
    engine.fill("shop")
    if engine.name == "sqlite":
        engine.deploy(
            "shop",
            "CREATE TRIGGER t AFTER INSERT ON orders BEGIN "
            "DELETE FROM untouched; INSERT INTO untouched VALUES (1); END;"
            "INSERT INTO orders VALUES (8, 'a; b -- c', 0, NULL) -- ; the end",
        )
    else:
        engine.deploy(
            "shop",
            "CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS $body$ BEGIN DELETE FROM untouched; "
            "INSERT INTO untouched VALUES (1); RETURN NULL; END; $body$;"
            "CREATE TRIGGER t AFTER INSERT ON orders FOR EACH ROW EXECUTE FUNCTION f();"
            "DO $$ BEGIN PERFORM 1; PERFORM 2; END $$;"
            "INSERT INTO orders VALUES (8, 'a; b -- c % %s', 0, NULL) -- ; the end",
        )
    assert engine.ask("shop", "SELECT id FROM untouched") == [(1,)]


def test_somebody_who_reads_is_not_in_the_way_of_a_dump(engine, tmp_path):
    """And what is written while it goes on is not in it."""
    engine.fill("shop")
    with engine.user("shop") as user:
        user.execute("BEGIN")
        user.execute("INSERT INTO orders VALUES (9, 'not committed', 0, NULL)")
        assert engine.provisioner.dump("shop", tmp_path / "dump")["orders"][0] == 3
        user.execute("COMMIT")
    assert engine.provisioner.try_load(Path(tmp_path / "dump"), "scratch_1")["orders"][0] == 3


def test_what_is_written_during_a_dump_is_in_all_of_it_or_in_nothing(engine, tmp_path):
    engine.fill("shop")
    done = threading.Event()

    def write() -> None:
        with engine.user("shop") as user:
            for n in range(1_000, 1_000_000):
                if done.is_set():
                    return
                user.execute(f"INSERT INTO orders VALUES ({n}, 'written meanwhile', 0, NULL)")

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(3):
            in_it = engine.provisioner.dump("shop", tmp_path / "dump")
            assert engine.provisioner.try_load(tmp_path / "dump", "scratch_1") == in_it
    finally:
        done.set()
        writer.join()
