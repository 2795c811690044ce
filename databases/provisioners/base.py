"""What an engine has to do."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

NAME_PATTERN = r"^[a-z][a-z0-9_]{0,62}\Z"
"""Names of databases: safe as a file's name and, being at most 63 characters long, as PostgreSQL's."""


class ProvisioningError(Exception):
    """The engine could not do it; the message says why and what to do. Trying again is always safe."""


class InUse(ProvisioningError):
    """A database is not copied because somebody is connected to it; the message says who."""


class Refused(Exception):
    """The engine will never do it: the message, in the server's words where it said any, is for whoever asked."""


@dataclass(frozen=True)
class Provisioned:
    """A database that is ready: where it is, and how many bytes it takes."""

    path: str
    size: int
    ended: str = ""
    """Whose sessions were ended for it."""


Contents = dict[str, list[Any]]
"""What is in a database: of each table, by its name, the number of its rows and a checksum of them, in any order."""


def count_and_sum(rows: Iterable[bytes]) -> list[Any]:
    """Return how many rows there are and a checksum of them, which is the same in any order."""
    count = total = 0
    for row in rows:
        count += 1
        total += int.from_bytes(hashlib.blake2b(row, digest_size=16).digest(), "big")
    return [count, f"{total % 2**128:032x}"]


class Provisioner(Protocol):
    """An engine. Every method may be killed at any point, and run again later, here or on another machine.

    Each raises ProvisioningError when it could not do it, and leaves nothing behind that the next attempt, or `delete`,
    does not find. A password is that of the role that owns the database, where the engine has roles.
    """

    def create(self, name: str, password: str = "") -> Provisioned:
        """Make the database, or finish one that is half made, and check that it works.

        One that is there already and works is left as it is, with all that is in it.
        """

    def copy(self, source: str, name: str, password: str = "", end_sessions: bool = False) -> Provisioned:
        """Make the database as a copy of another; one that is there already and whole is left as it is.

        Raises InUse where the engine cannot copy one that is in use, unless `end_sessions` ends the sessions of those
        who use it. Raises Refused when there is no such source.
        """

    def delete(self, name: str) -> None:
        """Remove the database and all that a killed method left of it; fine when nothing is there."""

    def deploy(self, name: str, password: str, marker: str, sql: str, timeout: timedelta) -> str:
        """Make a change of the schema unless its marker is there, in one transaction with the marker.

        Returns a digest of the schema right after the change, the same one each time. Raises Refused, and has changed
        nothing, for a change that fails, takes longer than `timeout`, or cannot be made in a transaction.
        """

    def schema(self, name: str) -> str:
        """Return a digest of the schema as it is now."""

    def dump(self, name: str, to: Path) -> Contents:
        """Write all of the database, as of one moment, into a file that is not there yet or half written.

        Returns what was in it at that moment.
        """

    def load(self, name: str, dump: Path, password: str = "") -> Contents:
        """Make the database out of such a file, replacing what a killed `load` left of it, and return what is in it.

        Raises Refused for a file that is no whole dump.
        """

    def try_load(self, dump: Path, scratch: str) -> Contents:
        """Load such a file where nobody sees it, under the name `scratch`, return what was in it, and remove it again.

        Nor does a killed one stay longer than until the next attempt, or until `discard`.
        """

    def discard(self, scratch: str) -> None:
        """Remove what a killed `try_load` left; fine when nothing is there."""
