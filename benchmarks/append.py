"""Appends per second beside one bare statement that writes the same rows, head row included.

Both are one round trip and one commit with fsync; the bare one checks nothing: no version, lease, command id or hash.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from uuid import uuid4

import anyio

from benchmarks.record import record
from projections import files
from rose.domain import catalogue
from rose.domain.artifacts import Artifact
from rose.domain.files import FileUploaded, evolve, initial
from rose.ids import new_id
from rose.log.append import Actor, StreamWrite, append
from rose.log.migrate import migrate
from rose.log.pool import Pool, open_pool
from tests.services import running_postgres

SECONDS = 3.0
CONNECTIONS = (1, 16)
EVENTS = (1, 10)
ACTOR = Actor(kind="system", name="benchmark")
ARTIFACT = Artifact(path="files/file_benchmark", bytes=1234, sha256="0" * 64)
BARE = """
with command as (insert into rose.commands (command_id) values ($1)),
stream as (insert into rose.streams (stream_id, version) values ($2, $3)),
entity as (insert into rose.files (id, doc, version) values ($4, $5::text::jsonb, $3)),
head as (update rose.log_head set position = position + $3 returning position),
event as (
    insert into rose.events (position, stream_id, version, type, schema, data, metadata)
    select head.position - $3 + number, $2, number, $6, 1, $7::text::jsonb, '{}'
    from head, generate_series(1, $3) as number
)
select pg_notify('rose', position::text) from head
"""

Write = Callable[[Pool, int], Awaitable[None]]


async def write_append(pool: Pool, events: int) -> None:
    """Append a new stream of `events` events with its entity row, as ROSE does."""
    event, stream_id = _event()
    row = files.row(evolve(initial, event))
    write = StreamWrite(stream_id=stream_id, expected_version=0, events=(event,) * events, row=row)
    await append(pool, [write], command_id=str(uuid4()), actor=ACTOR)


async def write_bare(pool: Pool, events: int) -> None:
    """Write the same rows with one plain statement."""
    event, stream_id = _event()
    row = files.row(evolve(initial, event))
    name, _, data = catalogue.encode(event)
    arguments = (str(uuid4()), stream_id, events, row.id, row.doc.decode(), name, data.decode())
    await pool.fetch(BARE, *arguments)


async def rate(pool: Pool, write: Write, *, connections: int, events: int) -> float:
    """Return writes per second of `connections` writers that each wait for their answer."""
    done = 0
    end = time.perf_counter() + SECONDS

    async def repeat() -> None:
        nonlocal done
        while time.perf_counter() < end:
            await write(pool, events)
            done += 1

    begin = time.perf_counter()
    async with anyio.create_task_group() as group:
        for _ in range(connections):
            group.start_soon(repeat)
    return done / (time.perf_counter() - begin)


async def measure(dsn: str) -> list[list[str]]:
    """Return the table's rows."""
    await migrate(dsn)
    pool = await open_pool(dsn, min_size=max(CONNECTIONS), max_size=max(CONNECTIONS))
    rows: list[list[str]] = []
    try:
        for write in (write_append, write_bare):
            await write(pool, 1)  # the statements are prepared before the clock starts
        for connections in CONNECTIONS:
            for events in EVENTS:
                own = await rate(pool, write_append, connections=connections, events=events)
                bare = await rate(pool, write_bare, connections=connections, events=events)
                columns = (own, own * events, bare, bare * events)
                rows.append(
                    [str(connections), str(events), *(f"{value:.0f}" for value in columns), f"{own / bare:.2f}"]
                )
    finally:
        await pool.close()
    return rows


def main() -> None:
    """Run on a Postgres of its own with fsync on."""
    with running_postgres() as service:
        rows = anyio.run(measure, service.dsn("postgres"))
    columns = ("writers", "events each", "appends/s", "events/s", "bare/s", "bare events/s", "ratio")
    print("written to", record("append", __doc__.splitlines()[0], columns, rows))


def _event() -> tuple[FileUploaded, str]:
    file_id = new_id("file_")
    event = FileUploaded(
        project="default",
        file_id=file_id,
        created_at=1,
        filename="benchmark.jsonl",
        purpose="fine-tune",
        artifact=ARTIFACT,
    )
    return event, f"file/{file_id}"


if __name__ == "__main__":
    main()
