"""What an engine has to do."""

from dataclasses import dataclass
from typing import Protocol

NAME_PATTERN = r"^[a-z][a-z0-9_]{0,62}\Z"
"""Names of databases: safe as a file's name and, being at most 63 characters long, as PostgreSQL's."""


class ProvisioningError(Exception):
    """The engine could not do it; the message says why and what to do. Trying again is always safe."""


@dataclass(frozen=True)
class Provisioned:
    """A database that is ready: where it is, and how many bytes it takes."""

    path: str
    size: int


class Provisioner(Protocol):
    """An engine. Both methods may be killed at any point, and run again later, here or on another machine."""

    def create(self, name: str) -> Provisioned:
        """Make the database, or finish one that is half made, and check that it works.

        One that is there already and works is left as it is, with all that is in it.
        """

    def delete(self, name: str) -> None:
        """Remove the database and all that a killed `create` left of it; fine when nothing is there."""
