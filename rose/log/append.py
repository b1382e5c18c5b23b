"""Appends events to the log: one statement, all or nothing, safe to ask again with the same command id.

Decides nothing: events, entity rows and expected versions come from the caller (rose/commands.py).
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import asyncpg
import msgspec

from rose.domain import catalogue
from rose.domain.catalogue import Event
from rose.errors import Conflict, InvalidRequest, ProjectFull, RoseError, StaleEpoch
from rose.log.pool import ACQUIRE_SECONDS, Pool, attempts, unavailable
from rose.log.queries import QUERIES

MAX_EVENT_BYTES = 256_000
NAME_CONSTRAINTS = ("jobs_model_name_taken", "models_name_taken")


EntityKind = Literal["jobs", "files", "models", "projects", "keys", "uploads", "permissions", "webhooks"]
"""Tables that appends write rows of."""


class EntityRow(msgspec.Struct, frozen=True, kw_only=True):
    """The entity's row after the write."""

    kind: EntityKind
    id: str
    doc: bytes
    """JSON of the entity's state."""


class LeaseChange(msgspec.Struct, frozen=True, kw_only=True):
    """What the write does to the job's lease."""

    action: Literal["claim", "release", "revoke"]
    """claim: refused while another lease lives; release: only its living owner may; revoke: always."""
    job_id: str
    kind: Literal["validation", "training"]
    epoch: int
    """The new epoch for a claim, the owned one for a release; a revoke ignores it."""
    owner: str
    lease_seconds: float = 60.0
    not_before_seconds: float = 0.0
    """Of a release: how long nobody may claim the job."""


class Quota(msgspec.Struct, frozen=True, kw_only=True):
    """How much a project may have; the write is refused when it would have more."""

    of: Literal["jobs", "bytes"]
    """jobs: those that have not ended. bytes: what it stores."""
    project: str
    adds: int
    """How much the write adds."""
    most: int


class StreamWrite(msgspec.Struct, frozen=True, kw_only=True):
    """Events for one stream, with what is stored beside them."""

    stream_id: str
    expected_version: int
    """Version the events were decided at; 0 for a stream that is not born yet."""
    events: tuple[Event, ...]
    row: EntityRow | None = None
    epoch: int | None = None
    """Set on everything a run appends: refused unless this epoch's lease lives."""
    lease: LeaseChange | None = None
    quota: Quota | None = None
    """Counted and held until the commit, so that writes that come together stay below it together."""


class Actor(msgspec.Struct, frozen=True, kw_only=True):
    """Who caused the events."""

    kind: str
    """client, trainer, system or cli."""
    name: str | None = None
    request_id: str | None = None


class Appended(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to a command."""

    position: int
    """Of its last event."""
    replayed: bool
    """True when the command had been accepted before; nothing was written now."""
    response: bytes | None
    """What was stored with the command when it was accepted."""


class ModelNameTaken(Conflict):
    """Another job has reserved this model name."""

    default_code = "model_name_taken"


class KeyReused(InvalidRequest):
    """A command id belongs to another request."""

    default_code = "idempotency_key_reused"

    def __init__(self, message: str) -> None:
        super().__init__(message, param="Idempotency-Key", hint="Send a new key with a new request.")


class QuotaExceeded(ProjectFull):
    """A project would have more than a limit allows; whoever asked says it in words."""


class UnreadableEvent(RoseError):
    """An event would not be read as it was written."""

    default_code = "event_unreadable"


async def append(
    pool: Pool,
    writes: Sequence[StreamWrite],
    *,
    command_id: str,
    request_hash: str | None = None,
    response: bytes | None = None,
    actor: Actor,
) -> Appended:
    """Append the events of `writes`, their entity rows and lease changes in one transaction.

    The same `command_id` again answers with what was stored the first time. An unknown outcome (a lost connection, a
    timeout) is asked again with the same id, for a bounded time.

    Raises: Conflict when a stream moved on or a live lease is in the way; ModelNameTaken; QuotaExceeded; StaleEpoch
    when the writer's lease is lost; KeyReused when the id belongs to another request; UnreadableEvent; Unavailable.
    """
    if len({write.stream_id for write in writes}) != len(writes):
        raise ValueError("an append names each stream once")
    metadata = {
        "actor": {"kind": actor.kind, "name": actor.name},
        "request_id": actor.request_id,
        "command_id": command_id,
    }
    with _storable():
        arguments = (
            command_id,
            request_hash,
            response,
            msgspec.json.encode(metadata).decode(),
            msgspec.json.encode([_write(write) for write in writes]).decode(),
        )
    with unavailable(), _storable():
        async for attempt in attempts():
            with attempt:
                return await _append_once(pool, arguments)
    raise AssertionError("stamina either returns or raises")


async def _append_once(pool: Pool, arguments: tuple[str, str | None, bytes | None, str, str]) -> Appended:
    try:
        async with pool.acquire(timeout=ACQUIRE_SECONDS) as connection:
            row = await connection.fetchrow(QUERIES["append"], *arguments)
    except asyncpg.UniqueViolationError as error:
        if error.constraint_name in NAME_CONSTRAINTS:
            raise ModelNameTaken(f"The model name is taken: {error.detail}") from None
        raise
    except asyncpg.UnknownPostgresError as error:
        raise _refusal(error) from None
    assert row is not None
    return Appended(position=row["last_position"], replayed=row["replayed"], response=row["stored_response"])


@contextmanager
def _storable() -> Generator[None]:
    """Name text that neither UTF-8 nor jsonb can hold."""
    try:
        yield
    except (UnicodeEncodeError, asyncpg.UntranslatableCharacterError, asyncpg.CharacterNotInRepertoireError) as error:
        raise InvalidRequest(
            f"Text that cannot be stored: {error}.",
            code="invalid_text",
            hint="Remove NUL characters and lone surrogates.",
        ) from None


def _refusal(error: asyncpg.UnknownPostgresError) -> Exception:
    """Return what the SQLSTATE of migrations/append.sql stands for."""
    message = f"{error}."
    match error.sqlstate:
        case "RS001":
            return Conflict(message)
        case "RS002":
            return StaleEpoch(message)
        case "RS003":
            return KeyReused(message)
        case "RS006":
            return QuotaExceeded(message)
        case _:
            return error


def _write(write: StreamWrite) -> dict[str, Any]:
    row = write.row
    return {
        "stream_id": write.stream_id,
        "expected_version": write.expected_version,
        "events": [_event(event, write.stream_id) for event in write.events],
        "row": row and {"kind": row.kind, "id": row.id, "doc": msgspec.Raw(row.doc)},
        "epoch": write.epoch,
        "lease": write.lease,
        "quota": write.quota,
    }


def _event(event: Event, stream_id: str) -> dict[str, Any]:
    name, schema, data = catalogue.encode(event)
    if len(data) >= MAX_EVENT_BYTES:
        raise RoseError(
            f"The event {name} of {stream_id} has {len(data)} bytes; at most {MAX_EVENT_BYTES} are kept.",
            code="event_too_large",
        )
    _prove_readable(event, name, schema, data, stream_id)
    return {"type": name, "schema": schema, "data": msgspec.Raw(data)}


def _prove_readable(event: Event, name: str, schema: int, data: bytes, stream_id: str) -> None:
    """Refuse what would not come back as it is (NaN becomes null): the log is for ever, and so would be the damage."""
    try:
        same = catalogue.decode(name, schema, data) == event
    except msgspec.ValidationError as error:
        raise UnreadableEvent(f"The event {name} of {stream_id} holds a value that JSON cannot: {error}.") from None
    if not same:
        raise UnreadableEvent(f"The event {name} of {stream_id} holds a value that JSON cannot, such as NaN.")
