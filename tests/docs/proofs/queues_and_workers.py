"""The queues of the page, and what it says about two jobs on one row and about switches."""

import pytest
from django.conf import settings
from photos.jobs import add_to_catalogue, make_thumbnail, schedule_catalogue, schedule_thumbnails
from photos.models import Photo
from redis import Redis
from waffle.models import Switch

from jobs.testing import drain, perform, tick


@pytest.fixture
def photo(db):
    return Photo.objects.create(name="hat.jpg")


@pytest.fixture
def redis():
    with Redis.from_url(settings.REDIS_URL) as client:
        client.flushdb()
        yield client


def test_the_default_time_limits(settings):
    assert (make_thumbnail.timeout_seconds, add_to_catalogue.timeout_seconds) == (15, 1800)
    assert schedule_thumbnails.queue == "background"
    del settings.RQ_QUEUES["urgent"]["DEFAULT_TIMEOUT"]
    assert make_thumbnail.timeout_seconds == 180


@pytest.mark.django_db(transaction=True)
def test_each_goes_into_its_queue(photo, redis):
    assert (schedule_thumbnails.sweep().enqueued, schedule_catalogue.sweep().enqueued) == (1, 1)
    assert redis.lrange("rq:queue:urgent", 0, -1) == [f"make_thumbnail-{photo.pk}".encode()]
    assert redis.lrange("rq:queue:slow", 0, -1) == [f"add_to_catalogue-{photo.pk}".encode()]
    assert drain() == {"done": 2}
    photo.refresh_from_db()
    assert photo.thumbnail
    assert photo.in_catalogue


def test_two_jobs_on_one_row_never_run_at_the_same_time(photo, monkeypatch):
    meanwhile = []
    work = make_thumbnail.function

    def both(row):
        meanwhile.append(perform(add_to_catalogue, row))
        work(row)

    monkeypatch.setattr(make_thumbnail, "function", both)
    assert perform(make_thumbnail, photo) == "done"
    assert meanwhile == ["busy"]


@pytest.mark.django_db(transaction=True)
def test_a_switch_stops_the_job_and_its_sweep_and_catches_up(photo, redis):
    schedule_catalogue.sweep()
    switch, _ = Switch.objects.update_or_create(name="disable_add_to_catalogue", defaults={"active": True})
    assert drain() == {"disabled": 1}
    assert schedule_catalogue.sweep() == (0, 0, 0, 0)
    assert "schedule_catalogue" not in tick()
    switch.active = False
    switch.save()
    assert schedule_catalogue.sweep().enqueued == 1
