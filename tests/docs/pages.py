"""The pages in docs/, read as a reader would who does what they say.

A page is followed from its top: a block of Python is the file that its first line names, and a block of console is
typed. Which blocks there may be is said here, and any other is an error, so that none escapes being run.
"""

import doctest
import itertools
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import NamedTuple

from coverage import Coverage
from django.core.management import call_command
from markdown_it import MarkdownIt

from config import BASE_DIR
from config.stack import Supervisor

DOCS = BASE_DIR / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
# A page that does not say how to install it begins with the project that this one ends with.
FIRST = DOCS / "add-to-a-project.md"

# `# shop/settings.py, at the end`: a new file, one that goes on, or one that is now another.
NAMED = re.compile(r"# ([\w/]+\.\w+)(?:, (at the end|continued|now))?\n")
LANGUAGES = {"python": ".py", "toml": ".toml", "ini": ".service", "yaml": ".yaml"}
# Directives of Sphinx, which name other pages and docstrings, and hold no code. And what is only looked at.
NOT_RUN = {"{toctree}", "{eval-rst}", "text"}
HIDDEN_CODE = re.compile(r"```|~~~|code|literalinclude|::\s*$|>>>", re.MULTILINE)

# What this run of the tests has in its environment for itself.
OURS = ("PYTEST", "TEST_", "COV", "DJANGO_")
CHECKS = """
from django.core.management import call_command


def test_there_is_nothing_to_warn_of(db):
    call_command("check", fail_level="WARNING")
"""
STAYS = {"rqscheduler", "rqworker"}
PATIENCE = 60


class Block(NamedTuple):
    """A fenced block of a page: where it stands, under which heading, in which language, and what is in it."""

    place: str
    section: str
    language: str
    code: str


class Untested(Exception):
    """A block that nobody knows how to run."""


def blocks(page: Path) -> Iterator[Block]:
    """Yield the blocks of a page that are to be run. Raises `Untested` for any that cannot be."""
    return parse(page.read_text(), page.name)


def parse(markdown: str, name: str) -> Iterator[Block]:
    tokens = MarkdownIt("commonmark").enable("table").parse(markdown)
    section = ""
    for token, following in itertools.pairwise([*tokens, *tokens[-1:]]):
        if token.type == "heading_open":
            section = following.content
        place = f"{name}:{token.map[0] + 1}" if token.map else name
        if token.type in ("code_block", "html_block"):
            raise Untested(f"{place}: a block without a language, or of HTML")
        if token.type != "fence":
            continue
        language = token.info.strip()
        if language in NOT_RUN:
            if language != "text" and HIDDEN_CODE.search(token.content):
                raise Untested(f"{place}: code inside of {language}")
        elif language == "console":
            if not token.content.startswith("$ "):
                raise Untested(f"{place}: a console begins with a command, as in `$ python manage.py check`")
            yield Block(place, section, language, token.content)
        elif language in LANGUAGES and (named := NAMED.match(token.content)):
            if not named[1].endswith(LANGUAGES[language]):
                raise Untested(f"{place}: {named[1]} is no file of {language}")
            yield Block(place, section, language, token.content)
        else:
            raise Untested(f"{place}: a block of {language or 'no language'} that does not begin with a file's name")


def commands(block: Block) -> Iterator[tuple[str, str]]:
    """Yield each command of a console, with the output that is shown below it."""
    for part in re.split(r"^\$ ", block.code, flags=re.MULTILINE)[1:]:
        command, _, output = part.partition("\n")
        yield command.partition("  #")[0].strip(), output


class Project:
    """The project of a reader: made by Django itself, then changed by what the pages say."""

    def __init__(self, folder: Path, redis_url: str, database_url: str | None, before: Path | None = None) -> None:
        self.folder = folder
        # The proof of what a page shows in a section "Before", which it replaces later on.
        self.before = before
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(OURS)},
            "PYTHONPATH": "",
            "REDIS_URL": redis_url,
            "DATABASE_URL": database_url or "",
        }
        # What the page that is followed has written.
        self.files: dict[Path, str] = {}
        of_shop = {"DJANGO_SETTINGS_MODULE": "shop.settings"}
        self.processes = Supervisor(folder.with_name("processes"), self.environment | of_shop)
        self.models_changed = self.database_is_behind = False
        folder.mkdir()
        call_command("startproject", "shop", str(folder))

    def add_to_settings(self, code: str) -> None:
        with (self.folder / "shop/settings.py").open("a") as settings:
            settings.write(code)

    def begin_where_the_first_page_ends(self) -> None:
        for block in blocks(FIRST):
            if block.language == "python" and block.code.startswith("# shop/settings.py"):
                self.write(block)
        self.files.clear()
        self.database_is_behind = True
        if url := self.environment["DATABASE_URL"]:
            self.add_to_settings(f"import dj_database_url\nDATABASES['default'] = dj_database_url.parse({url!r})\n")

    # --- Following a page ---------------------------------------------------------------------------------------------

    def follow(self, page: Path) -> None:
        """Do what the page says, from its top."""
        section = ""
        for block in blocks(page):
            if section == "Before" != block.section:
                self.prove(self.before)
            section = block.section
            if block.language == "console":
                for command, output in commands(block):
                    self.type(command, output, block.place)
            else:
                self.write(block)

    def write(self, block: Block) -> None:
        named = NAMED.match(block.code)
        assert named
        path, how = self.folder / named[1], named[2]
        assert path.exists() == (how is not None), f"{block.place}: is {named[1]} new, continued, or now another?"
        if not path.parent.exists():
            self._make_package(path.parent)
        if how == "now" and path.suffix == ".py":
            # As the reader did long ago, when it was what it was.
            self.make_migrations()
            assert self.before or path.name == "models.py", f"{block.place}: nothing runs {named[1]} as it was before"
        if path.name == "models.py":
            self.models_changed = True
        # Where it stands on the page is its line in the file, for whoever reads a traceback.
        before = path.read_text() + "\n\n" if how and how != "now" else ""
        path.write_text(before + block.code)
        self.files[path] = block.place

    def _make_package(self, folder: Path) -> None:
        if not folder.parent.exists():
            self._make_package(folder.parent)
        folder.mkdir()
        (folder / "__init__.py").touch()
        if folder.parent == self.folder:
            self.add_to_settings(f'\nINSTALLED_APPS += ["{folder.name}"]\n')

    def make_migrations(self) -> None:
        """Make what the page does not show. What it does show has to be all that there is to do in that app."""
        if not self.models_changed:
            return
        self.models_changed, self.database_is_behind = False, True
        shown = {path.parent.parent.name for path in self.files if path.parent.name == "migrations"}
        apps = {path.parent.name for path in self.files if path.name == "models.py"}
        if made := sorted(apps - shown):
            self.run(*self.manage("makemigrations", *made))
        if shown:
            self.run(*self.manage("makemigrations", "--check", "--dry-run"))

    def migrate(self) -> None:
        self.make_migrations()
        if self.database_is_behind:
            self.database_is_behind = False
            self.run(*self.manage("migrate", "--verbosity", "0"))

    def type(self, command: str, output: str, place: str) -> None:
        """Type a command, and see what the page says that one sees.

        With processes at work that may take a moment: then the command is typed again. Those stay for the whole page.
        """
        words = shlex.split(command)
        if words[:2] == ["pip", "install"]:
            # Without any index: what is named has to be here already, under this name.
            self.run(sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", *words[2:])
        elif words[0] == "pytest":
            self.see(output, self.run(sys.executable, "-m", *words), place)
        elif words[:2] == ["python", "manage.py"]:
            self.migrate()
            if words[2] in STAYS and "--burst" not in words:
                self.start(words[2:])
                return
            deadline = time.monotonic() + (PATIENCE if self.processes.names else 0)
            while not matches(output, said := self.run(*self.manage(*words[2:]))) and time.monotonic() < deadline:
                assert self.processes.poll() == [], self.log()
            self.see(output, said, place)
        else:
            raise Untested(f"{place}: {command}")

    def start(self, arguments: list[str]) -> None:
        """Start a command that stays, and wait until it is there: one that is ended before has nothing to say."""
        name = f"{len(self.processes.names)}-{arguments[0]}"
        self.processes.start(name, self.manage(*arguments))
        deadline = time.monotonic() + PATIENCE
        while "started with PID" not in (self.processes.logs / f"{name}.log").read_text():
            assert self.processes.poll() == [], self.log()
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.05)

    def see(self, wanted: str, said: str, place: str) -> None:
        assert matches(wanted, said), f"{place} shows:\n{wanted}\nbut it said:\n{said}\n{self.log()}"

    def log(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.processes.logs.iterdir()))

    # --- Seeing that it is right --------------------------------------------------------------------------------------

    def end_processes(self) -> None:
        """End what the page started, as the reader would: all of it is still there, and ends when it is told to."""
        names = self.processes.names
        assert self.processes.poll() == [], self.log()
        self.processes.stop(grace=30)
        said = self.log()
        assert "Traceback" not in said, said
        assert len(re.findall(r"Scheduler stopped|Worker \w+ stopped", said)) == len(names), said

    def prove(self, proof: Path | None) -> None:
        """Run the tests on the page, and ours of what it claims; together they reach every line of its code."""
        self.make_migrations()
        (self.folder / "test_checks.py").write_text(CHECKS)
        if proof:
            (self.folder / "test_proof.py").write_text(proof.read_text())
        options = ["-q", "-W", "error::RuntimeWarning", "-p", "no:cacheprovider"]
        if not (self.folder / "pyproject.toml").exists():
            options.append("--ds=shop.settings")
        self.run(sys.executable, "-m", "coverage", "run", "--source=.", "-m", "pytest", *options)
        reached = Coverage(str(self.folder / ".coverage"))
        reached.load()
        report = StringIO()
        files = [str(path) for path in self.files if path.suffix == ".py"]
        assert reached.report(include=files, show_missing=True, file=report) == 100, report.getvalue()

    def manage(self, *arguments: str) -> list[str]:
        return [sys.executable, str(self.folder / "manage.py"), *arguments]

    def run(self, *command: str) -> str:
        """Run a command to its end and return what it said; fail with that if it fails."""
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=2 * PATIENCE,
        )
        assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}"
        return done.stdout


def matches(wanted: str, said: str) -> bool:
    """Whether that was said, `...` standing for anything. Nothing is wanted where nothing is shown."""
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    return not wanted.strip() or doctest.OutputChecker().check_output(wanted, said, options)
