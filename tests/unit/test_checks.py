"""What a project can get wrong stops it at start, in a sentence that says what to do, with an id to look it up by."""

from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
from django.apps import apps
from django.core.checks import run_checks
from django.core.exceptions import ImproperlyConfigured
from django.core.management import call_command
from django.core.management.base import SystemCheckError
from django.db import connection, models
from django.db.models import Count, Exists, F, Q
from django.test.utils import isolate_apps

from config.servers import free_port
from databases.models import Database
from jobs import Backoff, checks, job, registry, sweep
from jobs.conf import DEFAULTS, conf
from jobs.exceptions import Misconfigured, SelfHealError
from tests.cast.models import Parcel, Seat, Stateful, Task, Truck

pytestmark = pytest.mark.any_database

EVERY_MINUTE = "* * * * *"


@pytest.fixture(autouse=True)
def _declaring() -> Iterator[None]:
    with registry.sandbox():
        yield


def found() -> list[tuple[str, str]]:
    """What the library's checks say now."""
    return [(error.id, f"{error.msg} {error.hint or ''}") for error in run_checks(tags=["selfheal"])]


def expect(number: str, sentence: str) -> None:
    """Exactly this one, and nothing else."""
    [(id, message)] = found()
    assert id == f"selfheal.{number}"
    assert sentence in message


def walk(dog: Any = None) -> None:
    pass


def all_tasks() -> Any:
    return Task.objects.all()


def test_this_project_has_nothing_to_complain_about():
    assert found() == []


def test_a_mistake_stops_the_stock_commands_before_they_begin():
    job(queue="fast")(walk)
    for command, options in {
        "check": {},
        "rqworker": {"skip_checks": False},
        "rqscheduler": {"skip_checks": False},
    }.items():
        with pytest.raises(SystemCheckError, match=r"selfheal\.E003"):
            call_command(command, **options)


def test_the_message_says_where_the_mistake_is():
    job(queue="fast")(walk)
    expect("E003", f"{__name__}.walk: There is no queue 'fast' in RQ_QUEUES; add it there or pass another queue=.")


# --- Names ------------------------------------------------------------------------------------------------------------


def test_e001_a_name_that_is_taken():
    first = job(walk)
    second = job(walk)
    expect("E001", "has its name, 'walk', already, and names are unique in a project. Rename one of them, or pass name")
    assert registry.get("walk") is first
    assert registry.get("walk") is not second


def test_e001_a_job_and_a_sweep_share_their_names():
    fed = job(name="walk")(walk)
    sweep(fed, cron=EVERY_MINUTE, name="walk")(all_tasks)
    expect("E001", "names are unique in a project")


@pytest.mark.parametrize("name", ["", "walk-dog", "walk dog", "1walk", "walk.dog", "x" * 81, "märz", 5, ("a",)])
def test_e005_a_name_that_cannot_be_in_an_id(name):
    job(name=name)(walk)
    expect("E005", f"The name {name!r} must be letters, digits and underscores, at most 80 of them.")


def test_e005_a_function_without_a_name():
    job(lambda: None)
    expect("E005", "The name '<lambda>' must be letters")


def test_a_name_as_long_as_allowed_is_fine():
    job(name="x" * 80)(walk)
    assert found() == []


# --- Options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cron", ["* * * *", "every minute", "61 * * * *", "", "0 0 30 2 *", 60])
def test_e002_a_cron_that_never_comes_due(cron):
    job(cron=cron)(walk)
    expect("E002", f"{cron!r} is no cron expression")


def test_e002_a_sweep_without_a_schedule():
    sweep(job(walk), cron=None, name="walk_dogs")(all_tasks)
    expect("E002", 'cron is None; pass an expression, such as "* * * * *" for every minute.')


@pytest.mark.parametrize("queue", ["fast", "", None, 3, ["default"]])
def test_e003_a_queue_that_does_not_exist(queue):
    job(queue=queue)(walk)
    expect("E003", f"There is no queue {queue!r} in RQ_QUEUES")


def test_e003_a_sweeps_own_queue():
    sweep(job(walk), cron=EVERY_MINUTE, queue="slow", name="walk_dogs")(all_tasks)
    expect("E003", "There is no queue 'slow' in RQ_QUEUES")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"timeout": 60}, "timeout is 60; pass a timedelta longer than zero."),
        ({"timeout": timedelta(0)}, "pass a timedelta longer than zero."),
        ({"max_attempts": 0}, "max_attempts is 0; pass a number from 1, or None for no end."),
        ({"max_attempts": -1}, "pass a number from 1"),
        ({"max_attempts": True}, "max_attempts is True; pass a number from 1"),
        ({"max_attempts": "3"}, "max_attempts is '3'; pass a number from 1"),
        ({"backoff": timedelta(seconds=10)}, "pass Backoff(first=..., cap=...)."),
        ({"backoff": Backoff(first=10)}, "make first and cap timedeltas longer than zero."),
        ({"backoff": Backoff(cap=timedelta(0))}, "make first and cap timedeltas longer than zero."),
        ({"unique_for": 60}, "unique_for is 60; pass a timedelta longer than zero."),
        ({"unique_for": timedelta(0)}, "pass a timedelta longer than zero."),
        (
            {"unique_for": timedelta(1), "unique_until": "end"},
            'unique_until is \'end\'; pass "start" or "done".',
        ),
        ({"unique_until": "start"}, "unique_until does nothing without unique_for; pass both."),
        ({"cron": EVERY_MINUTE, "missed": "never"}, 'missed is \'never\'; pass "once", "skip" or "all".'),
        ({"missed": "all"}, 'missed="all" does nothing without cron; pass both.'),
    ],
    ids=str,
)
def test_e004_an_option_of_a_job(options, sentence):
    job(**options)(walk)
    expect("E004", sentence)


def test_e004_a_coroutine_function():
    @job
    async def walk_later():
        pass

    expect("E004", "It is a coroutine function, which would never be awaited; wrap it in async_to_sync.")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"batch_size": 0}, "batch_size is 0; pass a number from 1."),
        ({"batch_size": None}, "batch_size is None; pass a number from 1."),
        ({"limit": 0}, "limit is 0; pass a number from 1."),
        ({"limit": 1.5}, "limit is 1.5; pass a number from 1."),
        ({"jitter": 60}, "jitter is 60; pass a timedelta longer than zero."),
        ({"jitter": timedelta(0)}, "pass a timedelta longer than zero."),
        ({"jitter": timedelta(days=2)}, "jitter is 2 days, 0:00:00; 1 day, 0:00:00 is the most."),
        ({"timeout": 60}, "timeout is 60; pass a timedelta longer than zero."),
    ],
    ids=str,
)
def test_e004_an_option_of_a_sweep(options, sentence):
    sweep(job(walk), cron=EVERY_MINUTE, name="walk_dogs", **options)(all_tasks)
    expect("E004", sentence)


# --- Jobs and their sweeps --------------------------------------------------------------------------------------------


def test_e006_two_sweeps_of_one_job():
    fed = job(walk)
    first = sweep(fed, cron=EVERY_MINUTE, name="walk_dogs")(all_tasks)
    sweep(fed, cron=EVERY_MINUTE, name="walk_more_dogs")(all_tasks)
    expect("E006", "walk already has a sweep, <Sweep walk_dogs>; combine their querysets with |.")
    assert fed.sweep is first


def test_e006_a_swept_job_with_a_schedule_of_its_own():
    sweep(job(cron=EVERY_MINUTE)(walk), cron=EVERY_MINUTE, name="walk_dogs")(all_tasks)
    expect("E006", "A job that a sweep feeds has no cron of its own; move it to the sweep.")


def test_e006_a_swept_job_that_wants_to_be_unique():
    sweep(job(unique_for=timedelta(1))(walk), cron=EVERY_MINUTE, name="walk_dogs")(all_tasks)
    expect("E006", "unique_for is for plain jobs; a row's id is unique in the queue anyway. Remove it.")


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        (lambda: None, "returned NoneType; return a queryset of the rows."),
        (lambda: [1, 2], "returned list; return a queryset of the rows."),
        (lambda: Task, "returned ModelBase; return a queryset of the rows."),
        (lambda: Task.objects, "return a queryset of the rows."),
        (lambda: Task.objects.all()[:10], "cannot be filtered any further, because it is a slice; combine with |"),
        (lambda: Task.objects.all().union(Task.objects.all()), "cannot be filtered any further, because it is a union"),
        (lambda: Task.objects.values_list("pk"), "returned values; return a queryset of the rows themselves."),
        (lambda: Task.objects.values("name"), "returned values; return a queryset of the rows themselves."),
        (lambda: Task.objects.filter(colour="red"), "raised FieldError: Cannot resolve keyword 'colour'"),
    ],
)
def test_e009_a_sweep_that_does_not_find_rows(rows, sentence):
    sweep(job(walk), cron=EVERY_MINUTE, name="walk_dogs")(rows)
    expect("E009", sentence)


@isolate_apps("tests.cast")
def test_e009_rows_that_cannot_be_named():
    class Digest(Stateful):
        sha = models.BinaryField(primary_key=True)

        class Meta:
            app_label = "cast"

    sweep(job(walk), cron=EVERY_MINUTE, name="walk_dogs")(lambda: Digest.objects.exclude(sha=b""))
    expect("E009", "The primary key of cast.Digest is binary, and cannot be written in an id; use another.")


@isolate_apps("tests.cast")
def test_e009_rows_that_are_rows_of_two_tables():
    class OfTheCast:
        app_label = "cast"

    class Book(Stateful):
        number = models.AutoField(primary_key=True)
        state = None
        Meta = OfTheCast

    class Article(Stateful):
        Meta = OfTheCast

    class Review(Book, Article):
        Meta = OfTheCast

    class LongReview(Review):
        Meta = OfTheCast

    class Reprint(Book):
        isbn = models.CharField(primary_key=True, max_length=20)
        book = models.OneToOneField(Book, models.CASCADE, parent_link=True)
        Meta = OfTheCast

    with registry.sandbox():
        sweep(job(walk), cron=EVERY_MINUTE, name="walk_dogs")(lambda: Reprint.objects.exclude(pk=0))
        expect(
            "E009", "A row of cast.Reprint is also a row of cast.Book, under another primary key. Make the link to it"
        )
    for model in (Review, LongReview):
        with registry.sandbox():
            sweep(job(walk), cron=EVERY_MINUTE, name="walk_dogs")(lambda model=model: model.objects.exclude(pk=0))
            expect("E009", "A row of cast.Review is also a row of each of cast.Book, cast.Article, and one lease can")


def test_a_database_without_tables_is_no_mistake_of_the_sweep():
    """`migrate` runs the checks before there are any."""
    from django.db import OperationalError

    def asks_at_once():
        raise OperationalError("no such table: cast_task")

    sweep(job(walk), cron=EVERY_MINUTE, name="walk_dogs")(asks_at_once)
    assert found() == []


def test_combined_querysets_are_one_queryset():
    sweep(job(walk), cron=EVERY_MINUTE, name="walk_dogs")(lambda: Task.objects.pending() | Task.objects.deleting())
    assert found() == []


# --- Settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("option", "path"), checks.CLASSES.items())
@pytest.mark.parametrize("wrong", [None, "rq.job.Job", "no.such.Class", "jobs.queues.names", 5])
def test_e007_a_class_that_django_rq_must_use(settings, option, path, wrong):
    settings.RQ = {**settings.RQ, option: wrong}
    expect("E007", f'RQ[\'{option}\'] is {wrong!r}. Set RQ = {{"{option}": "{path}", ...}}, or a subclass of it.')


@pytest.mark.parametrize("rq", [None, [], "jobs"])
def test_e007_what_is_no_dictionary(settings, rq):
    settings.RQ = rq
    assert [id for id, _ in found()] == ["selfheal.E007"] * 4


def test_e007_every_one_that_is_missing(settings):
    del settings.RQ
    assert [id for id, _ in found()] == ["selfheal.E007"] * 4


def test_a_subclass_does_by_path_or_itself(settings):
    from jobs.worker import Worker

    class OurWorker(Worker):
        pass

    settings.RQ = {**settings.RQ, "WORKER_CLASS": OurWorker}
    assert found() == []


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"LEASES": timedelta(1)}, "JOBS has no setting 'LEASES'; use one of LEASE, HEARTBEAT, TICK,"),
        ({"LEASE": 60}, "JOBS['LEASE'] is 60; make it a timedelta longer than zero."),
        ({"TICK": timedelta(0)}, "JOBS['TICK'] is datetime.timedelta(0); make it a timedelta longer than zero."),
        ({"KEEP_RUNS": None}, "JOBS['KEEP_RUNS'] is None; make it a timedelta longer than zero."),
        ({"REDACT": 1}, "JOBS['REDACT'] is 1; make it a function of a text, or the path to one."),
        ({"REDACT": "no.such.function"}, "JOBS['REDACT'] is 'no.such.function', which cannot be imported"),
        ({"LEASE": timedelta(seconds=29)}, "leaves room for less than two heartbeats"),
        ([], "JOBS is []; make it a dict."),
        (None, "JOBS is None; make it a dict."),
    ],
    ids=str,
)
def test_e008_a_setting_of_our_own(settings, given, sentence):
    settings.JOBS = given
    expect("E008", sentence)


def test_the_defaults_are_those_of_the_contract_and_apply_without_any_setting(settings):
    del settings.JOBS
    assert (
        timedelta(seconds=60),
        timedelta(seconds=15),
        timedelta(seconds=5),
        timedelta(milliseconds=500),
        timedelta(days=14),
    ) == (conf.LEASE, conf.HEARTBEAT, conf.TICK, conf.REDIS_TIMEOUT, conf.KEEP_RUNS)
    assert conf.lease_margin == timedelta(seconds=10)
    assert found() == []


def test_settings_are_read_when_they_are_needed(settings):
    settings.JOBS = {"LEASE": timedelta(seconds=90)}
    assert timedelta(seconds=90) == conf.LEASE
    settings.JOBS = {"LEASE": timedelta(seconds=120)}
    assert timedelta(seconds=120) == conf.LEASE


@pytest.mark.parametrize("name", DEFAULTS)
def test_a_wrong_setting_is_refused_where_it_is_used_too(settings, name):
    settings.JOBS = {name: 5}
    with pytest.raises(Misconfigured, match=rf"JOBS\['{name}'\] is 5"):
        getattr(conf, name)


def test_there_is_no_other_setting():
    with pytest.raises(AttributeError):
        _ = conf.INTERVAL


def test_a_mistake_of_configuration_is_also_djangos():
    assert issubclass(Misconfigured, ImproperlyConfigured)
    assert issubclass(Misconfigured, SelfHealError)


def test_the_errors_have_one_root() -> None:
    from jobs import LeaseLost, NoLongerNeeded, QueueUnavailable

    roots: list[Callable[..., Any]] = [LeaseLost, NoLongerNeeded, QueueUnavailable]
    assert all(issubclass(error, SelfHealError) for error in roots)


# --- Around it --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["django_rq", "waffle"])
def test_e010_an_app_that_is_missing(monkeypatch, name):
    monkeypatch.setattr(apps, "is_installed", lambda asked: asked != name)
    expect("E010", f'\'{name}\' is not in INSTALLED_APPS. INSTALLED_APPS += ["django_rq", "waffle", "jobs"]')


def test_e011_a_database_that_cannot_hold_claims(monkeypatch):
    monkeypatch.setattr(connection, "vendor", "mysql")
    monkeypatch.setattr(connection, "display_name", "MySQL")
    expect("E011", "The database 'default' is MySQL, and claims cannot be kept there. Route the app selfheal")


@pytest.mark.parametrize("path", ["jobs.py", "jobs/__init__.py"])
def test_w013_another_package_of_its_name(monkeypatch, tmp_path, path):
    (tmp_path / path).parent.mkdir(exist_ok=True)
    (tmp_path / path).touch()
    monkeypatch.syspath_prepend(tmp_path)
    expect("W013", f"{tmp_path / path} cannot be imported: ")


def test_a_folder_of_its_name_that_is_no_package_is_in_nobodys_way(monkeypatch, tmp_path):
    (tmp_path / "jobs").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert found() == []


@pytest.mark.parametrize(
    ("rows", "fields", "index"),
    [
        (lambda: Task.objects.filter(behaviour="x"), "behaviour", 'fields=["id"], condition=models.Q(behaviour=...)'),
        (
            lambda: Task.objects.filter(behaviour__in=["x", "y"], seconds__lt=F("writes")),
            "behaviour, seconds",
            'fields=["seconds"], condition=models.Q(behaviour=...)',
        ),
        (
            lambda: Task.objects.filter(Q(behaviour="x") | ~Q(name="y")),
            "behaviour, name",
            'fields=["id"], condition=models.Q(behaviour=...)',
        ),
        # A condition cannot move with the time.
        (lambda: Task.objects.filter(seconds__lte=7), "seconds", 'fields=["seconds"], name="..."'),
        (
            lambda: Task.objects.filter(seconds__range=(1, 2), behaviour="x"),
            "behaviour, seconds",
            'fields=["seconds"], condition=models.Q(behaviour=...)',
        ),
    ],
)
def test_w011_a_sweep_that_no_index_helps(rows, fields, index):
    sweep(job(walk), cron=EVERY_MINUTE, name="walk_dogs")(rows)
    sentence = f"no index of cast.Task helps to find its rows, by {fields}. Add one to Meta.indexes, such as"
    expect("W011", f"{sentence} models.Index({index}")


@pytest.mark.parametrize(
    "rows",
    [
        lambda: Task.objects.pending(),
        lambda: Task.objects.filter(behaviour="x", state="pending"),
        lambda: Task.objects.filter(pk__gt=5, behaviour="x"),
        lambda: Database.objects.pending(),
        lambda: Parcel.objects.filter(vehicle__state="pending"),
        lambda: Truck.objects.filter(state="pending"),
        lambda: Seat.objects.filter(pk=("hall", 1, "2026-01-01")),
        # Of these it cannot tell.
        lambda: Task.objects.none(),
        lambda: Task.objects.annotate(same=Count("pk")).filter(same=1),
        lambda: Task.objects.filter(Exists(Task.objects.filter(behaviour="x"))),
        lambda: Task.objects.extra(where=["1 = 1"]),
    ],
)
def test_a_sweep_that_an_index_may_help(rows):
    sweep(job(walk), cron=EVERY_MINUTE, name="walk_dogs")(rows)
    assert found() == []


@pytest.mark.parametrize("wrong", [-1, "-1", "for ever", "1x", "", [60], [], float("inf"), float("nan")])
def test_e012_a_queue_without_an_end(settings, wrong):
    settings.RQ_QUEUES = {**settings.RQ_QUEUES, "urgent": {**settings.RQ_QUEUES["urgent"], "DEFAULT_TIMEOUT": wrong}}
    expect("E012", f"The DEFAULT_TIMEOUT of the queue 'urgent' is {wrong!r}, and work without an end is never ended.")


def test_a_time_limit_as_rq_takes_it(settings):
    settings.RQ_QUEUES = {name: {**queue, "DEFAULT_TIMEOUT": "1h"} for name, queue in settings.RQ_QUEUES.items()}
    registry._declared.clear()
    assert job(timeout=timedelta(hours=1), name="short")(walk).timeout_seconds == 3600
    assert job(name="unsaid")(walk).timeout_seconds == 3600
    assert found() == []
    job(timeout=timedelta(hours=2))(walk)
    expect("W012", "is longer than the DEFAULT_TIMEOUT of the queue 'default', 3600 seconds")


def test_e013_time_that_comes_twice(settings):
    settings.USE_TZ = False
    expect("E013", "by the clocks of a time zone, an hour comes twice each year, and leases go by time.")


def test_w012_long_work_in_a_queue_for_short_work(settings):
    settings.RQ_QUEUES = {name: {**queue, "DEFAULT_TIMEOUT": 60} for name, queue in settings.RQ_QUEUES.items()}
    registry._declared.clear()
    job(timeout=timedelta(minutes=1), name="short")(walk)
    assert found() == []
    job(timeout=timedelta(minutes=2))(walk)
    expect("W012", "its timeout, 0:02:00, is longer than the DEFAULT_TIMEOUT of the queue 'default', 60 seconds")


# --- Before a deployment ----------------------------------------------------------------------------------------------


def found_before_deployment() -> dict[str, str]:
    """What only `check --deploy` says, by id."""
    errors = run_checks(tags=["selfheal"], include_deployment_checks=True)
    return {error.id.removeprefix("selfheal."): f"{error.msg} {error.hint}" for error in errors}


@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-ttl"])
def test_w014_a_redis_that_throws_data_away(redis, policy):
    redis.config_set("maxmemory-policy", policy)
    try:
        assert f"throws data away when its memory is full ({policy})" in found_before_deployment()["W014"]
    finally:
        redis.config_set("maxmemory-policy", "noeviction")
    assert "W014" not in found_before_deployment()


def test_w015_a_redis_that_does_not_answer(settings):
    port = free_port()
    settings.RQ_QUEUES = {name: {"URL": f"redis://localhost:{port}/0"} for name in settings.RQ_QUEUES}
    assert found() == []
    problems = found_before_deployment()
    assert f"Redis at localhost:{port} does not answer: " in problems["W015"]
    assert "W014" not in problems


def test_w016_a_database_that_cannot_lock_a_row():
    assert found() == []
    problems = found_before_deployment()
    if connection.features.has_select_for_update:
        assert problems == {}
    else:
        assert "The database 'default' (SQLite) cannot lock a row" in problems["W016"]
        assert "Use PostgreSQL" in problems["W016"]
