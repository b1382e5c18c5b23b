"""Follows the log's end for one process: a ring of the newest events, and waiters that wake for their stream only.

Reads; never decides or keeps anything. What lies before the ring is read from the database by whoever needs it.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable
from itertools import islice
from types import TracebackType

import anyio
from anyio.abc import TaskGroup

from rose.domain.catalogue import UnknownEvent
from rose.log.pool import ACQUIRE_SECONDS, CONNECT_SECONDS, UNANSWERED, AnyConnection, Pool, Record, unlisten
from rose.log.queries import QUERIES
from rose.log.read import Recorded, head, recorded

logger = logging.getLogger(__name__)

CHANNEL = "rose"
"""What rose.append notifies."""
POLL_SECONDS = 0.25
"""How often the log is read when no notification came: they can be lost, rows cannot."""
RECONNECT_SECONDS = 0.25
STOP_SECONDS = 2.0
"""How long the end waits for the database before it cuts the connection."""
BATCH = 512
RING = 10_000
"""Events kept in memory, of all streams together."""
RING_BYTES = 64 << 20
"""JSON of the kept events together, and what was made of them; large events make the ring shorter."""


class Kept:
    """An event in the ring, with what readers made of it."""

    __slots__ = ("made", "recorded", "size")

    def __init__(self, recorded: Recorded, size: int) -> None:
        self.recorded = recorded
        self.size = size
        self.made: bytes | None = None

    @property
    def position(self) -> int:
        """Place of the event in the log."""
        return self.recorded.position


class Tailer:
    """Reads each new event once for all readers of this process. Use as an async context manager, one per process.

    It holds one connection of the pool while it runs, and takes another when Postgres went away and came back.
    """

    def __init__(self, pool: Pool, *, ring: int = RING, ring_bytes: int = RING_BYTES) -> None:
        self._pool = pool
        self._longest = ring
        self._largest = ring_bytes
        self._ring: deque[Kept] = deque()
        self._bytes = 0
        self._streams: dict[str, deque[Kept]] = {}  # the same entries, by stream
        self._floor = 0
        self._position = 0
        self._stopped = False
        self._stream_waiters: dict[str, _Waiters] = {}
        self._notified = anyio.Event()
        self._lost = False
        self._ended = anyio.Event()
        self._tasks: TaskGroup | None = None

    @property
    def position(self) -> int:
        """Position that the log was read up to."""
        return self._position

    @property
    def stopped(self) -> bool:
        """True once `stop` was called: nothing new will come."""
        return self._stopped

    async def __aenter__(self) -> Tailer:
        """Start at the log's present end. Raises: Unavailable."""
        self._position = self._floor = await head(self._pool)
        self._tasks = await anyio.create_task_group().__aenter__()
        self._tasks.start_soon(self._follow)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        self.stop()
        assert self._tasks is not None
        with anyio.move_on_after(STOP_SECONDS, shield=True):
            await self._ended.wait()
        self._tasks.cancel_scope.cancel()
        return await self._tasks.__aexit__(kind, error, trace)

    def stop(self) -> None:
        """Wake every waiter at once; each is told False and none waits again."""
        self._stopped = True
        self._notified.set()
        self._wake(self._stream_waiters.keys())

    def since(self, stream_id: str, after_position: int) -> list[Recorded] | None:
        """Return the stream's events after `after_position` up to `position`, in order.

        None when some of them may lie before the ring: read them with `read_stream`.
        """
        kept = self.kept(stream_id, after_position)
        return None if kept is None else [one.recorded for one in kept]

    def kept(self, stream_id: str, after_position: int, limit: int | None = None) -> list[Kept] | None:
        """Return the same events (the oldest `limit` of them) as entries of the ring, for `made_once`."""
        if after_position < self._floor:
            return None
        stream = self._streams.get(stream_id)
        if stream is None or stream[-1].position <= after_position:
            return []
        first = bisect_right(stream, after_position, key=_position)
        return list(islice(stream, first, None if limit is None else first + limit))

    def made_once(self, kept: Kept, make: Callable[[Recorded], bytes]) -> bytes:
        """Return what `make` makes of the event: made at the first call, kept and dropped with the event."""
        if kept.made is None:
            kept.made = make(kept.recorded)
            if kept.position > self._floor:
                kept.size += len(kept.made)
                self._bytes += len(kept.made)
                self._shorten()
        return kept.made

    async def wait_for(self, stream_id: str, after_position: int, timeout: float) -> bool:
        """Wait up to `timeout` seconds for an event of the stream after `after_position`.

        Returns True when there is one, or when there may be one before the ring; False after the time or a stop.
        """
        with anyio.move_on_after(timeout):
            while not self._stopped:
                if self._has(stream_id, after_position):
                    return True
                await self._wait_once(stream_id)
        return False

    def _has(self, stream_id: str, after_position: int) -> bool:
        stream = self._streams.get(stream_id)
        return after_position < self._floor or (stream is not None and stream[-1].position > after_position)

    async def _wait_once(self, stream_id: str) -> None:
        waiters = self._stream_waiters.setdefault(stream_id, _Waiters())
        waiters.count += 1
        try:
            await waiters.event.wait()
        finally:
            waiters.count -= 1
            if not waiters.count and self._stream_waiters.get(stream_id) is waiters:
                del self._stream_waiters[stream_id]

    async def _follow(self) -> None:
        try:
            while not self._stopped:
                try:
                    async with self._pool.acquire(timeout=ACQUIRE_SECONDS) as connection:
                        await self._listen(connection)
                except UNANSWERED as error:
                    self._note_loss(error)
                    await anyio.sleep(RECONNECT_SECONDS)
        finally:
            self._ended.set()

    def _note_loss(self, error: BaseException) -> None:
        if not self._lost and not self._stopped:
            logger.warning("lost the database (%s: %s); reading on when it answers", type(error).__name__, error)
        self._lost = True

    async def _listen(self, connection: AnyConnection) -> None:
        await connection.add_listener(CHANNEL, self._notice)
        try:
            while not self._stopped:
                self._notified = anyio.Event()
                while await self._read(connection):
                    pass
                with anyio.move_on_after(POLL_SECONDS):
                    await self._notified.wait()
        finally:
            with anyio.move_on_after(CONNECT_SECONDS, shield=True):
                await unlisten(connection, CHANNEL, self._notice)

    def _notice(self, *_: object) -> None:
        self._notified.set()

    async def _read(self, connection: AnyConnection) -> bool:
        """Take one batch into the ring; True when there may be more."""
        rows = await connection.fetch(QUERIES["read_all"], self._position, BATCH)
        if self._lost:
            logger.info("the database answers again")
            self._lost = False
        fresh = {row["stream_id"] for row in rows}
        for row in rows:
            self._take(row)
        if rows:
            self._wake(fresh)
        return len(rows) == BATCH

    def _take(self, row: Record) -> None:
        try:
            event = recorded(row)
        except UnknownEvent as error:
            # Readers of this stream get the same error from the database; the others must not stand still for it.
            logger.error("%s (position %d of %s)", error, row["position"], row["stream_id"])
            self._forget_all()
            self._position = self._floor = row["position"]
            return
        kept = Kept(event, len(row["data"]))
        self._ring.append(kept)
        self._bytes += kept.size
        self._streams.setdefault(event.stream_id, deque()).append(kept)
        self._position = event.position
        self._shorten()

    def _shorten(self) -> None:
        while len(self._ring) > self._longest or self._bytes > self._largest:
            oldest = self._ring.popleft()
            stream = self._streams[oldest.recorded.stream_id]
            stream.popleft()
            if not stream:
                del self._streams[oldest.recorded.stream_id]
            self._bytes -= oldest.size
            self._floor = oldest.position

    def _forget_all(self) -> None:
        self._ring.clear()
        self._bytes = 0
        self._streams.clear()

    def _wake(self, stream_ids: Iterable[str]) -> None:
        for stream_id in list(stream_ids):
            waiters = self._stream_waiters.pop(stream_id, None)
            if waiters is not None:
                waiters.event.set()


def _position(kept: Kept) -> int:
    return kept.recorded.position


class _Waiters:
    """Those who wait for one stream."""

    def __init__(self) -> None:
        self.event = anyio.Event()
        self.count = 0
