"""Any model and any queryset of it: each goes the whole way from row to row, or says what is wrong."""

import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from decimal import Decimal
from typing import Any

import pytest
from django.db import connection, connections
from django.db.models import Count, Exists, F, Model, OuterRef, Q, QuerySet, Window
from django.db.models.functions import RowNumber
from django.test.utils import CaptureQueriesContext
from redis import Redis

from jobs import SweepResult, enqueue, job, sweep, with_lock
from jobs.exceptions import Misconfigured
from jobs.message import pk_of
from jobs.models import Claim, Run
from jobs.sweep import Sweep
from jobs.testing import drain, perform, tick
from tests.cast.models import (
    Account,
    Keyed,
    Parcel,
    Passport,
    Price,
    Seat,
    Secret,
    Sticker,
    Task,
    Ticket,
    Truck,
    UrgentTask,
    Vehicle,
)
from tests.integration.conftest import DEFAULT_LIST

pytestmark = [pytest.mark.long_on_postgres, pytest.mark.django_db]

Rows = Callable[[], QuerySet[Any]]


def pending(model: Any) -> Rows:
    return lambda: model._base_manager.filter(state="pending")


@pytest.fixture
def sweeping(nothing_else: None) -> Callable[..., Sweep]:
    """A sweep over any rows, whose job writes under the lock that they are done, and fails when told to."""

    def sweeping(rows: Rows, **options: Any) -> Sweep:
        @job
        def finish(row: Any) -> None:
            if row.state == "fail":
                raise RuntimeError("fails")
            with with_lock(row):
                assert row.state == "pending"
                row.state = "done"
                row.save(update_fields=["state"])

        return sweep(finish, cron="0 0 1 1 *", name="finish_all", **options)(rows)

    return sweeping


def state(row: Model) -> str:
    return type(row)._base_manager.values_list("state", flat=True).get(pk=row.pk)


@pytest.fixture
def go_the_whole_way(django_capture_on_commit_callbacks) -> Callable[..., None]:
    """Enqueue in each way there is, sweep, and perform: every row is queued once and done once."""

    def go(swept: Sweep, *rows: Any) -> None:
        with django_capture_on_commit_callbacks(execute=True):
            for row in rows:
                swept.job.enqueue(row)
                swept.job.enqueue(row.pk)
            swept.job.enqueue_many([row.pk for row in rows])
            swept.job.enqueue_many(swept())
        assert swept.sweep() == SweepResult(matched=len(rows), already_queued=len(rows))
        assert drain() == {"done": len(rows)}
        assert {state(row) for row in rows} == {"done"}
        assert swept.sweep() == SweepResult()
        assert not Claim.objects.exists()

    return go


TEXTS = [
    "a/b",
    "two words",
    " around ",
    "ключ 😀",
    "x" * 500,
    "😀" * 500,
    "-",
    "_",
    "_41",
    "A",
    "a",
    "a ",
    "007",
    "7",
    "",
]
TEXTS += ["new\nline", "a-b_c.d:e", "%s {} '; --", "[1, 2]", "None", "\u00e1", "a\u0301"]

KEYS: dict[str, Callable[[], list[Any]]] = {
    "whole numbers": lambda: [Account(number=number) for number in (42, 0, -1, -(2**31))],
    "decimal": lambda: [Price(amount=Decimal("1.50")), Price(amount=Decimal("-0.01"))],
    "uuid": lambda: [Ticket(id=uuid.UUID("00000000-0000-4000-8000-00000000000a")), Ticket()],
    "another row's": lambda: [Passport(ticket=Ticket.objects.create())],
    "several columns": lambda: [
        Seat(hall="great", number=-7, booked_on=date(2026, 2, 28)),
        Seat(hall="great", number=-7, booked_on=date(2026, 3, 1)),
        Seat(hall='a/b "c" [é, 😀]', number=0, booked_on=date.max),
    ],
    "text": lambda: [Keyed(key=key) for key in TEXTS],
}


def make(kind: str, state: str = "pending") -> list[Any]:
    rows = KEYS[kind]()
    for row in rows:
        row.state = state
        row.save(force_insert=True)
    return rows


@pytest.mark.parametrize("kind", KEYS)
def test_a_primary_key_of_any_kind(sweeping, go_the_whole_way, kind):
    rows = make(kind)
    go_the_whole_way(sweeping(pending(type(rows[0]))), *rows)


@pytest.mark.parametrize("spelt", ["1.5", Decimal("1.5"), 1.5, "1.500"])
def test_a_key_that_is_spelt_otherwise_is_the_same_row(nothing_else, spelt, django_capture_on_commit_callbacks):
    price = Price.objects.create(amount=Decimal("1.50"))
    ended: list[Any] = []

    @job
    def finish(row: Price) -> None:
        ended.append(perform(finish, Decimal("1.5") if ended else spelt))
        ended.append(perform(finish, price.pk))
        with with_lock(row):
            row.state = "done"
            row.save(update_fields=["state"])

    sweep(finish, cron="0 0 1 1 *", name="finish_all")(pending(Price))
    with django_capture_on_commit_callbacks(execute=True):
        finish.enqueue(spelt)
    assert drain() == {"done": 1}
    # While it was at work, nobody else was, by whichever spelling.
    assert ended == ["busy", "busy"]
    assert state(price) == "done"
    assert list(Run.objects.values_list("object_pk", "outcome")) == [("1.50", "done")]
    assert not Claim.objects.exists()


def test_a_change_meanwhile_is_seen_by_any_spelling(sweeping):
    price = Price.objects.create(amount=Decimal("1.50"))
    swept = sweeping(pending(Price))

    @job
    def finish(row: Price) -> None:
        Price.objects.update(state="deleting")
        with with_lock(Price(amount="1.50")):
            pytest.fail("the row needs this no more")

    swept.job.function = finish.function
    assert perform(swept.job, "1.5") == "not_needed"
    assert state(price) == "deleting"


def test_a_row_whose_key_was_set_as_text(sweeping, go_the_whole_way):
    go_the_whole_way(sweeping(pending(Ticket)), Ticket.objects.create(id=uuid.uuid4().hex))


@pytest.mark.parametrize("kind", KEYS)
def test_a_primary_key_of_any_kind_is_held_and_found_again(sweeping, kind, redis, django_capture_on_commit_callbacks):
    rows = make(kind, state="fail")
    everything, count = type(rows[0])._base_manager, len(rows)
    swept = sweeping(lambda: everything.filter(state__in=["pending", "fail"]))
    assert {perform(swept.job, row) for row in rows} == {"failed"}
    # Backing off, they are left alone by all.
    assert swept.sweep() == SweepResult(matched=count, waiting=count)
    with django_capture_on_commit_callbacks(execute=True):
        swept.job.enqueue(rows[0])
        swept.job.enqueue_many(rows)
    assert redis.llen("rq:queue:default") == 0
    assert {perform(swept.job, row.pk) for row in rows} == {"waiting"}
    # Then the tick brings them back.
    Claim.objects.all().queue_now()
    tick()
    assert swept.sweep() == SweepResult(matched=count, already_queued=count)
    assert drain() == {"failed": count}
    assert set(Claim.objects.values_list("attempts", flat=True)) == {2}
    # Done by hand, they are settled.
    everything.update(state="done")
    swept.sweep()
    assert not Claim.objects.exists()
    assert Run.objects.filter(outcome="resolved").count() == count


@pytest.mark.parametrize(
    ("model", "wrong"),
    [(Account, "five"), (Account, 1.5), (Ticket, "42"), (Seat, 5), (Seat, "x"), (Seat, ("great", 1))],
)
def test_what_cannot_be_a_primary_key_is_refused_by_enqueue(sweeping, model, wrong):
    with pytest.raises(ValueError, match=rf"is no primary key of cast\.{model.__name__}"):
        sweeping(pending(model)).job.enqueue(wrong)


# --- Inherited, proxied, hidden ---------------------------------------------------------------------------------------


def test_a_sweep_of_an_inherited_model(sweeping, go_the_whole_way):
    Vehicle.objects.create()
    truck = Truck.objects.create()
    go_the_whole_way(sweeping(pending(Truck)), truck)
    assert Vehicle.objects.filter(state="pending").count() == 1


def test_a_sweep_that_loads_little_of_an_inherited_row(nothing_else, django_assert_num_queries):
    truck = Truck.objects.create()

    @job
    def finish(row: Truck) -> None:
        Truck.objects.filter(pk=row.pk).update(state="done")

    sweep(finish, cron="0 0 1 1 *", name="finish_all")(lambda: Truck.objects.filter(state="pending").only("load"))
    assert perform(finish, truck) == "done"
    assert perform(finish, truck.pk) == "not_needed"
    [loaded] = Truck.objects.only("load")
    with django_assert_num_queries(0):
        assert pk_of(loaded) == str(truck.pk)


def test_a_sweep_of_the_model_that_others_inherit(sweeping, go_the_whole_way):
    truck = Truck.objects.create()
    swept = sweeping(pending(Vehicle))
    go_the_whole_way(swept, truck.vehicle_ptr)
    Truck.objects.update(state="pending")
    assert perform(swept.job, truck) == "done"
    truck.refresh_from_db()
    assert truck.state == "done"


def test_a_row_of_the_parent_is_none_of_the_child(sweeping):
    with pytest.raises(TypeError, match=r"finish works on cast\.Truck, not on cast\.Vehicle"):
        sweeping(pending(Truck)).job.enqueue(Vehicle.objects.create())


def test_a_row_and_what_inherits_from_it_are_one_row(sweeping):
    truck = Truck.objects.create()
    seen = []

    @job
    def paint(row: Truck) -> None:
        seen.append(perform(of_vehicles.job, row.vehicle_ptr))

    of_vehicles = sweeping(pending(Vehicle))
    sweep(paint, cron="0 0 1 1 *", name="paint_all")(pending(Truck))
    assert perform(paint, truck) == "done"
    assert seen == ["busy"]


@pytest.mark.parametrize("swept_model", [Vehicle, Truck])
@pytest.mark.parametrize("locked_model", [Vehicle, Truck])
def test_either_half_of_an_inherited_row_can_be_locked(nothing_else, swept_model, locked_model):
    truck = Truck.objects.create()
    half = locked_model.objects.get(pk=truck.pk)
    seen = []

    @job
    def finish(row: Vehicle) -> None:
        locked_model.objects.update(wheels=6)
        with with_lock(half):
            seen.append(half.wheels)
        locked_model.objects.update(state="cancelled")
        with with_lock(half):
            seen.append("a user's change was not noticed")

    sweep(finish, cron="0 0 1 1 *", name="finish_all")(pending(swept_model))
    assert perform(finish, truck.pk) == "not_needed"
    assert seen == [6]


def test_a_sweep_of_a_proxy(sweeping, go_the_whole_way):
    go_the_whole_way(sweeping(pending(UrgentTask)), UrgentTask.objects.create())


def test_a_proxy_and_its_model_are_one_row(sweeping):
    task = Task.objects.create()
    swept = sweeping(pending(UrgentTask))
    assert perform(swept.job, task) == "done"
    assert state(task) == "done"


def test_rows_that_the_default_manager_hides(sweeping, go_the_whole_way):
    secret = Secret.everything.create()
    assert not Secret.objects.exists()
    go_the_whole_way(sweeping(lambda: Secret.everything.filter(state="pending")), secret)


def test_rows_that_even_the_base_manager_hides(nothing_else, monkeypatch):
    secret = Secret.everything.create()
    monkeypatch.setitem(vars(Secret._meta), "base_manager", Secret.objects)

    @job
    def finish(row: Secret) -> None:
        with with_lock(row):
            # Django's own save() would not find it either.
            Secret.everything.filter(pk=row.pk).update(state="done")

    sweep(finish, cron="0 0 1 1 *", name="finish_all")(lambda: Secret.everything.filter(state="pending"))
    assert perform(finish, secret) == "done"
    # And outside a job.
    with with_lock(secret):
        assert secret.state == "done"


def test_rows_that_become_hidden_from_the_sweep_are_left_alone(sweeping):
    secret = Secret.everything.create(hidden=False)
    swept = sweeping(lambda: Secret.objects.filter(state="pending"))
    assert swept.sweep().enqueued == 1
    Secret.everything.update(hidden=True)
    assert drain() == {"not_needed": 1}
    assert state(secret) == "pending"


# --- Querysets --------------------------------------------------------------------------------------------------------


def parcels() -> QuerySet[Parcel]:
    return Parcel.objects.filter(state="pending")


QUERYSETS: dict[str, Rows] = {
    "all": lambda: Parcel.objects.exclude(state="done"),
    "Meta.ordering": parcels,
    "order by a relation": lambda: parcels().order_by("vehicle__wheels", "stickers__colour"),
    "any order": lambda: parcels().order_by("?"),
    "no order": lambda: parcels().order_by(),
    "reverse": lambda: parcels().reverse(),
    "a join to one": lambda: parcels().filter(vehicle__wheels=4),
    "a join to many": lambda: parcels().filter(stickers__colour__in=["red", "blue"]),
    "a join to many, excluded": lambda: parcels().exclude(stickers__colour="green"),
    "distinct": lambda: parcels().filter(stickers__colour__in=["red", "blue"]).distinct(),
    "an outer join": lambda: parcels().filter(Q(vehicle__truck__load=1) | Q(stickers__isnull=False)),
    "|": lambda: parcels().filter(weight=1) | parcels().filter(stickers__colour="red"),
    "&": lambda: parcels().filter(weight=1) & parcels().filter(stickers__colour="red"),
    "group by": lambda: parcels().annotate(stuck=Count("stickers")).filter(stuck__gt=1),
    "group by two": lambda: parcels().annotate(Count("stickers"), Count("vehicle")).filter(stickers__count=2),
    "an annotation": lambda: parcels().annotate(double=F("weight") * 2).filter(double=2),
    "an alias": lambda: parcels().alias(double=F("weight") * 2).filter(double=2).order_by("double"),
    "exists": lambda: parcels().filter(Exists(Sticker.objects.filter(parcel=OuterRef("pk")))),
    "a subquery": lambda: Parcel.objects.filter(pk__in=parcels().order_by("pk")[:10]),
    "select_related": lambda: parcels().select_related("vehicle"),
    "select_related to many kinds": lambda: parcels().select_related("vehicle__truck"),
    "prefetch_related": lambda: parcels().prefetch_related("stickers"),
    "only": lambda: parcels().only("weight"),
    "only the key": lambda: parcels().only("pk"),
    "defer": lambda: parcels().defer("state"),
    "extra": lambda: parcels().extra(where=["weight = 1"]),
}


@pytest.mark.parametrize("rows", QUERYSETS.values(), ids=QUERYSETS)
def test_a_queryset_of_any_kind(sweeping, go_the_whole_way, rows):
    parcel = Parcel.objects.create(vehicle=Vehicle.objects.create())
    for colour in ("red", "blue"):
        Sticker.objects.create(parcel=parcel, colour=colour)
    Parcel.objects.create(state="done")
    go_the_whole_way(sweeping(rows), parcel)


@pytest.mark.parametrize("rows", QUERYSETS.values(), ids=QUERYSETS)
def test_under_the_lock_every_field_is_fresh_whatever_the_queryset_loads(nothing_else, rows):
    parcel = Parcel.objects.create(vehicle=Vehicle.objects.create())
    for colour in ("red", "blue"):
        Sticker.objects.create(parcel=parcel, colour=colour)

    @job
    def finish(row: Parcel) -> None:
        assert (row.weight, row.state) == (1, "pending")
        assert row.vehicle is not None
        other = Vehicle.objects.create()
        Parcel.objects.update(vehicle=other)
        with with_lock(row):
            assert row.vehicle == other
        Parcel.objects.update(state="cancelled")
        Parcel.objects.filter(state="cancelled").update(state="done")
        with with_lock(row):
            pytest.fail("a user's change was not noticed")

    swept = sweep(finish, cron="0 0 1 1 *", name="finish_all")(rows)
    assert perform(swept.job, parcel) == "not_needed", Run.objects.values_list("traceback", flat=True)


def test_the_heaviest_come_first_as_the_model_says(sweeping, redis):
    light, heavy = Parcel.objects.create(weight=1), Parcel.objects.create(weight=9)
    sweeping(parcels).sweep()
    assert redis.lrange("rq:queue:default", 0, -1) == [b"finish-%d" % heavy.pk, b"finish-%d" % light.pk]


@pytest.mark.parametrize("limit", [2, 20])
def test_ordered_by_what_there_are_many_of_each_comes_once(sweeping, redis, limit):
    """A row that comes fifty times must not use up the limit of the others."""
    first, second, third = (Parcel.objects.create() for _ in range(3))
    Sticker.objects.bulk_create(Sticker(parcel=first, colour="a") for _ in range(50))
    Sticker.objects.bulk_create(Sticker(parcel=parcel, colour="b") for parcel in (second, third))
    swept = sweeping(lambda: parcels().order_by("stickers__colour", "pk"), limit=limit, batch_size=2)
    assert swept.sweep().enqueued == min(limit, 3)
    names = [b"finish-%d" % parcel.pk for parcel in (first, second, third)]
    assert redis.lrange("rq:queue:default", 0, -1) == names[:limit]


@pytest.mark.parametrize(
    "rows",
    [
        lambda: Parcel.objects.filter(vehicle__wheels=4),
        lambda: Parcel.objects.order_by("vehicle__state"),
        lambda: Truck.objects.filter(wheels=4),
        lambda: Vehicle.objects.filter(truck__load=0),
        lambda: Passport.objects.exclude(ticket__state="lost"),
    ],
)
def test_a_join_to_one_row_reads_no_more_than_the_limit(sweeping, rows):
    """However many there are: no more than can be queued."""
    swept = sweeping(rows, limit=7)
    with CaptureQueriesContext(connection) as queries:
        swept.sweep()
    assert [sql for query in queries if "JOIN" in (sql := query["sql"]) and "LIMIT 7" in sql]


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        (lambda: None, "returned NoneType; return a queryset"),
        (lambda: list(parcels()), "returned list; return a queryset"),
        (lambda: iter(parcels()), "; return a queryset"),
        (lambda: Parcel.objects, "; return a queryset"),
        (lambda: Parcel.objects.raw("SELECT * FROM cast_parcel"), "returned RawQuerySet; return a queryset"),
        (lambda: parcels()[:10], "is a slice; combine with | instead, and bound it with limit="),
        (lambda: parcels()[5:], "is a slice"),
        (lambda: parcels().union(Parcel.objects.filter(weight=2)), "is a union; combine with | instead"),
        (lambda: parcels().difference(Parcel.objects.filter(weight=2)), "is a difference"),
        (lambda: parcels().values("pk"), "returned values; return a queryset of the rows themselves"),
        (lambda: parcels().values_list("pk"), "returned values"),
        (lambda: parcels().select_for_update(), "Remove select_for_update(): with_lock() locks"),
        (
            lambda: parcels().alias(place=Window(RowNumber(), partition_by="weight")).filter(place=1),
            "filtered by a window function, which sees other rows when it is asked about one of them",
        ),
        (lambda: parcels().distinct("weight"), "means another set of rows when it is asked about one of them"),
    ],
)
def test_what_is_no_queryset_of_rows_says_so(sweeping, rows, sentence):
    swept = sweeping(rows)
    assert sentence in " ".join(problem for _, problem in swept.problems())
    with pytest.raises(Misconfigured, match="finish_all returned"):
        swept.sweep()


def test_rows_of_one_model_today_and_of_another_tomorrow(sweeping):
    of_the_day = [Parcel.objects.all(), Task.objects.all()]
    swept = sweeping(lambda: of_the_day[0])
    swept.sweep()
    of_the_day.pop(0)
    with pytest.raises(Misconfigured, match=r"finish_all returned rows of cast\.Task, and before that of cast\.Parcel"):
        swept.sweep()


# --- Gone meanwhile ---------------------------------------------------------------------------------------------------


@pytest.fixture
def somebody_else() -> Iterator[Callable[[Callable[[], Any]], Any]]:
    """Do something on a connection of its own, and wait until it is done."""
    with ThreadPoolExecutor(1) as threads:

        def do(something: Callable[[], Any]) -> Any:
            def on_its_own_connection() -> Any:
                try:
                    return something()
                finally:
                    connections.close_all()

            return threads.submit(on_its_own_connection).result(30)

        yield do


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("how", ["everything", "some"])
def test_rows_that_are_deleted_while_a_sweep_runs(sweeping, somebody_else, monkeypatch, redis: Redis, how):
    Ticket.objects.bulk_create([Ticket() for _ in range(350)])
    kept = set(Ticket.objects.values_list("pk", flat=True)[: 0 if how == "everything" else 170])
    swept = sweeping(pending(Ticket), batch_size=100)
    push = enqueue.push_ids
    batches = []

    def push_and_delete(*args: Any) -> None:
        push(*args)
        batches.append(args)
        if len(batches) == 1:
            gone = [pk for pk in Ticket.objects.values_list("pk", flat=True) if pk not in kept]
            somebody_else(Ticket.objects.filter(pk__in=gone).delete)

    monkeypatch.setattr(enqueue, "push_ids", push_and_delete)
    result = swept.sweep()
    assert len(kept) <= result.enqueued <= 350
    outcomes = drain()
    assert outcomes["done"] == Ticket.objects.filter(state="done").count()
    assert outcomes.total() == result.enqueued
    assert set(outcomes) <= {"done", "not_needed"}
    swept.sweep()
    drain()
    assert not Ticket.objects.filter(state="pending").exists()
    assert Ticket.objects.count() == len(kept)
    assert not Claim.objects.exists()


@pytest.mark.timeout(1200)
@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("many", [100_000, pytest.param(1_000_000, marks=pytest.mark.long)])
def test_very_many_rows_that_are_deleted_while_a_sweep_reads_them(sweeping, monkeypatch, redis: Redis, many):
    each = many // 100
    kept, created = set(range(each, many + 1, each)), range(2 * many, 2 * many + 5)
    table = Vehicle._meta.db_table
    with connection.cursor() as cursor:
        cursor.execute(
            f"WITH RECURSIVE numbers(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < {many}) "
            f"INSERT INTO {table} (id, state, wheels) SELECT n, 'pending', 4 FROM numbers"
        )
    swept = sweeping(pending(Vehicle), limit=2 * many)
    push = enqueue.push_ids
    reading = threading.Event()
    batches, enough = 0, many // 1000 * 9 // 10

    def delete_and_create() -> None:
        assert reading.wait(60)
        try:
            for part, pk in enumerate(created):
                where = f"id % {len(created)} = {part} AND id % {each} <> 0"
                with connection.cursor() as cursor:
                    cursor.execute(f"DELETE FROM {table} WHERE {where}")
                Vehicle.objects.create(pk=pk)
        finally:
            connections.close_all()

    def push_beside_it(*args: Any) -> None:
        nonlocal batches
        push(*args)
        batches += 1
        reading.set()
        if batches == enough:
            # However fast this was, a tenth of the rows is still to be read when they are long gone.
            deleting.result(900)

    monkeypatch.setattr(enqueue, "push_ids", push_beside_it)
    with ThreadPoolExecutor(1) as threads:
        deleting = threads.submit(delete_and_create)
        result = swept.sweep()
    assert batches > enough
    assert result.matched == result.enqueued == redis.llen(DEFAULT_LIST)
    with redis.pipeline() as pipeline:
        for pk in kept:
            pipeline.execute_command("LPOS", DEFAULT_LIST, f"finish-{pk}", "COUNT", 0)
        assert [len(places) for places in pipeline.execute()] == [1] * len(kept)

    # A message about a row that is gone costs a quick exit; some of them are enough to see it.
    redis.ltrim(DEFAULT_LIST, -many // 1000, -1)
    outcomes = drain()
    assert outcomes.total() == many // 1000
    assert set(outcomes) == {"done", "not_needed"}
    # The others were lost with what was cut off, or created after the sweep had read that far.
    rows = kept | set(created)
    assert swept.sweep() == (left := len(rows) - outcomes["done"], left, 0, 0)
    assert drain() == {"done": left}
    assert set(Vehicle.objects.values_list("pk", "state")) == {(pk, "done") for pk in rows}
    assert not Claim.objects.exists()
    assert set(Run.objects.values_list("outcome", flat=True)) == {"done"}


@pytest.mark.parametrize("kind", ["several columns", "another row's", "inherited"])
def test_a_row_that_is_deleted_while_its_job_runs(nothing_else, kind):
    row = Truck.objects.create() if kind == "inherited" else make(kind)[0]

    @job
    def finish(row: Any) -> None:
        type(row)._base_manager.all().delete()
        with with_lock(row):
            pytest.fail("the row is gone")

    sweep(finish, cron="0 0 1 1 *", name="finish_all")(pending(type(row)))
    assert perform(finish, row) == "not_needed"
    assert not Claim.objects.exists()
