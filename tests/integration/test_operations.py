"""What an operator does to many claims: all that match a filter, a batch at a time, and nobody else's."""

import re
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from django.db import connection
from django.db.models import F
from django.utils import timezone

from jobs import claims, operations, registry
from jobs.claims import Attempt
from jobs.jobs import selfheal_operate, selfheal_operations
from jobs.models import Claim, Operation, Run
from jobs.testing import drain, perform
from tests.cast.jobs import do_task, schedule_tasks
from tests.cast.models import Task

pytestmark = pytest.mark.django_db(transaction=True)

AN_HOUR = timedelta(hours=1)


def claim(pk: Any, job: str = "do_task", **values: Any) -> Claim:
    identity = {"job": job, "model": "cast.task", "object_pk": str(pk)}
    return Claim.objects.create(**identity, first_claimed_at=timezone.now(), **values)


def leased(pk: Any, until: timedelta = AN_HOUR) -> Claim:
    return claim(
        pk,
        lease_key=f"cast.task:{pk}",
        token=f"{pk}",
        leased_at=timezone.now(),
        lease_expires_at=timezone.now() + until,
        holder="w1@here:7",
    )


def waiting(pk: Any, **values: Any) -> Claim:
    return claim(pk, next_attempt_at=timezone.now() + AN_HOUR, attempts=2, last_error="No space left", **values)


def aside(pk: Any) -> Claim:
    return claim(pk, quarantined_at=timezone.now(), attempts=5, crashes=3, deaths=3, last_error="Killed by SIGKILL")


# What each action does to a claim in each state: the pks of those that it changes.
@pytest.mark.parametrize(("action", "changed"), [("queue_now", [2, 3, 5]), ("release", [4]), ("quarantine", [2, 3, 5])])
def test_each_action_changes_what_it_is_for(action, changed):
    leased(1)
    waiting(2)
    claim(3)
    aside(4)
    # Its process is gone: nobody works on it.
    leased(5, until=-AN_HOUR)
    before = {each.object_pk: each for each in Claim.objects.all()}
    assert [int(each.object_pk) for each in operations.apply(action, Claim.objects.all())] == changed
    for each in Claim.objects.all():
        was = before[each.object_pk]
        if int(each.object_pk) not in changed:
            same = ("lease_key", "next_attempt_at", "quarantined_at", "attempts")
            assert [getattr(each, name) for name in same] == [getattr(was, name) for name in same]
        elif action == "quarantine":
            assert each.quarantined_at
            assert each.attempts == was.attempts
        else:
            assert (each.quarantined_at, each.next_attempt_at) == (None, None)
            assert each.attempts == (0 if action == "release" else was.attempts)
    # Of the process that is gone it is written down that it died.
    outcomes = list(Run.objects.values_list("object_pk", "outcome"))
    assert outcomes == ([("5", "crashed")] if 5 in changed else [])


def test_a_run_of_a_schedule_is_never_set_aside():
    """Its schedule would never run again."""
    Claim.objects.create(
        job="nightly", model="selfheal.schedule", object_pk="nightly", first_claimed_at=timezone.now(), attempts=1
    )
    assert operations.apply("quarantine", Claim.objects.all()) == []
    assert len(operations.apply("queue_now", Claim.objects.all())) == 1


@pytest.mark.parametrize(
    ("criteria", "found"),
    [
        ({}, [1, 2, 3, 4, 5]),
        ({"job": "delete_task"}, [5]),
        ({"state": "leased"}, [1]),
        ({"state": "waiting"}, [2, 5]),
        ({"state": "due"}, [4]),
        ({"state": "quarantined"}, [3]),
        ({"search": "space NO"}, [2, 5]),
        ({"search": "w1@here"}, [1]),
        ({"job": "do_task", "state": "waiting", "search": "space"}, [2]),
        ({"search": "nowhere"}, []),
    ],
    ids=str,
)
def test_a_filter_means_the_same_whoever_asks(admin_client, criteria, found):
    """The page of claims, with its filters and its search, and an operation."""
    leased(1)
    waiting(2)
    aside(3)
    claim(4)
    waiting(5, job="delete_task")
    assert [int(each.object_pk) for each in Claim.objects.matching(**criteria).order_by("pk")] == found
    query = {("q" if name == "search" else name): value for name, value in criteria.items()}
    page = admin_client.get("/admin/selfheal/claim/", query)
    assert [int(each.object_pk) for each in page.context["cl"].result_list] == found


@pytest.mark.parametrize(
    ("state", "said"),
    [("leased", "leased"), ("due", "may be attempted now"), ("waiting", "backing off"), ("quarantined", "quarantined")],
)
def test_the_list_says_of_each_claim_the_state_by_which_it_was_found(admin_client, state, said):
    leased(1)
    waiting(2)
    aside(3)
    claim(4)
    # What these waited for is over.
    leased(5, until=-AN_HOUR)
    claim(6, next_attempt_at=timezone.now() - AN_HOUR, attempts=2)
    page = admin_client.get("/admin/selfheal/claim/", {"state": state}).content.decode()
    assert re.findall(r'field-state">(.*?)<', page) == [said] * (3 if state == "due" else 1)


def test_an_unknown_state_finds_nothing_rather_than_everything():
    with pytest.raises(KeyError):
        Claim.objects.matching(state="rubbish")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "BATCH", 3)


def test_an_operation_is_worked_off_by_the_library_itself(small, queued):
    for pk in range(10):
        aside(pk)
    waiting(10)
    operation = operations.request("release", {"state": "quarantined"}, by="ada")
    assert (operation.total, operation.requested_by, operation.finished_at) == (10, "ada", None)
    assert queued("rq:queue:background") == [f"selfheal_operate-{operation.pk}"]
    assert drain()["done"] == 1
    operation.refresh_from_db()
    assert operation.finished_at
    assert operation.changed == 10
    assert not Claim.objects.quarantined().exists()
    assert Claim.objects.waiting().count() == 1
    assert not Operation.objects.unfinished().exists()


def test_claims_that_are_made_later_are_not_meant(small):
    for pk in range(4):
        waiting(pk)
    operation = operations.request("quarantine", {"job": "do_task"})
    later = waiting(4)
    operations_done(operation)
    later.refresh_from_db()
    assert later.quarantined_at is None
    assert (operation.total, operation.changed) == (4, 4)


def operations_done(operation: Operation) -> None:
    perform(selfheal_operate, operation)
    operation.refresh_from_db()
    assert operation.finished_at


def test_what_fails_half_way_goes_on_where_it_was_and_counts_each_claim_once(small, monkeypatch):
    for pk in range(10):
        waiting(pk)
    operation = operations.request("quarantine", {})
    apply, calls = operations.apply, []

    def fails_the_third_time(action: str, meant: Any) -> Any:
        calls.append([int(each.object_pk) for each in meant])
        changed = apply(action, meant)
        if len(calls) == 3:
            # After the claims were changed: that is taken back with what was noted of it.
            raise RuntimeError("killed")
        return changed

    monkeypatch.setattr(operations, "apply", fails_the_third_time)
    assert perform(selfheal_operate, operation) == "failed"
    operation.refresh_from_db()
    assert (operation.changed, Claim.objects.quarantined().count()) == (6, 6)
    Claim.objects.filter(job="selfheal_operate").update(next_attempt_at=None)
    operations_done(operation)
    assert operation.changed == 10
    assert calls == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [6, 7, 8], [9]]


def test_one_attempt_takes_no_longer_than_its_time_and_the_next_sweep_brings_the_rest(small, monkeypatch):
    for pk in range(5):
        waiting(pk)
    operation = operations.request("quarantine", {})
    monkeypatch.setattr(operations, "ATTEMPT_SECONDS", 0.0)
    assert perform(selfheal_operate, operation) == "done"
    operation.refresh_from_db()
    assert (operation.changed, operation.finished_at) == (3, None)
    monkeypatch.undo()
    assert selfheal_operations.sweep().matched == 1
    drain()
    operation.refresh_from_db()
    assert operation.changed == 5


def test_how_far_it_has_come_is_said_of_what_it_is_for_and_not_of_all_history(admin_client, small, monkeypatch):
    for pk in range(10):
        aside(pk)
    # Many claims have come and gone before these.
    Claim.objects.update(id=F("id") + 5_000_000)
    operation = operations.request("release", {"state": "quarantined"})

    def progress() -> str:
        page = admin_client.get("/admin/selfheal/operation/").content.decode()
        [shown] = re.findall(r'field-progress">(\d+)\N{NO-BREAK SPACE}%<', page)
        return shown

    assert progress() == "0"
    monkeypatch.setattr(operations, "ATTEMPT_SECONDS", 0.0)
    assert perform(selfheal_operate, operation) == "done"
    assert progress() == "30"
    monkeypatch.undo()
    perform(selfheal_operate, operation)
    assert progress() == "100"


def test_what_is_claimed_while_an_operation_comes_to_it_is_left_alone(small, race):
    """A worker takes the row; the operation sets it aside: one of them, and the row is never in both hands."""
    for _ in range(5):
        task = Task.objects.create()
        meant = Claim.objects.filter(pk=claim(task.pk).pk)
        attempt = Attempt(do_task, "cast.task", str(task.pk))
        taken, changed = race(
            lambda attempt=attempt: claims.take(attempt),
            lambda meant=meant: operations.apply("quarantine", meant),
        )
        assert isinstance(taken, Claim) != bool(changed)
        now = Claim.objects.get(object_pk=str(task.pk))
        assert bool(now.lease_key) != bool(now.quarantined_at)


def test_two_operators_at_once_do_not_block_each_other(race):
    """PostgreSQL ends one of two that wait for each other. In the order of their keys nobody does."""
    identity = {"job": "do_task", "model": "cast.task", "first_claimed_at": timezone.now()}
    Claim.objects.bulk_create([Claim(**identity, object_pk=str(pk)) for pk in range(3000)])
    forwards, backwards = Claim.objects.order_by("pk"), Claim.objects.order_by("-pk")
    for action in ("quarantine", "release"):
        changed = race(
            lambda action=action: operations.apply(action, forwards),
            lambda action=action: operations.apply(action, backwards),
        )
        assert sorted(map(len, changed)) == [0, 3000]


def test_a_row_without_a_claim_is_quarantined_too(task, queued):
    result = operations.apply_to_row("quarantine", do_task, str(task.pk), by="ada")
    assert result.changed
    assert perform(do_task, task) == "quarantined"
    do_task.enqueue(task)
    assert schedule_tasks.sweep().waiting == 1
    assert queued() == []
    assert Claim.objects.get().last_error == "Quarantined by ada."
    assert not operations.apply_to_row("quarantine", do_task, str(task.pk)).changed
    assert operations.apply_to_row("release", do_task, str(task.pk)).changed
    assert queued() == [f"do_task-{task.pk}"]
    assert perform(do_task, task) == "done"


def on_row(action: str) -> Callable[[Task], operations.Result]:
    return lambda task: operations.apply_to_row(action, do_task, str(task.pk))


def test_what_cannot_be_done_to_a_row_says_why(task, queued):
    claims.take(Attempt(do_task, "cast.task", str(task.pk)))
    for action in ("quarantine", "queue_now"):
        result = on_row(action)(task)
        assert not result.changed
        assert "being worked on" in result.sentence
    assert on_row("release")(task) == (False, "The row is not quarantined.")
    Claim.objects.all().delete()
    Task.objects.update(state="done")
    assert "needs nothing" in on_row("quarantine")(task).sentence
    assert not Claim.objects.exists()
    Task.objects.update(state="pending")
    aside(task.pk)
    assert "release it" in on_row("queue_now")(task).sentence
    assert queued() == []


def test_operations_that_ended_long_ago_are_pruned(settings):
    now = timezone.now()
    for finished_at in (None, now, now - timedelta(days=400)):
        Operation.objects.create(action="release", last_pk=1, requested_at=now, finished_at=finished_at)
    registry.get("selfheal_prune").function()
    assert sorted(Operation.objects.values_list("finished_at", flat=True), key=str) == [now, None]


def test_the_sweep_of_operations_reads_only_those_that_are_not_done():
    Operation.objects.bulk_create(
        Operation(action="release", last_pk=1, requested_at=timezone.now(), finished_at=timezone.now())
        for _ in range(2000)
    )
    if connection.vendor == "postgresql":
        with connection.cursor() as cursor:
            cursor.execute("ANALYZE selfheal_operation")
    assert "selfheal_operation_unfinished" in selfheal_operations.queryset().explain()
