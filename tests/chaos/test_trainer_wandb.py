"""Whatever is killed in the middle of a job, its run at Weights & Biases goes on: every step once, none lost."""

from __future__ import annotations

import signal
from pathlib import Path

import psutil
import pytest

from tests.eventually import eventually
from tests.trainers import LOSABLE, House, child_of
from tests.wandb_runs import WrittenRun, logger_of

pytestmark = [pytest.mark.anyio, pytest.mark.slow, pytest.mark.timeout(400)]

LONG = {"n_epochs": 20, "batch_size": 1, "validation_split": 0}
STEPS = 160
WANTED = {"type": "wandb", "wandb": {"project": "roses", "name": None, "entity": None, "tags": []}}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path))


def written(house: House, job_id: str) -> WrittenRun:
    return WrittenRun(house.blobs.path(f"jobs/{job_id}"), job_id)


async def stop_in_the_middle(house: House, job_id: str) -> psutil.Process:
    """Stop the training child once its first steps are written to the run as well, so that neither is ahead by much."""
    await house.at_step(job_id, 10)
    child = child_of(job_id, 1)
    assert child is not None
    child.send_signal(signal.SIGSTOP)
    await eventually(lambda: written(house, job_id).steps)
    return child


async def is_whole(house: House, job_id: str, files: int) -> None:
    """Wait for the job's end and see its run: what every attempt added, each step once with the log's loss."""
    state = await house.ended(job_id, 180)
    assert state.status == "succeeded", state.error

    def finished() -> bool:
        return written(house, job_id).summary.get("state") == "succeeded"

    await eventually(finished)
    run = written(house, job_id)
    assert len(run.files) == files
    assert [(step, row["train_loss"]) for step, row in run.history] == await house.steps(job_id)
    assert run.steps == list(range(1, STEPS + 1))
    assert run.exit_codes[-1] == 0


async def test_a_killed_child_continues_the_same_run(house: House) -> None:
    job_id = await house.create_queued(integrations=(WANTED,), **LONG)
    async with house.trainer():
        child = await stop_in_the_middle(house, job_id)
        child.send_signal(signal.SIGKILL)
        await is_whole(house, job_id, 2)
    run = written(house, job_id)
    assert run.preempted == 1, "the first attempt's part is not the end of the run"
    assert {header.run_id for header in run.headers} == {job_id}


async def test_a_killed_trainer_takes_its_logger_along_and_the_next_continues_the_run(
    house: House, database_dsn: str
) -> None:
    house.reset(**LOSABLE)
    job_id = await house.create_queued(integrations=(WANTED,), **LONG)
    with house.trainer_process(database_dsn) as first:
        await stop_in_the_middle(house, job_id)
        process = logger_of(job_id)
        assert process is not None
        service = process.children()
        assert service, "the package's own service"
        first.send_signal(signal.SIGKILL)
        await eventually(lambda: not any(alive(one) for one in (process, *service)), 30)
    before = written(house, job_id).steps
    with house.trainer_process(database_dsn):
        await is_whole(house, job_id, 2)
    assert 0 < len(before) < STEPS


def alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
