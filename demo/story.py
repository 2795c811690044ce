"""What a user does with a database once it is there: branch it, deploy a change, back it up, restore the backup."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from backups.models import Backup
from databases.models import Database, DeployRequest
from demo import rows

if TYPE_CHECKING:
    from demo.user import User

ROWS = 500
CHANGE = f"""
CREATE TABLE IF NOT EXISTS orders (item text NOT NULL);
INSERT INTO orders
  WITH RECURSIVE numbers (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < {ROWS})
  SELECT 'item ' || n FROM numbers;
"""
"""Made twice, it leaves twice as many rows, and no error that would hide it."""

STEPS = ("created", "branched", "deployed", "backed up", "restored", "the same rows")
Wait = Callable[[], bool]


class Failed(Exception):
    """Something that should have become ready says that it never will."""


@dataclass
class Story:
    """One database of an engine, and how far its user has come with it. `play()` it until `is_over`."""

    name: str
    engine: str
    user: User
    done: list[str] = field(default_factory=list)
    failure: str = ""
    restored: str = ""

    def __post_init__(self) -> None:
        self._waits = self._told()
        self._wait: Wait = lambda: True

    @property
    def is_over(self) -> bool:
        return bool(self.failure) or "restored" in self.done

    @property
    def why_untold(self) -> str:
        missing = [step for step in STEPS if step not in self.done]
        return self.failure or (f"it was not {missing[0]}" if missing else "")

    def play(self) -> None:
        """Take the next step if what it needs is there."""
        try:
            while not self.is_over and self._wait():
                self._wait = next(self._waits, lambda: True)
        except Failed as error:
            self.failure = str(error)

    def compare(self) -> None:
        """See that what was restored is what is in the source, and that the change was made once."""
        if "restored" not in self.done:
            return
        source, restored = rows.read(self.name, self.engine), rows.read(self.restored, self.engine)
        if source != restored:
            self.failure = f"{self.restored} holds {restored}, and {self.name} {source}"
        elif (orders := source.get("orders", (0, ""))[0]) != ROWS:
            self.failure = f"its change was made {orders / ROWS:g} times"
        else:
            self.done.append("the same rows")

    def _told(self) -> Generator[Wait, None, None]:
        branch, self.restored = f"{self.name}_dev", f"{self.name}_again"
        self.user.create(self.name, self.engine)
        yield self._until(Database, name=self.name)
        self.done.append("created")
        self.user.branch(self.name, branch)
        yield self._until(Database, name=branch)
        self.done.append("branched")
        self.user.deploy(branch, self.name, CHANGE)
        yield self._until(DeployRequest, target__name=self.name)
        self.done.append("deployed")
        self.user.back_up(self.name)
        yield self._until(Backup, database__name=self.name)
        self.done.append("backed up")
        self.user.restore(self.name, self.restored)
        yield self._until(Database, name=self.restored)
        self.done.append("restored")

    def _until(self, model: type[Database] | type[DeployRequest] | type[Backup], **which: str) -> Wait:
        def is_there() -> bool:
            # None: the request is still on its way.
            found = model.objects.filter(**which).first()
            if found and found.state in {"failed", "damaged"}:
                raise Failed(f"{found} is {found.state}: {found.error}")
            return bool(found and found.state in {"ready", "deployed"})

        return is_there
