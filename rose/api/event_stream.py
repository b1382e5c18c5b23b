"""A job's events as server-sent events: a cursor over the log, so a reconnect neither loses nor repeats.

The frame's id is the job event's id. The frames of an event are encoded once, for all clients. There is no queue per
client: a slow one is simply behind. No pooled connection is held while a frame is sent. All streams end when the
tailer stops.
"""

from __future__ import annotations

import logging
import random
from collections.abc import AsyncIterator, Sequence

import anyio
import msgspec
from anyio.lowlevel import checkpoint

from projections import job_events as job_events_view
from rose.api import wire
from rose.api.limits import Slot
from rose.api.services import Services
from rose.domain import job_events
from rose.domain.job_events import JobCancelled, JobFailed, JobSucceeded
from rose.domain.jobs import JobState
from rose.domain.messages import event_id, job_messages
from rose.errors import Unavailable
from rose.log.read import Recorded, read_stream
from rose.log.tail import Kept, Tailer

PING_SECONDS = 15.0
"""Each client has a beat of its own: 2,000 that came at once would otherwise all be written to at once, for ever."""
PING = b": ping\n\n"
DONE = b"data: [DONE]\n\n"
BATCH = 32
"""Events that are read at a time; a client that stands still keeps no more of them in memory."""
CHUNK_BYTES = 64 << 10
"""Frames that are there at the same time are sent together, up to about so much."""

Cursor = tuple[int, int]
"""Position and index of the job event that was seen last."""

logger = logging.getLogger(__name__)


async def is_complete(services: Services, state: JobState, cursor: Cursor | None) -> bool:
    """Say whether a client at `cursor` has seen everything that this job will ever tell."""
    if cursor is None or not state.is_terminal:
        return False
    newest = await job_events_view.newest_first(services.pool, state.id, limit=1)
    return not newest.entries or newest.entries[0].message.id <= event_id(*cursor)


async def frames(services: Services, job_id: str, cursor: Cursor | None, slot: Slot) -> AsyncIterator[bytes]:
    """Yield the frames behind `cursor` (all without one), oldest first, until the job ends or the server stops.

    Those that are there at the same time come together. `slot` is the stream's place, held until it ends.
    """
    tailer = services.tailer
    stream_id = f"job/{job_id}"
    read_to = cursor[0] - 1 if cursor else 0
    ping_at = anyio.current_time() + random.uniform(0, PING_SECONDS)
    while True:
        caught_up = tailer.position
        try:
            events = await _behind(services, stream_id, read_to)
        except Unavailable as error:
            logger.warning("the event stream of %s ends; its client resumes it: %s", job_id, error)
            return
        if events:
            async for chunk in _chunks(tailer, events, cursor):
                yield chunk
            last = events[-1].recorded if isinstance(events[-1], Kept) else events[-1]
            if isinstance(last.event, JobSucceeded | JobFailed | JobCancelled):
                yield DONE
                return
            read_to = last.position
            continue
        read_to = max(read_to, caught_up)
        if not await tailer.wait_for(stream_id, read_to, ping_at - anyio.current_time()):
            if tailer.stopped:
                return
            yield PING
            ping_at = anyio.current_time() + PING_SECONDS


async def _behind(services: Services, stream_id: str, read_to: int) -> Sequence[Kept | Recorded]:
    recent = services.tailer.kept(stream_id, read_to, BATCH)
    if recent is not None:
        return recent
    return await read_stream(services.pool, stream_id, after_position=read_to, limit=BATCH)


async def _chunks(tailer: Tailer, events: Sequence[Kept | Recorded], seen: Cursor | None) -> AsyncIterator[bytes]:
    """Yield the frames of the events, without those up to `seen`."""
    texts: list[bytes] = []
    for event in events:
        fresh = isinstance(event, Recorded) or event.made is None
        texts.append(_text(tailer, event, seen))
        if sum(map(len, texts)) >= CHUNK_BYTES:
            yield b"".join(texts)
            texts.clear()
            fresh = True
        if fresh:
            await checkpoint()  # a long history must not make everybody else wait
    if any(texts):
        yield b"".join(texts)
        await checkpoint()


def _text(tailer: Tailer, event: Kept | Recorded, seen: Cursor | None) -> bytes:
    recorded = event.recorded if isinstance(event, Kept) else event
    if seen is not None and recorded.position == seen[0]:
        return _frames(recorded, behind=event_id(*seen))
    return tailer.made_once(event, _frames) if isinstance(event, Kept) else _frames(recorded)


def _frames(recorded: Recorded, behind: str = "") -> bytes:
    """Return the frames of one log event, without those up to the job event `behind`."""
    assert isinstance(recorded.event, job_events.Event)
    at = int(recorded.recorded_at.timestamp())
    return b"".join(
        b"id: %b\ndata: %b\n\n" % (message.id.encode(), msgspec.json.encode(wire.job_event(message, at)))
        for message in job_messages(recorded.position, recorded.event)
        if message.id > behind
    )
