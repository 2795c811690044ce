"""The jobs do what the functions did, RQ's own queue goes on beside, and what is in it is handed over."""

import django_rq
import pytest
from django.conf import settings
from django.core.management import call_command
from orders import tasks
from orders.jobs import forget_unpaid_orders, place, schedule_payments
from orders.models import Order
from orders.old_queue import old_queue
from redis import Redis
from rq import Queue

from jobs.testing import drain, tick


@pytest.fixture(autouse=True)
def empty_redis():
    for url in (settings.OLD_REDIS_URL, settings.NEW_REDIS_URL):
        with Redis.from_url(url) as redis:
            redis.flushall()


@pytest.mark.django_db(transaction=True)
def test_an_order_is_paid_also_when_redis_is_emptied():
    place("ada@example.com")
    assert drain() == {"done": 1}
    order = place("grace@example.com")
    with Redis.from_url(settings.NEW_REDIS_URL) as redis:
        redis.flushall()
    assert drain() == {}
    assert schedule_payments.sweep().enqueued == 1
    assert drain() == {"done": 1}
    order.refresh_from_db()
    assert order.paid == 1


@pytest.mark.django_db(transaction=True)
def test_what_is_in_the_old_queue_is_handed_over():
    order = Order.objects.create(email="ada@example.com")
    old_queue.enqueue(tasks.pay, order.pk)
    assert drain() == {}
    call_command("old_worker", "--burst")
    assert old_queue.count == 0
    assert drain() == {"done": 1}


@pytest.mark.django_db(transaction=True)
def test_a_task_hands_over_and_a_second_time_does_no_harm():
    order = Order.objects.create(email="ada@example.com")
    tasks.pay(order.pk)
    assert drain() == {"done": 1}
    tasks.pay(order.pk)
    assert drain() == {"not_needed": 1}


@pytest.mark.django_db(transaction=True)
def test_django_rq_refuses_what_is_not_declared():
    with pytest.raises(TypeError, match="Declare it with @job"):
        django_rq.enqueue(tasks.pay, 1)


@pytest.mark.django_db(transaction=True)
def test_in_the_same_database_of_redis_what_rq_has_to_do_is_cleared_away(caplog):
    with Redis.from_url(settings.NEW_REDIS_URL) as redis:
        theirs = Queue("default", connection=redis)
        theirs.enqueue(tasks.pay, 1)
        redis.zadd("rq:scheduler:scheduled_jobs", {"an-entry-of-rq-scheduler": 1})
        tick()
        drain()
        assert theirs.count == 0
        assert redis.zcard("rq:scheduler:scheduled_jobs") == 0
    assert caplog.text.count("Refused") == 2


@pytest.mark.django_db
def test_unpaid_orders_are_forgotten():
    Order.objects.create(email="ada@example.com")
    forget_unpaid_orders()
    assert not Order.objects.exists()
