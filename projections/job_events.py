"""A job's events, newest first, straight from the log: they need no table, `job_messages` makes them.

The stream (rose/api/event_stream.py) shows the same objects, oldest first.
"""

from __future__ import annotations

from datetime import datetime

import msgspec

from projections.paging import Page
from rose.domain import job_events
from rose.domain.catalogue import decode
from rose.domain.messages import JobMessage, event_id, job_messages
from rose.log.pool import Pool, fetch

FIRST_BATCH = 16
"""Log events that are read at first: those of a run hold a second's steps each, so a page seldom needs more."""
BATCH = 200
BEFORE = """
select position, type, schema, data, recorded_at from rose.events
where stream_id = $1 and position <= $2
order by position desc
limit $3
"""
NEWEST = 2**62


class DatedMessage(msgspec.Struct, frozen=True, kw_only=True):
    """A job event and when it was recorded."""

    message: JobMessage
    recorded_at: datetime


async def newest_first(
    pool: Pool, job_id: str, *, limit: int, after: tuple[int, int] | None = None
) -> Page[DatedMessage]:
    """Return up to `limit` job events behind the one at `after` (position and index), newest first."""
    position, index = after or (NEWEST, 0)
    cursor = event_id(position, index) if after else None
    found: list[DatedMessage] = []
    size = FIRST_BATCH
    while len(found) <= limit:
        batch = min(size, limit + 1 - len(found))
        size = min(4 * size, BATCH)
        rows = await fetch(pool, BEFORE, f"job/{job_id}", position, batch)
        for row in rows:
            event = decode(row["type"], row["schema"], row["data"])
            assert isinstance(event, job_events.Event)
            messages = reversed(job_messages(row["position"], event))
            found += [
                DatedMessage(message=message, recorded_at=row["recorded_at"])
                for message in messages
                if cursor is None or message.id < cursor
            ]
            if len(found) > limit:
                break
        if len(rows) < batch:
            break
        position = rows[-1]["position"] - 1
    return Page.cut(found, limit)
