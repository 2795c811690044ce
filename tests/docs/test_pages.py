"""What the pages in docs/ tell people to do works, all of it, and the reference is what the code says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from config import BASE_DIR
from config.servers import PostgresServer, RedisServer
from tests.docs.pages import DOCS, PAGES, Project, Untested, blocks, parse

# Each page's project has a database of its own.
pytestmark = pytest.mark.once

# What `make test` has no time for. The other pages show that what a page tells people to do is done.
LONG = {"sweep-by-time", "test-your-jobs", "queues-and-workers", "operate", "move-from-celery", "move-from-rq"}
PROOFS = Path(__file__).with_name("proofs")


def proof_of(page: Path, ending: str = "") -> Path | None:
    """Return our tests of what a page claims, or with "_before" of what it begins with, if there are any."""
    path = PROOFS / f"{page.stem.replace('-', '_')}{ending}.py"
    return path if path.exists() else None


# A dozen processes, one after the other: seconds, but not on a machine that has other things to do.
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=pytest.mark.long if page.stem in LONG else ()) for page in PAGES],
    ids=lambda page: page.stem,
)
def test_whatever_a_page_shows_works(page: Path, tmp_path: Path, redis_server: RedisServer):
    if not any(blocks(page)):
        return
    wants_postgres = "django.contrib.postgres" in page.read_text()
    postgres = PostgresServer(tmp_path / "postgres") if wants_postgres else None
    try:
        if postgres:
            postgres.start()
        project = Project(
            tmp_path / "project", redis_server.url, postgres and postgres.url, proof_of(page, ending="_before")
        )
        if "INSTALLED_APPS" not in page.read_text():
            project.begin_where_the_first_page_ends()
        with project.processes:
            project.follow(page)
            project.end_processes()
        # What they had queued when they ended was about another database than the proof's.
        redis_server.flush()
        project.prove(proof_of(page))
    finally:
        if postgres:
            postgres.stop()


def test_every_proof_is_of_a_page():
    proofs = {proof for page in PAGES for proof in (proof_of(page), proof_of(page, ending="_before")) if proof}
    assert proofs == set(PROOFS.glob("*.py"))
    assert len(proofs) >= 7


@pytest.mark.parametrize(
    "markdown",
    [
        "```\nls\n```",
        "```sh\nls\n```",
        "~~~javascript\n1 + 1\n~~~",
        "    import this",
        "<pre>import this</pre>",
        "- A list:\n\n  ```python\n  1 + 1\n  ```",
        "> ```python\n> 1 + 1\n> ```",
        "```python\n1 + 1\n```",
        "```python\n# shop/settings.toml\n```",
        "```console\nls\n```",
        "````{note}\n```python\n1 + 1\n```\n````",
        "```{code-block} python\n1 + 1\n```",
        "```{eval-rst}\n.. code-block:: python\n\n   1 + 1\n```",
        "```{eval-rst}\nAs in::\n\n   1 + 1\n```",
    ],
)
def test_a_block_that_nobody_knows_how_to_run_is_an_error(markdown):
    with pytest.raises(Untested):
        list(parse(markdown, "page.md"))


def test_a_command_that_nobody_knows_how_to_run_is_an_error(tmp_path, redis_server):
    project = Project(tmp_path / "project", redis_server.url, None)
    with pytest.raises(Untested):
        project.type("ls", "", "page.md:1")


def test_there_are_no_other_pages():
    """What is no Markdown would be shown, and read by nobody here."""
    files = (path for path in DOCS.rglob("*") if path.is_file())
    caches = ("__pycache__", ".ruff_cache")
    others = {path.name for path in files if not any(cache in path.parts for cache in caches)}
    assert others - {page.name for page in PAGES} == {"conf.py", "ruff.toml", "alerts.yml", "dashboard.json"}


def test_the_code_on_the_pages_is_in_order(tmp_path):
    """Each block is looked at alone, as it is read. `make lint` looks at its format."""
    for page in PAGES:
        for number, block in enumerate(blocks(page)):
            if block.language == "python":
                (tmp_path / f"{page.stem}_{number}.py".replace("-", "_")).write_text(block.code)
    apps = sorted(set(re.findall(r"^# (\w+)/", "\n".join(map(Path.read_text, PAGES)), re.MULTILINE)))
    # A block that goes on uses names from above it.
    rules = [
        "--select=B,E,F,I,PT,SIM,UP,W",
        "--ignore=F821,PT009,SIM300",
        f"--config=lint.isort.known-first-party={apps}",
    ]
    ruff = [sys.executable, "-m", "ruff", "check", "--isolated", "--target-version=py311", "--line-length=88"]
    done = subprocess.run([*ruff, *rules, "."], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_checks_that_the_pages_name_exist():
    sources = (BASE_DIR / "jobs").rglob("*.py")
    known = set(re.findall(r'"(?:selfheal\.)?([EW]\d{3})"', "\n".join(path.read_text() for path in sources)))
    named = {id for page in PAGES for id in re.findall(r"\b([EW]\d{3})\b", page.read_text())}
    assert named
    assert named <= known


def test_the_tests_that_the_pages_name_exist():
    named = {path for page in PAGES for path in re.findall(r"`(tests/[\w/]+\.py)`", page.read_text())}
    assert len(named) > 10
    assert [path for path in sorted(named) if not (BASE_DIR / path).exists()] == []


def test_they_become_html_without_a_warning(tmp_path):
    """As `make docs` does it. Here rather than there, so that whoever runs the tests sees a broken reference."""
    sphinx = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet", DOCS, tmp_path]
    done = subprocess.run(list(map(str, sphinx)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "index.html").exists()
