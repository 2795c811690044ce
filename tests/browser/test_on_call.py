"""A night on call, in a real browser, with real workers behind it: from the banner to the cause, and back to green."""

import re
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from django.db import transaction
from django.utils import timezone
from playwright.sync_api import Locator, Page, expect

from jobs.models import Claim, Schedule
from tests.cast.models import Task

GLANCE = "/admin/selfheal/health/"
PATIENCE = 60


def refresh_until(page: Page, place: Locator, text: str) -> None:
    """Look at a page that refreshes itself until it says so. What happened is counted meanwhile, as by the minute."""
    deadline = time.monotonic() + PATIENCE
    while text not in place.inner_text():
        assert time.monotonic() < deadline, place.inner_text()
        Schedule.objects.filter(pk="selfheal_tally").owe()
        page.clock.run_for(5500)
        page.wait_for_timeout(500)


def one_that_backs_off_for_an_hour() -> Task:
    now = timezone.now()
    with transaction.atomic():
        task = Task.objects.create(behaviour="always_raise")
        identity = {"job": "do_task", "model": "cast.task", "object_pk": str(task.pk), "first_claimed_at": now}
        Claim.objects.create(**identity, attempts=9, next_attempt_at=now + timedelta(hours=1), last_error="It is down.")
    return task


@pytest.mark.any_database
@pytest.mark.timeout(300)
def test_a_provider_fails_and_comes_back(stack: Any, visit: Callable[..., Page], barriers: Callable[[Page], list[str]]):
    stack.scheduler()
    stack.worker()
    stack.wait_until_up("scheduler", "worker")
    page = visit(GLANCE)
    refresh_until(page, page.locator("#banner"), "All is well.")

    # The provider fails.
    waiting = [Task.objects.create(behaviour="always_raise") for _ in range(2)]
    waiting.append(one_that_backs_off_for_an_hour())
    problem = page.locator("#health").get_by_text(re.compile("attempts of do_task failed"))
    refresh_until(page, page.locator("#health"), "attempts of do_task failed")
    expect(problem.first).to_be_visible()

    # What is it? One error, with its runs.
    page.get_by_role("link", name="Show its failures").first.click()
    expect(page.locator(".figures tbody tr")).to_have_count(1)
    page.get_by_role("link", name=re.compile("RuntimeError: task .* cannot succeed")).click()
    expect(page.locator("#result_list tbody tr").first).to_contain_text("failed")
    page.locator("#result_list tbody tr a").first.click()
    expect(page.locator("#content")).to_contain_text("Traceback")

    # Nobody should call it meanwhile.
    page.goto(page.url.split("/admin/")[0] + GLANCE)
    page.get_by_role("link", name="do_task", exact=True).click()
    page.get_by_role("button", name="Pause").click()
    page.get_by_label("Reason").fill("The provider is down.")
    page.get_by_label("30 minutes").check()
    assert barriers(page) == []
    page.get_by_role("button", name="Pause").click()
    expect(page.locator(".messagelist")).to_contain_text(re.compile("o_task is paused by admin"))

    # Why does my row wait?
    claims = page.url.split("/admin/")[0] + "/admin/selfheal/claim/?job=do_task"
    page.goto(claims)
    page.locator("#result_list tbody tr a").first.click()
    expect(page.locator(".selfheal-verdict")).to_contain_text(re.compile("o_task is paused by admin"))
    expect(page.locator(".selfheal-verdict")).to_contain_text("The provider is down.")
    assert barriers(page) == []

    # It is back, and so are the customers.
    Task.objects.filter(pk__in=[task.pk for task in waiting]).update(behaviour="succeed")
    Task.objects.bulk_create([Task() for _ in range(60)])
    page.get_by_role("button", name="Resume").click()
    expect(page.locator(".messagelist")).to_contain_text(re.compile("o_task is resumed"))
    # One of them would have waited for an hour.
    page.goto(claims + "&state=waiting")
    page.locator("#action-toggle").check()
    page.locator("select[name=action]").select_option("queue_now")
    page.get_by_role("button", name="Run").or_(page.get_by_role("button", name="Go")).click()
    expect(page.locator(".messagelist")).to_contain_text("may be attempted again now")
    stack.wait_until_done(*Task.objects.all())
    page.goto(page.url.split("/admin/")[0] + GLANCE)
    refresh_until(page, page.locator("#banner"), "All is well.")
