"""The log cannot be changed, and the checker names what is changed all the same: a tester that is tested."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import cast
from uuid import uuid4

import anyio
import asyncpg
import pytest

from rose.domain import job_commands, job_events
from rose.log.append import Appended, StreamWrite, append
from rose.log.migrate import folder
from rose.log.pool import Pool
from rose.log.read import Recorded, load_row, read_all
from tests.checker import changed, check, check_log, read_dump, unlike
from tests.eventually import eventually
from tests.integration.writes import ACTOR, claim, expire, file_write, queued_job, steps, tell

pytestmark = pytest.mark.anyio


@pytest.fixture
async def job_id(pool: Pool) -> str:
    """A job that runs, at positions 1 to 6."""
    job_id = await queued_job(pool)
    lease = await claim(pool, job_id)
    await tell(pool, job_id, job_commands.ReportSteps(epoch=lease.epoch, steps=steps(1, 3)), epoch=lease.epoch)
    return job_id


@pytest.fixture
async def hand(database_dsn: str) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
    """A person's connection, past every guard."""
    connection = await asyncpg.connect(database_dsn, timeout=30)
    yield connection
    await connection.close(timeout=10)


@pytest.mark.parametrize(
    "statement",
    [
        "update rose.events set data = '{}' where position = 1",
        "delete from rose.events where position = 1",
        "truncate rose.events",
        "truncate rose.events cascade",
    ],
)
async def test_events_are_immutable(pool: Pool, job_id: str, statement: str) -> None:
    before = await read_all(pool, after_position=0)
    with pytest.raises(asyncpg.PostgresError, match="immutable") as caught:
        await pool.execute(statement)
    assert caught.value.sqlstate == "RS005"
    async with pool.acquire() as connection:
        await connection.execute("set session_replication_role = replica")
        with pytest.raises(asyncpg.PostgresError, match="immutable"):
            await connection.execute(statement)
    assert await read_all(pool, after_position=0) == before


async def test_an_untouched_log_has_no_violation(pool: Pool, job_id: str, database_dsn: str) -> None:
    assert await check_log(database_dsn) == []


DROP_GUARD = "alter table rose.events disable trigger events_immutable;"
CORRUPTIONS = {
    "a deleted event": (
        f"{DROP_GUARD} delete from rose.events where position = 3",
        ["position 3: missing", "versions are [1, 2, 4, 5, 6]"],
    ),
    "an event too many": (
        "insert into rose.events (position, stream_id, version, type, schema, data, metadata) "
        "select 9, stream_id, 7, type, schema, data, metadata from rose.events where position = 4",
        ["position 9: outside 1..6", "is at version 6 and has 7 events"],
    ),
    "an event that nobody asked for": (
        "delete from rose.commands where position = 6",
        ["position 6: its command"],
    ),
    "a command that ends elsewhere": (
        "update rose.commands set position = 77 where position = 6",
        ["ends at 77, its last event is at 6"],
    ),
    "a head that fell back": ("update rose.log_head set position = 5", ["position 6: outside 1..5"]),
    "a stream that counts wrong": ("update rose.streams set version = 9", ["is at version 9 and has 6 events"]),
    "a changed row": (
        """update rose.jobs set doc = jsonb_set(doc, '{last_step}', '7')""",
        ["has last_step 7, its events make 3"],
    ),
    "a row of another version": ("update rose.jobs set version = 9", ["is at version 9 and has 6 events"]),
    "a lost row": ("delete from rose.jobs", ["has events and no row"]),
    "a row of nothing": (
        """insert into rose.files (id, doc, version) values ('file_x', '{}', 1)""",
        ["file/file_x has a row and no event"],
    ),
    "a row in the wrong place": ("update rose.jobs set created_position = 4", ["stands at 4, was born at 1"]),
    "a lease of another epoch": ("update rose.leases set epoch = 9", ["has epoch 9, the log claimed 2"]),
    "a stale epoch's event": (
        f"{DROP_GUARD} update rose.events set epoch = 1 where position = 6",
        ["job.steps_reported of epoch 1 while 2 is the newest claimed"],
    ),
    "an epoch that fell": (
        f"{DROP_GUARD} update rose.events set epoch = 1, data = jsonb_set(data, '{{epoch}}', '1') where position = 5",
        ["claims epoch 1 after 1"],
    ),
    "a step that came twice": (
        f"{DROP_GUARD} update rose.events set data = jsonb_set(data, '{{steps,1,step}}', '1') where position = 6",
        ["step 1 was reported 2 times"],
    ),
    "two ends": (
        f"{DROP_GUARD} update rose.events set type = 'job.cancelled', data = '{{\"at\": 1}}' where position in (4, 6)",
        ["ended 2 times, at positions [4, 6]", "position 6 comes after its end at 4"],
    ),
    "an illegal transition": (
        f'{DROP_GUARD} update rose.events set type = \'job.paused\', data = \'{{"at": 1, "reason": ""}}\' '
        "where position = 2",
        ["went from validating_files to paused"],
    ),
    "a view that differs": (
        "insert into rose.projections (name, version, position) values ('metrics', 1, 6); "
        "insert into rose.metrics select 1, substr(stream_id, 5), 1, data -> 'steps' -> 0, 6 "
        "from rose.events where position = 6",
        ["rose.metrics", ", 2) is None, the log makes"],
    ),
    "a view ahead of the log": (
        "insert into rose.projections (name, version, position) values ('anything', 1, 60)",
        ["projection anything: has read up to 60, the log ends at 6"],
    ),
}


@pytest.mark.parametrize("name", CORRUPTIONS)
async def test_the_checker_names_a_corruption(
    pool: Pool, job_id: str, hand: asyncpg.Connection[asyncpg.Record], database_dsn: str, name: str
) -> None:
    statements, named = CORRUPTIONS[name]
    before = await read_dump(database_dsn)
    await hand.execute(statements)
    violations = await check_log(database_dsn)
    for text in named:
        assert any(text in violation for violation in violations), violations
    touched = "rose.events set" in statements or "from rose.events where position = 3" in statements
    assert bool(changed(before, await read_dump(database_dsn))) == touched


async def test_without_the_fence_the_checker_finds_the_stale_writer(
    pool: Pool, job_id: str, hand: asyncpg.Connection[asyncpg.Record], database_dsn: str
) -> None:
    await hand.execute(
        "create or replace function rose.check_lease(p_stream_id text, p_epoch bigint) returns timestamptz "
        "language sql as $$ select 'infinity'::timestamptz $$"
    )
    await expire(pool, job_id)
    await claim(pool, job_id, owner="trainer-2")
    found = await load_row(pool, "jobs", job_id)
    assert found is not None
    late = StreamWrite(
        stream_id=f"job/{job_id}",
        expected_version=found[1],
        events=(job_events.StepsReported(epoch=2, steps=steps(4)),),
        row=None,
        epoch=2,
    )
    await append(pool, [late], command_id=str(uuid4()), actor=ACTOR)
    assert any("of epoch 2 while 3 is the newest" in violation for violation in await check_log(database_dsn))


class Held:
    """Lends one connection as a pool does, so that an append can be left open in its transaction."""

    def __init__(self, connection: asyncpg.Connection[asyncpg.Record]) -> None:
        self._connection = connection

    @asynccontextmanager
    async def acquire(self, *, timeout: float) -> AsyncGenerator[asyncpg.Connection[asyncpg.Record]]:
        yield self._connection


async def put(pool: Pool) -> Appended:
    return await append(pool, [file_write()], command_id=str(uuid4()), actor=ACTOR)


async def test_the_head_row_lets_no_later_position_commit_first(
    pool: Pool, hand: asyncpg.Connection[asyncpg.Record], database_dsn: str
) -> None:
    """Two writers, directed: the second waits for the first, so a reader sees both in their order."""

    async def the_second_waits() -> bool:
        return await pool.fetchval(
            "select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'"
        )

    seen: list[Recorded] = []
    async with anyio.create_task_group() as tasks:
        async with hand.transaction():
            await put(cast("Pool", Held(hand)))
            tasks.start_soon(put, pool)
            await eventually(the_second_waits)
            seen += await read_all(pool, after_position=0)
        assert seen == []
    seen += await read_all(pool, after_position=0)
    assert [event.position for event in seen] == [1, 2]
    dump = await read_dump(database_dsn)
    assert unlike(seen, dump) == []
    assert check(dump) == []


async def test_with_a_sequence_instead_a_reader_misses_an_event_and_the_checker_names_it(
    pool: Pool, hand: asyncpg.Connection[asyncpg.Record], database_dsn: str
) -> None:
    source = (folder() / "append.sql").read_text()
    with_sequence = source.replace(
        "update rose.log_head set position = position + total returning position into last_position;",
        "last_position := nextval('rose.positions');",
    )
    assert with_sequence != source
    await hand.execute("create sequence rose.positions")
    await hand.execute(with_sequence)
    seen: list[Recorded] = []
    async with hand.transaction():
        await put(cast("Pool", Held(hand)))
        assert (await put(pool)).position == 2
        seen += await read_all(pool, after_position=0)
    seen += await read_all(pool, after_position=seen[-1].position)
    assert unlike(seen, await read_dump(database_dsn)) == ["position 1: never seen by the reader"]
