"""The console in a real browser: whether everybody can use it, and whether one sees happen what one asked for."""

import re
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pytest
from django.contrib.sessions.models import Session
from django.template.loader import render_to_string
from playwright.sync_api import Page, expect

from backups.models import Backup
from databases.models import Database
from databases.provisioners import Provisioned
from jobs.models import Schedule
from tests.console import State, everything
from tests.engines import ON_ITS_OWN

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.usefixtures("backups_folder")]

# For a real worker, in milliseconds.
PATIENCE = 40_000
ORDERS = "CREATE TABLE orders (id integer PRIMARY KEY, what text);\nINSERT INTO orders VALUES (1, 'tea'), (2, 'bread');"


@pytest.fixture
def shop(admin_user) -> Database:
    return Database.objects.create(name="shop", owner=admin_user)


def become_ready(database: Database) -> None:
    database.become_ready(Provisioned(path="/nowhere/shop.sqlite3", size=8192))


# --- Everybody --------------------------------------------------------------------------------------------------------


@pytest.mark.any_database
@pytest.mark.parametrize("width", [1400, pytest.param(375, marks=pytest.mark.long)])
def test_everybody_can_use_every_page(visit: Callable[..., Page], barriers, admin_user, width):
    page = visit("/", width)
    base = page.url.rstrip("/")

    def look(name: str) -> None:
        expect(page.locator("h1")).to_have_count(1)
        assert barriers(page) == [], name
        assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0, name

    for path in ("/", "/deploys/", "/deploys/new/"):
        page.goto(base + path)
        look(f"empty {path}")
    rows = everything(admin_user)
    for name in rows.pages:
        page.goto(base + rows.pages[name])
        look(name)
    # As a browser shows them, without the answer that its console would complain about.
    for name in ("404.html", "500.html"):
        page.set_content(render_to_string(name))
        look(name)
    # What a form says that was not filled in right, and what is shown to whoever asks for it.
    for name in ("new_database", "new_policy", "delete_database"):
        page.goto(base + rows.pages[name])
        page.locator("main form button").last.click()
        expect(page.locator(".errorlist").first).to_be_visible()
        look(f"{name} with errors")
    page.goto(base + rows.pages["new_deploy"])
    page.get_by_label("SQL").fill("DROP TABLE orders")
    page.get_by_role("button", name="Deploy it").click()
    expect(page.get_by_label("Type shop to confirm")).to_be_visible()
    look("new_deploy that destroys something")
    page.goto(base + rows.pages["connection"])
    page.get_by_role("button", name="Show the password").click()
    expect(page.get_by_text(rows.shop.password).first).to_be_visible()
    look("connection with its password")
    page.get_by_role("button", name="Log out").click()
    expect(page.get_by_role("heading", name="Log in")).to_be_visible()
    look("login")


def test_by_keyboard_one_is_at_the_content_at_once_and_sees_where_one_is(visit: Callable[..., Page], shop):
    page = visit("/")
    page.keyboard.press("Tab")
    skip = page.get_by_role("link", name="Skip to the content")
    expect(skip).to_be_focused()
    assert skip.bounding_box()["width"] > 100
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    button = page.get_by_role("link", name="New database")
    expect(button).to_be_focused()
    assert button.evaluate("(node) => getComputedStyle(node).outlineStyle") == "solid"


# --- While one watches ------------------------------------------------------------------------------------------------


def test_what_changes_is_shown_without_a_reload_and_then_it_rests(visit: Callable[..., Page], shop):
    page = visit("/databases/shop/")
    page.evaluate("window.isStillThere = true")
    state = page.locator("#state")
    expect(state).to_have_text("pending")
    expect(state).to_have_attribute("aria-live", "polite")
    link = page.get_by_role("link", name="Backups")
    link.focus()
    become_ready(shop)
    expect(state).to_have_text("ready")
    expect(page.get_by_role("link", name="Connect")).to_be_visible()
    assert page.evaluate("window.isStillThere")
    # Nor is whoever goes through it by keyboard sent back to the beginning.
    expect(link).to_be_focused()
    asked = requests(page)
    page.clock.run_for(10_000)
    assert asked == []


def test_a_page_that_nobody_sees_asks_for_nothing(visit: Callable[..., Page], shop):
    page = visit("/")
    page.evaluate("Object.defineProperty(document, 'hidden', {get: () => window.isHidden, configurable: true})")
    page.evaluate("window.isHidden = true")
    asked = requests(page)
    become_ready(shop)
    page.clock.run_for(10_000)
    assert asked == []
    page.evaluate("window.isHidden = false; document.dispatchEvent(new Event('visibilitychange'))")
    expect(page.locator("#rows .state")).to_have_text("ready")


def test_whoever_is_logged_out_meanwhile_is_told(visit: Callable[..., Page], shop):
    page = visit("/databases/shop/")
    Session.objects.all().delete()
    expect(page.get_by_role("heading", name="Log in")).to_be_visible()


def test_without_scripts_a_reload_shows_it(visit: Callable[..., Page], shop):
    page = visit("/databases/shop/", java_script_enabled=False)
    expect(page.locator("#state")).to_have_text("pending")
    become_ready(shop)
    page.reload()
    expect(page.locator("#state")).to_have_text("ready")


def requests(page: Page) -> list[str]:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    return asked


# --- With real workers behind it --------------------------------------------------------------------------------------


@pytest.fixture(params=ON_ITS_OWN)
def engine(request) -> str:
    if request.param == "postgresql":
        request.getfixturevalue("postgres")
    return Database.Engine(request.param).label


def work(stack: Any, settings: Any, backups_folder: Path) -> None:
    """Start a worker that makes its databases and keeps its backups where this test looks."""
    stack.worker(
        BACKUPS_FOLDER=str(backups_folder),
        DATABASES_POSTGRES_URL=settings.DATABASES_POSTGRES_URL,
        DATABASES_POSTGRES_BIN=settings.DATABASES_POSTGRES_BIN,
    )
    stack.wait_until_up("worker")


def becomes(page: Page, state: str) -> None:
    expect(page.locator("#state")).to_have_text(state, timeout=PATIENCE)


def test_from_an_empty_page_to_a_restored_backup(
    stack: Any, visit: Callable[..., Page], engine, settings, backups_folder, tmp_path
):
    work(stack, settings, backups_folder)
    page = visit("/")

    # A database, and a branch of it.
    page.get_by_role("link", name="Create a database").click()
    page.get_by_label("Name").fill("shop")
    page.get_by_label(engine).check()
    page.get_by_role("button", name="Create it").click()
    becomes(page, "ready")
    page.get_by_role("link", name="Branch", exact=True).click()
    page.get_by_label("Name").fill("shop_trial")
    page.get_by_role("button", name="Branch it").click()
    becomes(page, "ready")

    # A change of it, tried on the branch; and one that cannot be made.
    page.get_by_role("link", name="Deploy", exact=True).click()
    page.get_by_label("SQL").fill(ORDERS)
    page.get_by_role("button", name="Deploy it").click()
    becomes(page, "deployed")
    assert orders("shop") == orders("shop_trial") == [(1, "tea"), (2, "bread")]
    page.goto(page.url.split("/deploys/")[0] + "/deploys/new/?branch=shop_trial")
    page.get_by_label("SQL").fill("ALTER TABLE orders ADD COLUMN what text")
    page.get_by_role("button", name="Deploy it").click()
    becomes(page, "failed")
    expect(page.locator("#said")).to_contain_text(re.compile("duplicate column name: what|column .what. of relation"))

    # A backup, on this machine and in a branch.
    page.goto(page.url.split("/deploys/")[0] + "/databases/shop/backups/")
    page.get_by_role("button", name="Take one now").click()
    expect(page.locator("#rows .state")).to_have_text("ready", timeout=PATIENCE)
    page.get_by_role("link", name=re.compile("^#")).click()
    with page.expect_download() as download:
        page.get_by_role("link", name="Download").click()
    backup = Backup.objects.get()
    assert Path(download.value.path()).read_bytes() == (backups_folder / backup.file).read_bytes()
    assert download.value.suggested_filename.startswith("shop-20")
    page.get_by_role("link", name="Restore").click()
    page.get_by_label("Name").fill("shop_as_it_was")
    page.get_by_role("button", name="Restore it").click()
    becomes(page, "ready")
    expect(page.locator("#facts")).to_contain_text("a backup of shop")
    assert orders("shop_as_it_was") == [(1, "tea"), (2, "bread")]

    # And gone again.
    page.get_by_role("link", name="Delete").click()
    page.get_by_label("Type shop_as_it_was to confirm").fill("shop_as_it_was")
    page.get_by_role("button", name="Delete it").click()
    becomes(page, "deleted")


def orders(name: str) -> list[tuple[int, str]]:
    """Return what is in a database, asked as its owner would: by what the page on how to connect shows."""
    database = Database.objects.get(name=name)
    query = "SELECT * FROM orders ORDER BY id"
    if database.engine == Database.Engine.SQLITE:
        with closing(sqlite3.connect(database.path)) as connection:
            return connection.execute(query).fetchall()
    with psycopg.connect(f"postgresql://{name}:{database.password}@{database.path}") as connection:
        return connection.execute(query).fetchall()


@pytest.mark.any_database
def test_asked_for_while_redis_is_stopped_and_ready_after_it_is_back(
    stack: Any, visit: Callable[..., Page], settings, backups_folder
):
    stack.scheduler()
    work(stack, settings, backups_folder)
    stack.wait_until_up("scheduler")
    page = visit("/new/")
    stack.redis.stop()
    page.get_by_label("Name").fill("shop")
    page.get_by_role("button", name="Create it").click()
    expect(page.locator("#state")).to_have_text("pending")
    stack.redis.start()
    # A minute has gone by.
    Schedule.objects.filter(pk="schedule_databases").owe()
    becomes(page, "ready")
    assert Database.objects.get().state == State.READY
