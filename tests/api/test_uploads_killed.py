"""Uploads in parts over several processes: killed at any moment, asked at once, large, and nothing is left behind."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import anyio
import httpx2
import msgspec
import psutil
import pytest

from projections.verify import verify
from rose.blobs import Blobs
from rose.log.pool import Pool
from rose.settings import Settings, to_environment
from rose.sweeper import sweep
from tests.api.running import free_port
from tests.api.test_large_uploads import Peak
from tests.eventually import eventually

pytestmark = pytest.mark.anyio

PIECE = 4 << 20
CREATE = {"filename": "a.bin", "mime_type": "bin", "purpose": "user_data"}


def content(number: int, size: int = PIECE) -> bytes:
    """Return the bytes of a part."""
    return random.Random(number).randbytes(64 << 10) * (size >> 16)


class Process:
    """An API in a process of its own, on the test's database and blob folder."""

    def __init__(self, settings: Settings) -> None:
        self.settings = msgspec.structs.replace(settings, port=free_port())
        environment = {**os.environ, **to_environment(self.settings)}
        self.process = subprocess.Popen([sys.executable, "-m", "rose.app", "api"], env=environment)
        self.http = httpx2.AsyncClient(base_url=self.settings.url, timeout=120)

    async def answers(self) -> bool:
        """Say whether it answers."""
        try:
            return (await self.http.get("/ready")).status_code == 200
        except httpx2.TransportError:
            return False

    async def create(self, size: int) -> str:
        """Create an upload and return its id."""
        return (await self.http.post("/v1/uploads", json={**CREATE, "bytes": size})).raise_for_status().json()["id"]

    async def part(self, upload: str, data: bytes) -> str:
        """Add a part and return its id."""
        sent = await self.http.post(f"/v1/uploads/{upload}/parts", files={"data": ("upload", data)})
        return sent.raise_for_status().json()["id"]

    async def complete(self, upload: str, parts: list[str], **more: Any) -> dict[str, Any]:
        """Complete an upload and return the answer."""
        done = await self.http.post(f"/v1/uploads/{upload}/complete", json={"part_ids": parts, **more})
        return done.raise_for_status().json()


@asynccontextmanager
async def running(settings: Settings) -> AsyncGenerator[Process]:
    """Run an API until the block ends."""
    process = Process(settings)
    try:
        await eventually(process.answers)
        yield process
    finally:
        process.process.kill()
        process.process.wait(timeout=30)
        await process.http.aclose()


@pytest.fixture
def given(settings: Callable[..., Settings], database_dsn: str) -> Settings:
    return settings(database_url=database_dsn)


def stored(settings: Settings) -> list[str]:
    """Return the path of every file in the blob folder."""
    return sorted(path.relative_to(settings.blobs).as_posix() for path in settings.blobs.rglob("*") if path.is_file())


async def check_house(pool: Pool, settings: Settings) -> None:
    """Sweep as if a day had passed: what stays is exactly what an event names."""
    await sweep(pool, Blobs(settings.blobs), keep_seconds=-60)
    files = [row["path"] for row in await pool.fetch("select doc -> 'artifact' ->> 'path' as path from rose.files")]
    pending = await pool.fetch(
        "select id, jsonb_array_elements(doc -> 'parts') ->> 'id' as part from rose.uploads "
        "where doc ->> 'completed_at' is null and doc ->> 'cancelled_at' is null"
    )
    assert stored(settings) == sorted([*files, *(f"uploads/{row['id']}/{row['part']}" for row in pending)])
    assert await verify(pool) == []


async def test_a_kill_in_the_middle_of_a_part_leaves_nothing_after_the_sweep(given: Settings, pool: Pool) -> None:
    async with running(given) as api:
        upload = await api.create(2 * PIECE)
        first = await api.part(upload, content(1))

        async def slow() -> Any:
            yield b'--x\r\nContent-Disposition: form-data; name="data"; filename="upload"\r\n\r\n'
            yield content(2)[: 3 << 20]
            await eventually(lambda: any(path.startswith("tmp/part.") for path in stored(given)))
            api.process.kill()

        with pytest.raises(httpx2.TransportError):
            await api.http.post(
                f"/v1/uploads/{upload}/parts",
                content=slow(),
                headers={"content-type": "multipart/form-data; boundary=x"},
            )
    assert len(stored(given)) == 2
    await check_house(pool, given)
    assert stored(given) == [f"uploads/{upload}/{first}"]
    async with running(given) as api:
        second = await api.part(upload, content(2))
        done = await api.complete(upload, [first, second])
    assert done["file"]["sha256"] == hashlib.sha256(content(1) + content(2)).hexdigest()
    await check_house(pool, given)


async def test_a_kill_between_the_rename_and_the_event_leaves_an_upload_that_can_be_completed(
    given: Settings, pool: Pool
) -> None:
    async with running(given) as api:
        upload = await api.create(2 * PIECE)
        parts = [await api.part(upload, content(1)), await api.part(upload, content(2))]
        async with pool.acquire() as connection, connection.transaction():
            await connection.execute("select from rose.streams where stream_id = $1 for update", f"upload/{upload}")
            async with anyio.create_task_group() as tasks:

                async def cut_off() -> None:
                    with pytest.raises(httpx2.TransportError):
                        await api.complete(upload, parts)

                tasks.start_soon(cut_off)
                await eventually(lambda: (given.blobs / "files").is_dir() and any((given.blobs / "files").iterdir()))
                api.process.kill()

            async def no_append_waits() -> bool:
                count = await pool.fetchval(
                    "select count(*) from pg_stat_activity where datname = current_database() "
                    "and query like '%rose.append%' and state = 'active' and pid <> pg_backend_pid()"
                )
                return count == 0

            await eventually(no_append_waits)
    assert len(stored(given)) == 3
    async with running(given) as api:
        assert (await api.http.get(f"/v1/uploads/{upload}")).json()["status"] == "pending"
        done = await api.complete(upload, parts)
        assert (await api.http.get(f"/v1/files/{done['file']['id']}/content")).content == content(1) + content(2)
    await check_house(pool, given)
    assert stored(given) == [f"files/{done['file']['id']}"]


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_kills_at_random_moments_of_a_completion(given: Settings, pool: Pool) -> None:
    chance = random.Random(7)
    for round_ in range(6):
        async with running(given) as api:
            upload = await api.create(3 * PIECE)
            parts = [await api.part(upload, content(number)) for number in (1, 2, 3)]

            async def cut_off(api: Process = api, upload: str = upload, parts: list[str] = parts) -> None:
                with suppress(httpx2.TransportError):
                    await api.complete(upload, parts)

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(cut_off)
                await anyio.sleep(chance.uniform(0, 0.12))  # the moment is what is tried
                api.process.kill()
        async with running(given) as api:
            done = await api.complete(upload, parts)
            again = await api.complete(upload, parts)
            assert again == done, round_
            found = await api.http.get(f"/v1/files/{done['file']['id']}/content")
            assert found.content == b"".join(map(content, (1, 2, 3)))
    assert await pool.fetchval("select count(*) from rose.files") == 6
    await check_house(pool, given)


async def test_two_processes_complete_at_once(given: Settings, pool: Pool) -> None:
    async with running(given) as one, running(given) as other:
        upload = await one.create(8 * PIECE)
        parts = [await one.part(upload, content(number)) for number in range(8)]
        answers: list[dict[str, Any]] = []

        async def complete(api: Process) -> None:
            answers.append(await api.complete(upload, parts))

        async with anyio.create_task_group() as tasks:
            for api in (one, other, one, other):
                tasks.start_soon(complete, api)
        assert len(answers) == 4
        assert all(answer == answers[0] for answer in answers)
    assert stored(given) == [f"files/{answers[0]['file']['id']}"]
    await check_house(pool, given)


def pieces(count: int) -> Iterator[bytes]:
    """Yield parts of 64 MB."""
    for number in range(count):
        yield content(number, 64 << 20)


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_512_mb_in_parts_take_little_memory_and_the_api_answers_meanwhile(given: Settings, pool: Pool) -> None:
    async with running(given) as api:
        upload = await api.create(512 << 20)
        digest, md5, parts = hashlib.sha256(), hashlib.md5(), []
        peak = Peak(api.process.pid)
        before = psutil.Process(api.process.pid).memory_info().rss
        answered = 0

        async def ask() -> None:
            nonlocal answered
            async with httpx2.AsyncClient(base_url=api.settings.url, timeout=60) as http:
                while True:
                    await http.get("/health")
                    answered += 1

        async with anyio.create_task_group() as watching:
            watching.start_soon(peak.watch)
            for piece in pieces(8):
                parts.append(await api.part(upload, piece))
                digest.update(piece)
                md5.update(piece)
            watching.start_soon(ask)
            await eventually(lambda: answered > 0)
            answered = 0
            done = await api.complete(upload, parts, md5=md5.hexdigest())
            while_completing = answered
            watching.cancel_scope.cancel()
    assert done["file"]["sha256"] == digest.hexdigest()
    assert while_completing >= 5
    grown = peak.bytes - before
    assert grown < 64 << 20, f"the server grew by {grown >> 20} MB"
    await check_house(pool, given)


async def test_a_cancel_ends_a_completion_or_comes_too_late(given: Settings, pool: Pool) -> None:
    async with running(given) as api:
        upload = await api.create(8 * PIECE)
        parts = [await api.part(upload, content(number)) for number in range(8)]
        statuses: dict[str, httpx2.Response] = {}

        async def ask(verb: str, body: dict[str, Any] | None) -> None:
            statuses[verb] = await api.http.post(f"/v1/uploads/{upload}/{verb}", json=body)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask, "complete", {"part_ids": parts})
            tasks.start_soon(ask, "cancel", None)
        assert sorted(answer.status_code for answer in statuses.values()) == [200, 400]
        refused = next(answer for answer in statuses.values() if answer.status_code == 400).json()["error"]
        assert (refused["param"], refused["code"]) == ("upload_id", "invalid_upload_state")
    await check_house(pool, given)
    assert len(stored(given)) == (1 if statuses["complete"].status_code == 200 else 0)
