"""A view that counts, which shows every repetition, and a process that follows it: `python -m … DSN`, to be killed."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import anyio

from projections.runner import run
from projections.views import View
from rose.log.pool import AnyConnection, Pool, open_pool
from rose.log.read import Recorded

TABLE = "create table rose.counts (version int, job_id text, events int, primary key (version, job_id))"
COUNT = """
insert into rose.counts as c values ($1, $2, 1) on conflict (version, job_id) do update set events = c.events + 1
"""


async def count(connection: AnyConnection, version: int, events: Sequence[Recorded]) -> None:
    """Count the events of each stream."""
    for event in events:
        await connection.execute(COUNT, version, event.stream_id)


VIEW = View(name="counts", takes=frozenset({"job.steps_reported"}), key=("job_id",), apply=count)


async def counted(pool: Pool, stream_id: str) -> int:
    """Return how often an event of the stream was applied."""
    return await pool.fetchval("select coalesce(sum(events), 0) from rose.counts where job_id = $1", stream_id)


async def main(dsn: str) -> None:
    """Follow until killed."""
    await run(await open_pool(dsn), anyio.Event(), views=(VIEW,))


if __name__ == "__main__":
    anyio.run(main, sys.argv[1])
