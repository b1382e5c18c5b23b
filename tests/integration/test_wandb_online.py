"""The same with a server that answers: the real client decides what it sends, resumes and syncs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio.to_thread
import pytest

from rose.domain.job_events import JobWarned
from rose.log.pool import Pool
from rose.settings import Settings
from tests.eventually import eventually
from tests.scripted_child import STEADY_STEPS
from tests.trainers import QUICK, House
from tests.wandb_runs import WrittenRun, logger_of
from tests.wandb_server import API_KEY, WandbServer, running_wandb
from trainer import supervision
from trainer.integrations import wandb_files

pytestmark = [pytest.mark.anyio, pytest.mark.slow, pytest.mark.timeout(240)]

ALL = list(range(1, STEADY_STEPS + 1))
WANTED: dict[str, Any] = {
    "type": "wandb",
    "wandb": {"project": "roses", "name": "a red one", "entity": None, "tags": ["red"]},
}


@pytest.fixture
def server() -> Iterator[WandbServer]:
    with running_wandb() as running:
        yield running


@pytest.fixture
def house(
    pool: Pool,
    settings: Callable[..., Settings],
    fixture_base: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    server: WandbServer,
) -> House:
    """A house whose training child is scripted, and whose environment names the server."""
    monkeypatch.setattr(supervision, "TRAINING_MODULE", "tests.scripted_child")
    monkeypatch.setenv("ROSE_TEST_SCRIPT", "steps steadily")
    for name, value in {
        "WANDB_BASE_URL": server.url,
        "WANDB_API_KEY": API_KEY,
        "WANDB_CACHE_DIR": str(tmp_path),
        "WANDB_CONFIG_DIR": str(tmp_path),
    }.items():
        monkeypatch.setenv(name, value)
    return House(pool, settings(**QUICK), fixture_base)


async def codes(house: House, job_id: str) -> list[str]:
    return [event.warning.code for event in await house.events(job_id) if isinstance(event, JobWarned)]


async def test_a_run_is_sent_and_finished(house: House, server: WandbServer) -> None:
    async with house.trainer():
        job_id = await house.create_queued(integrations=(WANTED,))
        state = await house.ended(job_id)
        await eventually(lambda: server.runs[job_id].exit_codes)
    run = server.runs[job_id]
    assert run.steps == ALL
    assert run.name == "a red one"
    assert run.config["job_id"]["value"] == job_id
    assert run.summary["fine_tuned_model"] == state.model_name
    assert run.exit_codes == [0]
    assert await codes(house, job_id) == []


async def test_a_killed_logger_continues_behind_what_the_server_has(house: House, server: WandbServer) -> None:
    async with house.trainer():
        job_id = await house.create_queued(integrations=(WANTED,))
        await house.at_step(job_id, 20)
        process = await eventually(lambda: logger_of(job_id))
        await eventually(lambda: job_id in server.runs)
        process.send_signal(signal.SIGKILL)
        await house.ended(job_id)
        await eventually(lambda: server.runs[job_id].exit_codes)
    run = server.runs[job_id]
    assert run.steps == ALL
    assert len(run.resumed_from) == 1
    assert await codes(house, job_id) == ["wandb"]


async def test_offline_parts_of_several_attempts_are_synced_as_one_run(
    house: House, server: WandbServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as offline:
        offline.setenv("WANDB_MODE", "offline")
        async with house.trainer():
            job_id = await house.create_queued(integrations=(WANTED,))
            folder = house.blobs.path(f"jobs/{job_id}")
            await house.at_step(job_id, 20)
            process = await eventually(lambda: logger_of(job_id))
            await eventually(lambda: WrittenRun(folder, job_id).steps)
            process.send_signal(signal.SIGKILL)
            await house.ended(job_id)
    parts = [str(path.parent) for path in wandb_files.files(folder, job_id)]
    assert len(parts) == 2
    assert server.runs == {}
    await anyio.to_thread.run_sync(sync, parts, tmp_path)
    assert server.runs[job_id].steps == ALL
    assert server.runs[job_id].summary["state"] == "succeeded"


def sync(parts: list[str], folder: Path) -> None:
    """Do what the job's warning names; the program writes its own log into the folder where it is started."""
    command = [Path(sys.executable).with_name("wandb"), "sync", *parts]
    done = subprocess.run(command, env=dict(os.environ), cwd=folder, capture_output=True, text=True, timeout=120)
    assert "Finished syncing" in done.stderr, f"{done.stdout}\n{done.stderr}"
