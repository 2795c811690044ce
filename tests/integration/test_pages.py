"""At a glance, and failures with their like: what stands on the two pages, who may see it, and where its links lead."""

import re
from datetime import timedelta
from html.parser import HTMLParser
from urllib.parse import parse_qs, urlsplit

import pytest
from django.contrib.auth.models import Permission, User
from django.test import Client
from django.urls import reverse
from django.utils import timezone

from jobs import health, pauses, tallies
from jobs.fingerprint import fingerprint
from jobs.models import Claim, Run, Schedule
from jobs.templatetags.selfheal import ago, sparkline
from tests.integration.test_health import ended
from tests.machine import within

pytestmark = [pytest.mark.long_on_postgres, pytest.mark.django_db(transaction=True)]

GLANCE = "/admin/selfheal/health/"
FAILURES = "/admin/selfheal/failure/"


class Text(HTMLParser):
    """What a page says, its links, and whatever a strict policy would not let through."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.links: list[str] = []
        self.inline: list[str] = []
        self.feed(page)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        if (
            tag == "style"
            or (tag == "script" and "src" not in given)
            or any(name == "style" or name.startswith("on") for name in given)
        ):
            self.inline.append(self.get_starttag_text())

    def handle_data(self, data):
        self.words.append(data)


def failed(error: str, ago: timedelta = timedelta(0), job: str = "do_task") -> None:
    ended_at = timezone.now() - ago
    Run.objects.create(job=job, outcome="failed", error=error, fingerprint=fingerprint(error), finished_at=ended_at)


def aside(number: int, job: str = "do_task") -> None:
    now = timezone.now()
    values = {"job": job, "model": "cast.task", "object_pk": str(number), "first_claimed_at": now}
    Claim.objects.create(**values, quarantined_at=now, last_error="No space left")


def reader(client: Client, *permissions: str) -> Client:
    user = User.objects.create_user("reader", is_staff=True)
    user.user_permissions.set(Permission.objects.filter(codename__in=permissions))
    client.force_login(user)
    return client


def page(client: Client, path: str, **query: str) -> Text:
    response = client.get(path, query)
    assert response.status_code == 200
    return Text(response.content.decode())


# --- At a glance ------------------------------------------------------------------------------------------------------


def test_it_says_in_one_sentence_that_all_is_well_or_what_is_not(admin_client, at_work, redis):
    assert "All is well." in page(admin_client, GLANCE).text
    aside(1)
    found = page(admin_client, GLANCE)
    assert "1 row of do_task is in quarantine. Find out why, then release them." in found.text
    assert "All is well." not in found.text
    redis.hset(at_work.key, "queues", "default")
    redis.rpush("rq:queue:urgent", "a")
    response = admin_client.get(GLANCE).content.decode()
    [banner] = re.findall(r'id="banner" class="banner (\w+)".*?<strong>(.*?)</strong>', response, re.DOTALL)
    assert banner == ("critical", "No worker serves the queue urgent, although 1 job waits in it.")


def test_each_name_and_each_count_is_a_link_to_what_is_behind_it(admin_client, at_work):
    aside(1)
    for _ in range(3):
        failed("no")
    tallies.count(None)
    links = page(admin_client, GLANCE).links
    for link in (
        reverse("admin:selfheal_schedule_change", args=["do_task"]),
        reverse("admin:selfheal_claim_changelist") + "?job=do_task&state=quarantined",
        reverse("admin:selfheal_failure_changelist") + "?job=do_task&period=hour",
    ):
        assert link in links
        assert admin_client.get(link).status_code == 200


@pytest.mark.parametrize("path", [GLANCE, FAILURES])
def test_whoever_may_not_see_it_does_not_and_whoever_may_sees_no_link_that_is_closed(path, client, at_work):
    aside(1)
    failed("no")
    tallies.count(None)
    assert client.get(path).status_code == 302
    reader(client, "view_claim", "view_run", "view_schedule")
    assert client.get(path).status_code == 403
    user = User.objects.get(username="reader")
    user.user_permissions.set(Permission.objects.filter(codename__in=["view_health", "view_failure"]))
    found = page(client, path)
    assert "do_task" in found.text
    own = ("/admin/selfheal/health/", "/admin/selfheal/failure/", "/admin/selfheal/")
    assert not [link for link in found.links if link.startswith("/admin/selfheal/") and urlsplit(link).path not in own]


@pytest.mark.parametrize("path", [GLANCE, FAILURES])
def test_nothing_can_be_changed_there(path, admin_client, at_work):
    for more in ("add/", "1/change/", "do_task/change/", "do_task/delete/"):
        assert admin_client.get(path + more).status_code == 404


@pytest.mark.parametrize("path", [GLANCE, FAILURES])
def test_nothing_on_it_is_inline(path, admin_client, at_work):
    ended()
    failed("<script>alert(1)</script>")
    aside(1)
    tallies.count(None)
    assert page(admin_client, path).inline == []


def test_it_stands_first_in_the_admin(admin_client, at_work):
    index = admin_client.get("/admin/").content.decode()
    places = [index.index(f">{name}</a>") for name in ("At a glance", "Claims", "Failures", "Runs", "Schedules")]
    assert places == sorted(places)


def test_with_redis_away_it_is_there_within_a_second(admin_client, at_work, hanging_redis):
    with within(1):
        found = page(admin_client, GLANCE)
    assert "does not answer" in found.text
    assert "do_task" in found.text


def test_it_asks_the_database_a_bounded_number_of_times(admin_client, at_work, django_assert_max_num_queries):
    with django_assert_max_num_queries(30):
        admin_client.get(GLANCE)


def test_what_an_operator_wrote_is_text(admin_client, at_work):
    pauses.pause("do_task", reason="<b>no</b>", by="<i>anna</i>")
    response = admin_client.get(GLANCE).content.decode()
    assert "<b>no</b>" not in response
    assert "<i>anna</i>" not in response
    assert "by &lt;i&gt;anna&lt;/i&gt;: &lt;b&gt;no&lt;/b&gt;." in response


def test_times_say_when_exactly_and_where():
    now = timezone.now()
    assert ago(None, now) == "\N{EN DASH}"
    for difference, text in ((-90, "in 90 s"), (0.3, "now"), (200, "3 min ago")):
        written = ago(now - timedelta(seconds=difference), now)
        assert written.startswith('<time datetime="')
        assert " UTC" in written
        assert written.endswith(f">{text}</time>")


def test_a_sparkline_has_a_text_and_shows_each_failure():
    item = health.Item("x", "swept", "default")
    assert "nothing in 24 h" in sparkline(item)
    item.done[5], item.done[-1], item.failed[-1] = 10, 10_000, 1
    drawn = sparkline(item)
    assert 'aria-label="24 hours: 10,010 done, 1 failed, at most 10,001 an hour"' in drawn
    assert [drawn.count(f'class="{kind}"') for kind in ("done", "failed", "none")] == [2, 1, 22]
    heights = [float(height) for height in re.findall(r'class="(?:done|failed)".*?height="([\d.]+)"', drawn)]
    assert min(heights) >= 1.5


def test_a_sweep_has_what_is_kept_of_it_how_long_its_last_run_took_and_how_often_it_failed(admin_client, at_work):
    now = timezone.now()
    Schedule.objects.filter(name="schedule_tasks").update(
        last_started_at=now - timedelta(seconds=17), last_finished_at=now, last_outcome="done"
    )
    for _ in range(3):
        failed("no", job="schedule_tasks")
    tallies.count(None)
    response = admin_client.get(GLANCE).content.decode()
    [line] = re.findall(r"<tr><th[^>]*><a[^>]*>schedule_tasks</a>.*?</tr>", response, re.DOTALL)
    assert re.search(r'data-label="Took"[^>]*>17 s<', line)
    assert re.search(r'data-label="Failed, last hour"[^>]*><a [^>]*job=schedule_tasks[^>]*>3</a>', line)
    # How many were done is not kept, so it is not said.
    assert 'aria-label="24 hours: 3 failed, at most 3 an hour"' in line
    assert "none in 24 h" in response
    # It has succeeded since.
    assert "attempts of schedule_tasks failed" not in response


# --- Failures ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def many_failures(at_work) -> None:
    for number in range(4):
        failed(f"OSError: no space for row {number}")
    failed("OSError: no space for row 99", ago=timedelta(hours=5))
    failed("ValueError: too <b>bold</b>", ago=timedelta(days=3))
    failed("OSError: no space for row 1", job="nightly")
    ended()
    Run.objects.create(job="do_task", outcome="interrupted", error="a deploy", finished_at=timezone.now())
    aside(1)
    tallies.count(None)


def rows(client: Client, **query: str) -> list[tuple[str, ...]]:
    """The lines of the table: error, job, and how often in the last hour, day and week."""
    table = client.get(FAILURES, query).content.decode().partition("<tbody>")[2].partition("</tbody>")[0]
    lines = [re.findall(r"<t[hd].*?>(.*?)</t[hd]>", line, re.DOTALL) for line in table.split("</tr>")[:-1]]
    return [tuple(re.sub(r"<[^>]+>", "", cell).strip() for cell in line[:5]) for line in lines if len(line) > 1]


@pytest.mark.usefixtures("many_failures")
def test_failures_are_counted_with_their_like(admin_client):
    row = "OSError: no space for row {}"
    assert rows(admin_client) == [(row.format(99), "do_task", "4", "5", "5"), (row.format(1), "nightly", "1", "1", "1")]
    assert [line[0] for line in rows(admin_client, period="week")] == [
        row.format(99), "ValueError: too &lt;b&gt;bold&lt;/b&gt;", row.format(1)
    ]  # fmt: skip


@pytest.mark.usefixtures("many_failures")
@pytest.mark.parametrize(
    ("query", "jobs"),
    [
        ({"q": "space"}, ["do_task", "nightly"]),
        ({"q": "SPACE night"}, ["nightly"]),
        ({"q": "bold", "period": "week"}, ["do_task"]),
        ({"q": "bold"}, []),
        ({"q": "%"}, []),
        ({"job": "nightly"}, ["nightly"]),
        ({"period": "hour", "job": "do_task"}, ["do_task"]),
        ({"period": "century", "p": "seven"}, ["do_task", "nightly"]),
    ],
)
def test_they_can_be_looked_for(admin_client, query, jobs):
    assert [line[1] for line in rows(admin_client, **query)] == jobs


@pytest.mark.usefixtures("many_failures")
def test_each_leads_to_its_runs_and_to_the_rows_that_are_set_aside(admin_client):
    found = page(admin_client, FAILURES)
    [link] = [link for link in found.links if "/run/" in link and "do_task" in link]
    assert parse_qs(urlsplit(link).query) == {"job": ["do_task"], "error": [fingerprint("OSError: no space for row 1")]}
    runs = page(admin_client, link)
    assert "5 runs" in runs.text or runs.text.count("no space for row") == 5
    assert "a deploy" not in runs.text
    assert "the chosen one" in runs.text
    assert reverse("admin:selfheal_claim_changelist") + "?job=do_task&state=quarantined" in found.links


def test_where_nothing_has_failed_it_says_so(admin_client, at_work):
    assert "Nothing has failed in this time." in page(admin_client, FAILURES).text
    assert "Nothing like that has failed in this time." in page(admin_client, FAILURES, q="x").text


def test_many_errors_take_several_pages(admin_client, at_work, monkeypatch):
    monkeypatch.setattr("jobs.pages.PER_PAGE", 2)
    for word in ("one", "two", "three"):
        failed(f"Error {word}")
    tallies.count(None)
    assert len(rows(admin_client)) == 2
    assert "Page 1 of 2" in page(admin_client, FAILURES).text
    assert len(rows(admin_client, p="2")) == 1
