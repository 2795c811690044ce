"""Claims of jobs, models and apps that were renamed or removed: seen, not alarmed about for ever, and got rid of."""

from datetime import timedelta
from io import StringIO
from typing import Any

import pytest
from django.core.management import CommandError, call_command
from django.utils import timezone

from jobs import health, job, sweep
from jobs.jobs import selfheal_prune
from jobs.models import Claim, Run, Schedule

pytestmark = pytest.mark.django_db(transaction=True)

LONG_AGO = timedelta(days=15)
# Of a model that was renamed, of a job that was, of a job that has lost its cron, and of one that has got a sweep.
LEFT_BEHIND = [
    ("do_task", "oldcast.chore"),
    ("do_chore", "cast.task"),
    ("touch_file", "selfheal.schedule"),
    ("do_task", "selfheal.schedule"),
]
of_each_kind = pytest.mark.parametrize(("job_name", "model"), LEFT_BEHIND)


def claim(job: str = "do_task", model: str = "oldcast.chore", pk: int = 1, **values: Any) -> Claim:
    first = {"first_claimed_at": timezone.now()}
    return Claim.objects.create(job=job, model=model, object_pk=str(pk), **{**first, **values})


def quarantined(job: str = "do_task", model: str = "oldcast.chore", pk: int = 1) -> Claim:
    return claim(job, model, pk, quarantined_at=timezone.now(), last_error="Killed by SIGKILL")


def command(*arguments: str) -> str:
    out = StringIO()
    call_command("jobs", *arguments, stdout=out, no_color=True)
    return out.getvalue()


@of_each_kind
def test_it_is_said_to_be_there_and_is_no_reason_for_alarm(at_work, job_name, model):
    quarantined(job_name, model)
    found = health.read()
    assert [(each.severity, each.code) for each in found.problems] == [("notice", "left_behind")]
    assert found.problems[0].what == "1 claim is of a job that is gone, or works on rows of another model now."
    assert (found.is_well, found.left_behind) == (True, 1)
    assert {item.quarantined for item in found.items} == {0}


def test_what_a_job_works_on_is_not_among_them(at_work):
    claim("do_task", "cast.task")
    claim("nightly", "selfheal.schedule")
    claim("schedule_tasks", "selfheal.schedule")
    assert not Claim.objects.left_behind().exists()
    assert health.read().left_behind == 0


def test_one_whose_sweep_cannot_tell_keeps_its_claims(declaring):
    @job
    def broken(task):
        pass

    @sweep(broken, cron="0 0 1 1 *")
    def schedule_broken():
        raise RuntimeError("no table yet")

    claim("broken", "cast.task", first_claimed_at=timezone.now() - LONG_AGO)
    selfheal_prune()
    assert Claim.objects.count() == 1


@of_each_kind
def test_the_admin_finds_and_explains_them(admin_client, job_name, model):
    left, needed = quarantined(job_name, model), claim("do_task", "cast.task")
    page = admin_client.get("/admin/selfheal/claim/", {"state": "left_behind"})
    assert list(page.context["cl"].result_list) == [left]
    assert "no job works it off any more" in page.content.decode()
    assert needed.is_left_behind is False
    page = admin_client.get(f"/admin/selfheal/claim/{left.pk}/change/").content.decode()
    assert "Release from quarantine" not in page


@pytest.mark.parametrize("action", ["release", "queue_now"])
def test_an_operator_removes_them_and_queues_no_row_that_only_has_the_same_key(admin_client, queued, task, action):
    left = [(quarantined if action == "release" else claim)(pk=task.pk, job=name) for name in ("do_task", "do_chore")]
    page = admin_client.post(
        "/admin/selfheal/claim/",
        {"action": action, "_selected_action": [each.pk for each in left]},
        follow=True,
    )
    assert "2 claims are removed: no job works them off any more." in page.content.decode()
    assert not Claim.objects.exists()
    assert queued() == []


def test_so_does_the_command():
    quarantined("do_task")
    quarantined("do_chore", "cast.task")
    assert command("retry", "do_task", "--quarantined") == (
        "0 of 1 that were quarantined may be attempted again now. 1 that no job works off any more are removed.\n"
    )
    assert "removed" in command("retry", "do_chore", "--quarantined")
    assert not Claim.objects.exists()
    with pytest.raises(CommandError, match="do_chore"):
        command("retry", "do_chore", "--quarantined")


@of_each_kind
def test_they_are_pruned_in_the_end(job_name, model):
    old = timezone.now() - LONG_AGO
    claim(job_name, model, first_claimed_at=old, quarantined_at=old)
    kept = {claim("do_task", "cast.task", first_claimed_at=old), claim(job_name, model, pk=2)}
    selfheal_prune()
    assert set(Claim.objects.all()) == kept
    assert not Run.objects.exists()
    assert Schedule.objects.exists()
