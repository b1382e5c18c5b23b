"""What a follower of the log needs: to be woken, one working copy at a time, events as they lie, the log's identity.

A feed is one connection. When it is lost, its lock is too, and every call on it raises Unavailable.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from datetime import datetime

import anyio
import msgspec

from rose.errors import Unavailable
from rose.log.pool import ACQUIRE_SECONDS, AnyConnection, Pool, unavailable, unlisten

CHANNEL = "rose"
LOCK_CLASS = 0x524F5345
"""First key of the followers' advisory locks (`ROSE` in ASCII)."""
CLOSE_SECONDS = 2.0
"""How long the end waits for the database before it leaves the connection to the pool."""


class RawEvent(msgspec.Struct, frozen=True, kw_only=True):
    """An event that was not decoded, so that one from a newer ROSE passes too."""

    position: int
    stream_id: str
    project: str
    version: int
    event_id: str
    type: str
    schema: int
    data: bytes
    """JSON."""
    recorded_at: datetime


class LogIdentity(msgspec.Struct, frozen=True, kw_only=True):
    """Which log this is; a restored or copied database differs in one of the three."""

    log_id: str
    system_identifier: str
    timeline: str


class Feed:
    """One connection that hears of appends; open it with `open_feed`."""

    def __init__(self, connection: AnyConnection) -> None:
        self._connection = connection
        self._bell = anyio.Event()
        self._lost = False

    @property
    def lost(self) -> bool:
        """True when the connection is gone; asyncpg's own answer is an error once the pool knows that too."""
        return self._lost

    async def lock(self, key: int) -> bool:
        """Take the advisory lock `key` for as long as this feed is open; False when another feed holds it."""
        with unavailable():
            return await self._connection.fetchval("select pg_try_advisory_lock($1, $2)", LOCK_CLASS, key)

    async def wait(self, timeout_seconds: float) -> None:
        """Return after an append, at the latest after `timeout_seconds`. An append before the call counts too."""
        with anyio.move_on_after(timeout_seconds):
            await self._bell.wait()
        self._bell = anyio.Event()
        with unavailable():
            if self._lost:
                raise ConnectionError("the connection was lost")

    async def events_after(self, position: int, limit: int) -> list[RawEvent]:
        """Return up to `limit` events after `position`, in order."""
        with unavailable():
            rows = await self._connection.fetch(
                "select events.position, stream_id, project_id, events.version, event_id::text, type, schema, "
                "data::text, recorded_at from rose.events join rose.streams using (stream_id) "
                "where events.position > $1 order by events.position limit $2",
                position,
                limit,
            )
        return [
            RawEvent(
                position=row["position"],
                stream_id=row["stream_id"],
                project=row["project_id"],
                version=row["version"],
                event_id=row["event_id"],
                type=row["type"],
                schema=row["schema"],
                data=row["data"].encode(),
                recorded_at=row["recorded_at"],
            )
            for row in rows
        ]

    async def head(self) -> int:
        """Return the position of the newest event; 0 for an empty log."""
        with unavailable():
            return await self._connection.fetchval("select position from rose.log_head")

    async def event_id_at(self, position: int) -> str | None:
        """Return the id of the event at `position`, None when the log does not reach that far."""
        with unavailable():
            return await self._connection.fetchval(
                "select event_id::text from rose.events where position = $1", position
            )

    async def identity(self) -> LogIdentity:
        """Return which log this is. The timeline is that of the write-ahead log as it is written now."""
        with unavailable():
            row = await self._connection.fetchrow(
                "select log_id::text, (select system_identifier::text from pg_control_system()), "
                "left(pg_walfile_name(pg_current_wal_insert_lsn()), 8) as timeline from rose.log_head"
            )
        assert row is not None, "migration 0001 makes the row"
        return LogIdentity(log_id=row["log_id"], system_identifier=row["system_identifier"], timeline=row["timeline"])

    def ring(self, *_: object) -> None:
        """Wake whoever waits."""
        self._bell.set()

    def lose(self, *_: object) -> None:
        """Note that the connection is gone."""
        self._lost = True
        self._bell.set()


@asynccontextmanager
async def open_feed(pool: Pool) -> AsyncGenerator[Feed, None]:
    """Give a feed on a connection of its own from `pool`. Raises: Unavailable."""
    with unavailable():
        connection = await pool.acquire(timeout=ACQUIRE_SECONDS)
    feed = Feed(connection)
    try:
        with unavailable():
            connection.add_termination_listener(feed.lose)
            await connection.add_listener(CHANNEL, feed.ring)
        yield feed
    finally:
        with anyio.move_on_after(CLOSE_SECONDS, shield=True):
            if not feed.lost:
                await _forget(connection, feed)
            await pool.release(connection, timeout=ACQUIRE_SECONDS)


async def _forget(connection: AnyConnection, feed: Feed) -> None:
    with suppress(Unavailable), unavailable():
        connection.remove_termination_listener(feed.lose)
    await unlisten(connection, CHANNEL, feed.ring)
