"""Counts the tokens of answers by project, model and hour.

The counts are no events: they lie in the table rose.usage, which no rebuild touches. A process adds up in memory and
writes every few seconds, never while somebody waits for an answer. It writes its own totals of an hour, so writing
again after an unknown outcome counts nothing twice. What a killed process had not written yet is lost.
"""

from __future__ import annotations

import logging
import time
from types import TracebackType
from typing import Self

import anyio
import msgspec

from rose.errors import Unavailable
from rose.ids import new_id
from rose.log.pool import Pool, fetch

HOUR_SECONDS = 3600
FLUSH_SECONDS = 5.0
"""How often the counts are written; what a killed process can lose."""
LAST_FLUSH_SECONDS = 5.0
"""How long an ending process tries to write its last counts."""

WRITE = """
insert into rose.usage (process, project, model, hour, requests, prompt_tokens, completion_tokens)
select $1, * from unnest($2::text[], $3::text[], $4::bigint[], $5::bigint[], $6::bigint[], $7::bigint[])
on conflict (project, hour, model, process) do update set
    requests = excluded.requests, prompt_tokens = excluded.prompt_tokens, completion_tokens = excluded.completion_tokens
"""

logger = logging.getLogger(__name__)

Place = tuple[str, str, int]
"""Project, model, and the hour's first second."""


class Count(msgspec.Struct):
    """What a process has counted of one hour."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Meter:
    """Counts answers; as an async context it also writes the counts, the last ones when it ends."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._process = new_id("meter_")
        self._counts: dict[Place, Count] = {}
        self._changed: set[Place] = set()
        self._tasks = anyio.create_task_group()

    async def __aenter__(self) -> Self:
        await self._tasks.__aenter__()
        self._tasks.start_soon(self._run)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tasks.cancel_scope.cancel()
        await self._tasks.__aexit__(None, None, None)
        with anyio.move_on_after(LAST_FLUSH_SECONDS, shield=True):
            await self._try_to_flush()

    def note(self, project: str, model: str, prompt_tokens: int, completion_tokens: int) -> None:
        """Count an answer."""
        hour = int(time.time()) // HOUR_SECONDS * HOUR_SECONDS
        place = (project, model, hour)
        count = self._counts.setdefault(place, Count())
        count.requests += 1
        count.prompt_tokens += prompt_tokens
        count.completion_tokens += completion_tokens
        self._changed.add(place)

    async def flush(self) -> None:
        """Write what has changed. Raises: Unavailable; nothing is lost then."""
        written, self._changed = self._changed, set()
        if not written:
            return
        rows = [
            (*place, count.requests, count.prompt_tokens, count.completion_tokens)
            for place, count in ((place, self._counts[place]) for place in sorted(written))
        ]
        try:
            await fetch(self._pool, WRITE, self._process, *map(list, zip(*rows, strict=True)))
        except BaseException:
            self._changed |= written
            raise
        now = time.time()
        for place in [place for place in self._counts if place[2] + HOUR_SECONDS <= now]:
            if place not in self._changed:
                del self._counts[place]

    async def _run(self) -> None:
        while True:
            await anyio.sleep(FLUSH_SECONDS)
            await self._try_to_flush()

    async def _try_to_flush(self) -> None:
        try:
            await self.flush()
        except Unavailable as error:
            logger.warning("the counts of answers could not be written yet: %s", error)
