"""Uploads at and over the limit: memory stays bounded, the refusal arrives, nothing is left."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager

import anyio
import httpx2
import psutil
import pytest

from rose.log.pool import Pool
from rose.settings import Settings, to_environment
from tests.api.conftest import serving
from tests.api.running import free_port
from tests.eventually import eventually

pytestmark = pytest.mark.anyio

LINE = b'{"messages": [{"role": "user", "content": "%s"}, {"role": "assistant", "content": "ok"}]}\n' % (b"x" * 900)
BLOCK = LINE * 1024
HEAD = (
    b'--rose\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
    b'--rose\r\nContent-Disposition: form-data; name="file"; filename="large.jsonl"\r\n\r\n'
)
TAIL = b"\r\n--rose--\r\n"
FORM = {"content-type": "multipart/form-data; boundary=rose"}


def content(size: int) -> Iterator[bytes]:
    """Yield exactly `size` bytes of JSONL in large pieces."""
    while size > 0:
        piece = BLOCK[:size]
        size -= len(piece)
        yield piece


async def form(size: int) -> AsyncIterator[bytes]:
    """Yield a multipart body with a file of `size` bytes."""
    yield HEAD
    for piece in content(size):
        yield piece
    yield TAIL


class Peak:
    """The largest resident memory of a process while somebody looks."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self.bytes = self._process.memory_info().rss

    async def watch(self) -> None:
        """Look often, until cancelled."""
        while True:
            self.bytes = max(self.bytes, self._process.memory_info().rss)
            await anyio.sleep(0.02)


@contextmanager
def api_process(settings: Settings) -> Iterator[int]:
    """Run the API in a process of its own and yield its id."""
    environment = {**os.environ, **to_environment(settings)}
    with subprocess.Popen([sys.executable, "-m", "rose.app", "api"], env=environment) as process:
        try:
            yield process.pid
        finally:
            process.terminate()
            process.wait(timeout=30)


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_512_mb_take_less_than_64_mb_of_memory(settings: Callable[..., Settings], database_dsn: str) -> None:
    size = 512 << 20
    given = settings(port=free_port(), database_url=database_dsn)
    with api_process(given) as pid:
        async with httpx2.AsyncClient(base_url=given.url, timeout=240) as http:

            async def answers() -> bool:
                try:
                    return (await http.get("/ready")).status_code == 200
                except httpx2.TransportError:
                    return False

            await eventually(answers)
            before = psutil.Process(pid).memory_info().rss
            peak = Peak(pid)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(peak.watch)
                answer = await http.post("/v1/files", content=form(size), headers=FORM)
                tasks.cancel_scope.cancel()
    assert answer.status_code == 200, answer.text
    made = answer.json()
    assert made["bytes"] == size
    digest = hashlib.sha256()
    for piece in content(size):
        digest.update(piece)
    assert made["sha256"] == digest.hexdigest()
    grown = peak.bytes - before
    assert grown < 64 << 20, f"the server grew by {grown >> 20} MB"


@pytest.mark.parametrize("announced", [True, False])
async def test_a_file_over_the_limit_is_refused_and_leaves_nothing(
    settings: Callable[..., Settings], pool: Pool, announced: bool
) -> None:
    given = settings(port=free_port(), max_upload_bytes=1 << 20)
    async with serving(given, pool) as api:
        size = 20 << 20
        length = {"content-length": str(len(HEAD) + size + len(TAIL))} if announced else {}
        answer = await api.http.post("/v1/files", content=form(size), headers={**FORM, **length})
        assert answer.status_code == 413
        error = answer.json()["error"]
        assert (error["param"], error["type"]) == ("file", "invalid_request_error")
        assert str(1 << 20) in error["message"]
        assert [path for path in given.blobs.rglob("*") if path.is_file()] == []
        exact = await api.http.post("/v1/files", content=form(1 << 20), headers=FORM)
        assert exact.status_code == 200


async def test_below_the_floor_of_free_space_nothing_is_taken(settings: Callable[..., Settings], pool: Pool) -> None:
    given = settings(port=free_port(), min_free_bytes=1 << 60)
    async with serving(given, pool) as api:
        answer = await api.http.post("/v1/files", content=form(1000), headers=FORM)
        assert answer.status_code == 507
        assert answer.headers["x-should-retry"] == "false"
        assert "rose models delete" in answer.json()["error"]["message"]


async def test_below_the_floor_of_free_space_no_job_is_created(settings: Callable[..., Settings], pool: Pool) -> None:
    async with serving(settings(port=free_port()), pool) as api:
        training_file = (await api.http.post("/v1/files", content=form(1000), headers=FORM)).json()["id"]
    async with serving(settings(port=free_port(), min_free_bytes=1 << 60), pool) as api:
        body = {"model": "tiny", "training_file": training_file}
        answer = await api.http.post("/v1/fine_tuning/jobs", json=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (507, "no_space")
        assert (await api.http.get("/v1/fine_tuning/jobs")).json()["data"] == []


async def test_a_repeated_upload_with_a_key_is_stored_once(settings: Callable[..., Settings], pool: Pool) -> None:
    given = settings(port=free_port())
    async with serving(given, pool) as api:
        headers = {**FORM, "Idempotency-Key": "upload-1"}
        first = await api.http.post("/v1/files", content=form(5000), headers=headers)
        again = await api.http.post("/v1/files", content=form(5000), headers=headers)
        assert again.json() == first.json()
        other = await api.http.post("/v1/files", content=form(6000), headers=headers)
        assert (other.status_code, other.json()["error"]["code"]) == (400, "idempotency_key_reused")
        files = [path.name for path in (given.blobs / "files").iterdir()]
        assert files == [first.json()["id"]]
