"""The process that delivers webhooks is killed between sending and noting: the event comes again, under the same id."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import anyio
import pytest

from rose.log.pool import Pool
from rose.settings import Settings, to_environment
from tests.api.conftest import serving
from tests.api.running import SEED, free_port
from tests.eventually import eventually
from tests.webhook_receiver import Receiver

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(300)]


@contextmanager
def projections(settings: Settings) -> Iterator[subprocess.Popen[bytes]]:
    """Run the process `projections`, without NATS, which it does not need for this; kill it at the end."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("ROSE_")}
    environment = {**inherited, "ROSE_CONFIG": "/nonexistent", **to_environment(settings)}
    with (settings.data_dir / "projections.log").open("ab") as log:
        command = [sys.executable, "-m", "rose.app", "projections"]
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


async def states(pool: Pool) -> set[str]:
    return {row["state"] for row in await pool.fetch("select state from rose.webhook_deliveries")}


async def test_an_event_comes_again_after_a_kill(
    settings: Callable[..., Settings], pool: Pool, database_dsn: str, tmp_path: Path
) -> None:
    given = settings(port=free_port(), database_url=database_dsn, webhook_private_targets=True)
    file = tmp_path / "a.jsonl"
    file.write_bytes(SEED)
    receiver = Receiver(free_port())
    never = anyio.Event()
    receiver.hold = lambda _: never if len(receiver.received) == 1 else None
    async with serving(given, pool) as api, receiver.listening():
        made = await api.openai.webhooks.create(event_types=["fine_tuning.job.cancelled"], name="ci", url=receiver.url)
        with projections(given) as first, projections(given) as second:
            job = await api.job(file)
            await api.openai.fine_tuning.jobs.cancel(job.id)
            await receiver.wait(1, 120)
            assert await states(pool) == {"pending"}
            for process in (first, second):
                process.send_signal(signal.SIGKILL)
                await anyio.to_thread.run_sync(process.wait)
            with projections(given):
                await receiver.wait(2, 120)

                async def delivered() -> bool:
                    return await states(pool) == {"delivered"}

                await eventually(delivered)
        never.set()
    assert len({one.id for one in receiver.received}) == 1
    for one in receiver.received:
        assert one.unwrap(made.signing_secret).data.id == job.id


async def test_a_stop_signal_lets_what_is_under_way_arrive(
    settings: Callable[..., Settings], pool: Pool, database_dsn: str, tmp_path: Path
) -> None:
    given = settings(port=free_port(), database_url=database_dsn, webhook_private_targets=True)
    file = tmp_path / "a.jsonl"
    file.write_bytes(SEED)
    receiver = Receiver(free_port())
    held = anyio.Event()
    receiver.hold = lambda _: held
    async with serving(given, pool) as api, receiver.listening():
        await api.openai.webhooks.create(event_types=["fine_tuning.job.cancelled"], name="ci", url=receiver.url)
        with projections(given) as process:
            job = await api.job(file)
            await api.openai.fine_tuning.jobs.cancel(job.id)
            await receiver.wait(1, 120)
            process.send_signal(signal.SIGTERM)
            held.set()
            assert await anyio.to_thread.run_sync(process.wait) == 0
        assert await states(pool) == {"delivered"}
    assert len(receiver.received) == 1
