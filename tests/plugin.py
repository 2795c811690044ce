"""What has to be done before Django reads its settings; pytest loads it by `-p tests.plugin`, before any conftest.py.

Nothing of the developer's environment reaches the tests, save DATABASE_URL. `pytest --postgres` runs them on a
PostgreSQL of their own: one server for the run, and in it a database for each test process.

A test says by a marker of MARKERS what it does not depend on, and is then run once where others run again and again.
"""

import os
import platform
import sqlite3
import sys
from importlib import metadata
from pathlib import Path

import psycopg
import pytest
from packaging.requirements import Requirement

from tests import guardian

MARKERS = {
    "sqlite": "about SQLite; left out on PostgreSQL",
    "postgres": "about PostgreSQL; left out on SQLite",
    "any_database": "says nothing about the database of the run, or brings its own; left out on PostgreSQL",
    "once": "any_database, and says nothing about the versions under it either; left out with --versions",
    "long_on_sqlite": "takes long, and says much the same on both; left out on SQLite in `make test`",
    "long_on_postgres": "takes long, and says much the same on both; left out on PostgreSQL in `make test`",
    "long": "takes longer than `make test` has time for; left out without --long, which .ci/run asks for",
}

OF_THE_DEVELOPER = (
    "REDIS_URL",
    "DATABASES_FOLDER",
    "DATABASES_POSTGRES_URL",
    "DATABASES_POSTGRES_BIN",
    "DATABASES_SQLITE_PROVISIONER",
    "DATABASES_POSTGRES_PROVISIONER",
    "BACKUPS_FOLDER",
    "BACKUPS_SCRATCH",
    "ALLOWED_HOSTS",
    "SECRET_KEY",
    "DEBUG",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--postgres", action="store_true", help="run on a PostgreSQL that is started for this run")
    parser.addoption("--long", action="store_true", help="run also what takes longer than `make test` has time for")
    parser.addoption("--versions", action="store_true", help="run only what depends on the versions of what is below")


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    for name, meaning in MARKERS.items():
        early_config.addinivalue_line("markers", f"{name}: {meaning}")
    # Processes that run tests side by side get all this from the one that started them.
    if "PYTEST_XDIST_WORKER" in os.environ:
        return
    for variable in OF_THE_DEVELOPER:
        os.environ.pop(variable, None)
    home = guardian.begin()
    os.environ["SELFHEAL_HOME"] = str(home)
    # The first that is added is the last that is called.
    early_config.add_cleanup(lambda: _fail_for_what_is_left(home))
    if early_config.known_args_namespace.postgres:
        # Not before: what is imported from `config` has read the environment.
        from config.servers import PostgresServer

        server = PostgresServer(home / "postgres")
        server.start()
        early_config.add_cleanup(server.stop)
        os.environ["DATABASE_URL"] = server.url


_session: pytest.Session


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    global _session
    _session = session


def _fail_for_what_is_left(home: Path) -> None:
    """Fail the run for each process that a test has started and not ended. The guardian ends it."""
    if left := guardian.left_behind(home):
        print("Tests have left processes behind:", *left, sep="\n", file=sys.stderr)
        _session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_report_header() -> str:
    """Say which versions this run is a test of."""
    requirements = map(Requirement, metadata.requires("django-selfheal") or [])
    wanted = [each.name for each in requirements if not each.marker or each.marker.evaluate({"extra": "postgres"})]
    libraries = [f"{name} {metadata.version(name)}" for name in wanted]
    return ", ".join([f"Tested with: Python {platform.python_version()}", _database(), *libraries])


def _database() -> str:
    url = os.environ.get("DATABASE_URL", "")
    if not url.startswith("postgres"):
        return f"SQLite {sqlite3.sqlite_version}"
    with psycopg.connect(url) as session:
        return "PostgreSQL {}.{}".format(*divmod(session.info.server_version, 10_000))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out, and never skip, what says nothing here, or not for the first time."""
    from django.db import connection

    on_sqlite = connection.vendor == "sqlite"
    left_out = {"postgres"} if on_sqlite else {"sqlite", "any_database", "once"}
    if not config.option.long:
        left_out.add("long")
    if config.option.versions:
        left_out.add("once")
    elif not config.option.long:
        left_out.add("long_on_sqlite" if on_sqlite else "long_on_postgres")
    deselected = [item for item in items if any(mark.name in left_out for mark in item.iter_markers())]
    if deselected:
        config.hook.pytest_deselected(items=deselected)
        items[:] = [item for item in items if item not in set(deselected)]
