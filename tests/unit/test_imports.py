"""Imports go one way, and there is one door to each library: read from the source, not from what is loaded."""

import ast
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import jobs

pytestmark = pytest.mark.once

ROOT = Path(jobs.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
MODULES = {path.stem for path in ROOT.glob("*.py")}

# Each may import from the rows above its own, and the leaves from one another.
LAYERS = [
    {
        "backoff",
        "clock",
        "conf",
        "cron",
        "database",
        "deletion",
        "exceptions",
        "fingerprint",
        "message",
        "queues",
        "registry",
        "resolver",
        "switches",
    },
    {"models"},
    {"enqueue", "claims", "pauses", "tallies"},
    {"job"},
    {"sweep"},
    {"operations"},
    {"jobs"},
    {"perform", "scheduler"},
    {"worker", "checks", "explain", "health"},
    {"metrics", "steering"},
    {"pages", "views"},
    {"admin", "apps", "testing", "urls"},
]
# The front door imports what it promises; nothing inside comes in by it.
RANK = {name: rank for rank, names in enumerate([*LAYERS, {"__init__"}]) for name in names}


def run_time_imports(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Yield the imports that are ever executed, those inside functions too, but not those for the type checker."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        yield from run_time_imports(node)


def imported(path: Path) -> set[str]:
    """Return the dotted names that a file imports, `from jobs import conf` being `jobs.conf`."""
    names: set[str] = set()
    for node in run_time_imports(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif node.module == "jobs":
            names |= {f"jobs.{alias.name}" for alias in node.names}
        else:
            assert node.level == 0, f"{path.name} imports relatively; say where from"
            names.add(str(node.module))
    return names


def importers(package: str) -> set[str]:
    return {
        path.name for path in FILES if any(name == package or name.startswith(f"{package}.") for name in imported(path))
    }


def siblings(path: Path) -> set[str]:
    """Return which other modules of the library a file imports."""
    return {name.split(".")[1] for name in imported(path) if name.startswith("jobs.")}


def test_every_module_has_its_place():
    assert set(RANK) == MODULES


@pytest.mark.parametrize("path", [path for path in FILES if path.parent == ROOT], ids=lambda path: path.stem)
def test_a_module_imports_only_from_below(path):
    above = {name for name in siblings(path) if RANK[name] > RANK[path.stem] or name == "__init__"}
    assert not above
    beside = {name for name in siblings(path) if RANK[name] == RANK[path.stem]}
    assert not beside or path.stem in LAYERS[0] | {"testing"}


def test_there_is_no_circle():
    graph = {path.stem: siblings(path) for path in FILES if path.parent == ROOT}
    TopologicalSorter(graph).prepare()


def test_only_one_module_knows_django_rq():
    assert importers("django_rq") == {"queues.py"}


def test_only_one_module_knows_waffle():
    assert importers("waffle") == {"switches.py"}


def test_only_one_module_knows_prometheus():
    assert importers("prometheus_client") == {"metrics.py"}


@pytest.mark.parametrize("package", ["databases", "backups", "config", "demo", "soak", "tests"])
def test_the_library_knows_nothing_of_the_project_around_it(package):
    assert importers(package) == set()


def test_it_depends_on_nothing_that_is_not_declared():
    allowed = {"croniter", "django", "django_rq", "prometheus_client", "redis", "rq", "rq_scheduler", "waffle", "jobs"}
    outside = {name.split(".")[0] for path in FILES for name in imported(path)} - sys.stdlib_module_names
    assert outside == allowed


def test_rows_are_deleted_by_one_module():
    """Django's own way to delete depends on who else listens."""
    trees = {path.name: ast.walk(ast.parse(path.read_text())) for path in FILES}
    deleting = {
        name
        for name, nodes in trees.items()
        if any(isinstance(node, ast.Attribute) and node.attr in ("delete", "_raw_delete") for node in nodes)
    }
    # The other deletes keys of Redis.
    assert deleting == {"deletion.py", "queues.py"}
