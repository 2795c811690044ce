"""What `@job` and `@sweep` make of a function, and what the front door promises."""

import inspect
from collections.abc import Iterator
from datetime import timedelta

import pytest
from django.apps import apps
from django.db.models import QuerySet

import jobs
from databases.jobs import create_database, schedule_databases
from jobs import Backoff, job, registry, sweep
from jobs.job import Job
from jobs.sweep import Sweep
from tests.cast.jobs import do_task, nightly, schedule_tasks, touch_file
from tests.cast.models import Task

pytestmark = pytest.mark.any_database


@pytest.fixture(autouse=True)
def _declaring() -> Iterator[None]:
    with registry.sandbox():
        yield


def test_the_front_door_is_what_the_readme_promises():
    assert set(jobs.__all__) == {
        "job",
        "sweep",
        "with_lock",
        "Backoff",
        "SweepResult",
        "LeaseLost",
        "NoLongerNeeded",
        "QueueUnavailable",
    }
    assert all(hasattr(jobs, name) for name in jobs.__all__)
    assert jobs.SweepResult._fields == ("matched", "enqueued", "already_queued", "waiting")


def test_the_app_has_a_label_of_its_own():
    config = apps.get_app_config("selfheal")
    assert (config.name, config.verbose_name) == ("jobs", "Jobs")


def test_a_job_has_the_promised_defaults():
    @job
    def walk_the_dog(dog):
        """Once around the block."""

    assert (walk_the_dog.name, walk_the_dog.queue, walk_the_dog.cron) == ("walk_the_dog", "default", None)
    assert (walk_the_dog.backoff, walk_the_dog.unique_for) == (Backoff(), None)
    assert walk_the_dog.__doc__ == "Once around the block."
    assert registry.get("walk_the_dog") is walk_the_dog


def test_a_plain_job_has_five_attempts_and_a_swept_one_has_no_end():
    @job()
    def walk_the_dog(dog):
        pass

    assert walk_the_dog.max_attempts == 5
    sweep(walk_the_dog, cron="* * * * *")(lambda: Task.objects.all())
    assert walk_the_dog.max_attempts is None


def test_max_attempts_is_kept_whatever_the_kind():
    @job(max_attempts=None)
    def plain():
        pass

    @job(max_attempts=3)
    def swept(task):
        pass

    sweep(swept, cron="* * * * *", name="feeds_it")(lambda: Task.objects.all())
    assert (plain.max_attempts, swept.max_attempts) == (None, 3)


def test_a_sweep_has_the_promised_defaults():
    @job
    def walk_the_dog(dog):
        pass

    @sweep(walk_the_dog, cron="* * * * *")
    def walk_the_dogs():
        return Task.objects.all()

    assert (walk_the_dogs.queue, walk_the_dogs.batch_size, walk_the_dogs.limit, walk_the_dogs.jitter) == (
        "background",
        1000,
        100_000,
        None,
    )
    assert walk_the_dog.is_swept
    assert walk_the_dogs.name == "walk_the_dogs"


def test_the_time_limit_is_the_queues_unless_it_is_given(settings):
    settings.RQ_QUEUES["background"]["DEFAULT_TIMEOUT"] = 7

    @job(queue="background")
    def as_the_queue_has_it():
        pass

    @job(timeout=timedelta(milliseconds=1500))
    def as_it_says_itself():
        pass

    assert (as_the_queue_has_it.timeout_seconds, as_it_says_itself.timeout_seconds) == (7, 2)
    del settings.RQ_QUEUES["background"]["DEFAULT_TIMEOUT"]
    assert as_the_queue_has_it.timeout_seconds == 180


def test_a_name_can_be_given_and_the_functions_own_is_kept_for_messages():
    @job(name="dog_walk")
    def walk():
        pass

    assert (walk.name, walk.__name__) == ("dog_walk", "walk")
    assert registry.get("dog_walk") is walk
    assert registry.get("walk") is None
    assert walk.origin.endswith("<locals>.walk")


def test_a_declared_function_can_still_be_called():
    @job(cron="0 0 * * *")
    def add(one: int, two: int = 2) -> int:
        return one + two

    assert add(1) == 3
    assert add(1, two=1) == 2


def test_a_sweep_called_is_its_queryset():
    found = schedule_tasks()
    assert isinstance(found, QuerySet)
    assert str(found.query) == str(Task.objects.pending().query)


def test_every_apps_jobs_module_was_imported_at_start():
    declared = registry.declared()
    assert {create_database, schedule_databases, do_task, schedule_tasks, nightly, touch_file} <= set(declared)
    assert registry.get("selfheal_prune") in declared
    assert [each.name for each in declared] == sorted(each.name for each in declared)


def test_what_a_sandbox_declared_is_forgotten():
    with registry.sandbox():

        @job
        def for_a_moment():
            pass

        @job(name="do_task")
        def taken():
            pass

        assert registry.get("for_a_moment") is for_a_moment
        assert registry.refused()
    assert registry.get("for_a_moment") is None
    assert registry.refused() == []


def test_an_option_that_does_not_exist_is_refused_by_name():
    with pytest.raises(TypeError, match="ques"):
        job(ques="default")(lambda: None)
    with pytest.raises(TypeError, match="every"):
        sweep(do_task, cron="* * * * *", every=60)(lambda: None)


def test_a_sweep_needs_to_know_how_often():
    with pytest.raises(TypeError, match="cron"):
        sweep(do_task)


@pytest.mark.parametrize("fed", ["do_task", lambda task: None, None, schedule_tasks])
def test_a_sweep_feeds_a_declared_job_and_nothing_else(fed):
    with pytest.raises(TypeError, match="@sweep takes the job that it feeds, declared with @job, not"):
        sweep(fed, cron="* * * * *")


@pytest.mark.parametrize("given", ["default", 5, None])
def test_a_job_is_made_of_a_function(given):
    """`@job("default")` is how rq writes it."""
    if given is None:
        assert callable(job(given))
        return
    with pytest.raises(TypeError, match="@job takes a function, and options by name"):
        job(given)


def test_the_options_are_those_of_the_contract():
    def options(function) -> set[str]:
        return set(inspect.signature(function).parameters) - {"self", "function", "job"}

    assert options(Job.__init__) == {
        "queue",
        "name",
        "timeout",
        "max_attempts",
        "backoff",
        "cron",
        "missed",
        "unique_for",
        "unique_until",
    }
    assert {"cron", "queue", "batch_size", "limit", "jitter"} <= options(Sweep.__init__)


def test_a_job_and_a_sweep_say_who_they_are():
    assert (repr(do_task), repr(schedule_tasks)) == ("<Job do_task>", "<Sweep schedule_tasks>")


def test_a_sweep_is_switched_off_by_its_own_switch_or_its_jobs():
    assert schedule_tasks.switches == {"schedule_tasks", "do_task"}
    assert do_task.switches == {"do_task"}
