"""What has to be done before Django reads its settings; pytest loads it by `-p tests.plugin`, before any conftest.py.

Nothing of the developer's environment reaches the tests, save DATABASE_URL. `pytest --postgres` runs them on a
PostgreSQL of their own: one server for the run, and in it a database for each test process.
"""

import os
import platform
import sqlite3
import tempfile
from importlib import metadata
from pathlib import Path

import psycopg
import pytest
from packaging.requirements import Requirement

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


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    early_config.addinivalue_line("markers", "sqlite: about SQLite; left out on PostgreSQL")
    early_config.addinivalue_line("markers", "postgres: about PostgreSQL; left out on SQLite")
    # Processes that run tests side by side get all this from the one that started them.
    if "PYTEST_XDIST_WORKER" in os.environ:
        return
    for variable in OF_THE_DEVELOPER:
        os.environ.pop(variable, None)
    home = tempfile.TemporaryDirectory(prefix="selfheal-tests-")
    early_config.add_cleanup(home.cleanup)
    os.environ["SELFHEAL_HOME"] = home.name
    if early_config.known_args_namespace.postgres:
        # Not before: what is imported from `config` has read the environment.
        from config.servers import PostgresServer

        server = PostgresServer(Path(home.name) / "postgres")
        server.start()
        early_config.add_cleanup(server.stop)
        os.environ["DATABASE_URL"] = server.url


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
    """Leave out, and never skip, what is about the other database."""
    from django.db import connection

    other = "sqlite" if connection.vendor == "postgresql" else "postgres"
    left_out = [item for item in items if item.get_closest_marker(other)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
