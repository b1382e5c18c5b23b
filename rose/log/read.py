"""Reads the log and the rows that appends write. Never writes."""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID

import msgspec

from rose.domain import catalogue
from rose.domain.catalogue import Event
from rose.log.append import EntityKind
from rose.log.pool import Pool, Record, fetch, fetch_row
from rose.log.queries import QUERIES


class Recorded(msgspec.Struct, frozen=True, kw_only=True):
    """One event as the log holds it."""

    position: int
    """Place in the whole log, from 1, without gaps."""
    stream_id: str
    version: int
    """Place in the stream, from 1."""
    event_id: UUID
    type: str
    """Wire name, for example `job.created`."""
    schema: int
    event: Event
    epoch: int | None
    """Lease epoch of the run that wrote it."""
    metadata: dict[str, Any]
    recorded_at: datetime
    """For people; order comes from positions."""


class StoredCommand(msgspec.Struct, frozen=True, kw_only=True):
    """A command that was accepted."""

    command_id: str
    request_hash: str | None
    response: bytes | None
    position: int
    created_at: datetime


async def read_stream(
    pool: Pool, stream_id: str, *, after_position: int = 0, limit: int | None = None
) -> list[Recorded]:
    """Return the stream's events after `after_position`, in order. Raises: Unavailable, UnknownEvent."""
    rows = await fetch(pool, QUERIES["read_stream"], stream_id, after_position, limit)
    return [recorded(row) for row in rows]


async def read_all(pool: Pool, *, after_position: int, limit: int = 256) -> list[Recorded]:
    """Return up to `limit` events of the log after `after_position`, in order. Raises: Unavailable, UnknownEvent."""
    return [recorded(row) for row in await fetch(pool, QUERIES["read_all"], after_position, limit)]


async def head(pool: Pool) -> int:
    """Return the position of the newest event; 0 for an empty log. Raises: Unavailable."""
    return (await _head(pool))["position"]


async def end_of_stream(pool: Pool, stream_id: str) -> int:
    """Return the position of the stream's newest event; 0 when it has none. Raises: Unavailable."""
    row = await fetch_row(pool, QUERIES["end_of_stream"], stream_id)
    assert row is not None, "an aggregate always has a row"
    return row["position"]


async def log_id(pool: Pool) -> UUID:
    """Return the identity of this log, which a restored or recreated database does not share. Raises: Unavailable."""
    return UUID(str((await _head(pool))["log_id"]))


async def load_row(pool: Pool, kind: EntityKind, id: str) -> tuple[bytes, int] | None:
    """Return the state's JSON and the version of an entity, or None. Raises: Unavailable."""
    row = await fetch_row(pool, QUERIES[f"load_{kind}"], id)
    return None if row is None else (row["doc"].encode(), row["version"])


async def find_command(pool: Pool, command_id: str) -> StoredCommand | None:
    """Return the stored answer of a command, or None when it was never accepted. Raises: Unavailable."""
    row = await fetch_row(pool, QUERIES["find_command"], command_id)
    return None if row is None else StoredCommand(**dict(row))


async def find_request(pool: Pool, request_hash: str, *, within_seconds: float = 120.0) -> StoredCommand | None:
    """Return the newest accepted command with an equal request of the last seconds, or None. Raises: Unavailable."""
    row = await fetch_row(pool, QUERIES["find_request"], request_hash, within_seconds)
    return None if row is None else StoredCommand(**dict(row))


def recorded(row: Record) -> Recorded:
    """Return the event of a row of rose.events. Raises: UnknownEvent when a newer ROSE wrote it."""
    return Recorded(
        position=row["position"],
        stream_id=row["stream_id"],
        version=row["version"],
        event_id=UUID(str(row["event_id"])),
        type=row["type"],
        schema=row["schema"],
        event=catalogue.decode(row["type"], row["schema"], row["data"]),
        epoch=row["epoch"],
        metadata=msgspec.json.decode(row["metadata"]),
        recorded_at=row["recorded_at"],
    )


async def _head(pool: Pool) -> Record:
    row = await fetch_row(pool, QUERIES["head"])
    assert row is not None, "migration 0001 makes the row"
    return row
