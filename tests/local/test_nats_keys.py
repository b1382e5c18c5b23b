"""A key for NATS on a machine with `rose up`: made, read with, kept over crashes and restarts, revoked."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import anyio
import nats.errors
import pytest
from nats.aio.client import Client

from rose.subjects import READER_API, STREAM
from tests.eventually import eventually
from tests.local.rose_up import RoseUp, rose_up
from tests.services import private_folder

pytestmark = [pytest.mark.anyio, pytest.mark.slow, pytest.mark.timeout(400)]


async def read(access: dict[str, Any], password: str) -> list[dict[str, Any]]:
    """Return the next event that a holder of the key gets."""
    user = access["user"]
    client = Client()
    try:
        await client.connect(
            access["url"], user=user, password=password, inbox_prefix=access["inbox_prefix"], allow_reconnect=False
        )
        jetstream = client.jetstream(prefix=READER_API)
        subscription = await jetstream.pull_subscribe_bind(user, stream=STREAM)
        found: list[dict[str, Any]] = []
        with anyio.move_on_after(3):
            while True:
                (message,) = await subscription.fetch(1, timeout=5, heartbeat=1)
                found.append(json.loads(message.data))
                await message.ack_sync()
        return found
    finally:
        await client.close()


async def opens(access: dict[str, Any], password: str) -> bool:
    try:
        await read(access, password)
    except (nats.errors.Error, OSError):
        return False
    return True


def upload(up: RoseUp, path: Path) -> None:
    path.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n')
    sent = up.rose("upload", str(path))
    assert sent.returncode == 0, sent.stderr


async def test_a_key_reads_over_crashes_and_restarts_until_it_is_revoked(tmp_path: Path) -> None:
    with private_folder() as data:
        with rose_up(data) as up:
            made = up.rose("keys", "create", "reader", "--nats")
            assert made.returncode == 0, made.stderr
            assert "NATS does not know the key yet" not in made.stdout
            shown = dict(line.split("=", 1) for line in made.stdout.splitlines() if line.startswith("NATS_"))
            access = {"url": shown["NATS_URL"], "user": shown["NATS_USER"]}
            access["inbox_prefix"] = f"_INBOX_{access['user']}"
            password = shown["NATS_PASSWORD"]
            assert [event["type"] for event in await read(access, password)] == ["rose.v2.key.created"]
            for kind in ("nats", "projections"):
                pid = up.pid_of(kind)
                assert pid is not None
                os.kill(pid, signal.SIGKILL)
            upload(up, tmp_path / "one.jsonl")
            await eventually(lambda: opens(access, password))
        with rose_up(data, {"ROSE_PORT": str(up.settings.port)}) as up:
            upload(up, tmp_path / "two.jsonl")
            events = await read(access, password)
            assert events[-1]["data"]["filename"] == "two.jsonl"
            assert "nats" in up.rose("keys", "list").stdout
            gone = up.rose("keys", "revoke", access["user"])
            assert gone.returncode == 0, gone.stderr

            async def closed() -> bool:
                return not await opens(access, password)

            await eventually(closed)
