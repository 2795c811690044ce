"""Each job of the page dies between its effect and the note of it, and is done again: there is one effect."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from django.core import mail
from orders import jobs
from orders.models import Order, Points

from jobs.models import Claim, Run
from jobs.testing import drain, perform

State = Order.State


class Service(BaseHTTPRequestHandler):
    """A payment service that keeps keys, a carrier that knows references, and a gateway for texts without a memory."""

    made: dict[str, list[dict]] = {}
    by_key: dict[str, dict] = {}

    def do_POST(self):
        data = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        key = self.headers["Idempotency-Key"]
        if not (key and key in self.by_key):
            data["id"] = f"{self.path}-{len(self.made.setdefault(self.path, []))}"
            self.made[self.path].append(data)
            self.by_key[key] = data
        self.answer(self.by_key[key])

    def do_GET(self):
        url = urlsplit(self.path)
        [reference] = parse_qs(url.query)["reference"]
        self.answer([each for each in self.made.get(url.path, []) if each["reference"] == reference])

    def answer(self, value):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(value).encode())

    def log_message(self, *args):
        pass


@pytest.fixture(autouse=True)
def made(settings, tmp_path):
    Service.made, Service.by_key = {}, {}
    settings.INVOICES = tmp_path
    with ThreadingHTTPServer(("127.0.0.1", 0), Service) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        settings.SERVICES = f"http://127.0.0.1:{server.server_port}"
        yield Service.made
        server.shutdown()
        thread.join()


@pytest.fixture
def order(db):
    return Order.objects.create(email="ada@example.com", cents=4_200)


def test_an_order_passes_through_all_of_it(order, made, settings):
    for job in (jobs.charge, jobs.reward, jobs.write_invoice, jobs.ship, jobs.confirm):
        assert perform(job, order) == "done"
    order.refresh_from_db()
    assert order.state == State.CONFIRMED
    assert Points.objects.get().points == 42
    assert [path.name for path in Path(settings.INVOICES).iterdir()] == [f"invoice-{order.pk}.txt"]
    [message] = mail.outbox
    assert message.extra_headers["Message-ID"] == f"<order-{order.pk}-confirmation@shop.example>"


class Died(BaseException):
    """What follows the effect is not reached."""


@pytest.fixture
def dies_before_the_note(monkeypatch):
    """The process ends where the job takes its lock, the first time."""
    alive = jobs.with_lock

    def die(row):
        monkeypatch.setattr(jobs, "with_lock", alive)
        raise Died

    monkeypatch.setattr(jobs, "with_lock", die)


def twice(job, order):
    assert perform(job, order) == "failed"
    Claim.objects.queue_now()
    assert perform(job, order) == "done"


def test_a_payment_is_made_once(order, made, dies_before_the_note):
    twice(jobs.charge, order)
    assert len(made["/payments"]) == 1
    order.refresh_from_db()
    assert order.payment == "/payments-0"


def test_points_are_given_once(order, monkeypatch):
    Order.objects.update(state=State.PAID)
    alive = Order.move_on

    def die(*args):
        monkeypatch.setattr(Order, "move_on", alive)
        raise Died

    monkeypatch.setattr(Order, "move_on", die)
    twice(jobs.reward, order)
    assert Points.objects.count() == 1


def test_an_invoice_is_written_whole(order, settings, dies_before_the_note):
    Order.objects.update(state=State.REWARDED)
    twice(jobs.write_invoice, order)
    [path] = Path(settings.INVOICES).iterdir()
    assert path.read_text() == f"Invoice {order.pk} for ada@example.com: 42.00\n"


def test_a_parcel_is_made_once(order, made, dies_before_the_note):
    Order.objects.update(state=State.INVOICED)
    twice(jobs.ship, order)
    assert len(made["/parcels"]) == 1


def test_an_email_may_come_twice_with_the_same_id(order, dies_before_the_note):
    Order.objects.update(state=State.SHIPPED)
    twice(jobs.confirm, order)
    first, second = mail.outbox
    assert first.extra_headers == second.extra_headers


def test_a_text_comes_once_or_never(order, made, monkeypatch):
    Order.objects.update(state=State.CONFIRMED)
    assert perform(jobs.send_text, order) == "done"
    assert len(made["/texts"]) == 1

    Order.objects.update(state=State.CONFIRMED)
    monkeypatch.setattr(jobs.services, "post", lambda *args: 1 / 0)
    assert perform(jobs.send_text, order) == "failed"
    # What does not match any more is settled, and leaves nothing but the history.
    assert not Claim.objects.exists()
    assert Run.objects.filter(job="send_text", outcome="failed").count() == 1
    assert perform(jobs.send_text, order) == "not_needed"


def test_points_that_somebody_gave_by_hand_are_not_given_again(order):
    Order.objects.update(state=State.PAID)
    Points.objects.create(order=order, points=7)
    assert perform(jobs.reward, order) == "done"
    assert Points.objects.get().points == 7


@pytest.mark.django_db(transaction=True)
def test_the_sweeps_carry_an_order_from_state_to_state(made):
    Order.objects.create(email="ada@example.com", cents=100)
    for sweep in (
        jobs.schedule_charges,
        jobs.schedule_rewards,
        jobs.schedule_invoices,
        jobs.schedule_parcels,
        jobs.schedule_confirmations,
        jobs.schedule_texts,
    ):
        assert sweep.sweep().enqueued == 1
        assert drain() == {"done": 1}
    assert Order.objects.get().state == State.TEXTED
