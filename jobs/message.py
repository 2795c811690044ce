"""The message in the queue: an id from which everything else is found in the code and the database.

`create_database-42` is the work of one job on one row, `schedule_databases` a run of a schedule, and
`check_deployment_status-<hex>` a plain call, the only kind with something more in Redis: its arguments, in JSON.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, cast
from uuid import uuid4

from django.core.exceptions import ValidationError
from django.db.models import Model
from redis.exceptions import ResponseError
from rq.exceptions import NoSuchJobError
from rq.job import Job, JobStatus
from rq.serializers import JSONSerializer
from rq.utils import as_text

from jobs import registry
from jobs.exceptions import Misconfigured

if TYPE_CHECKING:
    from redis import Redis

    from jobs.job import Declared

# What a plain call's arguments may take up at most, unpacked. Redis may hold anything by the time we read it.
MAX_CALL_BYTES = 1_000_000
# PostgreSQL indexes at most 2,704 bytes, and a claim's identity has a job and a model too.
MAX_PK_BYTES = 2_200


def row_id(name: str, pk: str) -> str:
    """Return the id of the work of one job on the row with this primary key (text). Reversible at any length."""
    return f"{name}-{encode(pk)}"


def row_ids(name: str, pks: Iterable[str]) -> list[bytes]:
    """Return the ids of many rows, as Redis has them."""
    return [f"{name}-{encode(pk)}".encode() for pk in pks]


def encode(text: str) -> str:
    """Write any text in the letters that rq allows in an id. Digits, letters and dashes stay readable."""
    if text.isascii() and (text.isalnum() or text.replace("-", "").isalnum()):
        return text
    return re.sub(rb"[^A-Za-z0-9-]", lambda match: b"_%02X" % match[0][0], text.encode()).decode()


def decode(text: str) -> str:
    """Undo `encode`. Raises `ValueError` for what it never wrote."""
    if "_" not in text:
        return text
    raw = re.sub(rb"_([0-9A-F]{2})", lambda match: bytes([int(match[1], 16)]), text.encode())
    decoded = raw.decode()
    if encode(decoded) != text:
        raise ValueError(f"{text!r} is no encoded primary key.")
    return decoded


def label(model: type[Model]) -> str:
    """Return the name under which the rows of a model are claimed: proxies and children are rows of their root."""
    return _root(model)._meta.label_lower


def _root(model: type[Model]) -> type[Model]:
    concrete = model._meta.concrete_model or model
    root: type[Model] = [concrete, *concrete._meta.get_parent_list()][-1]
    return root


def pk_text(pk: Any) -> str:
    """Return a primary key as text, the form that claims and messages carry. Composite ones become a JSON list."""
    if isinstance(pk, (tuple, list)):
        return json.dumps([str(part) for part in pk], ensure_ascii=False)
    return str(pk)


def pk_of(row: Model) -> str:
    """Return a row's primary key as text, as one that was read has it: a UUID that was set without dashes has them.

    Of a row that is spread over several tables, that of its root: the name by which it is claimed.
    """
    root = _root(type(row))
    is_link = getattr(type(row)._meta.pk.remote_field, "parent_link", False)
    # What the link to a parent says is there also where the parent's own column was not loaded.
    pk = row.pk if is_link else getattr(row, root._meta.pk.attname)
    return pk_text(pk_value(root, pk_text(pk)))


def pk_value(model: type[Model], text: str) -> Any:
    """Return the primary key that the text stands for. Raises `ValueError` when it cannot be one of this model's."""
    try:
        value = model._meta.pk.to_python(text)
    except (ValidationError, ValueError, TypeError):
        raise ValueError(f"{text!r} is no primary key of {model._meta.label}.") from None
    return tuple(value) if isinstance(value, list) else value


def check_pk(text: str) -> str:
    """Return the text; raise `ValueError` for one that is too long to be indexed, or that no database stores."""
    # No letter takes more than four bytes.
    if len(text) * 4 > MAX_PK_BYTES and len(text.encode()) > MAX_PK_BYTES:
        raise ValueError(f"A primary key of more than {MAX_PK_BYTES:,} bytes cannot be claimed: {text[:50]}…")
    if "\0" in text:
        raise ValueError(f"A primary key with a NUL in it cannot be claimed: {text[:50]!r}")
    return text


class Message(Job):
    """rq's job, rebuilt from its id. It names work; it carries nothing that could be executed.

    `refresh` raises `NoSuchJobError` for whatever the project did not declare, so neither a worker nor a page that
    lists the queue will touch it.
    """

    declared: Declared
    # The row's primary key as text; the schedule's name for a run of a schedule; None for a plain call.
    pk: str | None = None
    attempt: int = 0

    def __init__(self, id: str | None = None, connection: Redis | None = None, serializer: Any = None) -> None:
        # JSON whatever the caller prefers: a pickle in Redis is code.
        super().__init__(id, connection=connection, serializer=JSONSerializer)

    @classmethod
    def create(cls, func: Any, *args: Any, **kwargs: Any) -> Message:
        """Refuse rq's own way in: only what `.enqueue` of a declared job makes can be run."""
        raise TypeError(
            f"{func!r} cannot be queued this way. Declare it with @job, then call .enqueue(...) on it: "
            "workers run declared jobs only."
        )

    @classmethod
    def call(cls, declared: Any, args: tuple[Any, ...], kwargs: dict[str, Any], connection: Redis) -> Message:
        """Make the message of a plain call. Raises `TypeError` for arguments that are not JSON."""
        try:
            problem = _not_json([list(args), kwargs])
        except RecursionError:
            problem = "arguments that contain themselves, or are nested too deeply"
        if problem:
            raise TypeError(
                f"{declared.name} cannot be queued with {problem}: pass JSON values, such as a primary key."
            )
        message = cls(f"{declared.name}-{uuid4().hex}", connection=connection)
        message._describe(declared, list(args), kwargs)
        if len(message.data) > MAX_CALL_BYTES:
            raise ValueError(
                f"The arguments of {declared.name} take {len(message.data):,} bytes; {MAX_CALL_BYTES:,} is the most. "
                "Keep the data in a row and pass its primary key."
            )
        return message

    def refresh(self) -> None:
        """Find out what this id stands for. Asks Redis only for a plain call."""
        name, dash, rest = self.id.partition("-")
        declared = registry.get(name)
        if declared is None:
            raise NoSuchJobError(f"no job or sweep named {name!r} is declared in this project")
        if not dash:
            if not declared.is_scheduled:
                raise NoSuchJobError(f"{name} has no schedule")
            self.pk = name
            self._describe(declared, [], {})
        elif declared.is_swept:
            self.pk = check_pk(decode(rest))
            # Another spelling of the same key, such as 042, would be another row to the claims.
            if pk_text(pk_value(declared.model, self.pk)) != self.pk:
                raise NoSuchJobError(f"{rest!r} is not how {name} writes a primary key")
            self._describe(declared, [self.pk], {})
        elif declared.takes_calls:
            self._read_call(declared)
        else:
            raise NoSuchJobError(f"{name} is a sweep, and takes no arguments")

    def _read_call(self, declared: Any) -> None:
        try:
            stored = self.connection.hmget(self.key, "data", "attempt")
        except ResponseError as error:
            raise NoSuchJobError(f"its arguments cannot be read: {error}") from None
        if stored[0] is None:
            raise NoSuchJobError("its arguments are gone from Redis")
        try:
            unpacker = zlib.decompressobj()
            data = unpacker.decompress(cast(bytes, stored[0]), MAX_CALL_BYTES)
            name, instance, args, kwargs = json.loads(data)
            self.attempt = int(stored[1] or 0)
            if str(self.attempt) != as_text(stored[1] or b"0"):
                # Redis, which adds to it, reads numbers more strictly.
                raise ValueError(f"{stored[1]!r} is no number of an attempt")
        except (zlib.error, ValueError, TypeError, RecursionError) as error:
            raise NoSuchJobError(f"its arguments cannot be read: {error}") from None
        if name != declared.name or instance is not None or not isinstance(args, list) or not isinstance(kwargs, dict):
            raise NoSuchJobError(f"its arguments are not those of a call of {declared.name}")
        self._describe(declared, args, kwargs)

    def _describe(self, declared: Any, args: list[Any], kwargs: dict[str, Any]) -> None:
        self.declared = declared
        self._func_name, self._instance, self._args, self._kwargs = declared.name, None, args, kwargs
        self.origin = declared.queue
        self.timeout = declared.timeout_seconds
        # Not the arguments: this is logged, and they may be private.
        self.description = self.id
        self._status = JobStatus.QUEUED
        # Nobody knows since when an id is queued, but django-rq's dashboard fails without a time.
        self.enqueued_at = self.created_at

    @property
    def func(self) -> Any:
        return self.declared

    def perform(self) -> Any:
        """Refuse: a worker of another class would run the function without a claim, with a key instead of the row."""
        raise Misconfigured(f"{self.id} needs a worker of the class jobs.worker.Worker; set it in RQ['WORKER_CLASS'].")

    # rq imports a callback by the name that stands in Redis. Nothing that stands in Redis is imported here.
    success_callback = failure_callback = stopped_callback = property(lambda self: None)


def _not_json(value: Any) -> str | None:
    """Return what in the value would not come back from JSON as it went, or None."""
    if value is None or isinstance(value, (str, bool, int)):
        return None
    if isinstance(value, float):
        return None if math.isfinite(value) else repr(value)
    if isinstance(value, (list, tuple)):
        return next((problem for item in value if (problem := _not_json(item))), None)
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                return f"the key {key!r}, which is no text"
            if problem := _not_json(item):
                return problem
        return None
    return f"{value!r} ({type(value).__name__})"
