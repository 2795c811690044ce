"""The truth about writes: a trigger appends every one to a table, with who wrote and who held the lease just then."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from django.db import connection

USER = "user"
"""How whoever is no worker's child calls itself."""

# The claim is seen as the writing transaction sees it: with_lock has renewed it there.
TRIGGER = """
CREATE TABLE soak_audit (
    id bigserial PRIMARY KEY, at timestamptz NOT NULL DEFAULT clock_timestamp(), backend int NOT NULL,
    name text NOT NULL, old text NOT NULL, new text NOT NULL, writer text NOT NULL, holder text NOT NULL
);
CREATE FUNCTION soak_audit() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    held_by text := (SELECT holder FROM selfheal_claim
                     WHERE lease_key = 'databases.database:' || NEW.id AND lease_expires_at > clock_timestamp());
    before text := '';
BEGIN
    IF TG_OP = 'UPDATE' THEN before := OLD.state; END IF;
    INSERT INTO soak_audit (backend, name, old, new, writer, holder) VALUES
        (pg_backend_pid(), NEW.name, before, NEW.state, current_setting('application_name'),
         coalesce(substring(held_by from '[0-9]+$'), ''));
    RETURN NEW;
END $$;
CREATE TRIGGER soak_audit AFTER INSERT OR UPDATE ON databases_database FOR EACH ROW EXECUTE FUNCTION soak_audit();
"""

# Each of them once in the life of a row, in this order, and the second half of them by a job.
ONCE = {
    ("", "pending"): "asked for",
    ("pending", "ready"): "made",
    ("pending", "deleting"): "given up",
    ("ready", "deleting"): "given up",
    ("deleting", "deleted"): "deleted",
}
BY_A_JOB = {"made", "deleted"}


class Write(NamedTuple):
    """One write of a row: from which state to which, by which process, and whose lease was alive on the row."""

    name: str
    old: str
    new: str
    writer: str
    holder: str = ""
    at: object = ""

    def __str__(self) -> str:
        return f"{self.name}: {self.old or 'nothing'} to {self.new}, by {self.writer} at {self.at}"


def install() -> None:
    with connection.cursor() as cursor:
        cursor.execute(TRIGGER)


def writes() -> list[Write]:
    """Return all that was committed, in its order."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT name, old, new, writer, holder, at FROM soak_audit ORDER BY id")
        return [Write(*row) for row in cursor.fetchall()]


def bad(writes: Iterable[Write]) -> Iterator[str]:
    """Yield a sentence for each write that nobody may make: twice, over a user's change, or after a lost lease."""
    seen: Counter[tuple[str, str]] = Counter()
    for write in writes:
        step = ONCE.get((write.old, write.new))
        if step is None:
            yield f"{write}, which no step leads to"
            continue
        seen[write.name, step] += 1
        if seen[write.name, step] > 1:
            yield f"{write}, for the second time"
        if step in BY_A_JOB and write.writer != write.holder:
            yield f"{write}, while {write.holder or 'nobody'} held the lease"
