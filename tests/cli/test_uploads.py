"""`rose upload` of what is too large for one piece: parts side by side, a bar on a terminal, no rest after Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import anyio
import pytest

from cli import uploading
from rose.log.pool import Pool
from rose.settings import Settings
from tests.api.conftest import serving
from tests.api.running import SEED, Running, free_port
from tests.cli.conftest import Rose, call
from tests.cli.test_manners import in_a_terminal
from tests.eventually import eventually

pytestmark = pytest.mark.anyio

SMALL_LIMIT = {"ROSE_MAX_UPLOAD_BYTES": "1000"}


@pytest.fixture
def large_file(tmp_path: Path) -> Path:
    """A file of five and a half parts, once a part has a megabyte."""
    path = tmp_path / "large.jsonl"
    path.write_bytes(SEED * (11 * (1 << 19) // len(SEED)))
    return path


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploading, "PART_BYTES", 1 << 20)


def stored(api: Running) -> list[str]:
    """Return the path of every file in the blob folder."""
    root = api.services.settings.blobs
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


@pytest.mark.usefixtures("small_parts")
async def test_a_large_file_goes_up_in_parts(api: Running, rose: Rose, large_file: Path) -> None:
    done = await rose("upload", str(large_file), **SMALL_LIMIT)
    assert (done.status, done.err) == (0, "")
    file_id = done.out.removeprefix("File uploaded: ").strip()
    assert (await api.openai.files.content(file_id)).content == large_file.read_bytes()
    assert stored(api) == [f"files/{file_id}"]
    assert await api.services.pool.fetchval("select jsonb_array_length(doc -> 'part_ids') from rose.uploads") == 6


@pytest.mark.usefixtures("small_parts")
async def test_a_job_of_a_large_file_is_created_from_its_path(api: Running, rose: Rose, large_file: Path) -> None:
    done = await rose("finetune", "create", str(large_file), "--model", "tiny", "-q", **SMALL_LIMIT)
    assert done.status == 0, done.err
    job = await api.openai.fine_tuning.jobs.retrieve(done.out.strip())
    assert (await api.openai.files.retrieve(job.training_file)).bytes == large_file.stat().st_size


@pytest.mark.usefixtures("small_parts")
async def test_the_servers_limit_counts(settings: Callable[..., Settings], pool: Pool, large_file: Path) -> None:
    async with serving(settings(port=free_port(), max_upload_bytes=1000), pool) as api:
        done = await call("upload", str(large_file), "-q", environment={"ROSE_URL": api.services.settings.url})
        assert done.status == 0, done.err
        assert stored(api) == [f"files/{done.out.strip()}"]


@pytest.mark.usefixtures("small_parts")
async def test_a_refused_upload_is_cancelled(
    api: Running, rose: Rose, large_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploading, "_md5", lambda *_: "0" * 32)
    done = await rose("upload", str(large_file), **SMALL_LIMIT)
    assert done.status == 2
    assert "error[md5_mismatch]" in done.err
    assert "nothing of it stays on the server" in done.err
    assert stored(api) == []
    assert await api.services.pool.fetchval("select doc ->> 'cancelled_at' is not null from rose.uploads")


async def test_too_large_is_said_before_anything_is_sent(
    settings: Callable[..., Settings], pool: Pool, large_file: Path
) -> None:
    given = settings(port=free_port(), max_upload_bytes=1000, max_upload_in_parts_bytes=2000)
    async with serving(given, pool) as api:
        done = await call("upload", str(large_file), environment={"ROSE_URL": given.url})
        assert done.status == 2
        assert f"bytes is {large_file.stat().st_size}; it must be from 0 to 2000" in done.err
        assert stored(api) == []


@pytest.fixture
def sparse_file(tmp_path: Path) -> Path:
    """A file of ten parts that takes no room."""
    path = tmp_path / "sparse.bin"
    path.touch()
    os.truncate(path, 640 << 20)
    return path


async def test_ctrl_c_leaves_nothing(api: Running, sparse_file: Path) -> None:
    environment = {**os.environ, "ROSE_URL": api.services.settings.url}
    command = [sys.executable, "-m", "cli.app", "upload", str(sparse_file), "--purpose", "user_data"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            await eventually(lambda: any(path.startswith("uploads/") for path in stored(api)))
            process.send_signal(signal.SIGINT)
            out, err = await anyio.to_thread.run_sync(lambda: process.communicate(timeout=60))
        finally:
            process.kill()
    assert (process.returncode, out) == (130, b""), err
    assert err == b"The upload was given up; nothing of it stays on the server.\n"
    await eventually(lambda: stored(api) == [])
    assert await api.services.pool.fetchval("select doc ->> 'cancelled_at' is not null from rose.uploads")


@pytest.mark.usefixtures("small_parts")
async def test_a_terminal_gets_a_bar(api: Running, large_file: Path) -> None:
    environment = {"ROSE_URL": api.services.settings.url, "COLUMNS": "100", **SMALL_LIMIT}
    shown = await in_a_terminal("upload", str(large_file), **environment)
    assert "Uploading large.jsonl" in shown
    assert "File uploaded: file_" in shown
