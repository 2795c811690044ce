"""What PostgreSQL's engine alone has to beware of: other databases on the server, roles, sessions, and passwords."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import psycopg
import pytest

from databases.provisioners import ProvisioningError, Refused
from databases.provisioners.postgresql import PostgreSQLProvisioner, take_over
from tests.engines import Engine, PostgreSQL, password_of
from tests.machine import within

pytestmark = pytest.mark.postgres


@pytest.fixture
def engine(postgres) -> Engine:
    return Engine(PostgreSQL(postgres))


def wait_until(condition: Callable[[], bool]) -> None:
    with within(20):
        while not condition():
            pass


# --- Names ------------------------------------------------------------------------------------------------------------


def test_what_others_have_on_the_server_is_never_touched(engine, postgres):
    postgres.execute("CREATE DATABASE theirs")
    postgres.execute("CREATE ROLE role")
    engine.fill("shop")
    before = engine.everything()
    for name in ("postgres", "template1", "pg_monitor", "pg_mine", "public", "none", "theirs", "role"):
        with pytest.raises(Refused, match="Choose another"):
            engine.create(name)
        with pytest.raises(Refused):
            engine.copy(name, "branch")
        with pytest.raises(Refused):
            engine.provisioner.schema(name)
        engine.provisioner.delete(name)
        engine.provisioner.delete("branch")
        assert engine.everything() == before


def test_a_name_that_is_none_is_sent_to_no_server(engine):
    for name in ("", 'x"; DROP DATABASE shop', "Shop", "s" * 64, "_making_x"):
        with pytest.raises(ProvisioningError, match="cannot be the name"):
            engine.provisioner.create(name)
    assert engine.everything() == set()


def test_the_longest_name_there_can_be(engine, tmp_path):
    name, branch = "s" * 63, "s" * 62 + "t"
    engine.fill(name)
    engine.copy(name, branch)
    engine.provisioner.dump(name, tmp_path / "dump")
    engine.provisioner.try_load(tmp_path / "dump", name)
    assert engine.ask(branch, "SELECT count(*) FROM orders") == [(3,)]
    engine.provisioner.delete(name)
    engine.provisioner.delete(branch)
    assert engine.everything() == set()


def test_without_a_server_it_says_what_to_set(settings):
    settings.DATABASES_POSTGRES_URL = ""
    with pytest.raises(ProvisioningError, match="Set DATABASES_POSTGRES_URL"):
        PostgreSQLProvisioner()


def test_without_the_programs_it_says_what_to_install_and_no_dump_is_called_damaged(engine, settings, tmp_path):
    engine.fill("shop")
    engine.provisioner.dump("shop", tmp_path / "dump")
    settings.DATABASES_POSTGRES_BIN = str(tmp_path)
    with pytest.raises(ProvisioningError, match=r"no program .*pg_dump.* DATABASES_POSTGRES_BIN"):
        engine.provisioner.dump("shop", tmp_path / "dump")
    with pytest.raises(ProvisioningError, match=r"no program .*pg_restore.* DATABASES_POSTGRES_BIN"):
        engine.provisioner.try_load(tmp_path / "dump", "scratch_1")


def test_a_dump_that_is_not_there_is_not_damaged(engine, tmp_path):
    with pytest.raises(ProvisioningError, match="No such file"):
        engine.provisioner.try_load(tmp_path / "dump", "scratch_1")


# --- Roles ------------------------------------------------------------------------------------------------------------


def test_nobody_else_is_let_in_and_the_owner_can_neither_drop_it_nor_open_it_to_others(engine):
    engine.fill("shop")
    engine.fill("neighbour")
    with pytest.raises(psycopg.OperationalError, match="permission denied for database"):
        engine.kind.user("neighbour", "shop")
    with engine.kind.user("shop", "shop") as user:
        user.execute("GRANT CONNECT ON DATABASE shop TO neighbour")
        for statement in ("ALTER DATABASE shop RENAME TO mine", "DROP DATABASE neighbour", "CREATE ROLE another"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                user.execute(statement)
    with pytest.raises(psycopg.OperationalError, match="permission denied for database"):
        engine.kind.user("neighbour", "shop")


def test_a_change_has_no_more_rights_than_the_owner(engine):
    engine.fill("shop")
    for statement in (
        "RESET SESSION AUTHORIZATION; CREATE ROLE another",
        "SET ROLE postgres",
        "DO $$ BEGIN COPY orders TO PROGRAM 'touch x'; END $$",
        "SELECT pg_read_file('/etc/passwd')",
    ):
        with pytest.raises(Refused, match="permission denied"):
            engine.deploy("shop", statement)


def test_what_the_owner_makes_is_not_run_by_the_superuser(engine, postgres, tmp_path):
    """Functions with the names of PostgreSQL's, and a cast: whoever reads the tables must not call them."""
    engine.fill("shop")
    promote = "LANGUAGE plpgsql AS $$ BEGIN ALTER ROLE shop SUPERUSER; RETURN NULL; END $$"
    engine.deploy(
        "shop",
        f"CREATE FUNCTION public.quote_ident(name) RETURNS text {promote};"
        f"CREATE FUNCTION public.pg_get_indexdef(integer) RETURNS text {promote};"
        f"CREATE FUNCTION public.as_text(public.orders) RETURNS text {promote};"
        "CREATE CAST (public.orders AS text) WITH FUNCTION public.as_text(public.orders);"
        "ALTER ROLE shop SET search_path = public, pg_catalog",
        "evil",
    )
    engine.provisioner.schema("shop")
    engine.provisioner.dump("shop", tmp_path / "dump")
    engine.provisioner.try_load(tmp_path / "dump", "scratch_1")
    engine.copy("shop", "branch")
    assert postgres.execute("SELECT rolname FROM pg_roles WHERE rolsuper").fetchall() == [("postgres",)]


def test_what_an_owner_has_granted_keeps_neither_a_branch_nor_its_parent_from_being_deleted(engine, tmp_path):
    engine.fill("shop")
    engine.deploy(
        "shop",
        "ALTER DEFAULT PRIVILEGES GRANT SELECT ON TABLES TO PUBLIC;"
        "GRANT SELECT ON orders TO PUBLIC; CREATE SCHEMA more; CREATE TYPE more.colour AS ENUM ('red');"
        "CREATE TABLE more.things (id serial, colour more.colour); ALTER TABLE more.things ENABLE ROW LEVEL SECURITY;"
        "CREATE POLICY mine ON more.things TO shop USING (true);",
    )
    engine.copy("shop", "branch")
    engine.copy("branch", "twig")
    engine.provisioner.delete("shop")
    for name in ("branch", "twig"):
        engine.do(name, "DROP SCHEMA more CASCADE")
        engine.do(name, "DROP SCHEMA public CASCADE")
    assert engine.everything() == {f"{kind} {name}" for kind in ("database", "role") for name in ("branch", "twig")}
    engine.provisioner.delete("branch")
    engine.provisioner.delete("twig")
    assert engine.everything() == set()


def test_a_parent_that_is_deleted_while_it_is_copied_does_not_empty_the_copy(engine, monkeypatch):
    engine.fill("shop")
    connect = PostgreSQLProvisioner._session

    def delete_meanwhile(self: PostgreSQLProvisioner, name: str | None = None, **changes: object) -> psycopg.Connection:
        if name and name.startswith("_making_"):
            with pytest.raises(ProvisioningError, match="still being copied"):
                PostgreSQLProvisioner().delete("shop")
        return connect(self, name, **changes)

    with monkeypatch.context() as patch:
        patch.setattr(PostgreSQLProvisioner, "_session", delete_meanwhile)
        engine.copy("shop", "branch")
    assert engine.ask("branch", "SELECT count(*) FROM orders") == [(3,)]
    engine.provisioner.delete("shop")
    engine.provisioner.delete("branch")
    assert engine.everything() == set()


def test_no_password_is_ever_in_the_log_of_the_server(engine, postgres, postgres_server, tmp_path):
    postgres.execute("ALTER ROLE postgres SET log_statement = 'all'")
    try:
        engine.fill("shop")
        engine.copy("shop", "branch")
        engine.provisioner.dump("shop", tmp_path / "dump")
        engine.provisioner.load("restored", tmp_path / "dump", password_of("restored"))
    finally:
        postgres.execute("ALTER ROLE postgres RESET log_statement")
    log = postgres_server._log.read_text()
    assert 'CREATE ROLE "branch" LOGIN PASSWORD \'SCRAM-SHA-256$' in log
    assert not [name for name in ("shop", "branch", "restored") if password_of(name) in log]


# --- Sessions ---------------------------------------------------------------------------------------------------------


def test_a_database_in_use_is_not_copied_and_it_says_who_uses_it(engine):
    engine.fill("shop")
    with engine.user("shop") as user:
        user.execute("SET application_name = 'the till'")
        with pytest.raises(ProvisioningError, match=r"in use by the till of shop from 127\.0\.0\.1 since"):
            engine.copy("shop", "branch")
        engine.provisioner.delete("branch")
    assert engine.everything() == {"database shop", "role shop"}


@contextmanager
def somebody_who_always_comes_back(engine: Engine, name: str) -> Iterator[None]:
    """A client that connects again as soon as it is cut off, several times over."""
    done, inside = threading.Event(), threading.Semaphore(0)

    def stay() -> None:
        while not done.is_set():
            try:
                with engine.user(name) as user:
                    inside.release()
                    while not done.is_set():
                        user.execute("SELECT 1")
            except psycopg.Error:
                pass

    with ThreadPoolExecutor(4) as threads:
        for _ in range(4):
            threads.submit(stay)
        for _ in range(4):
            inside.acquire()
        try:
            yield
        finally:
            done.set()


def test_after_long_enough_the_sessions_are_ended_also_those_that_come_back_at_once(engine):
    engine.fill("shop")
    with somebody_who_always_comes_back(engine, "shop"):
        engine.copy("shop", "branch", end_sessions=True)
    assert engine.ask("branch", "SELECT count(*) FROM orders") == [(3,)]


def test_what_a_killed_process_has_begun_at_the_server_is_ended_and_not_waited_for(engine, postgres):
    engine.fill("shop")
    left_behind = engine.user("shop")
    take_over(left_behind, "deploy a marker")

    def sleep() -> None:
        with pytest.raises(psycopg.OperationalError, match="terminating connection"):
            left_behind.execute("SELECT pg_sleep(100)")

    begun = threading.Thread(target=sleep)
    begun.start()
    asleep = "SELECT 1 FROM pg_stat_activity WHERE query = 'SELECT pg_sleep(100)'"
    wait_until(lambda: postgres.execute(asleep).fetchone() is not None)
    with within(5):
        engine.deploy("shop", "CREATE TABLE visits (id integer)")
    begun.join()
    left_behind.close()
    assert engine.has("shop", "visits")


# --- Changes ----------------------------------------------------------------------------------------------------------


IMPOSSIBLE = [
    ("VACUUM", "made in one transaction, and this cannot be: VACUUM cannot run inside"),
    ("CREATE INDEX CONCURRENTLY again ON orders (item)", "this cannot be: CREATE INDEX CONCURRENTLY"),
    ("PREPARE TRANSACTION 'x'", "which it can neither begin nor end"),
    ("/* /* nested */ */ COMMIT", "which it can neither begin nor end"),
    ("-- a comment\rCOMMIT", "which it can neither begin nor end"),
    (";;COMMIT", "which it can neither begin nor end"),
    ("ROLLBACK; SELECT 1", "which it can neither begin nor end"),
    ("SAVEPOINT x", "which it can neither begin nor end"),
    ("DO $$ BEGIN COMMIT; END $$", "invalid transaction termination"),
    ("CREATE TABLE begin (id integer); COMMIT; SELECT 1", "which it can neither begin nor end"),
    ("SELECT $$ ' $$; COMMIT; SELECT $$ ' $$", "which it can neither begin nor end"),
    ("SELECT E'\\'; COMMIT; --'; COMMIT", "which it can neither begin nor end"),
    ("COPY orders FROM STDIN", "no files to COPY"),
    ("COPY orders TO STDOUT", "no files to COPY"),
    ("ALTER SYSTEM SET fsync = off", "this cannot be|permission denied"),
    ("DROP TABLE public.selfheal_deploys; CREATE VIEW public.selfheal_deploys AS SELECT 1", "selfheal_deploys"),
    ("SET statement_timeout = 0; SET lock_timeout = 0; SELECT pg_sleep(100)", "took longer than 1 seconds"),
    ("SET CONSTRAINTS ALL DEFERRED; INSERT INTO orders VALUES (1, 'twice')", "duplicate key"),
    ("DROP OWNED BY CURRENT_USER; CREATE TABLE x (id integer)", "no schema has been selected"),
]


def test_what_a_change_cannot_be(engine):
    engine.fill("shop")
    for statement, because in IMPOSSIBLE:
        with pytest.raises(Refused, match=because):
            engine.deploy("shop", f"CREATE TABLE visits (id integer); {statement}", seconds=1)
        assert not engine.has("shop", "visits"), statement
        assert engine.has("shop", "orders"), statement


POSSIBLE = [
    'CREATE TABLE visits (begin integer, "end" integer); ALTER TABLE visits ADD COLUMN declare integer',
    "/* /* ; */ ; */ CREATE TABLE visits (id integer)",
    "CREATE TABLE visits (path text DEFAULT 'C:\\', quoted text DEFAULT E'a\\';b')",
    """
    CREATE TABLE visits (id integer);
    CREATE FUNCTION one() RETURNS integer LANGUAGE sql
    BEGIN ATOMIC SELECT 2; SELECT CASE WHEN true THEN 1 ELSE 2 END; END;
    SELECT one()
    """,
    """
    CREATE TABLE visits (id integer);
    CREATE RULE twice AS ON INSERT TO visits
    DO ALSO (INSERT INTO untouched VALUES (1); INSERT INTO untouched VALUES (2));
    INSERT INTO visits VALUES (1)
    """,
    "SET search_path = public; SELECT 1 AS id INTO visits",
    "CREATE SCHEMA mine; SET search_path = mine; CREATE TABLE public.visits (id integer); CREATE TABLE a (id integer)",
    "CREATE TABLE visits (id integer); -- done",
]


@pytest.mark.parametrize("text", POSSIBLE)
def test_the_server_itself_says_where_a_statement_ends(engine, text):
    engine.create("shop")
    engine.deploy("shop", "CREATE TABLE untouched (id integer)", "before")
    schema = engine.deploy("shop", text)
    assert engine.has("shop", "visits")
    assert engine.deploy("shop", text) == schema == engine.provisioner.schema("shop")


def test_what_is_refused_says_where_and_not_all_of_it(engine):
    engine.fill("shop")
    fails = "CREATE FUNCTION fail() RETURNS void LANGUAGE plpgsql AS $$ BEGIN RAISE 'no'; END $$"
    for text, words in (
        (
            "CREATE TABLE visits (id integer);\nALTER TABLE orders ADD COLUMN item text; SELECT 'all of it'",
            'column "item" of relation "orders" already exists',
        ),
        (
            "SELECT 'all of it';\nSELECT nothing FROM orders",
            'column "nothing" does not exist\nLINE 2: SELECT nothing FROM orders\n               ^',
        ),
        ("SELECT 'all of it';\nSELEC 1", 'syntax error at or near "SELEC"\nLINE 2: SELEC 1\n        ^'),
        (
            "CREATE TABLE visits (id integer PRIMARY KEY); INSERT INTO visits VALUES (1), (1); SELECT 'all of it'",
            'duplicate key value violates unique constraint "visits_pkey"\nDETAIL:  Key (id)=(1) already exists.',
        ),
        (f"{fails}; SELECT fail(); SELECT 'all of it'", "no\nCONTEXT:  PL/pgSQL function fail() line 1 at RAISE"),
    ):
        with pytest.raises(Refused) as refused:
            engine.deploy("shop", text)
        assert str(refused.value) == words


@pytest.mark.parametrize("theirs", ["PASSWORD 'mine'", "PASSWORD NULL"])
def test_a_password_that_the_owner_has_set_is_no_reason_to_wait(engine, theirs):
    engine.fill("shop")
    engine.deploy("shop", f"ALTER ROLE CURRENT_USER {theirs}", "theirs")
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        engine.user("shop")
    engine.deploy("shop", "CREATE TABLE visits (id integer)", "after that")
    assert engine.has("shop", "visits")


def test_a_deadlock_is_tried_again(engine, postgres):
    """It is nobody's fault, and gone the next time."""
    engine.fill("shop")
    with engine.user("shop") as other, ThreadPoolExecutor(1) as thread:
        other.execute("BEGIN")
        other.execute("LOCK TABLE untouched")
        deploying = thread.submit(engine.deploy, "shop", "LOCK TABLE orders; LOCK TABLE untouched")
        wait_until(lambda: engine.ask("shop", "SELECT 1 FROM pg_locks WHERE NOT granted") != [])
        # The one that waits first looks for the circle first, and is the one that gives up: it is asleep by then.
        postgres.execute("ALTER ROLE shop SET application_name = 'the next'")
        with suppress(psycopg.errors.DeadlockDetected):
            other.execute("LOCK TABLE orders")
        other.execute("ROLLBACK")
        with suppress(ProvisioningError):
            deploying.result()
    engine.deploy("shop", "LOCK TABLE orders; LOCK TABLE untouched")


def test_a_server_that_is_away_is_nobodys_refusal(engine, settings):
    settings.DATABASES_POSTGRES_URL = "postgres://postgres:a-secret@127.0.0.1:1/postgres"
    for what in (
        lambda: engine.create("shop"),
        lambda: engine.copy("shop", "branch"),
        lambda: engine.deploy("shop", "SELECT 1"),
        lambda: engine.provisioner.delete("shop"),
    ):
        with pytest.raises(ProvisioningError, match="Could not") as raised:
            what()
        assert "a-secret" not in str(raised.value)
