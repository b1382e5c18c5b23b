"""Reports become appends on a real log: in order, none lost, each once, also while Postgres is away."""

from __future__ import annotations

import base64
import itertools
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from rose.commands import Request
from rose.domain.artifacts import Artifact
from rose.domain.job_commands import CancelJob, StartRun, StartValidation
from rose.domain.job_events import (
    CheckpointSaved,
    JobWarned,
    PhaseEntered,
    RecoveryPointSaved,
    RunResumed,
    StepsReported,
)
from rose.domain.job_values import StepMetrics
from rose.errors import StaleEpoch
from rose.leases import Lease
from rose.log.append import Actor, LeaseChange
from rose.log.pool import Pool
from rose.settings import Settings
from tests.trainers import CLIENT, House, own_postgres
from tests.unit import samples
from trainer.journal import MAX_STEPS, Journal
from trainer.ownership import OwnedJob
from trainer.protocol import CheckpointMade, PhaseChanged, RecoveryPointMade, Resumed, StepDone, Warned
from trainer.results import HEADER, write_result_file

pytestmark = pytest.mark.anyio

ACTOR = Actor(kind="trainer", name="tests")


@pytest.fixture
def house(pool: Pool, settings: Callable[..., Settings], tmp_path: Path) -> House:
    return House(pool, settings(), tmp_path)


async def claim(house: House, job_id: str, kind: str = "training", owner: str = "tests") -> OwnedJob:
    """Own a job, as a worker does."""
    state = await house.state(job_id)
    epoch = state.epoch + 1
    if kind == "training":
        command = StartRun(owner=owner, host="here", epoch=epoch, at=1)
    else:
        command = StartValidation(owner=owner, epoch=epoch, at=1)
    change = LeaseChange(action="claim", job_id=job_id, kind=kind, epoch=epoch, owner=owner)
    outcome = await house.commands.job(job_id, command, Request(actor=ACTOR), lease=change)
    lease = Lease(job_id=job_id, kind=kind, epoch=epoch, owner=owner)
    return OwnedJob(house.pool, lease, outcome.state, actor=ACTOR, lease_seconds=60, renewed_at=time.monotonic())


async def running_job(house: House) -> OwnedJob:
    """Create a job and bring it to a run without any child process."""
    job_id = await house.create()
    validation = await claim(house, job_id, "validation")
    await validation.append(samples.validated(validation.lease.epoch), "end", free_in_seconds=0)
    return await claim(house, job_id)


@asynccontextmanager
async def writing(owned: OwnedJob, house: House) -> AsyncGenerator[Journal]:
    journal = Journal(owned, house.blobs)
    with anyio.fail_after(60):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(journal.write)
            yield journal
            tasks.cancel_scope.cancel()


@asynccontextmanager
async def writing_in(house: House) -> AsyncGenerator[tuple[House, OwnedJob, Journal]]:
    owned = await running_job(house)
    async with writing(owned, house) as journal:
        yield house, owned, journal


def metrics(step: int) -> StepMetrics:
    return samples.step(
        step, valid_loss=0.25 if step % 2 else None, valid_mean_token_accuracy=0.5 if step % 2 else None
    )


async def test_steps_are_gathered_and_everything_keeps_its_order(house: House) -> None:
    owned = await running_job(house)
    point = Artifact(path="jobs/x/e2/recovery-1", bytes=1, sha256="1" * 64)
    async with writing(owned, house) as journal:
        await journal.put(Resumed(from_step=0, rejected=("step 3: a NUL \0 and a lone \ud800",)))
        await journal.put(PhaseChanged(phase="train"))
        for step in range(1, 301):
            await journal.put(StepDone(metrics=metrics(step)))
        await journal.put(RecoveryPointMade(step=300, artifact=point, trained_tokens=9))
        await journal.put(CheckpointMade(step=300, epoch_number=1, artifact=point, metrics={"train_loss": 1.0}))
        await journal.put(Warned(code="few_examples", message="only 2"))
        await journal.put(StepDone(metrics=metrics(301)))
        await journal.flush()
    events = (await house.events(owned.lease.job_id))[-8:]
    kinds = (RunResumed, PhaseEntered, StepsReported, StepsReported, RecoveryPointSaved, CheckpointSaved, JobWarned)
    assert [type(event) for event in events] == [*kinds, StepsReported]
    assert isinstance(events[0], RunResumed)
    assert events[0].rejected == ("step 3: a NUL \N{REPLACEMENT CHARACTER} and a lone ?",)
    assert isinstance(events[2], StepsReported)
    assert len(events[2].steps) == MAX_STEPS
    assert [step for step, _ in await house.steps(owned.lease.job_id)] == list(range(1, 302))


async def test_a_steady_stream_of_steps_makes_about_one_append_a_second(house: House) -> None:
    owned = await running_job(house)
    async with writing(owned, house) as journal:
        began = anyio.current_time()
        for step in itertools.count(1):
            await journal.put(StepDone(metrics=metrics(step)))
            await anyio.sleep(0.005)  # the pace of the steps is what is tested
            if anyio.current_time() - began > 2.5:
                break
        seconds = anyio.current_time() - began
        appends = sum(isinstance(event, StepsReported) for event in await house.events(owned.lease.job_id))
        await journal.flush()
    assert 2 <= appends <= seconds + 1
    assert [number for number, _ in await house.steps(owned.lease.job_id)] == list(range(1, step + 1))


async def test_nothing_is_lost_while_postgres_is_away(settings: Callable[..., Settings], tmp_path: Path) -> None:
    async with (
        own_postgres() as (server, pool),
        writing_in(House(pool, settings(), tmp_path)) as (house, owned, journal),
    ):
        await journal.put(StepDone(metrics=metrics(1)))
        await journal.flush()
        await anyio.to_thread.run_sync(server.kill)
        for step in range(2, 500):
            await journal.put(StepDone(metrics=metrics(step)))
            if step % 50 == 0:
                await journal.put(PhaseChanged(phase="evaluate" if step % 100 else "train"))
        await anyio.to_thread.run_sync(server.start)
        await journal.flush()
        assert [step for step, _ in await house.steps(owned.lease.job_id)] == list(range(1, 500))


async def test_what_was_reported_twice_is_in_the_log_once(house: House) -> None:
    owned = await running_job(house)
    for _ in range(2):
        async with writing(owned, house) as journal:
            for step in range(1, 11):
                await journal.put(StepDone(metrics=metrics(step)))
            await journal.flush()
    assert [step for step, _ in await house.steps(owned.lease.job_id)] == list(range(1, 11))


async def test_a_cancelled_job_refuses_the_next_append(house: House) -> None:
    owned = await running_job(house)
    await house.commands.job(owned.lease.job_id, CancelJob(at=5), Request(actor=CLIENT))
    journal = Journal(owned, house.blobs)
    await journal.put(StepDone(metrics=metrics(1)))
    with anyio.fail_after(30), pytest.raises(StaleEpoch):
        await journal.write()
    assert await house.steps(owned.lease.job_id) == []


async def test_recovery_points_that_the_job_no_longer_names_are_deleted(house: House) -> None:
    owned = await running_job(house)
    points: list[Artifact] = []
    async with writing(owned, house) as journal:
        for step in range(1, 5):
            folder = house.blobs.temporary_folder()
            (folder / "state").write_text(str(step))
            points.append(house.blobs.publish_folder(folder, f"jobs/{owned.lease.job_id}/e2/recovery-{step}"))
            await journal.put(RecoveryPointMade(step=step, artifact=points[-1], trained_tokens=step))
        await journal.flush()
    named = [point.artifact for point in (await house.state(owned.lease.job_id)).recovery_points]
    assert named == [points[3], points[2]]
    assert [house.blobs.path(point.path).exists() for point in points] == [False, False, True, True]


@pytest.mark.parametrize("encoding", ["plain", "base64"])
async def test_the_result_file_has_a_row_for_each_step_of_the_log(house: House, encoding: str) -> None:
    owned = await running_job(house)
    async with writing(owned, house) as journal:
        for step in range(1, 501):
            await journal.put(StepDone(metrics=metrics(step)))
            if step % 7 == 0:
                await journal.put(PhaseChanged(phase="evaluate" if step % 2 else "train"))
        await journal.flush()
    artifact = await write_result_file(house.pool, house.blobs, owned.lease.job_id, "file_results", encoding)
    house.blobs.verify(artifact)
    content = house.blobs.path(artifact.path).read_bytes()
    lines = (base64.b64decode(content, validate=True) if encoding == "base64" else content).decode().splitlines()
    assert lines[0] == HEADER
    assert len(lines) == 501
    assert lines[1] == "1,1.0,0.5,0.25,0.5"
    assert lines[2] == "2,0.5,0.5,,"
    assert [int(line.split(",")[0]) for line in lines[1:]] == list(range(1, 501))
