"""What the page says of its example and its settings."""

import pytest
from django.db import transaction
from exports.jobs import schedule_exports, write_export
from exports.models import Export
from exports.views import ask_for_export

from jobs.conf import DEFAULTS, conf
from jobs.testing import drain, perform


def test_the_settings_that_are_shown_are_the_defaults(settings):
    shown, redact = dict(settings.JOBS), conf.REDACT
    del shown["REDACT"], settings.JOBS
    assert shown == DEFAULTS
    assert conf.REDACT is redact


@pytest.mark.django_db(transaction=True)
def test_a_request_leads_to_an_export(rf):
    response = ask_for_export(rf.post("/", {"customer": "Ada"}))
    assert response.status_code == 202
    assert drain() == {"done": 1}
    assert Export.objects.get().lines.startswith("Ada;0\nAda;1\n")
    assert not schedule_exports().exists()


@pytest.mark.django_db(transaction=True)
def test_what_is_rolled_back_is_not_queued(rf):
    with transaction.atomic():
        ask_for_export(rf.post("/", {"customer": "Ada"}))
        transaction.set_rollback(True)
    assert drain() == {}


@pytest.mark.django_db
def test_one_that_is_written_is_not_written_again():
    export = Export.objects.create(customer="Ada")
    assert perform(write_export, export) == "done"
    assert perform(write_export, export) == "not_needed"
