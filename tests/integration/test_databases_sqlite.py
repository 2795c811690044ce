"""What SQLite's engine alone has to beware of: a change that would reach another file than its own."""

import sqlite3
from contextlib import closing

import pytest

from databases.provisioners import Refused, sqlite
from tests.engines import Engine, SQLite

pytestmark = pytest.mark.sqlite


@pytest.fixture
def engine(tmp_path, settings) -> Engine:
    settings.DATABASES_FOLDER = tmp_path / "databases"
    engine = Engine(SQLite(settings.DATABASES_FOLDER))
    engine.fill("shop")
    engine.fill("neighbour")
    return engine


@pytest.mark.parametrize(
    ("statement", "because"),
    [
        ("ATTACH '{folder}/neighbour.sqlite3' AS other; DELETE FROM other.orders", "reaches no other file"),
        ("ATTACH '{folder}/new' AS other", "reaches no other file"),
        ("DETACH main", "reaches no other file"),
        ("VACUUM INTO '{folder}/new'", "VACUUM"),
        ("PRAGMA writable_schema = ON", "PRAGMA writable_schema is not for"),
        ("PRAGMA journal_mode = OFF", "PRAGMA journal_mode is not for"),
        ("PRAGMA temp_store_directory = '/'", "PRAGMA temp_store_directory is not for"),
        ("SELECT * FROM pragma_journal_mode", "PRAGMA journal_mode is not for"),
        ("SELECT load_extension('{folder}/new')", "not authorized"),
        ("UPDATE sqlite_master SET sql = ''", "sqlite_master"),
        ("INSERT OR ROLLBACK INTO orders VALUES (1, 'twice', 0, NULL); CREATE TABLE x (id)", "UNIQUE"),
    ],
)
def test_a_change_stays_in_its_own_file(engine, statement, because):
    before = engine.everything()
    with pytest.raises(Refused, match=because):
        engine.deploy("shop", f"CREATE TABLE visits (id); {statement.format(folder=engine.kind.folder)}")
    assert engine.everything() == before
    assert not engine.has("shop", "visits")
    assert engine.ask("neighbour", "SELECT count(*) FROM orders") == [(3,)]


@pytest.mark.parametrize(
    "statement",
    [
        "ALTER TABLE orders ADD COLUMN pieces INTEGER CHECK (pieces > 0)",
        "CREATE VIRTUAL TABLE words USING fts5 (word); INSERT INTO words VALUES ('a b')",
        "CREATE VIRTUAL TABLE words USING fts4 (word); INSERT INTO words VALUES ('a b'); DROP TABLE words",
        "CREATE VIRTUAL TABLE places USING rtree (id, low, high); INSERT INTO places VALUES (1, 2, 3)",
    ],
)
def test_what_sqlite_asks_itself_is_nobodys_pragma(engine, statement, tmp_path):
    engine.deploy("shop", f"CREATE TABLE visits (id); {statement}")
    assert engine.has("shop", "visits")
    dumped = engine.provisioner.dump("shop", tmp_path / "dump")
    assert engine.provisioner.try_load(tmp_path / "dump", "scratch_1") == dumped


def test_what_stands_in_the_write_ahead_log_alone_is_in_a_copy_and_in_a_dump(engine, tmp_path):
    with engine.user("shop") as user:
        user.execute("PRAGMA wal_autocheckpoint = 0")
        user.execute("INSERT INTO orders VALUES (4, 'in the log', 0, NULL)")
        engine.copy("shop", "branch")
        assert engine.provisioner.dump("shop", tmp_path / "dump")["orders"][0] == 4
    assert engine.ask("branch", "SELECT count(*) FROM orders") == [(4,)]
    assert not list(tmp_path.glob("dump-*"))
    with closing(sqlite3.connect(f"file:{tmp_path / 'dump'}?mode=ro&immutable=1", uri=True)) as dump:
        assert dump.execute("SELECT count(*) FROM orders").fetchone() == (4,)


def test_what_is_written_between_the_count_and_the_copy_is_in_neither(engine, tmp_path, monkeypatch):
    back_up = sqlite.back_up

    def after_somebody_wrote(connection, to):
        engine.do("shop", "INSERT INTO orders VALUES (4, 'just now', 0, NULL)")
        back_up(connection, to)

    with monkeypatch.context() as patch:
        patch.setattr(sqlite, "back_up", after_somebody_wrote)
        in_it = engine.provisioner.dump("shop", tmp_path / "dump")
    assert in_it["orders"][0] == 3
    assert engine.provisioner.try_load(tmp_path / "dump", "scratch_1") == in_it


def test_text_that_is_none_and_names_that_need_quotes_are_counted_too(engine, tmp_path):
    with engine.user("shop") as user:
        user.execute('CREATE TABLE "a ""table"", quoted" (x)')
        user.execute("""INSERT INTO "a ""table"", quoted" VALUES (CAST(x'ff00fe' AS TEXT)), (x'ff00fe'), (1), (1.0)""")
        user.execute("CREATE VIRTUAL TABLE words USING fts5(text)")
        user.execute("INSERT INTO words VALUES ('found again')")
    in_it = engine.provisioner.dump("shop", tmp_path / "dump")
    assert in_it['a "table", quoted'][0] == 4
    assert engine.provisioner.load("restored", tmp_path / "dump") == in_it
    assert engine.ask("restored", "SELECT * FROM words WHERE words MATCH 'again'") == [("found again",)]
