"""Trainers and their children are killed, stopped and doubled in the middle of jobs; each job still ends once, whole.

Every test ends with the checker of docs/architecture.md's promises (conftest.py), which finds stale writes, gaps and
second endings.
"""

from __future__ import annotations

import random
import signal
from collections import Counter

import anyio
import anyio.to_thread
import psutil
import pytest

from rose import leases
from rose.domain.catalogue import Event
from rose.domain.job_events import (
    FilesValidated,
    JobSucceeded,
    LeaseExpired,
    RecoveryPointSaved,
    RunReleased,
    RunResumed,
    RunStarted,
)
from tests.eventually import eventually
from tests.trainers import LOSABLE, House, child_of, jsonl

pytestmark = [pytest.mark.anyio, pytest.mark.slow, pytest.mark.timeout(400)]

STEPS = 80
LONG = {"n_epochs": 10, "batch_size": 1, "validation_split": 0}
"""Eight examples, ten epochs: eighty steps, an epoch's end each eight."""
FIRST_HALF = range(6, STEPS // 2)
"""Steps at which a run is disturbed: it goes on for seconds, so whoever saw one of them meets it alive."""


Result = tuple[list[tuple[int, float]], bytes]
"""Every step with its loss, and the final weights."""

_reference: list[Result] = []


async def uninterrupted(house: House) -> Result:
    """Return the result of a run that nobody disturbed; made once, since it is always the same."""
    if not _reference:
        job_id = await house.create_queued(**LONG)
        async with house.trainer():
            await house.ended(job_id, 120)
        _reference.append(await result(house, job_id))
    return _reference[0]


async def result(house: House, job_id: str) -> Result:
    state = await house.state(job_id)
    assert state.status == "succeeded", state.error
    assert state.artifact is not None
    house.blobs.verify(state.artifact)
    weights = house.blobs.path(state.artifact.path) / "adapter_model.safetensors"
    return await house.steps(job_id), weights.read_bytes()


def resumptions_are_honest(events: list[Event]) -> int:
    """Check that each resumed run began at the newest recovery point of its time; return how many there were."""
    newest, found = 0, 0
    for event in events:
        if isinstance(event, RecoveryPointSaved):
            newest = max(newest, event.step)
        elif isinstance(event, RunResumed):
            found += 1
            assert (event.from_step, event.rejected) == (newest, ())
    return found


async def kill_child_at(house: House, job_id: str, step: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Signal the child that reached the step or goes on behind it; one that was signalled before has to be gone."""

    async def living() -> psutil.Process | None:
        state = await house.at_step(job_id, step)
        resumed = [event.epoch for event in await house.events(job_id) if isinstance(event, RunResumed)]
        return child_of(job_id, state.epoch) if state.epoch in (1, *resumed) else None

    (await eventually(living)).send_signal(number)


async def test_a_child_killed_at_any_step_goes_on_bit_for_bit(house: House) -> None:
    expected = await uninterrupted(house)
    job_id = await house.create_queued(**LONG)
    steps = sorted(random.Random(7).sample(FIRST_HALF, 3))
    async with house.trainer():
        for step in steps:
            await kill_child_at(house, job_id, step)
        await house.ended(job_id, 180)
    losses, weights = await result(house, job_id)
    assert [step for step, _ in losses] == list(range(1, STEPS + 1))
    assert losses == expected[0], "every loss is that of the uninterrupted run, bit for bit"
    assert weights == expected[1]
    events = await house.events(job_id)
    released = [event for event in events if isinstance(event, RunReleased)]
    assert released
    assert {event.reason for event in released} == {"crashed"}
    assert all("SIGKILL" in event.detail for event in released)
    assert resumptions_are_honest(events) == len(released)


async def test_a_stopped_child_is_found_killed_and_continued(house: House) -> None:
    expected = await uninterrupted(house)
    house.reset(stall_seconds=2.0, phase_seconds=60.0)
    job_id = await house.create_queued(**LONG)
    async with house.trainer():
        await kill_child_at(house, job_id, 12, signal.SIGSTOP)  # between steps or, on a busy machine, while it saves
        await house.ended(job_id, 200)
    assert await result(house, job_id) == expected, "losses and weights are those of the uninterrupted run, bit for bit"
    events = await house.events(job_id)
    released = [event for event in events if isinstance(event, RunReleased)]
    assert [event.reason for event in released] == ["stalled"]
    assert released[0].detail.startswith(("no training step for", "no end of the phase"))
    assert resumptions_are_honest(events) == 1


async def test_a_killed_supervisor_takes_its_child_along_and_another_takes_over(
    house: House, database_dsn: str
) -> None:
    expected = await uninterrupted(house)
    house.reset(**LOSABLE)
    job_id = await house.create_queued(**LONG)
    with house.trainer_process(database_dsn) as first:
        state = await house.at_step(job_id, 7)
        child = child_of(job_id, state.epoch)
        assert child is not None
        first.send_signal(signal.SIGKILL)
        await eventually(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, 5)
    async with house.trainer():
        await house.ended(job_id, 120)
    assert await result(house, job_id) == expected, "losses and weights are those of the uninterrupted run, bit for bit"
    events = await house.events(job_id)
    assert sum(isinstance(event, LeaseExpired) for event in events) == 1
    assert resumptions_are_honest(events) == 1


async def test_a_supervisor_stopped_past_its_lease_can_write_nothing_more(house: House, database_dsn: str) -> None:
    expected = await uninterrupted(house)
    house.reset(**LOSABLE)
    job_id = await house.create_queued(**LONG)
    with house.trainer_process(database_dsn) as first:
        state = await house.at_step(job_id, 7)
        stale_child = child_of(job_id, state.epoch)
        assert stale_child is not None
        first.send_signal(signal.SIGSTOP)
        async with house.trainer():

            async def taken_over() -> bool:
                return (await house.state(job_id)).epoch > state.epoch

            await house.until(job_id, taken_over, 60)
            first.send_signal(signal.SIGCONT)
            await house.ended(job_id, 120)
            await eventually(lambda: not stale_child.is_running(), 30)
        assert first.poll() is None, "the stale supervisor goes on, without that job"
    assert await result(house, job_id) == expected, "losses and weights are those of the uninterrupted run, bit for bit"
    events = await house.events(job_id)
    assert resumptions_are_honest(events) == 1
    assert sum(isinstance(event, JobSucceeded) for event in events) == 1


async def test_two_trainers_share_several_jobs_and_each_runs_once(house: House, database_dsn: str) -> None:
    async def both() -> bool:
        return len(await leases.workers(house.pool, "trainer")) == 2

    with house.trainer_process(database_dsn), house.trainer_process(database_dsn):
        await eventually(both)
        jobs = [await house.create_queued(n_epochs=1, batch_size=4) for _ in range(4)]
        for job_id in jobs:
            assert (await house.ended(job_id, 180)).status == "succeeded"
    owners: Counter[str] = Counter()
    for job_id in jobs:
        started = [event for event in await house.events(job_id) if isinstance(event, RunStarted)]
        assert len(started) == 1
        owners[started[0].owner] += 1
    assert len(owners) == 2, "both worked"


async def test_pausing_and_resuming_at_random_moments_loses_no_step(house: House) -> None:
    expected = await uninterrupted(house)
    job_id = await house.create_queued(**LONG)
    chance = random.Random(11)
    async with house.trainer():
        for step in sorted(chance.sample(FIRST_HALF, 3)):
            await house.at_step(job_id, step)
            await house.pause(job_id)
            if chance.random() < 0.7:

                async def idle() -> bool:
                    return (await house.state(job_id)).run is None

                await house.until(job_id, idle, 60)
            await house.resume(job_id)
        await house.ended(job_id, 120)
    assert await result(house, job_id) == expected
    events = await house.events(job_id)
    assert {event.reason for event in events if isinstance(event, RunReleased)} <= {"paused", "drained"}


async def test_a_child_that_always_dies_fails_the_job_with_reason_and_log(house: House) -> None:
    house.reset(recovery_steps=None)
    job_id = await house.create_queued(n_epochs=50, batch_size=8)
    async with house.trainer():
        killed = 0
        while not (state := await house.state(job_id)).is_terminal:
            child = child_of(job_id, state.epoch)
            if child is not None and state.run is not None:
                child.send_signal(signal.SIGKILL)
                killed += 1
                epoch = state.epoch

                async def next_one(epoch: int = epoch) -> bool:
                    now = await house.state(job_id)
                    return now.is_terminal or now.epoch > epoch

                await house.until(job_id, next_one, 60)
            else:
                await anyio.sleep(0.05)  # until the next child has started
    assert killed == house.settings.max_attempts
    assert state.error is not None
    assert state.error.code == "attempts_exhausted"
    assert "SIGKILL" in state.error.message
    assert state.error.log is not None
    assert f"{job_id}-e{state.epoch}.log" in state.error.log


async def test_a_validation_that_is_killed_is_done_again(house: House) -> None:
    content = jsonl() * 500  # long enough that the child can be caught
    async with house.trainer():
        job_id = await house.create(content, n_epochs=1, batch_size=256)
        child = await eventually(lambda: child_of(job_id, 1, "trainer.validate"), 60)
        assert child is not None
        child.send_signal(signal.SIGKILL)

        async def validated() -> bool:
            return (await house.state(job_id)).hyperparameters is not None

        await house.until(job_id, validated, 120)
        await house.cancel(job_id)
    events = await house.events(job_id)
    released = [event for event in events if isinstance(event, RunReleased)]
    assert released[0].kind == "validation"
    assert released[0].reason == "crashed"
    assert sum(isinstance(event, FilesValidated) for event in events) == 1
