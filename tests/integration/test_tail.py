"""The tailer: sees the whole log once, wakes only whom it must, survives Postgres, stops at once."""

from __future__ import annotations

import logging
from pathlib import Path
from uuid import uuid4

import anyio
import asyncpg
import pytest

from rose.domain import job_commands
from rose.ids import new_id
from rose.local.postgres import Postgres
from rose.log.append import append
from rose.log.migrate import migrate
from rose.log.pool import Pool, open_pool
from rose.log.read import Recorded, read_all, read_stream
from rose.log.tail import Tailer
from tests.checker import read_dump, unlike
from tests.eventually import eventually
from tests.integration.writes import (
    ACTOR,
    claim,
    create_command,
    created_job,
    file_write,
    lease_change,
    tell,
    validated,
)
from tests.services import Server

pytestmark = pytest.mark.anyio

LONG = 30.0
"""A wait that a test must never sit out."""


async def put(pool: Pool, file_id: str | None = None) -> int:
    return (await append(pool, [file_write(file_id)], command_id=str(uuid4()), actor=ACTOR)).position


async def test_it_starts_at_the_end_and_sees_what_comes(pool: Pool) -> None:
    await put(pool, "file_old")
    async with Tailer(pool) as tailer:
        assert tailer.position == 1
        assert tailer.since("file/file_old", 0) is None
        assert tailer.since("file/file_new", 1) == []
        await put(pool, "file_new")
        assert await tailer.wait_for("file/file_new", 1, LONG)
        assert tailer.since("file/file_new", 1) == (await read_all(pool, after_position=1))
        assert tailer.since("file/file_new", 2) == []
        assert tailer.position == 2


async def test_a_reader_behind_the_ring_is_sent_to_the_database_at_once(pool: Pool) -> None:
    await put(pool, "file_a")
    async with Tailer(pool) as tailer:
        assert await tailer.wait_for("file/file_a", 0, LONG)
        assert tailer.since("file/file_a", 0) is None


async def test_the_ring_forgets_its_oldest(pool: Pool) -> None:
    async with Tailer(pool, ring=3) as tailer:
        job_id = await created_job(pool)
        assert [await put(pool) for _ in range(4)] == [2, 3, 4, 5]
        await eventually(lambda: tailer.position == 5)
        assert tailer.since(f"job/{job_id}", 0) is None
        assert tailer.since(f"job/{job_id}", 2) == []


async def test_large_events_make_the_ring_shorter(pool: Pool) -> None:
    async with Tailer(pool, ring_bytes=1) as tailer:
        await put(pool, "file_a")
        await eventually(lambda: tailer.position == 1)
        assert tailer.since("file/file_a", 0) is None
        assert tailer.since("file/file_a", 1) == []


async def test_what_readers_make_of_an_event_is_made_once_and_counts(pool: Pool) -> None:
    made: list[int] = []

    def make(event: Recorded) -> bytes:
        made.append(event.position)
        return b"x" * 10_000

    async with Tailer(pool, ring_bytes=15_000) as tailer:
        for name in "ab":
            await put(pool, f"file_{name}")
        await eventually(lambda: tailer.position == 2)
        [first] = tailer.kept("file/file_a", 0) or ()
        [second] = tailer.kept("file/file_b", 0) or ()
        assert [tailer.made_once(first, make) for _ in range(3)] == [b"x" * 10_000] * 3
        assert tailer.since("file/file_a", 0) == [first.recorded]
        tailer.made_once(second, make)
        assert tailer.since("file/file_a", 0) is None, "the ring holds no more than its bytes"
        assert tailer.since("file/file_b", 1) == [second.recorded]
        first.made = None
        tailer.made_once(first, make)
        assert tailer.since("file/file_b", 1) == [second.recorded], "what left the ring does not count"
        assert made == [1, 2, 1]


async def test_entries_come_oldest_first_and_as_many_as_are_asked(pool: Pool) -> None:
    async with Tailer(pool) as tailer:
        job_id = await created_job(pool)
        for _ in range(3):
            await put(pool)
        lease = await claim(pool, job_id, "validation")
        await tell(pool, job_id, validated(lease.epoch), epoch=lease.epoch, lease=lease_change("release", lease))
        end = (await read_all(pool, after_position=0))[-1].position
        await eventually(lambda: tailer.position == end)
        everything = [one.recorded for one in tailer.kept(f"job/{job_id}", 0) or ()]
        assert everything == await read_stream(pool, f"job/{job_id}")
        for after in range(end + 1):
            behind = [event for event in everything if event.position > after]
            assert [one.recorded for one in tailer.kept(f"job/{job_id}", after, 2) or ()] == behind[:2]


async def test_a_wait_ends_after_its_time(pool: Pool) -> None:
    async with Tailer(pool) as tailer:
        assert not await tailer.wait_for("file/never", 0, 0.01)


async def test_only_the_stream_with_news_is_woken(pool: Pool) -> None:
    woken: list[str] = []

    async def wait(tailer: Tailer, stream_id: str) -> None:
        if await tailer.wait_for(stream_id, 0, LONG):
            woken.append(stream_id)

    async with Tailer(pool) as tailer, anyio.create_task_group() as tasks:
        for name in "ab":
            for _ in range(3):
                tasks.start_soon(wait, tailer, f"file/file_{name}")
        await put(pool, "file_a")
        await eventually(lambda: len(woken) == 3)
        assert tailer.position == 1
        assert woken == ["file/file_a"] * 3
        await put(pool, "file_b")
        await eventually(lambda: len(woken) == 6)


async def test_a_lost_notification_costs_only_the_poll(pool: Pool, database_dsn: str) -> None:
    async with Tailer(pool) as tailer:
        connection = await asyncpg.connect(database_dsn, timeout=30)
        await connection.execute(
            "insert into rose.events (position, stream_id, version, type, schema, data, metadata) "
            "values (1, 'job/x', 1, 'job.queued', 1, '{\"reason\": \"resumed\"}', '{}')"
        )
        await connection.close()
        assert await tailer.wait_for("job/x", 0, LONG)


async def test_it_sees_exactly_the_log_under_concurrent_appends(pool: Pool, database_dsn: str) -> None:
    writers, pauses = 10, 10
    seen: list[Recorded] = []

    async def write(job_id: str) -> None:
        await tell(pool, job_id, create_command(job_id))
        lease = await claim(pool, job_id, "validation")
        await tell(pool, job_id, validated(lease.epoch), epoch=lease.epoch, lease=lease_change("release", lease))
        for _ in range(pauses):
            await tell(pool, job_id, job_commands.PauseJob(at=1))
            await tell(pool, job_id, job_commands.ResumeJob(at=1))
        await tell(pool, job_id, job_commands.CancelJob(at=1))

    async def follow(tailer: Tailer, job_id: str) -> None:
        position, ended = 0, False
        while not ended:
            assert await tailer.wait_for(f"job/{job_id}", position, LONG)
            news = tailer.since(f"job/{job_id}", position)
            assert news
            seen.extend(news)
            ended = news[-1].type == "job.cancelled"
            position = tailer.position

    async with Tailer(pool) as tailer, anyio.create_task_group() as tasks:
        for _ in range(writers):
            job_id = new_id("ftjob_")
            tasks.start_soon(follow, tailer, job_id)
            tasks.start_soon(write, job_id)
    assert len(seen) == writers * (5 + 2 * pauses)
    assert unlike(sorted(seen, key=lambda event: event.position), await read_dump(database_dsn)) == []


async def test_stop_wakes_everyone_at_once(pool: Pool) -> None:
    answers: list[bool] = []

    async def wait(tailer: Tailer, number: int) -> None:
        answers.append(await tailer.wait_for(f"file/{number % 7}", 0, LONG))

    with anyio.fail_after(5):
        async with Tailer(pool) as tailer, anyio.create_task_group() as tasks:
            for number in range(200):
                tasks.start_soon(wait, tailer, number)
            await anyio.wait_all_tasks_blocked()
            tailer.stop()
            assert tailer.stopped
    assert answers == [False] * 200


async def test_leaving_wakes_those_who_wait_outside(pool: Pool) -> None:
    answers: list[bool] = []

    async def wait(tailer: Tailer) -> None:
        answers.append(await tailer.wait_for("file/x", 0, LONG))

    with anyio.fail_after(5):
        async with anyio.create_task_group() as tasks, Tailer(pool) as tailer:
            tasks.start_soon(wait, tailer)
            await anyio.wait_all_tasks_blocked()
    assert answers == [False]


async def test_it_reads_on_after_its_connection_was_cut(
    pool: Pool, database_dsn: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "rose.log.tail")
    killer = await asyncpg.connect(database_dsn, timeout=30)
    async with Tailer(pool) as tailer:
        await put(pool, "file_a")
        assert await tailer.wait_for("file/file_a", 0, LONG)
        killed = await killer.fetch(
            "select pg_terminate_backend(pid) from pg_stat_activity "
            "where datname = current_database() and pid <> pg_backend_pid() and backend_type = 'client backend'"
        )
        assert killed
        await eventually(lambda: "lost the database" in caplog.text)
        await put(pool, "file_b")
        assert await tailer.wait_for("file/file_b", 1, LONG)
        assert [event.position for event in tailer.since("file/file_a", 0) or ()] == [1]
        assert "answers again" in caplog.text
    await killer.close()


async def test_it_outlives_a_crash_of_postgres(private_folder: Path) -> None:
    service = Postgres(private_folder)
    server = Server(service)
    server.start()
    try:
        await migrate(service.dsn("postgres"))
        pool = await open_pool(service.dsn("postgres"))
        async with Tailer(pool) as tailer:
            await put(pool, "file_a")
            assert await tailer.wait_for("file/file_a", 0, LONG)
            server.kill()
            assert not await tailer.wait_for("file/file_a", 1, 0.5)
            server.start()
            await put(pool, "file_b")
            assert await tailer.wait_for("file/file_b", 1, LONG)
            assert tailer.position == 2
        await pool.close()
    finally:
        server.stop()


async def test_an_event_of_a_newer_rose_does_not_stop_the_others(pool: Pool, caplog: pytest.LogCaptureFixture) -> None:
    async with Tailer(pool) as tailer:
        await pool.execute(
            "with moved as (update rose.log_head set position = position + 1) "
            "insert into rose.events (position, stream_id, version, type, schema, data, metadata) "
            "values (1, 'job/x', 1, 'job.from_the_future', 1, '{}', '{}')"
        )
        await eventually(lambda: tailer.position == 1)
        assert tailer.since("job/x", 0) is None
        await put(pool, "file_b")
        assert await tailer.wait_for("file/file_b", 1, LONG)
        assert "job.from_the_future" in caplog.text


async def test_it_gives_its_connection_back(database_dsn: str) -> None:
    pool = await open_pool(database_dsn, min_size=2, max_size=2)
    async with Tailer(pool):
        await put(pool)
    assert pool.get_idle_size() == pool.get_size()
    await pool.close()
