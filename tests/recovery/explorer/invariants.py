"""What must hold, seen from outside: after each commit, after each write to Redis, and when all is at rest."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

from jobs import clock, enqueue, queues
from jobs.claims import SEEN_DEATHS
from jobs.conf import conf
from jobs.jobs import selfheal_prune
from tests.recovery.explorer.cast import LIMIT, MOVES, READY, REPORTS, SLOW, TIME_LIMIT
from tests.recovery.explorer.world import EPOCH, Actor, Process, Violation, World

TASK = "cast.task"


class Task(NamedTuple):
    pk: int
    state: str
    behaviour: str

    @property
    def is_hopeless(self) -> bool:
        return "hopeless" in self.behaviour


class Claim(NamedTuple):
    job: str
    model: str
    pk: str
    lease_key: str | None
    token: str
    lease_expires_at: datetime | None
    next_attempt_at: datetime | None
    quarantined_at: datetime | None

    def is_live(self, now: datetime) -> bool:
        return self.lease_key is not None and self.lease_expires_at is not None and self.lease_expires_at > now

    def is_of_quarantined(self, tasks: dict[int, Task]) -> bool:
        """Whether it keeps a row in quarantine, and the row is there."""
        return self.quarantined_at is not None and self.model == TASK and int(self.pk) in tasks


class Seen(NamedTuple):
    tasks: dict[int, Task]
    claims: list[Claim]


class Invariants:
    def __init__(self, world: World) -> None:
        self.world = world
        self.seen = Seen({}, [])
        self.at_work_on: dict[str, list[Process]] = defaultdict(list)
        self.reports: set[int] = set()
        self.commits = 0

    # --- After each commit --------------------------------------------------------------------------------------------

    def after_commit(self, actor: Actor) -> None:
        """Compare what is committed now with what was before: all of it was this actor's doing."""
        self.commits += 1
        before, self.seen = self.seen, self._look()
        for problem in self._problems(actor, before, self.seen):
            self.world.fail(f"{actor}: {problem}")

    def _problems(self, actor: Actor, before: Seen, after: Seen) -> Iterator[str]:
        if before.tasks != after.tasks:
            yield from self._of_rows(actor, before, after)
        if before.claims != after.claims:
            yield from self._of_claims(actor, before, after)

    def _of_rows(self, actor: Actor, before: Seen, after: Seen) -> Iterator[str]:
        process = actor.process
        if process.kind in ("request", "operator"):
            return
        if before.tasks.keys() != after.tasks.keys():
            yield f"rows appeared or were lost: {before.tasks.keys() ^ after.tasks.keys()}"
        for pk, now in after.tasks.items():
            was = before.tasks.get(pk, now)
            if was.state == now.state:
                continue
            attempt = process.attempt
            if attempt is None or attempt.model != TASK or attempt.pk != str(pk):
                yield f"it is no attempt at task {pk}, and changed it from {was.state} to {now.state}"
            elif (was.state, now.state) != MOVES[attempt.declared.name]:
                yield f"{attempt.work} overwrote {was.state!r}, which a user has set, with {now.state!r}"
            elif attempt.token not in {claim.token for claim in after.claims}:
                yield f"{attempt.work} wrote to its row without its claim"

    def _of_claims(self, actor: Actor, before: Seen, after: Seen) -> Iterator[str]:
        now = self.world.latest_now
        tokens = {claim.token for claim in after.claims}
        for claim in before.claims:
            if claim.is_live(now) and claim.token not in tokens and not self._may_end(actor, claim.token):
                yield f"it ended the live lease of somebody else on {claim.model} {claim.pk}, for {claim.job}"
        held: dict[tuple[str, str], str] = {}
        for claim in after.claims:
            if claim.is_live(now):
                row = (claim.model, claim.pk)
                if row in held:
                    yield f"two live leases on {row}, for {held[row]} and {claim.job}"
                held[row] = claim.job
        known = {(claim.job, claim.model, claim.pk): claim for claim in before.claims}
        for claim in after.claims:
            was = known.get((claim.job, claim.model, claim.pk))
            if was is None or not claim.token or claim.token == was.token:
                continue
            if was.next_attempt_at is not None and was.next_attempt_at > now:
                yield f"{claim.job} of {claim.pk} was taken while it was backing off, until {was.next_attempt_at}"
            if was.quarantined_at is not None:
                yield f"{claim.job} of {claim.pk} was taken while it was quarantined"
        left = {(claim.job, claim.model, claim.pk) for claim in after.claims}
        for claim in before.claims:
            # No world lasts for the day after which a row that does not match is forgiven.
            if claim.is_of_quarantined(after.tasks) and (claim.job, claim.model, claim.pk) not in left:
                yield f"the quarantine of {claim.job} of {claim.pk} was forgotten"

    @staticmethod
    def _may_end(actor: Actor, token: str) -> bool:
        """Its own attempt may end a lease, and the process that writes down how the one before it died."""
        process = actor.process
        attempt = process.attempt or (process.dead_sibling and process.dead_sibling.attempt)
        return attempt is not None and bool(attempt.token == token)

    # --- While a job is at work ---------------------------------------------------------------------------------------

    @contextmanager
    def at_work(self, actor: Actor, what: str) -> Iterator[None]:
        """Two at once are an error, unless one of them stood still for too long, or the clock jumped under it."""
        process = actor.process
        others = [each for each in self.at_work_on[what] if each.is_alive and not each.is_excused]
        if others and not process.is_excused:
            self.world.fail(f"{process} and {others} are at work on {what} at once")
        for each in self.at_work_on[what]:
            if each.thaws_when_overtaken:
                each.thaw()
        self.at_work_on[what].append(process)
        try:
            yield
        finally:
            self.at_work_on[what].remove(process)

    # --- In Redis -----------------------------------------------------------------------------------------------------

    def after_push(self, actor: Actor) -> None:
        """The queue is about within its limit: each of those who push at the same moment may fill it once."""
        with self.world.seams.redis.pipeline(transaction=False) as pipeline:
            pipeline.lrange("rq:queue:default", 0, -1)
            pipeline.zrange("rq:scheduler:scheduled_jobs", 0, -1)
            counts = Counter(id.partition(b"-")[0].decode() for part in pipeline.execute() for id in part)
        for job in MOVES:
            if counts[job] > 3 * LIMIT + self.world.doubled:
                self.world.fail(f"{counts[job]} messages of {job} are queued, and its limit is {LIMIT}")

    # --- At rest ------------------------------------------------------------------------------------------------------

    def at_rest(self) -> bool:
        if next(self._unrest(), None) is not None:
            return False
        # What SQLite inserts and returns is there only when all of it has been fetched, after the last look.
        self.seen = self._look()
        return next(self._unrest(), None) is None

    def work_left(self) -> float:
        """How many seconds one worker would take for the rows that are not ready, whatever they do to it."""
        unfinished = [task.behaviour for task in self.seen.tasks.values() if task.state not in READY]
        return sum(min(SLOW.get(each, 0.5), TIME_LIMIT) for behaviour in unfinished for each in behaviour.split(","))

    def unrest(self) -> list[str]:
        """What is not yet as it has to be in the end."""
        return list(self._unrest())

    def _unrest(self) -> Iterator[str]:
        tasks, claims = self.seen
        for task in tasks.values():
            if task.state not in READY and not task.is_hopeless:
                yield f"task {task.pk} is {task.state}"
        for claim in claims:
            if claim.job in self.world.roster.versions["today"] and not self._is_needed(claim):
                yield f"a claim is left: {claim}"
        for process in self.world.processes:
            if process.kind == "request":
                yield f"{process} has not ended"
        with self.world.seams.outside() as cursor:
            cursor.execute("SELECT name, next_run_at, due_runs - settled_runs FROM selfheal_schedule")
            for name, next_run_at, owed in cursor.fetchall():
                moment = _moment(next_run_at)
                if owed or (moment is not None and moment <= self.world.now):
                    yield f"a run of {name} is due or owed"

    def _is_needed(self, claim: Claim) -> bool:
        """Whether a claim may be left at rest: that of a row which cannot succeed, or could not and was mended."""
        if claim.is_of_quarantined(self.seen.tasks):
            return True
        task = self.seen.tasks.get(int(claim.pk)) if claim.model == TASK else None
        return task is not None and task.is_hopeless and task.state not in READY

    def at_the_end(self) -> None:
        """Raise for what was lost on the way, and for what would stay for ever."""
        world = self.world
        given_up = self._given_up()
        for minute in REPORTS:
            due = EPOCH + timedelta(minutes=(minute - EPOCH.minute) % 60)
            # After a clock that jumped nobody can say what was due when.
            if due <= world.now and not world.jumps and minute not in self.reports | given_up:
                self.fail(f"the report that was due at {due} was never made")
        # Claims of jobs that were renamed or removed have no sweep that would settle them.
        with clock.fixed(world.now + conf.KEEP_RUNS + timedelta(days=1)):
            selfheal_prune()
        if left := [claim for claim in self._look().claims if not self._is_needed(claim)]:
            self.fail(f"claims would stay for ever: {left}")
        redis = world.seams.redis
        # A clock that jumped may have said of a call that it comes due in a while.
        with clock.fixed(world.now + timedelta(days=1)):
            enqueue.find_lost_calls(redis)
        places = {*redis.lrange("rq:queue:urgent", 0, -1), *redis.zrange(queues.DELAYED_KEY, 0, -1)}
        for call in redis.zrange(queues.CALLS_KEY, 0, -1):
            if call not in places:
                self.fail(f"{call.decode()} has not ended, and nobody will run it")
        for key in redis.keys("*"):
            name = key.decode()
            if name.startswith(("rq:job:", "selfheal:unique:", "selfheal:ticked")):
                if redis.ttl(key) < 0:
                    self.fail(f"{name} stays in Redis for ever")
            elif not name.startswith(("rq:queue:", "rq:queues", queues.DELAYED_KEY, queues.CALLS_KEY)):
                self.fail(f"{name} is in Redis, and nobody knows why")

    def _given_up(self) -> set[int]:
        """Return the reports whose process died too often for another attempt before they are due again."""
        with self.world.seams.outside() as cursor:
            cursor.execute(
                "SELECT job, COUNT(*) FROM selfheal_run WHERE outcome = 'crashed' AND job LIKE 'report%' GROUP BY job"
            )
            return {int(job.removeprefix("report_")) for job, died in cursor.fetchall() if died >= SEEN_DEATHS}

    def fail(self, what: str) -> None:
        raise Violation(what)

    # --- Looking ------------------------------------------------------------------------------------------------------

    def _look(self) -> Seen:
        with self.world.seams.outside() as cursor:
            cursor.execute("SELECT id, state, behaviour FROM cast_task ORDER BY id")
            tasks = {row[0]: Task(*row) for row in cursor.fetchall()}
            cursor.execute(
                "SELECT job, model, object_pk, lease_key, token, lease_expires_at, next_attempt_at, quarantined_at "
                "FROM selfheal_claim ORDER BY id"
            )
            claims = [Claim(*row[:5], *map(_moment, row[5:])) for row in cursor.fetchall()]
        return Seen(tasks, claims)


def _moment(value: Any) -> datetime | None:
    """SQLite knows no time zones."""
    moment = datetime.fromisoformat(value) if isinstance(value, str) else value
    return moment.replace(tzinfo=UTC) if moment is not None and moment.tzinfo is None else moment
