"""The job of the page, against a real server of a merchant, and what the page says becomes of it."""

import threading
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from urllib.request import urlopen

import pytest
from django.core.cache import cache
from django.utils import timezone
from webhooks.announce import announce
from webhooks.jobs import count_undelivered, deliver, forget_old_deliveries, schedule_deliveries
from webhooks.models import Delivery

from jobs.models import Claim
from jobs.testing import drain, perform

State = Delivery.State


class Merchant(BaseHTTPRequestHandler):
    answer = 200
    keys: list[str] = []

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        type(self).keys.append(self.headers["Idempotency-Key"])
        self.send_response(self.answer)
        self.end_headers()

    def log_message(self, *args):
        pass


@pytest.fixture
def merchant():
    class Ours(Merchant):
        keys = []

    with HTTPServer(("127.0.0.1", 0), Ours) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        Ours.url = f"http://127.0.0.1:{server.server_port}/"
        yield Ours
        server.shutdown()
        thread.join()


@pytest.fixture
def delivery(db, merchant):
    return Delivery.objects.create(url=merchant.url, event={"order": 1})


def test_it_is_delivered(delivery, merchant):
    assert perform(deliver, delivery) == "done"
    delivery.refresh_from_db()
    assert delivery.state == State.DELIVERED
    assert not schedule_deliveries().exists()


@pytest.mark.django_db(transaction=True)
def test_the_fast_path(merchant):
    announce(merchant.url, {"order": 2})
    assert drain() == {"done": 1}


def test_what_is_refused_for_good_is_settled(delivery, merchant):
    merchant.answer = 410
    assert perform(deliver, delivery) == "done"
    delivery.refresh_from_db()
    assert delivery.state == State.REFUSED


def test_a_failure_waits_and_the_key_is_the_same_each_time(delivery, merchant):
    merchant.answer = 503
    assert perform(deliver, delivery) == "failed"
    assert perform(deliver, delivery) == "waiting"
    [claim] = Claim.objects.all()
    assert "503" in claim.last_error
    assert timedelta(seconds=14) < claim.next_attempt_at - timezone.now() <= timedelta(seconds=30)
    Claim.objects.queue_now()
    merchant.answer = 200
    assert perform(deliver, delivery) == "done"
    assert len(merchant.keys) == 2
    assert len(set(merchant.keys)) == 1


def test_after_the_last_attempt_comes_quarantine(delivery, merchant):
    merchant.answer = 503
    for _ in range(20):
        assert perform(deliver, delivery) == "failed"
        Claim.objects.queue_now()
    assert perform(deliver, delivery) == "quarantined"
    # Mended by hand: the sweep settles it when it has not matched for a day.
    Delivery.objects.update(state=State.CANCELLED)
    schedule_deliveries.sweep()
    assert Claim.objects.exists()
    Claim.objects.update(unmatched_since=timezone.now() - timedelta(days=1))
    schedule_deliveries.sweep()
    assert not Claim.objects.exists()


def test_a_cancellation_that_comes_while_it_is_posted_stands(delivery, monkeypatch):
    def cancel_and_post(*args, **kwargs):
        Delivery.objects.update(state=State.CANCELLED)
        return urlopen(*args, **kwargs)

    monkeypatch.setattr("webhooks.jobs.urlopen", cancel_and_post)
    assert perform(deliver, delivery) == "not_needed"
    delivery.refresh_from_db()
    assert delivery.state == State.CANCELLED


def test_old_ones_are_forgotten(delivery):
    forget_old_deliveries()
    Delivery.objects.update(settled_at=timezone.now() - timedelta(days=91))
    forget_old_deliveries()
    assert not Delivery.objects.exists()


@pytest.mark.django_db(transaction=True)
def test_a_plain_job_is_queued_once(merchant):
    for _ in range(3):
        count_undelivered.enqueue(merchant.url)
    assert drain() == {"done": 1}
    assert cache.get(f"undelivered:{merchant.url}") == 0
    count_undelivered.enqueue(merchant.url)
    assert drain() == {"done": 1}
