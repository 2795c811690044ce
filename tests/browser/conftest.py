"""A real browser, one for each test process: Chromium as the machine has it, or as `make browser` brings it."""

import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from django.contrib.auth.models import User
from django.test import Client
from playwright.sync_api import Browser, ConsoleMessage, Page, sync_playwright

# Real workers and a real scheduler, for a page that tells of them.
from tests.recovery.conftest import stack as stack
from tests.recovery.conftest import zygote as zygote

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    # Playwright keeps a loop of its own in this thread, and Django takes that for asynchronous code.
    os.environ["DJANGO_ALLOW_ASYNC_UNSAFE"] = "true"
    path = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    with sync_playwright() as playwright:
        # In a container there is no sandbox within the sandbox. It visits no pages but ours.
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()
    del os.environ["DJANGO_ALLOW_ASYNC_UNSAFE"]


@pytest.fixture
def visit(browser: Browser, live_server: Any, admin_user: User) -> Iterator[Callable[..., Page]]:
    """Open a page as the admin, in a fresh window. After the test, fail for whatever its console complained about."""
    complaints: list[str] = []

    def listen(said: ConsoleMessage) -> None:
        url = said.location["url"]
        # What a test itself runs in a page has no address. The icon that a browser asks for is nobody's here.
        if said.type in ("error", "warning") and url and not url.endswith("/favicon.ico"):
            complaints.append(f"{url}: {said.text}")

    client = Client()
    client.force_login(admin_user)
    session = {"name": "sessionid", "value": client.cookies["sessionid"].value, "url": live_server.url}
    contexts = []

    def visit(path: str, width: int = 1400, **options: Any) -> Page:
        context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        contexts.append(context)
        context.add_cookies([session])
        page = context.new_page()
        page.on("console", listen)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.clock.install()
        page.goto(live_server.url + path)
        return page

    yield visit
    for context in contexts:
        context.close()
    assert complaints == []


@pytest.fixture
def barriers() -> Callable[[Page], list[str]]:
    """What axe-core finds on a page that would keep somebody from using it, by day and by night.

    All that the colours change is the contrast.
    """

    def barriers(page: Page) -> list[str]:
        by_day = Axe().run(page).response["violations"]
        page.emulate_media(color_scheme="dark")
        # The colours are on their way.
        page.evaluate("document.getAnimations().forEach((each) => each instanceof CSSTransition && each.finish())")
        by_night = page.evaluate("axe.run({runOnly: ['color-contrast'], resultTypes: ['violations']})")["violations"]
        page.emulate_media(color_scheme="light")
        return [f"{each['id']}: {node['html']}" for each in [*by_day, *by_night] for node in each["nodes"]]

    return barriers
