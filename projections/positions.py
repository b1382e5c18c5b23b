"""How far each follower of the log has read and whether it goes on: the table rose.projections.

A view has one row that is read and, during a rebuild, one that is built. The relay keeps a row too: JetStream is one
more copy of the log.
"""

from __future__ import annotations

from datetime import datetime

import anyio
import msgspec

from rose.log.pool import Pool, fetch, fetch_row

POLL_SECONDS = 0.02

LIST = """
select name, version, position, status, error, updated_at,
       (select position from rose.log_head) as head
from rose.projections order by name, version
"""
READ = "select position, status from rose.projections where name = $1 and status <> 'building'"
NOTE = """
insert into rose.projections as known (name, version, position, status, error)
values ($1, 1, coalesce($2::bigint, 0), $3, $4)
on conflict (name, version) do update set
    position = coalesce($2::bigint, known.position), status = excluded.status, error = excluded.error,
    updated_at = clock_timestamp()
"""


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """Where one follower is."""

    name: str
    version: int
    position: int
    """Read up to here."""
    head: int
    """End of the log at the same moment."""
    status: str
    """running, waiting (a service is away), building (a rebuild), or stopped (alarm: see error)."""
    error: str | None
    updated_at: datetime


async def list_projections(pool: Pool) -> list[Progress]:
    """Return every follower of the log, the relay included. Raises: Unavailable."""
    return [Progress(**dict(row)) for row in await fetch(pool, LIST)]


async def alarms(pool: Pool) -> list[Progress]:
    """Return the followers that stopped and need a person. Raises: Unavailable."""
    return [progress for progress in await list_projections(pool) if progress.status == "stopped"]


async def wait_until(pool: Pool, name: str, position: int, timeout_seconds: float = 1.0) -> bool:
    """Wait until the view has read up to `position`; False after `timeout_seconds` or when it is stopped.

    For reads that shall show what the entity's row shows already. Raises: Unavailable.
    """
    deadline = anyio.current_time() + timeout_seconds
    while position > 0:
        row = await fetch_row(pool, READ, name)
        if row is not None and row["position"] >= position:
            return True
        if anyio.current_time() >= deadline or (row is not None and row["status"] == "stopped"):
            return False
        await anyio.sleep(POLL_SECONDS)
    return True


async def note(pool: Pool, name: str, *, position: int | None, status: str, error: str | None) -> None:
    """Store how far a follower that keeps its own position is; None leaves it as it was. Raises: Unavailable."""
    await fetch(pool, NOTE, name, position, status, error)
