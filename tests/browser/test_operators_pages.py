"""The operators' pages in a real browser: whether everybody can use them, and whether they keep themselves fresh."""

from collections.abc import Callable
from datetime import timedelta

import pytest
from django.contrib import admin
from django.contrib.sessions.models import Session
from django.utils import timezone
from playwright.sync_api import Page, expect

from jobs import pages, tallies
from jobs.fingerprint import fingerprint
from jobs.models import Claim, Operation, Run, Schedule
from tests.console import everything

pytestmark = [pytest.mark.any_database, pytest.mark.django_db(transaction=True)]

# By how much a table is wider than the room that it has.
WIDEST = """
    () => Math.max(...[...document.querySelectorAll(".figures")].map(
        (table) => table.offsetWidth - table.parentElement.clientWidth))
"""
WIDEST_LIST = WIDEST.replace(".figures", "#result_list")
GLANCE = "/admin/selfheal/health/"
FAILURES = "/admin/selfheal/failure/"


@pytest.fixture(autouse=True)
def _something_of_everything() -> None:
    """Nobody ticks, no worker is there, one job is paused, some rows are set aside, and a few attempts failed."""
    now = timezone.now()
    Schedule.objects.update(next_run_at=now - timedelta(hours=1), last_succeeded_at=now - timedelta(hours=1))
    for number in range(30):
        error = "OSError: no space left on device" if number % 3 else ""
        Run.objects.create(
            job="do_task",
            outcome="failed" if error else "done",
            error=error,
            fingerprint=fingerprint(error),
            started_at=now - timedelta(minutes=2 * number, seconds=number),
            finished_at=now - timedelta(minutes=2 * number),
        )
    tallies.count(None)
    aside(1)


def aside(number: int) -> None:
    now = timezone.now()
    identity = {"job": "do_task", "model": "cast.task", "object_pk": str(number)}
    Claim.objects.create(**identity, first_claimed_at=now, quarantined_at=now)


def some_time_passes(page: Page) -> None:
    """By the page's own clock."""
    page.clock.run_for(5500)


@pytest.mark.parametrize("width", [1400, 390])
@pytest.mark.parametrize("path", [GLANCE, FAILURES])
def test_everybody_can_use_it(path, width, visit: Callable[..., Page], barriers):
    page = visit(path, width)
    expect(page.locator(".figures").first).to_be_visible()
    assert barriers(page) == []
    # All of it can be read without scrolling sideways, also between a desk and a phone.
    for narrower in range(width, width * 3 // 4, -width // 20):
        page.set_viewport_size({"width": narrower, "height": 900})
        assert page.evaluate(WIDEST) <= 0, narrower


@pytest.mark.usefixtures("backups_folder")
def test_everybody_can_use_the_pages_of_every_model(visit: Callable[..., Page], barriers, admin_user):
    everything(admin_user)
    Operation.objects.create(action="release", last_pk=1, total=1, requested_at=timezone.now())
    page = visit("/admin/selfheal/")
    base = page.url.removesuffix("/admin/selfheal/")
    looked_at: list[str] = []

    def look(path: str) -> None:
        response = page.goto(base + path)
        assert response is not None
        assert response.ok, path
        assert barriers(page) == [], path
        if path.startswith("/admin/selfheal/"):
            # It need not be scrolled sideways.
            assert page.evaluate(WIDEST_LIST) <= 0, path
        looked_at.append(path)

    look("/admin/selfheal/")
    for model, its_pages in admin.site._registry.items():
        opts = model._meta
        if opts.app_label not in ("selfheal", "databases", "backups"):
            continue
        root = f"/admin/{opts.app_label}/{opts.model_name}/"
        look(root)
        if not isinstance(its_pages, pages.Page):
            pk = model._default_manager.order_by("pk").values_list("pk", flat=True)[0]
            look(f"{root}{pk}/change/")
            look(f"{root}{pk}/history/")
    assert len(looked_at) > 25


def test_what_changes_is_shown_without_a_reload(visit: Callable[..., Page]):
    page = visit(GLANCE)
    page.evaluate("window.isStillThere = true")
    problem = page.locator(".problems li", has_text="in quarantine")
    expect(problem).to_contain_text("1 row of do_task is in quarantine.")
    link = page.get_by_role("link", name="do_task", exact=True)
    link.focus()
    aside(2)
    some_time_passes(page)
    expect(problem).to_contain_text("2 rows of do_task are in quarantine.")
    assert page.evaluate("window.isStillThere")
    # Nor is whoever goes through it by keyboard sent back to the beginning.
    expect(link).to_be_focused()


def test_hold_still_holds(visit: Callable[..., Page]):
    page = visit(GLANCE)
    problem = page.locator(".problems li", has_text="in quarantine")
    button = page.get_by_role("button", name="Hold still")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    button.press("Enter")
    expect(button).to_have_attribute("aria-pressed", "true")
    aside(2)
    some_time_passes(page)
    some_time_passes(page)
    expect(page.get_by_text("Held still.")).to_be_visible()
    expect(problem).to_contain_text("1 row of do_task is in quarantine.")
    assert asked == []
    button.press("Enter")
    expect(problem).to_contain_text("2 rows of do_task are in quarantine.")
    # And a page that nobody sees asks for nothing either.
    page.evaluate("Object.defineProperty(document, 'hidden', {get: () => true})")
    asked.clear()
    some_time_passes(page)
    assert asked == []


def test_signed_out_it_says_that_it_is_old_and_keeps_what_it_showed(visit: Callable[..., Page]):
    page = visit(GLANCE)
    Session.objects.all().delete()
    some_time_passes(page)
    expect(page.get_by_text("It could not be refreshed.")).to_be_visible()
    expect(page.get_by_role("link", name="do_task", exact=True)).to_be_visible()


def test_without_scripts_it_is_all_there(visit: Callable[..., Page]):
    page = visit(GLANCE, java_script_enabled=False)
    expect(page.locator("#banner")).to_contain_text("Nobody ticks")
    expect(page.locator("#banner")).to_have_attribute("aria-live", "polite")
    expect(page.get_by_role("button", name="Hold still")).to_be_hidden()


def test_from_what_is_wrong_to_the_error_and_its_runs(visit: Callable[..., Page]):
    page = visit(GLANCE)
    page.locator(".problems li", has_text="attempts of do_task failed").get_by_role("link").click()
    page.get_by_role("link", name="OSError: no space left on device").click()
    expect(page.locator("#result_list tbody tr")).to_have_count(20)
