"""PostgreSQL databases: one each, with a role that owns what is in it, on the server of `DATABASES_POSTGRES_URL`."""

import hashlib
import logging
import os
import re
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from threading import Event, Thread
from typing import Any

import psycopg
from django.conf import settings
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from databases.provisioners.base import (
    NAME_PATTERN,
    Contents,
    InUse,
    Provisioned,
    ProvisioningError,
    Refused,
    count_and_sum,
)

logger = logging.getLogger(__name__)

Session = psycopg.Connection[Any]

MARK = "The owner of a database that django-selfheal made."
MADE, TRIED = "making", "trying"
CONNECT_SECONDS = 10
TAKE_OVER_SECONDS = 30
LOCK_SECONDS = 10
"""How long a change waits for what others have locked: everybody else who wants it waits behind the change."""

# What is said about a database must not depend on what its owner has set; nor must they make a superuser call a
# function of theirs by giving it the name of PostgreSQL's.
PLAIN = """
    SET search_path = pg_catalog;
    SET timezone = 'UTC';
    SET datestyle = 'ISO';
    SET intervalstyle = 'postgres';
    SET extra_float_digits = 1;
    SET bytea_output = 'hex';
    SET quote_all_identifiers = off;
    SET row_security = off;
    SET statement_timeout = 0;
    SET idle_in_transaction_session_timeout = 0;
"""


class ProgramFailed(ProvisioningError):
    """One of PostgreSQL's programs could not do what it was told; the message is what it said."""


class PostgreSQLProvisioner:
    """Makes and deletes databases as the superuser of the URL; what users wrote runs as the role of their database.

    A database gets its name only when it is finished: it is made as `_making_…`, then renamed. Its role has the same
    name, is made before it, goes after it, and bears a mark. What has no marked role was not made here, and is never
    touched. The database itself belongs to the superuser, so that its role can neither drop it nor let others in.
    """

    def __init__(self) -> None:
        if not settings.DATABASES_POSTGRES_URL:
            raise ProvisioningError(
                "There is no PostgreSQL server for databases. Set DATABASES_POSTGRES_URL to the URL of a superuser."
            )
        self._server = conninfo_to_dict(settings.DATABASES_POSTGRES_URL)

    def create(self, name: str, password: str = "") -> Provisioned:
        return self._have("create", name, password, lambda server, making: self._make(server, making, name))

    def copy(self, source: str, name: str, password: str = "", end_sessions: bool = False) -> Provisioned:
        ended: list[str] = []

        def copy(server: Session, making: str) -> None:
            self._require(source)
            try:
                with self._ending_sessions(source, ended) if end_sessions else nullcontext():
                    self._make(server, making, name, template=source)
            except psycopg.errors.ObjectInUse as error:
                raise InUse(
                    f"The database {source!r} can only be copied while nobody is connected to it, and it is in use by "
                    f"{who(server, source)}."
                ) from error

        made = self._have("copy", name, password, copy)
        # Not those who came back at once as well, any number of times.
        return replace(made, ended="".join(ended[:1]))

    def delete(self, name: str) -> None:
        with self._at_work("delete", name) as server:
            remove_begun(server, name, MADE)
            if is_ours(server, name):
                drop(server, name)
                self._drop_role(server, name)

    def schema(self, name: str) -> str:
        with self._explained("look at", name), self._existing(name) as session:
            return digest(session)

    def deploy(self, name: str, password: str, marker: str, sql: str, timeout: timedelta) -> str:
        with self._explained("change", name):
            self._require(name)
            with self._as_owner(name, password) as session:
                # What a killed process has begun goes on at the server until its statement ends.
                take_over(session, f"deploy {marker}")
                if (deployed := find_marker(session, marker)) is not None:
                    return deployed
                return change(session, marker, sql, timeout)

    def dump(self, name: str, to: Path) -> Contents:
        with self._explained("dump", name), self._existing(name) as session, session.transaction():
            session.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
            [(snapshot,)] = session.execute("SELECT pg_export_snapshot()").fetchall()
            command = ["--format=custom", f"--snapshot={snapshot}", f"--dbname={self._conninfo(dbname=name)}"]
            # By way of this process, so that one of a killed process ends instead of writing where the next one does.
            with self._running("pg_dump", *command, password=self._server.get("password")) as process:
                assert process.stdout
                to.unlink(missing_ok=True)
                with open(os.open(to, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:  # noqa: PTH123
                    shutil.copyfileobj(process.stdout, file)
                    file.flush()
                    os.fsync(file.fileno())
            return contents(session)

    def load(self, name: str, dump: Path, password: str = "") -> Contents:
        self._see_that_it_is_whole(dump)

        def load(server: Session, making: str) -> None:
            self._make(server, making, name)
            self._restore(dump, making, name, password)

        self._have("load", name, password, load)
        with self._explained("read", name), self._existing(name) as session:
            return contents(session)

    def try_load(self, dump: Path, scratch: str) -> Contents:
        self._see_that_it_is_whole(dump)
        with self._at_work("try to load", scratch, TRIED) as server:
            self._discard(server, scratch)
            tried, password = f"{begun(scratch, TRIED)}{secrets.token_hex(8)}", secrets.token_urlsafe(24)
            try:
                have_role(server, tried, password)
                self._make(server, tried, tried)
                self._restore(dump, tried, tried, password)
                with self._session(tried) as session:
                    return contents(session)
            finally:
                self._discard(server, scratch)

    def discard(self, scratch: str) -> None:
        with self._at_work("discard", scratch, TRIED) as server:
            self._discard(server, scratch)

    def _discard(self, server: Session, scratch: str) -> None:
        remove_begun(server, scratch, TRIED)
        roles = "SELECT rolname FROM pg_roles WHERE starts_with(rolname::text, %s)"
        for (role,) in server.execute(roles, [begun(scratch, TRIED)]).fetchall():
            self._drop_role(server, role)

    def _have(self, verb: str, name: str, password: str, fill: Callable[[Session, str], None]) -> Provisioned:
        """Have a database of this name: the one that is there, or one that `fill` makes under another name first."""
        with self._at_work(verb, name) as server:
            have_role(server, name, password)
            remove_begun(server, name, MADE)
            if not exists(server, name):
                making = f"{begun(name, MADE)}{secrets.token_hex(8)}"
                fill(server, making)
                server.execute(
                    sql.SQL("ALTER DATABASE {} RENAME TO {}").format(sql.Identifier(making), sql.Identifier(name))
                )
            with self._session(name, user=name, password=password) as session:
                [(size,)] = session.execute("SELECT pg_database_size(current_database())").fetchall()
            return Provisioned(path=f"{server.info.host}:{server.info.port}/{name}", size=size)

    def _make(self, server: Session, making: str, owner: str, template: str = "template0") -> None:
        """Make a database in which all belongs to `owner`, and into which nobody else is let, superusers apart."""
        names = {"making": sql.Identifier(making), "owner": sql.Identifier(owner), "template": sql.Identifier(template)}
        for statement in (
            # Everybody could come in until it is said who may.
            "CREATE DATABASE {making} TEMPLATE {template} ALLOW_CONNECTIONS false",
            "REVOKE ALL ON DATABASE {making} FROM PUBLIC",
            "GRANT ALL ON DATABASE {making} TO {owner}",
            "ALTER DATABASE {making} ALLOW_CONNECTIONS true",
        ):
            server.execute(sql.SQL(statement).format(**names))
        with self._session(making) as session:
            if template == "template0":
                session.execute(sql.SQL("ALTER SCHEMA public OWNER TO {owner}").format(**names))
            else:
                # The role of the template has the template's name. What it owns beside this database stays its own:
                # that is nothing, since no database is owned by such a role.
                session.execute(sql.SQL("REASSIGN OWNED BY {template} TO {owner}").format(**names))

    def _drop_role(self, server: Session, name: str) -> None:
        """Drop a role whose database is gone, and what it was granted in the branches of that."""
        for database, owns in server.execute(IN_OTHER_DATABASES, [name]).fetchall():
            if owns:
                # A copy that is not its new owner's yet; to drop what is owned would empty it.
                raise ProvisioningError(f"The database {name!r} is still being copied.")
            with self._session(database) as session:
                session.execute(sql.SQL("DROP OWNED BY {}").format(sql.Identifier(name)))
        server.execute(sql.SQL("DROP ROLE IF EXISTS {}").format(sql.Identifier(name)))

    def _conninfo(self, **changes: str) -> str:
        """Return how to connect, without the password: it stands in a command line that everybody can read."""
        options: dict[str, Any] = {**self._server, **changes, "password": None}
        return make_conninfo(**options)

    def _session(self, name: str | None = None, **changes: Any) -> Session:
        """Connect to the database of this name, else to the one of the URL; as its superuser, unless told otherwise."""
        options = {"connect_timeout": CONNECT_SECONDS, **self._server, **({"dbname": name} if name else {}), **changes}
        session = psycopg.connect(**options, autocommit=True)
        session.execute(PLAIN)
        return session

    def _as_owner(self, name: str, password: str) -> Session:
        """Connect as the role that owns a database, and has this password again if its user gave it another one.

        Not as a superuser who takes its place: what users wrote could take that back.
        """
        try:
            return self._session(name, user=name, password=password)
        except psycopg.OperationalError:
            with self._session() as server:
                proof = verifier(server, name, password)
                server.execute(sql.SQL("ALTER ROLE {} PASSWORD {}").format(sql.Identifier(name), proof))
            return self._session(name, user=name, password=password)

    def _require(self, name: str) -> None:
        """See that there is a database that was made here. Raises Refused when there is none."""
        with self._session() as server:
            if not (is_ours(server, name) and exists(server, name)):
                raise Refused(f"There is no database {name!r} any more.")

    def _existing(self, name: str) -> Session:
        """Connect to a database that was made here. Raises Refused when there is none."""
        self._require(name)
        return self._session(name)

    @contextmanager
    def _at_work(self, verb: str, name: str, kind: str = MADE) -> Iterator[Session]:
        """Yield a superuser's session that alone makes or removes what has to do with this name."""
        if not re.match(NAME_PATTERN, name):
            raise ProvisioningError(
                f"{name!r} cannot be the name of a database. Use lower-case letters, digits and underscores, "
                "at most 63 of them, and begin with a letter."
            )
        with self._explained(verb, name), self._session() as server:
            take_over(server, f"{kind} {name}")
            yield server

    @contextmanager
    def _ending_sessions(self, name: str, ended: list[str]) -> Iterator[None]:
        """End the sessions in a database for as long as this goes on, and say each time whose.

        CREATE DATABASE waits five seconds for those who use its template, and lets nobody in meanwhile: ended before,
        they would be back.
        """
        done = Event()
        with self._session() as server:

            def end() -> None:
                while not done.wait(0.1):
                    if found := who(server, name):
                        logger.warning("To copy the database %s, these sessions are ended: %s.", name, found)
                        ended.append(found)
                        server.execute(f"SELECT pg_terminate_backend(pid) {SESSIONS}", [name])

            thread = Thread(target=end, daemon=True)
            thread.start()
            try:
                yield
            finally:
                done.set()
                thread.join()

    def _see_that_it_is_whole(self, dump: Path) -> None:
        """Read all of a dump without a server. Raises Refused when that cannot be done."""
        try:
            dump.open("rb").close()
            with self._running("pg_restore", f"--file={os.devnull}", str(dump)):
                pass
        except OSError as error:
            raise ProvisioningError(f"Could not read the dump: {error}.") from error
        except ProgramFailed as error:
            raise Refused(f"This is no whole dump of a PostgreSQL database: {error}") from error

    def _restore(self, dump: Path, database: str, role: str, password: str) -> None:
        into = f"--dbname={self._conninfo(dbname=database, user=role)}"
        # Who owned it and who might use it there has no meaning here: all of it belongs to the new role.
        how = ("--exit-on-error", "--no-owner", "--no-privileges")
        with self._running("pg_restore", *how, into, str(dump), password=password):
            pass

    @contextmanager
    def _running(self, program: str, *arguments: str, password: Any = None) -> Iterator[subprocess.Popen[bytes]]:
        """Run one of PostgreSQL's programs, and see that it ends well. Raises ProgramFailed with its own words."""
        path = str(Path(settings.DATABASES_POSTGRES_BIN, program)) if settings.DATABASES_POSTGRES_BIN else program
        environment = {**os.environ, **({"PGPASSWORD": str(password)} if password else {})}
        command = [path, "--no-password", *arguments]
        # What it says goes into a file: nobody reads a second pipe meanwhile.
        with tempfile.TemporaryFile() as words:
            pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": words}
            try:
                process = subprocess.Popen(command, env=environment, **pipes)
            except FileNotFoundError as error:
                raise ProvisioningError(
                    f"There is no program {path}. Install PostgreSQL's client programs, or say in "
                    "DATABASES_POSTGRES_BIN in which folder they are."
                ) from error
            with process:
                try:
                    yield process
                except BaseException:
                    process.kill()
                    raise
            if process.returncode < 0:
                raise ProvisioningError(f"The program {program} was ended by signal {-process.returncode}.")
            if process.returncode:
                words.seek(0)
                raise ProgramFailed(words.read(2_000).decode(errors="replace").strip() or f"{program} failed")

    @contextmanager
    def _explained(self, verb: str, name: str) -> Iterator[None]:
        try:
            yield
        except psycopg.errors.ReservedName as error:
            raise Refused(f"PostgreSQL keeps the name {name!r} for itself. Choose another.") from error
        except (psycopg.Error, OSError) as error:
            raise ProvisioningError(
                f"Could not {verb} the database {name!r} on PostgreSQL: {said(error)}. "
                "Mend that, and it is done at the next attempt."
            ) from error


SESSIONS = "FROM pg_stat_activity WHERE datname = %s AND backend_type = 'client backend' AND pid <> pg_backend_pid()"

IN_OTHER_DATABASES = """
    SELECT datname, bool_or(deptype = 'o' AND classid <> 'pg_default_acl'::regclass)
    FROM pg_shdepend JOIN pg_database ON pg_database.oid = dbid
    WHERE refclassid = 'pg_authid'::regclass AND refobjid = (SELECT oid FROM pg_roles WHERE rolname = %s)
    GROUP BY datname
"""


def take_over(session: Session, work: str) -> None:
    """Be the only session that does this work, for as long as this session lasts.

    Whoever holds it still has lost the right to: their process was killed, or is frozen for longer than its lease. What
    it has told the server to do goes on there, until the session is ended.
    """
    key = int.from_bytes(hashlib.sha256(work.encode()).digest()[:8], "big") >> 1
    session.execute(
        """
        SELECT pg_terminate_backend(pid) FROM pg_locks
        WHERE locktype = 'advisory' AND objsubid = 1 AND (classid::bigint << 32) + objid::bigint = %s
        AND database = (SELECT oid FROM pg_database WHERE datname = current_database()) AND pid <> pg_backend_pid()
        """,
        [key],
    )
    session.execute(f"SET lock_timeout = '{TAKE_OVER_SECONDS}s'")
    session.execute("SELECT pg_advisory_lock(%s)", [key])


def begun(name: str, kind: str) -> str:
    """Return how the names of databases begin that are made for this one. A user's begins with a letter."""
    return f"_{kind}_{hashlib.sha256(name.encode()).hexdigest()[:16]}_"


def remove_begun(server: Session, name: str, kind: str) -> None:
    databases = "SELECT datname FROM pg_database WHERE starts_with(datname::text, %s)"
    for (database,) in server.execute(databases, [begun(name, kind)]).fetchall():
        drop(server, database)


def drop(server: Session, name: str) -> None:
    server.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))


def exists(server: Session, name: str) -> bool:
    return server.execute("SELECT 1 FROM pg_database WHERE datname = %s", [name]).fetchone() is not None


def is_ours(server: Session, name: str) -> bool:
    """Whether there is a role of this name that was made here."""
    marks = "SELECT shobj_description(oid, 'pg_authid') FROM pg_roles WHERE rolname = %s"
    return server.execute(marks, [name]).fetchone() == (MARK,)


def have_role(server: Session, name: str, password: str) -> None:
    """Make the role that is to own a database, unless it is there. Raises Refused for a name that others have."""
    if is_ours(server, name):
        return
    taken = server.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", [name]).fetchone()
    if taken or exists(server, name):
        raise Refused(f"The server has a database or a role {name!r} already, which was not made here. Choose another.")
    role = sql.Identifier(name)
    with server.transaction():
        server.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(role, verifier(server, name, password)))
        server.execute(sql.SQL("COMMENT ON ROLE {} IS {}").format(role, sql.Literal(MARK)))


def verifier(server: Session, name: str, password: str) -> sql.Literal:
    """Return what proves the password of a role, and no more: the statement may end up in the server's log."""
    return sql.Literal(server.pgconn.encrypt_password(password.encode(), name.encode(), b"scram-sha-256").decode())


def who(server: Session, name: str) -> str:
    """Say who is connected to a database."""
    found = server.execute(
        "SELECT concat_ws(' ', coalesce(nullif(application_name, ''), 'a session'), 'of', usename, "
        f"'from ' || host(client_addr), 'since ' || date_trunc('second', backend_start)) {SESSIONS} ORDER BY pid",
        [name],
    ).fetchall()
    return ", ".join(each for (each,) in found)


def said(error: BaseException) -> str:
    return str(error).strip() or type(error).__name__


# --- Changes ----------------------------------------------------------------------------------------------------------


def find_marker(session: Session, marker: str) -> str | None:
    """Return the digest that was taken when this change was made, or None when it has not been made."""
    if session.execute("SELECT to_regclass('public.selfheal_deploys')").fetchone() == (None,):
        return None
    found = session.execute("SELECT schema FROM public.selfheal_deploys WHERE marker = %s", [marker]).fetchone()
    return found[0] if found else None


# The server itself takes the text apart, as no other program can; and here it lets no statement end the transaction.
MAKE_IT = "DO LANGUAGE plpgsql $$ BEGIN EXECUTE pg_catalog.current_setting('selfheal.change'); END $$"


def change(session: Session, marker: str, text: str, timeout: timedelta) -> str:
    """Make a change and leave its marker, in one transaction; return a digest of the schema. Raises Refused."""
    seconds = timeout.total_seconds()
    deadline, patience = time.monotonic() + seconds, min(LOCK_SECONDS, seconds / 2)
    if re.search(r"\binto\b", text, re.IGNORECASE):
        # EXECUTE wants to know nothing of a SELECT INTO, where that comes last.
        text += "\n;SELECT"

    def limit() -> None:
        left = max(1, int((deadline - time.monotonic()) * 1_000))
        session.execute(f"SET statement_timeout = {left}; SET lock_timeout = {int(patience * 1_000)}")

    try:
        with session.transaction():
            session.execute("RESET ALL")
            limit()
            try:
                session.execute("SELECT pg_advisory_xact_lock(0)")
            except (psycopg.errors.LockNotAvailable, psycopg.errors.QueryCanceled) as error:
                raise ProvisioningError("Another change is being made in this database.") from error
            limit()
            session.execute("SELECT pg_catalog.set_config('selfheal.change', %s, true)", [text])
            session.execute(MAKE_IT)
            # Again: the change may have set them.
            session.execute(PLAIN)
            limit()
            # The change itself may have dropped them.
            session.execute("CREATE SCHEMA IF NOT EXISTS public")
            session.execute(
                "CREATE TABLE IF NOT EXISTS public.selfheal_deploys "
                "(marker text PRIMARY KEY, schema text NOT NULL, deployed_at timestamptz NOT NULL DEFAULT now())"
            )
            schema = digest(session)
            session.execute("INSERT INTO public.selfheal_deploys (marker, schema) VALUES (%s, %s)", [marker, schema])
            return schema
    except psycopg.errors.LockNotAvailable as error:
        raise Refused(
            f"It waited {patience:g} seconds for what others have locked, and was given up so that nobody has to wait "
            f"behind it. Nothing was changed.{in_transactions(session)}"
        ) from error
    except psycopg.errors.QueryCanceled as error:
        raise Refused(
            f"It took longer than {seconds:g} seconds, and was given up. Nothing was changed. "
            f"The server said: {said_of(text, error)}"
        ) from error
    except psycopg.errors.ActiveSqlTransaction as error:
        raise Refused(
            f"A change is made in one transaction, and this cannot be: {said_of(text, error)}. Nothing was changed."
        ) from error
    except psycopg.Error as error:
        # What the server could not do now it may do later: a lost connection, a deadlock, a full disk.
        if isinstance(error, psycopg.OperationalError | psycopg.InterfaceError) and not (
            error.sqlstate or ""
        ).startswith("54"):
            raise
        if error.diag.source_function == "exec_stmt_dynexecute":
            raise Refused(
                "A change is made in one transaction, which it can neither begin nor end; and it has no files to COPY "
                f"from or to. The server said: {said_of(text, error)}"
            ) from error
        raise Refused(said_of(text, error)) from error


def said_of(text: str, error: psycopg.Error) -> str:
    """Return what the server said of a change, without all of the change and without how it was made here."""
    words = said(error)
    for ours in (f"QUERY:  {text}", f'SQL statement "{text}"', "PL/pgSQL function inline_code_block line 1 at EXECUTE"):
        words = words.replace(ours, "")
    return words.rstrip().removesuffix("CONTEXT:").rstrip()


def in_transactions(session: Session) -> str:
    """Say who else is in the middle of something in this database."""
    others = session.execute(
        "SELECT format('%s (pid %s, %s for %s s)', coalesce(nullif(application_name, ''), usename), pid, state, "
        "extract(epoch FROM now() - xact_start)::int) FROM pg_catalog.pg_stat_activity "
        "WHERE datname = current_database() AND pid <> pg_backend_pid() AND xact_start IS NOT NULL ORDER BY xact_start"
    ).fetchall()
    return f" In a transaction there: {', '.join(each for (each,) in others)}." if others else ""


OWN_SCHEMAS = "(SELECT oid FROM pg_namespace WHERE nspname NOT LIKE 'pg\\_%' AND nspname <> 'information_schema')"
SCHEMA = f"""
    SELECT format('schema %I', nspname) FROM pg_namespace WHERE oid IN {OWN_SCHEMAS}
    UNION ALL
    SELECT format('%s %s %s %s %s %s %s %s', relkind, oid::regclass, relpersistence, relrowsecurity, reloptions,
        CASE WHEN relkind IN ('v', 'm') THEN pg_get_viewdef(oid) END,
        CASE WHEN relkind = 'p' THEN pg_get_partkeydef(oid) END, pg_get_expr(relpartbound, oid))
    FROM pg_class WHERE relkind IN ('r', 'p', 'v', 'm', 'f', 'c', 'S') AND relnamespace IN {OWN_SCHEMAS}
    UNION ALL
    SELECT format('column %s %s %I %s %s %s %s %s %s', attrelid::regclass,
        row_number() OVER (PARTITION BY attrelid ORDER BY attnum), attname, format_type(atttypid, atttypmod),
        attnotnull, attidentity, attgenerated, nullif(attcollation, 0)::regcollation, pg_get_expr(adbin, adrelid))
    FROM pg_attribute JOIN pg_class ON pg_class.oid = attrelid
        LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
    WHERE attnum > 0 AND NOT attisdropped AND relkind IN ('r', 'p', 'v', 'm', 'f', 'c')
        AND relnamespace IN {OWN_SCHEMAS}
    UNION ALL
    SELECT format('constraint %s %s %I %s', conrelid::regclass, contypid::regtype, conname, pg_get_constraintdef(oid))
    FROM pg_constraint WHERE connamespace IN {OWN_SCHEMAS}
    UNION ALL
    SELECT pg_get_indexdef(indexrelid)
    FROM pg_index JOIN pg_class ON pg_class.oid = indrelid WHERE relnamespace IN {OWN_SCHEMAS}
    UNION ALL
    SELECT format('%s %s', tgenabled, pg_get_triggerdef(pg_trigger.oid))
    FROM pg_trigger JOIN pg_class ON pg_class.oid = tgrelid WHERE NOT tgisinternal AND relnamespace IN {OWN_SCHEMAS}
    UNION ALL
    SELECT pg_get_ruledef(pg_rewrite.oid)
    FROM pg_rewrite JOIN pg_class ON pg_class.oid = ev_class
    WHERE rulename <> '_RETURN' AND relnamespace IN {OWN_SCHEMAS}
    UNION ALL
    SELECT CASE prokind WHEN 'a' THEN 'aggregate ' || oid::regprocedure ELSE pg_get_functiondef(oid) END
    FROM pg_proc WHERE pronamespace IN {OWN_SCHEMAS}
    UNION ALL
    SELECT format('type %s %s %s %s %s', oid::regtype, typtype, format_type(nullif(typbasetype, 0), typtypmod),
        typdefault,
        (SELECT string_agg(enumlabel, ',' ORDER BY enumsortorder) FROM pg_enum WHERE enumtypid = pg_type.oid))
    FROM pg_type WHERE typtype IN ('d', 'e', 'r') AND typnamespace IN {OWN_SCHEMAS}
    UNION ALL
    SELECT format('policy %s %I %s %s %s', polrelid::regclass, polname, polcmd, pg_get_expr(polqual, polrelid),
        pg_get_expr(polwithcheck, polrelid))
    FROM pg_policy
    UNION ALL
    SELECT format('sequence %s %s %s %s %s %s', seqrelid::regclass, seqtypid::regtype, seqstart, seqincrement, seqmax,
        seqmin)
    FROM pg_sequence
"""


def digest(session: Session) -> str:
    """Return a digest of the schema; the table of the markers is no part of it."""
    lines = sorted(line for (line,) in session.execute(SCHEMA) if "selfheal_deploys" not in line)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


# --- Contents ---------------------------------------------------------------------------------------------------------


TABLES = f"""
    SELECT nspname, relname, concat(CASE WHEN nspname <> 'public' THEN quote_ident(nspname) || '.' END,
        quote_ident(relname))
    FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace
    WHERE relkind = 'r' AND relpersistence <> 't' AND relnamespace IN {OWN_SCHEMAS}
    AND NOT EXISTS (SELECT FROM pg_depend WHERE classid = 'pg_class'::regclass AND objid = pg_class.oid
        AND deptype = 'e')
"""


def contents(session: Session) -> Contents:
    """Return what is in all tables. By COPY, which alone calls no cast or function that their owner has made."""
    found: Contents = {}
    for schema, table, name in session.execute(TABLES).fetchall():
        with session.cursor() as cursor:
            copying = sql.SQL("COPY {} TO STDOUT").format(sql.Identifier(schema, table))
            with cursor.copy(copying) as rows:
                found[name] = count_and_sum(bytes(row) for row in rows)
    return found
