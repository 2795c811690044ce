"""Feature flags that stop one kind of job: read from the database at each use, and never from a cache."""

import pytest
from django.core.cache import cache
from django.core.management import call_command
from waffle import get_waffle_switch_model, switch_is_active

from jobs import job, registry, switches
from tests.cast.jobs import do_task, nightly, schedule_tasks, touch_file

pytestmark = pytest.mark.django_db

Switch = get_waffle_switch_model()


def test_a_switch_that_is_missing_means_enabled():
    Switch.objects.all().delete()
    assert switches.disabled(["do_task", "schedule_tasks"]) == set()


def test_a_switch_that_is_off_means_enabled(switch):
    switch("do_task", on=False)
    assert switches.disabled(["do_task"]) == set()


def test_of_those_asked_for_the_ones_that_are_on_are_disabled(switch):
    for name in ("do_task", "nightly", "delete_task"):
        switch(name)
    Switch.objects.create(name="do_ticket", active=True)
    assert switches.disabled(["do_task", "nightly", "schedule_tasks", "do_ticket"]) == {"do_task", "nightly"}


def test_however_many_are_asked_for_it_is_one_query(switch, django_assert_num_queries):
    switch("do_task")
    for names in (["do_task"], [each.name for each in registry.declared()]):
        for _ in range(2):
            with django_assert_num_queries(1):
                assert switches.disabled(names) == {"do_task"}


@pytest.fixture
def empty_cache():
    cache.clear()
    yield
    cache.clear()


@pytest.mark.usefixtures("empty_cache")
def test_a_flip_that_no_cache_heard_of_is_seen_at_once():
    """`update` tells nobody, as a flip on another machine does not tell this process."""
    Switch.objects.update_or_create(name="disable_do_task", defaults={"active": False})
    assert not switch_is_active("disable_do_task")
    Switch.objects.filter(name="disable_do_task").update(active=True)
    # This is why waffle's own check will not do.
    assert not switch_is_active("disable_do_task")
    assert switches.disabled(["do_task"]) == {"do_task"}
    Switch.objects.filter(name="disable_do_task").update(active=False)
    assert switches.disabled(["do_task"]) == set()


def test_migrate_makes_one_for_each_sweep_cron_job_and_swept_job():
    Switch.objects.all().delete()
    call_command("migrate", verbosity=0)
    made = set(Switch.objects.values_list("name", flat=True))
    assert {f"disable_{each.name}" for each in (do_task, schedule_tasks, nightly)} <= made
    assert f"disable_{touch_file.name}" not in made
    assert {"disable_create_database", "disable_schedule_databases", "disable_selfheal_prune"} <= made
    assert not Switch.objects.filter(active=True).exists()
    assert all(
        f"stop {name.removeprefix('disable_')}" in note for name, note in Switch.objects.values_list("name", "note")
    )


def test_migrate_makes_those_that_came_with_a_deploy_and_leaves_the_others(declaring, switch):
    switch("do_task")
    Switch.objects.filter(name="disable_do_task").update(note="Incident 7")

    @job(cron="* * * * *")
    def came_with_a_deploy():
        pass

    call_command("migrate", verbosity=0)
    assert Switch.objects.filter(name="disable_came_with_a_deploy", active=False).exists()
    assert Switch.objects.filter(name="disable_do_task", active=True, note="Incident 7").exists()
