"""A job's events as server-sent events: a cursor over the log, so a reconnect neither loses nor repeats.

The frame's id is the job event's id. There is no queue per client: a slow one is simply behind. No pooled connection
is held while a frame is sent. All streams end when the tailer stops.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator

import msgspec
from anyio.lowlevel import checkpoint

from projections import job_events as job_events_view
from rose.api import wire
from rose.api.services import Services
from rose.domain import job_events
from rose.domain.job_events import JobCancelled, JobFailed, JobSucceeded
from rose.domain.jobs import JobState
from rose.domain.messages import event_id, job_messages
from rose.errors import Unavailable
from rose.log.read import Recorded, read_stream

PING_SECONDS = 15.0
PING = b": ping\n\n"
DONE = b"data: [DONE]\n\n"
BATCH = 200

Cursor = tuple[int, int]
"""Position and index of the job event that was seen last."""

logger = logging.getLogger(__name__)


async def is_complete(services: Services, state: JobState, cursor: Cursor | None) -> bool:
    """Say whether a client at `cursor` has seen everything that this job will ever tell."""
    if cursor is None or not state.is_terminal:
        return False
    newest = await job_events_view.newest_first(services.pool, state.id, limit=1)
    return not newest.entries or newest.entries[0].message.id <= event_id(*cursor)


async def frames(services: Services, job_id: str, cursor: Cursor | None) -> AsyncIterator[bytes]:
    """Yield the frames behind `cursor` (all without one), oldest first, until the job ends or the server stops."""
    tailer = services.tailer
    stream_id = f"job/{job_id}"
    read_to = cursor[0] - 1 if cursor else 0
    seen = event_id(*cursor) if cursor else ""
    while True:
        caught_up = tailer.position
        try:
            events = await _behind(services, stream_id, read_to)
        except Unavailable as error:
            logger.warning("the event stream of %s ends; its client resumes it: %s", job_id, error)
            return
        if events:
            for event in events:
                read_to = event.position
                if text := _frame(event, seen):
                    yield text
                await checkpoint()  # a long history must not make everybody else wait
            if isinstance(events[-1].event, JobSucceeded | JobFailed | JobCancelled):
                yield DONE
                return
            continue
        read_to = max(read_to, caught_up)
        if not await tailer.wait_for(stream_id, read_to, PING_SECONDS):
            if tailer.stopped:
                return
            yield PING


async def _behind(services: Services, stream_id: str, read_to: int) -> list[Recorded]:
    recent = services.tailer.since(stream_id, read_to)
    if recent is not None:
        return recent
    return await read_stream(services.pool, stream_id, after_position=read_to, limit=BATCH)


def _frame(recorded: Recorded, seen: str) -> bytes:
    """Return the frames of one log event, without those up to the job event `seen`."""
    assert isinstance(recorded.event, job_events.Event)
    at = int(recorded.recorded_at.timestamp())
    return b"".join(
        b"id: %b\ndata: %b\n\n" % (message.id.encode(), msgspec.json.encode(wire.job_event(message, at)))
        for message in job_messages(recorded.position, recorded.event)
        if message.id > seen
    )
