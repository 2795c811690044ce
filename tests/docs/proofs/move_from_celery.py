"""The jobs do what the tasks did, the migration finishes what was there, and what comes in by Celery is handed over."""

from datetime import timedelta

import pytest
from django.conf import settings
from django.db import connection
from django.db.migrations.executor import MigrationExecutor
from django.utils import timezone
from orders import jobs, tasks
from orders.models import Cart, Order
from products.jobs import prepare_picture, publish
from products.models import Picture, Product
from redis import Redis
from shop.celery import app

from jobs.testing import drain, perform

State = Order.State


@pytest.fixture(autouse=True)
def empty_redis():
    with Redis.from_url(settings.REDIS_URL) as redis:
        redis.flushdb()


@pytest.fixture
def eager():
    app.set_current()
    app.conf.update(task_always_eager=True, task_eager_propagates=True)


@pytest.mark.django_db(transaction=True)
def test_after():
    order = jobs.place("ada@example.com")
    assert drain() == {"done": 2}
    order.refresh_from_db()
    assert order.log == ["pay", "confirm"]
    assert not jobs.schedule_reviews().exists()
    Order.objects.update(ask_at=timezone.now())
    assert perform(jobs.ask_for_a_review, order) == "done"
    assert perform(jobs.ask_for_a_review, order) == "not_needed"
    order.refresh_from_db()
    assert order.log == ["pay", "confirm", "ask for review"]


@pytest.mark.django_db
def test_the_sweeps_find_an_order_in_each_of_its_states():
    order = Order.objects.create(email="ada@example.com")
    assert list(jobs.schedule_payments()) == [order]
    assert perform(jobs.pay_order, order) == "done"
    assert list(jobs.schedule_confirmations()) == [order]


@pytest.mark.django_db
def test_carts_are_forgotten():
    Cart.objects.create(touched_at=timezone.now() - timedelta(days=31))
    jobs.forget_old_carts()
    assert not Cart.objects.exists()


@pytest.mark.django_db(transaction=True)
def test_the_orders_that_there_were_are_finished():
    executor = MigrationExecutor(connection)
    executor.migrate([("orders", "0001_initial")])
    old = executor.loader.project_state([("orders", "0001_initial")]).apps.get_model("orders", "Order")
    try:
        old.objects.create(email="from before the migration")
    finally:
        executor = MigrationExecutor(connection)
        executor.migrate(executor.loader.graph.leaf_nodes())
    old.objects.create(email="by code from before the migration")
    new = Order.objects.create(email="new")
    assert list(jobs.schedule_payments()) == [new]
    assert Order.objects.filter(state=State.CONFIRMED).count() == 2


@pytest.mark.django_db(transaction=True)
def test_what_comes_in_by_celery_is_handed_over(eager):
    order = Order.objects.create(email="ada@example.com")
    tasks.pay.delay(order.pk)
    tasks.pay.delay(order.pk)
    assert drain() == {"done": 2}
    tasks.pay.delay(order.pk)
    assert drain() == {"not_needed": 1}


@pytest.mark.django_db(transaction=True)
def test_a_product_is_published_when_its_last_picture_is_ready():
    product = Product.objects.create()
    pictures = [Picture.objects.create(product=product) for _ in range(3)]
    assert perform(publish, product) == "not_needed"
    prepare_picture.enqueue_many(pictures[:2])
    assert drain() == {"done": 2, "not_needed": 1}
    prepare_picture.enqueue(pictures[2])
    assert drain() == {"done": 2}
    product.refresh_from_db()
    assert product.is_published
