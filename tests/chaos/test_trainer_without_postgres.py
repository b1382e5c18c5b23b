"""Postgres goes away within a run: briefly, and nothing is noticed; for long, and the run is taken up anew."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from rose.domain.job_events import LeaseExpired, RunReleased, RunStarted
from rose.settings import Settings
from tests.checker import check_log
from tests.eventually import eventually
from tests.scripted_child import LONG_STEPS, STEADY_STEPS
from tests.services import Server
from tests.trainers import LOSABLE, QUICK, House, child_of, own_postgres
from trainer import supervision

pytestmark = [pytest.mark.anyio, pytest.mark.slow, pytest.mark.timeout(240)]

CHILD = "tests.scripted_child"


@asynccontextmanager
async def house_on_its_own_postgres(settings: Settings, base: Path) -> AsyncGenerator[tuple[House, Server]]:
    async with own_postgres() as (server, pool):
        yield House(pool, settings, base), server
        assert await check_log(server.service.dsn()) == []


@pytest.fixture(autouse=True)
def steady_child(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervision, "TRAINING_MODULE", CHILD)
    monkeypatch.setenv("ROSE_TEST_SCRIPT", "steps steadily")


async def test_a_short_absence_interrupts_nothing(settings: Callable[..., Settings], fixture_base: Path) -> None:
    async with house_on_its_own_postgres(settings(**QUICK), fixture_base) as (house, server), house.trainer():
        job_id = await house.create_queued()
        await house.at_step(job_id, 50)
        await anyio.to_thread.run_sync(server.kill)
        await anyio.to_thread.run_sync(server.start)
        assert (await house.ended(job_id)).status == "succeeded"
        events = await house.events(job_id)
        assert sum(isinstance(event, RunStarted) for event in events) == 1, "one child did all of it"
        assert [step for step, _ in await house.steps(job_id)] == list(range(1, STEADY_STEPS + 1))


async def test_a_child_that_nobody_can_vouch_for_is_killed_and_the_run_taken_up_again(
    settings: Callable[..., Settings], fixture_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROSE_TEST_SCRIPT", "steps steadily for long")  # longer than anybody vouches for it
    losable = settings(**{**QUICK, **LOSABLE})
    async with house_on_its_own_postgres(losable, fixture_base) as (house, server), house.trainer():
        job_id = await house.create_queued()
        await house.at_step(job_id, 50)
        child = child_of(job_id, module=CHILD)
        assert child is not None
        await anyio.to_thread.run_sync(server.kill)
        began = anyio.current_time()
        await eventually(lambda: not child.is_running(), 20)
        assert anyio.current_time() - began < house.settings.lease_seconds + 1, "before anybody else may own the job"
        await anyio.to_thread.run_sync(server.start)
        assert (await house.ended(job_id)).status == "succeeded"
        events = await house.events(job_id)
        assert sum(isinstance(event, RunStarted) for event in events) == 2
        assert any(isinstance(event, LeaseExpired | RunReleased) for event in events)
        assert [step for step, _ in await house.steps(job_id)] == list(range(1, LONG_STEPS + 1))


async def test_a_trainer_stops_although_nothing_can_be_given_back(
    settings: Callable[..., Settings], fixture_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervision, "FAREWELL_SECONDS", 1.0)
    given = settings(**{**QUICK, "drain_seconds": 0.5})
    async with house_on_its_own_postgres(given, fixture_base) as (house, server):
        async with house.trainer():
            job_id = await house.create_queued()
            await house.at_step(job_id, 50)
            await anyio.to_thread.run_sync(server.kill)
            began = anyio.current_time()
        assert anyio.current_time() - began < 40
        assert child_of(job_id, module=CHILD) is None
        await anyio.to_thread.run_sync(server.start)
        state = await house.state(job_id)
        assert state.run is not None, "nobody could say that it ended; the lease will"
