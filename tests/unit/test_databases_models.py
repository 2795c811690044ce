"""Rows of databases: names, states, and what the sweeps read."""

import pytest
from django.contrib.auth import get_user_model
from django.core.exceptions import ValidationError
from django.db import IntegrityError
from django.db.models import ProtectedError

from databases.models import Database
from databases.provisioners import Provisioned

pytestmark = pytest.mark.django_db
State = Database.State


@pytest.fixture
def owner(db):
    return get_user_model().objects.create_user("ada")


@pytest.fixture
def make(owner):
    def make(name: str = "shop", state: str = State.PENDING) -> Database:
        return Database.objects.create(name=name, owner=owner, state=state)

    return make


def state_of(database: Database) -> str:
    return Database.objects.values_list("state", flat=True).get(pk=database.pk)


@pytest.mark.parametrize("name", ["a", "shop", "shop_2", "s" * 63])
def test_good_names(owner, name):
    Database(name=name, owner=owner).full_clean()


@pytest.mark.parametrize(
    "name", ["", "Shop", "1shop", "_shop", "shop-2", "shop.x", "../shop", "shop\n", "s" * 64, "shöp"]
)
def test_bad_names(owner, name):
    with pytest.raises(ValidationError) as refused:
        Database(name=name, owner=owner).full_clean()
    assert set(refused.value.error_dict) == {"name"}


def test_a_name_is_never_used_twice_not_even_after_its_deletion(make, owner):
    make("shop", State.DELETED)
    with pytest.raises(ValidationError, match="Names are not used twice"):
        Database(name="shop", owner=owner).full_clean()
    with pytest.raises(IntegrityError):
        make("shop")


def test_an_owner_with_databases_cannot_be_deleted(make, owner):
    make()
    with pytest.raises(ProtectedError):
        owner.delete()


def test_each_sweep_finds_its_own_rows_oldest_first(make):
    rows = {state: [make(f"{state}_{n}", state) for n in range(2)] for state in State}
    assert list(Database.objects.pending()) == rows[State.PENDING]
    assert list(Database.objects.deleting()) == rows[State.DELETING]


# PostgreSQL reads a table as small as this one as it likes: see test_sweep_plans.
@pytest.mark.sqlite
@pytest.mark.parametrize("state", ["pending", "deleting"])
def test_a_sweep_reads_its_partial_index(make, state):
    for other in State:
        make(other, other)
    plan = getattr(Database.objects, state)().explain()
    assert f"databases_{state}" in plan, plan


@pytest.mark.parametrize("state", [State.PENDING, State.READY])
def test_a_deletion_is_asked_for_once(make, state):
    database = make(state=state)
    assert database.request_deletion() is True
    assert database.state == state_of(database) == State.DELETING
    assert database.request_deletion() is False


@pytest.mark.parametrize("state", [State.DELETING, State.DELETED])
def test_a_deletion_changes_nothing_where_it_was_asked_for_already(make, state):
    database = make(state=state)
    assert database.request_deletion() is False
    assert database.state == state_of(database) == state


def test_a_deletion_asks_the_row_and_not_what_was_read_of_it(make):
    database = make()
    Database.objects.filter(pk=database.pk).update(state=State.DELETED)
    assert database.request_deletion() is False
    assert database.state == state_of(database) == State.DELETED


def test_many_deletions_at_once_count_those_that_are_new(make):
    for state in State:
        make(state, state)
    assert Database.objects.all().request_deletion() == len(Database.DELETABLE)
    assert sorted(Database.objects.values_list("state", flat=True)) == ["deleted"] + ["deleting"] * 4


def test_becoming_ready_and_deleted_keeps_what_there_is_to_know(make):
    database = make()
    database.become_ready(Provisioned(path="/somewhere/shop.sqlite3", size=8192))
    database.refresh_from_db()
    assert (database.state, database.path, database.size) == (State.READY, "/somewhere/shop.sqlite3", 8192)
    assert database.ready_at >= database.created_at
    assert database.deleted_at is None

    database.become_deleted()
    database.refresh_from_db()
    assert (database.state, database.path, database.size) == (State.DELETED, "", None)
    assert database.deleted_at >= database.ready_at
