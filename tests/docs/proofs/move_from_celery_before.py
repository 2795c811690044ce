"""The tasks that the page begins with are ones that Celery runs."""

import pytest
from celery.schedules import crontab
from django.utils import timezone
from orders import tasks
from orders.models import Cart
from shop.celery import app


@pytest.fixture(autouse=True)
def eager():
    app.set_current()
    app.conf.update(task_always_eager=True, task_eager_propagates=True)


@pytest.mark.django_db
def test_an_order_passes_through_its_tasks():
    order = tasks.place("ada@example.com")
    order.refresh_from_db()
    assert order.log == ["pay", "confirm", "ask for review"]


@pytest.mark.django_db
def test_beat_forgets_carts():
    Cart.objects.create(touched_at=timezone.now() - timezone.timedelta(days=31))
    entry = app.conf.beat_schedule["forget-carts"]
    assert entry["schedule"] == crontab(hour=3, minute=17)
    app.tasks[entry["task"]].delay()
    assert not Cart.objects.exists()
