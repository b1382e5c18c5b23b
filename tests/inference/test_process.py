"""The whole process: settings in, an entry in `workers`, answers, and an end that keeps nobody waiting."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import anyio
import msgspec
import pytest

from rose import leases
from rose.app import PROCESSES
from rose.errors import InvalidRequest, RoseError
from rose.inference import making
from rose.inference.client import EngineClient
from rose.inference.engine import TorchEngine
from rose.log.pool import Pool
from rose.settings import Settings
from tests.eventually import eventually
from tests.inference.asking import QUESTION, World

pytestmark = pytest.mark.anyio


async def test_an_engine_announces_itself_answers_and_ends_its_streams_at_once(
    pool: Pool, database_dsn: str, settings: Callable[..., Settings], world: World
) -> None:
    given = settings(
        database_url=database_dsn,
        blob_dir=world.blobs.root,
        inference_threads=1,
        inference_token="secret",
        device="cpu",
        hub_offline=True,
    )
    stop = anyio.Event()
    asked: dict[str, Any] = {"messages": QUESTION, "rose": msgspec.to_builtins(world.target(world.red))}
    async with EngineClient(token="secret") as client, anyio.create_task_group() as tasks:
        tasks.start_soon(PROCESSES["inference"], given, stop)
        workers = await eventually(lambda: leases.workers(pool, "inference"))
        url = client.choose(workers)
        assert url.startswith("http://127.0.0.1:")
        answer = await client.complete(url, {**asked, "max_tokens": 5})
        assert answer["usage"]["completion_tokens"] <= 5

        async def loaded() -> bool:
            (worker,) = await leases.workers(pool, "inference")
            bases = worker.capabilities["bases"]
            return bool(bases) and bases[0]["adapters"] == [world.red.sha256]

        await eventually(loaded)
        received: list[str] = []
        with anyio.fail_after(30):
            async with client.stream(url, {**asked, "stream": True, "max_tokens": 2000}) as lines:
                async for line in lines:
                    received.append(line)
                    stop.set()
        assert msgspec.json.decode(received[-1])["error"]["code"] == "engine_stopping"
    assert await leases.workers(pool, "inference") == []


async def test_a_process_whose_engine_died_ends(
    database_dsn: str, settings: Callable[..., Settings], world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    class DyingEngine(TorchEngine):
        def _drop_idle(self) -> None:
            raise ZeroDivisionError

    monkeypatch.setattr(making, "TorchEngine", DyingEngine)
    given = settings(database_url=database_dsn, blob_dir=world.blobs.root, inference_threads=1, device="cpu")
    with pytest.raises(RoseError, match="ended by itself"), anyio.fail_after(60):
        await PROCESSES["inference"](given, anyio.Event())


async def test_an_open_door_is_refused(settings: Callable[..., Settings]) -> None:
    given = settings(database_url="postgresql:///nowhere", inference_host="0.0.0.0")
    with pytest.raises(InvalidRequest, match="without a token") as refused:
        await PROCESSES["inference"](given, anyio.Event())
    assert refused.value.param == "inference_token"


STARTED = """
import os, sys
from rose import app, settings
async def run(kind, given):
    assert "torch" not in sys.modules
    import torch
app.run = run
sys.exit(app.main(sys.argv[1], settings.load({})))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks the OpenMP of Linux what it has read")
@pytest.mark.parametrize(("given", "read"), [(None, "PASSIVE"), ("active", "ACTIVE")])
def test_threads_wait_passively_unless_somebody_says_otherwise(given: str | None, read: str) -> None:
    environment = {**os.environ, "OMP_DISPLAY_ENV": "true"} | ({"OMP_WAIT_POLICY": given} if given else {})
    done = subprocess.run(
        [sys.executable, "-c", STARTED, "inference"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"OMP_WAIT_POLICY = '{read}'" in done.stderr
