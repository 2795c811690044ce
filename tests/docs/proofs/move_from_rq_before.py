"""What the page begins with is what django-rq runs."""

import django_rq
import pytest
from orders import tasks
from orders.models import Order
from rq import SimpleWorker


@pytest.fixture(autouse=True)
def empty_redis():
    connection = django_rq.get_connection("default")
    connection.flushdb()
    return connection


@pytest.mark.django_db(transaction=True)
def test_an_order_is_paid():
    order = tasks.place("ada@example.com")
    django_rq.get_worker("default", worker_class=SimpleWorker).work(burst=True)
    order.refresh_from_db()
    assert order.paid == 1


@pytest.mark.django_db
def test_unpaid_orders_are_forgotten(empty_redis):
    tasks.schedule()
    [entry] = django_rq.get_scheduler("default").get_jobs()
    assert entry.meta["cron_string"] == "17 3 * * *"
    Order.objects.create(email="ada@example.com")
    entry.func()
    assert not Order.objects.exists()
