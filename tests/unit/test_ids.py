"""A message is its id: any primary key goes in, the same comes out, in letters that rq allows."""

import re
import uuid

import pytest
from django.db import models
from django.test.utils import isolate_apps
from hypothesis import assume, example, given
from hypothesis import strategies as st
from redis import Redis

from jobs.message import Message, decode, encode, pk_text, pk_value, row_id
from tests.cast.models import Keyed, Task, Ticket

pytestmark = pytest.mark.any_database

ALLOWED = re.compile(r"[A-Za-z0-9_-]*")
# What a text column can hold: no lone surrogates.
texts = st.text(st.characters(exclude_categories=["Cs"]))


def test_ordinary_keys_stay_readable():
    ticket = uuid.UUID("7b0c1e62-44f8-4d0c-8f6e-1f8b7a5f5b01")
    assert row_id("create_database", pk_text(42)) == "create_database-42"
    assert row_id("create_database", pk_text(-42)) == "create_database--42"
    assert row_id("do_ticket", pk_text(ticket)) == f"do_ticket-{ticket}"
    assert row_id("do_keyed", "a/b c_d") == "do_keyed-a_2Fb_20c_5Fd"


@pytest.mark.parametrize("key", ["", "-", "_", "_20", "a_", "ключ/β 😀", "\x00\n", "%41", "A" * 500, "ü" * 500, "2²"])
def test_any_text_comes_back_as_it_went(key):
    assert decode(encode(key)) == key
    assert ALLOWED.fullmatch(encode(key))


@given(texts)
@example("²")  # A digit, but not an ASCII one.
@example("_41")
def test_encoding_is_reversible_and_rq_allows_it(text):
    assert decode(encode(text)) == text
    assert Message(row_id("do_keyed", text), connection=Redis()).id == f"do_keyed-{encode(text)}"


@given(texts, texts)
def test_two_keys_never_share_an_id(one, two):
    assume(one != two)
    assert encode(one) != encode(two)


@given(st.text("0123456789ABCDEFabcdef_-xz", max_size=12))
def test_what_was_never_encoded_is_refused_and_nothing_has_two_ids(text):
    try:
        decoded = decode(text)
    except ValueError:
        return
    assert encode(decoded) == text


@pytest.mark.parametrize("text", ["_", "_4", "_zz", "_41", "_2f", "_FF", "a_2", "_C3_28", "_ED_A0_80"])
def test_malformed_and_second_encodings_are_refused(text):
    with pytest.raises(ValueError, match=r"no encoded primary key|can't decode"):
        decode(text)


@pytest.mark.parametrize(
    ("model", "value"), [(Task, 42), (Task, -1), (Ticket, uuid.uuid4()), (Keyed, "a/b"), (Keyed, "-7")]
)
def test_a_key_of_any_model_survives_as_text(model, value):
    assert pk_value(model, pk_text(value)) == value


@given(st.integers(min_value=-(2**63), max_value=2**63 - 1))
def test_every_integer_key_survives(number):
    assert pk_value(Task, decode(encode(pk_text(number)))) == number


@pytest.mark.parametrize(("model", "text"), [(Task, "x"), (Task, ""), (Task, "1" * 5000), (Ticket, "42")])
def test_what_cannot_be_a_key_of_the_model_is_refused(model, text):
    with pytest.raises(ValueError, match=f"is no primary key of {model._meta.label}"):
        pk_value(model, text)


@isolate_apps("tests.cast")
def test_composite_keys_survive():
    class Seat(models.Model):  # noqa: DJ008
        pk = models.CompositePrimaryKey("row", "number")
        row = models.CharField(max_length=10)
        number = models.IntegerField()

        class Meta:
            app_label = "cast"

    for key in (("a,b", 7), ('"', -1)):
        assert pk_value(Seat, decode(encode(pk_text(key)))) == key
