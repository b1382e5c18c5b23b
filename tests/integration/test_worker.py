"""One trainer in this process with its real children: from a created job to a model, and every way to stop between."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import anyio
import pytest

from rose import leases
from rose.domain.job_events import JobSucceeded, RunReleased, RunResumed
from rose.log.pool import Pool
from rose.log.read import load_row
from rose.settings import Settings
from tests.eventually import eventually
from tests.trainers import QUICK, House, child_of, jsonl
from trainer.results import HEADER

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(300)]

LONG = 15
"""Epochs of a run that goes on for seconds after somebody has seen its first steps."""


@pytest.fixture
def house(pool: Pool, settings: Callable[..., Settings], fixture_base: Path) -> House:
    return House(pool, settings(**QUICK), fixture_base)


async def test_a_job_runs_from_created_to_a_registered_model_with_a_result_file(house: House) -> None:
    async with house.trainer():
        job_id = await house.create(n_epochs=3, batch_size=4)
        state = await house.ended(job_id)
    assert state.status == "succeeded", state.error
    assert state.artifact is not None
    house.blobs.verify(state.artifact)
    assert [step for step, _ in await house.steps(job_id)] == list(range(1, 7))
    model = await load_row(house.pool, "models", job_id)
    assert model is not None
    assert state.result_file is not None
    lines = house.blobs.path(f"files/{state.result_file}").read_text().splitlines()
    assert lines[0] == HEADER
    assert len(lines) == 7
    assert state.recovery_points == () or not any(
        house.blobs.path(point.artifact.path).exists() for point in state.recovery_points
    )
    assert child_of(job_id) is None
    assert [worker for worker in await leases.workers(house.pool) if worker.kind == "trainer"] == []


async def test_a_broken_file_fails_the_job_with_its_line(house: House) -> None:
    async with house.trainer():
        job_id = await house.create(jsonl() + b'{"messages": 3}\n')
        state = await house.ended(job_id)
    assert state.status == "failed"
    assert state.error is not None
    assert state.error.code == "invalid_training_file"
    assert "9" in state.error.message


async def test_a_base_that_is_not_there_fails_the_job_with_what_to_do(house: House) -> None:
    async with house.trainer():
        job_id = await house.create(base="/nowhere/at-all")
        state = await house.ended(job_id)
    assert state.error is not None
    assert state.error.code == "model_not_available"
    assert "/nowhere/at-all" in state.error.message


async def test_a_cancel_kills_the_child_within_seconds(house: House) -> None:
    async with house.trainer():
        job_id = await house.create_queued(n_epochs=50, batch_size=1)
        await house.at_step(job_id, 2)
        assert child_of(job_id) is not None
        await house.cancel(job_id)
        await eventually(lambda: child_of(job_id) is None, 15)
        assert (await house.state(job_id)).status == "cancelled"


async def test_a_pause_keeps_a_recovery_point_and_a_resume_goes_on_from_it(house: House) -> None:
    async with house.trainer():
        job_id = await house.create_queued(n_epochs=LONG, batch_size=1)
        await house.at_step(job_id, 5)
        await house.pause(job_id)

        async def given_back() -> bool:
            return (await house.state(job_id)).run is None

        await house.until(job_id, given_back, 30)
        assert (await house.state(job_id)).status == "paused"
        paused_at = await house.newest_recovery_point(job_id)
        assert paused_at is not None
        await house.resume(job_id)
        state = await house.ended(job_id)
    events = await house.events(job_id)
    assert [event.reason for event in events if isinstance(event, RunReleased)] == ["paused"]
    assert [event.from_step for event in events if isinstance(event, RunResumed)] == [paused_at]
    assert state.status == "succeeded"
    assert [step for step, _ in await house.steps(job_id)] == list(range(1, 8 * LONG + 1))


async def test_stopping_the_trainer_drains_and_the_next_one_goes_on_at_once(house: House) -> None:
    async with house.trainer():
        job_id = await house.create_queued(n_epochs=LONG, batch_size=1)
        await house.at_step(job_id, 5)
    state = await house.state(job_id)
    assert (state.status, state.run, state.attempts) == ("queued", None, 0)
    drained_at = await house.newest_recovery_point(job_id)
    began = anyio.current_time()
    async with house.trainer():
        await house.at_step(job_id, (drained_at or 0) + 1)
        assert anyio.current_time() - began < house.settings.lease_seconds, "nobody waited for the lease"
        assert (await house.ended(job_id)).status == "succeeded"
    events = await house.events(job_id)
    assert [event.reason for event in events if isinstance(event, RunReleased)] == ["drained"]
    assert [event.from_step for event in events if isinstance(event, RunResumed)] == [drained_at]
    assert [step for step, _ in await house.steps(job_id)] == list(range(1, 8 * LONG + 1))
    assert sum(isinstance(event, JobSucceeded) for event in events) == 1


async def test_a_queued_job_whose_base_has_vanished_fails_instead_of_waiting_for_ever(
    house: House, tmp_path: Path
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(house.base, folder)
    house.base = folder
    job_id = await house.create_queued()
    shutil.rmtree(folder)
    async with house.trainer():
        state = await house.ended(job_id)
    assert state.error is not None
    assert state.error.code == "model_not_available"
    assert str(folder) in state.error.message
