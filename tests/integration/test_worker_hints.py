"""NATS makes a trainer quick and nothing else: it wakes slots and tells of cancels; without it all is only slower."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest

from rose import relay
from rose.bus import Bus
from rose.log.pool import Pool
from rose.settings import Settings
from tests.eventually import eventually
from tests.services import NatsServer
from tests.trainers import QUICK, House, child_of
from trainer import supervision

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]

CHILD = "tests.scripted_child"
SLEEPY = {**QUICK, "poll_seconds": 600.0, "renew_seconds": 600.0, "lease_seconds": 3600.0, "abandon_seconds": 3000.0}
"""Nothing happens by itself: whatever happens within a test was caused by a hint."""
SOON_SECONDS = 10.0


@pytest.fixture
def house(
    pool: Pool,
    settings: Callable[..., Settings],
    nats_server: Callable[[], NatsServer],
    fixture_base: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> House:
    monkeypatch.setattr(supervision, "TRAINING_MODULE", CHILD)
    monkeypatch.setenv("ROSE_TEST_SCRIPT", "hangs")
    server = nats_server()
    return House(pool, settings(**SLEEPY, nats_url=server.url), fixture_base)


@asynccontextmanager
async def relaying(house: House) -> AsyncGenerator[None]:
    stop = anyio.Event()
    async with Bus(house.settings.nats_url) as bus, anyio.create_task_group() as tasks:
        tasks.start_soon(relay.run, house.pool, bus, house.settings, stop)
        yield
        stop.set()


async def test_a_queued_job_starts_and_a_cancelled_one_ends_by_hints_alone(house: House) -> None:
    async with relaying(house), house.trainer(drain_seconds=0.1):
        await eventually(house.trainer_is_connected, SOON_SECONDS)
        job_id = await house.create_queued()
        child = await eventually(lambda: child_of(job_id, module=CHILD), SOON_SECONDS)
        assert child is not None
        await house.at_step(job_id, 3)
        await house.cancel(job_id)
        await eventually(lambda: not child.is_running(), SOON_SECONDS)


async def test_a_pause_is_noticed_by_a_hint(house: House) -> None:
    async with relaying(house), house.trainer(drain_seconds=0.1):
        await eventually(house.trainer_is_connected, SOON_SECONDS)
        job_id = await house.create_queued()
        await house.at_step(job_id, 3)
        await house.pause(job_id)

        async def given_back() -> bool:
            return (await house.state(job_id)).run is None

        await eventually(given_back, SOON_SECONDS)


async def test_without_nats_the_same_happens_by_asking(house: House) -> None:
    house.reset(poll_seconds=0.2, renew_seconds=0.3, nats_url="nats://127.0.0.1:9")
    async with house.trainer(drain_seconds=0.1):
        job_id = await house.create_queued()
        await house.at_step(job_id, 3)
        child = child_of(job_id, module=CHILD)
        assert child is not None
        await house.cancel(job_id)
        await eventually(lambda: not child.is_running(), SOON_SECONDS)
