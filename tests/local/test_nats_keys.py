"""A key for NATS on a machine with `rose up`: made, read with, kept over crashes and restarts, revoked."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import anyio
import nats.errors
import pytest
from nats.aio.client import Client

from rose.local import state
from rose.nats_readers import API_PREFIX, inbox_prefix
from rose.subjects import STREAM
from tests.eventually import eventually
from tests.local.rose_up import RoseUp, rose_up
from tests.services import private_folder

pytestmark = [pytest.mark.anyio, pytest.mark.slow, pytest.mark.timeout(400)]


@asynccontextmanager
async def connected(access: dict[str, Any], password: str) -> AsyncIterator[Client]:
    client = Client()
    try:
        await client.connect(
            access["url"],
            user=access["user"],
            password=password,
            inbox_prefix=access["inbox_prefix"],
            allow_reconnect=False,
        )
        yield client
    finally:
        await client.close()


async def hears_of(filename: str, access: dict[str, Any], password: str) -> None:
    """Read until the file's event comes. Raises: TimeoutError."""
    async with connected(access, password) as client:
        subscription = await client.jetstream(prefix=API_PREFIX).pull_subscribe_bind(access["user"], stream=STREAM)
        with anyio.fail_after(60):
            while True:
                with suppress(nats.errors.Error):  # nothing there yet, or the consumer is not
                    (message,) = await subscription.fetch(1, timeout=5, heartbeat=1)
                    await message.ack_sync()
                    if json.loads(message.data)["data"].get("filename") == filename:
                        return
                await anyio.sleep(0.05)


async def opens(access: dict[str, Any], password: str) -> bool:
    with suppress(nats.errors.Error, OSError):
        async with connected(access, password):
            return True
    return False


def upload(up: RoseUp, path: Path) -> None:
    path.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n')
    sent = up.rose("upload", str(path))
    assert sent.returncode == 0, sent.stderr


async def test_a_key_reads_over_crashes_and_restarts_until_it_is_revoked(tmp_path: Path) -> None:
    with private_folder() as data:
        with rose_up(data) as up:
            made = up.rose("keys", "create", "reader", "--nats", "--json")
            assert made.returncode == 0, made.stderr
            key, password = (json.loads(made.stdout)["api_key"][name] for name in ("id", "value"))
            nats_url = state.connection(up.settings).nats_url
            assert nats_url is not None
            url = f"nats://{nats_url.rpartition('@')[2]}"
            access = {"url": url, "user": key, "inbox_prefix": inbox_prefix(key)}
            await eventually(lambda: opens(access, password))
            upload(up, tmp_path / "none.jsonl")
            await hears_of("none.jsonl", access, password)
            for kind in ("nats", "projections"):
                pid = up.pid_of(kind)
                assert pid is not None
                os.kill(pid, signal.SIGKILL)
            upload(up, tmp_path / "one.jsonl")
            await eventually(lambda: opens(access, password))
            await hears_of("one.jsonl", access, password)
        with rose_up(data, {"ROSE_PORT": str(up.settings.port)}) as up:
            upload(up, tmp_path / "two.jsonl")
            await hears_of("two.jsonl", access, password)
            assert "nats" in up.rose("keys", "list").stdout
            gone = up.rose("keys", "revoke", access["user"])
            assert gone.returncode == 0, gone.stderr

            async def closed() -> bool:
                return not await opens(access, password)

            await eventually(closed)
