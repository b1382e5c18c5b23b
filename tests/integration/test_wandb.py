"""A job that names Weights & Biases is logged there: read back from the files that the package wrote, offline."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest

from rose.domain.job_commands import NoteResume, ReleaseRun, ReportSteps
from rose.domain.job_events import JobWarned, StepsReported
from rose.local import launcher
from rose.log.pool import Pool
from rose.settings import Settings
from tests.api.running import free_port
from tests.eventually import eventually
from tests.integration.test_worker_journal import claim
from tests.scripted_child import STEADY_STEPS
from tests.trainers import QUICK, House
from tests.unit import samples
from tests.wandb_runs import WrittenRun, logger_of
from tests.wandb_server import API_KEY
from trainer import supervision
from trainer.integrations import wandb_mirror
from trainer.integrations.wandb_mirror import mirrored
from trainer.protocol import Warned

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(240)]

WANTED = {
    "type": "wandb",
    "wandb": {"project": "roses", "name": "a red one", "entity": "gardeners", "tags": ["red", "tall"]},
}
PLAIN = {"type": "wandb", "wandb": {"project": "roses", "name": None, "entity": None, "tags": []}}


@pytest.fixture
def house(
    pool: Pool,
    settings: Callable[..., Settings],
    fixture_base: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> House:
    """A house whose training child is scripted, and whose environment asks for no network."""
    monkeypatch.setattr(supervision, "TRAINING_MODULE", "tests.scripted_child")
    monkeypatch.setenv("ROSE_TEST_SCRIPT", "steps steadily")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path))
    return House(pool, settings(**QUICK), fixture_base)


def written(house: House, job_id: str, run_id: str | None = None) -> WrittenRun:
    return WrittenRun(house.blobs.path(f"jobs/{job_id}"), run_id or job_id)


async def warnings(house: House, job_id: str) -> list[tuple[str, str]]:
    return [(e.warning.code, e.warning.message) for e in await house.events(job_id) if isinstance(e, JobWarned)]


async def accepted(house: House, job_id: str) -> list[dict[str, Any]]:
    """What the log has of every step, as it should be logged."""
    return [
        {name: value for name, value in msgspec.to_builtins(step).items() if value is not None and name != "step"}
        for event in await house.events(job_id)
        if isinstance(event, StepsReported)
        for step in event.steps
    ]


async def logged(house: House, job_id: str, run_id: str | None = None) -> WrittenRun:
    """Wait until the run is finished, and return it."""
    await eventually(lambda: "state" in written(house, job_id, run_id).summary)
    await eventually(lambda: written(house, job_id, run_id).exit_codes)
    return written(house, job_id, run_id)


async def test_a_job_is_logged_with_its_settings_every_metric_of_every_step_and_its_end(house: House) -> None:
    async with house.trainer():
        job_id = await house.create_queued(integrations=(WANTED,), n_epochs=3)
        state = await house.ended(job_id)
        run = await logged(house, job_id)
    assert state.status == "succeeded"
    assert run.steps == list(range(1, STEADY_STEPS + 1))
    rows = [{name: value for name, value in row.items() if not name.startswith("_")} for _, row in run.history]
    assert rows == await accepted(house, job_id)
    [header] = run.headers
    assert (header.run_id, header.project, header.entity, header.display_name) == (
        job_id,
        "roses",
        "gardeners",
        "a red one",
    )
    assert list(header.tags) == ["red", "tall"]
    assert header.resume
    assert run.config["n_epochs"] == 3
    assert state.hyperparameters is not None
    assert run.config["learning_rate"] == state.hyperparameters.learning_rate
    assert run.config["base_model"] == str(house.base)
    assert run.summary["state"] == "succeeded"
    assert run.summary["fine_tuned_model"] == state.model_name
    assert run.exit_codes == [0]


async def test_the_job_says_where_an_offline_run_is_and_the_data_is_not_in_it(house: House) -> None:
    async with house.trainer():
        job_id = await house.create_queued(integrations=(PLAIN,))
        await house.ended(job_id)
        run = await logged(house, job_id)
    [(code, message)] = await warnings(house, job_id)
    folder = house.blobs.path(f"jobs/{job_id}/wandb")
    assert code == "wandb_offline"
    assert str(folder) in message
    assert "wandb sync" in message
    assert run.headers[0].display_name == job_id
    everything = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert b"colour of thing" not in everything
    assert b"requirements" not in run.text
    assert [path.name for path in folder.rglob("*") if path.suffix in (".txt", ".yaml", ".json")] == []


async def test_a_killed_logger_is_overcome_and_no_step_is_lost_or_logged_twice(house: House) -> None:
    async with house.trainer():
        job_id = await house.create_queued(integrations=(PLAIN,))
        await house.at_step(job_id, 20)
        process = await eventually(lambda: logger_of(job_id))
        await eventually(lambda: written(house, job_id).steps)
        process.send_signal(signal.SIGKILL)
        state = await house.ended(job_id)
        run = await logged(house, job_id)
    assert state.status == "succeeded"
    assert len(run.files) == 2
    assert run.steps == list(range(1, STEADY_STEPS + 1))
    assert run.summary["state"] == "succeeded"
    codes = [code for code, _ in await warnings(house, job_id)]
    assert codes == ["wandb_offline", "wandb"]


async def test_a_cancelled_job_ends_its_run_as_cancelled(house: House) -> None:
    async with house.trainer():
        job_id = await house.create_queued(integrations=(PLAIN,))
        await house.at_step(job_id, 5)
        await eventually(lambda: written(house, job_id).steps)
        await house.cancel(job_id)
        run = await logged(house, job_id)
    assert run.summary["state"] == "cancelled"
    assert run.exit_codes == [1]
    assert run.steps == [step for step, _ in await house.steps(job_id)]


async def test_a_failed_job_ends_its_run_as_failed_with_the_code(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROSE_TEST_SCRIPT", "diverges")
    async with house.trainer():
        job_id = await house.create_queued(integrations=(PLAIN,))
        await house.ended(job_id)
        run = await logged(house, job_id)
    assert run.summary["state"] == "failed"
    assert run.summary["error_code"] == "training_diverged"
    assert run.steps == [1, 2, 3]


async def test_a_service_that_refuses_is_a_warning_and_the_run_is_written_to_disk(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", "too short")
    async with house.trainer():
        job_id = await house.create_queued(integrations=(PLAIN,))
        state = await house.ended(job_id)
        run = await logged(house, job_id)
    assert state.status == "succeeded"
    [(code, message), (other_code, where)] = await warnings(house, job_id)
    assert (code, other_code) == ("wandb", "wandb_offline")
    assert "API key" in message
    assert str(house.blobs.path(f"jobs/{job_id}/wandb")) in where
    assert run.steps == list(range(1, STEADY_STEPS + 1))


async def test_a_service_that_nobody_reaches_costs_the_job_nothing_and_the_run_is_whole_on_disk(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", API_KEY)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setattr(wandb_mirror, "DRAIN_SECONDS", 60.0)
    async with house.trainer():
        job_id = await house.create_queued(integrations=(PLAIN,))
        assert (await house.ended(job_id)).status == "succeeded"
        run = await logged(house, job_id)
    assert run.steps == list(range(1, STEADY_STEPS + 1))
    assert run.summary["state"] == "succeeded"
    assert run.files[-1].parent.name.startswith("offline-run-")


async def test_training_that_begins_anew_begins_another_run(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb_mirror, "DRAIN_SECONDS", 60.0)
    job_id = await house.create_queued(integrations=(PLAIN,))
    owned = await claim(house, job_id)
    stop, launch = anyio.Event(), launcher.command

    async def unheard(warning: Warned) -> None:
        assert warning.code == "wandb_offline"

    async with mirrored(owned, house.settings, house.pool, house.blobs, launch=launch, report=unheard, stop=stop):
        await owned.append(ReportSteps(epoch=1, steps=tuple(map(samples.step, (1, 2, 3)))), "1")
        await owned.append(NoteResume(epoch=1, from_step=0, anew=True), "2")
        await owned.append(ReportSteps(epoch=1, steps=tuple(map(samples.step, (1, 2)))), "3")
        await eventually(lambda: written(house, job_id, f"{job_id}-e1").steps)
        await owned.append(ReleaseRun(epoch=1, at=1, reason="drained", max_attempts=3), "4", free_in_seconds=0.0)
    first, second = written(house, job_id), written(house, job_id, f"{job_id}-e1")
    assert len(first.files) == len(second.files) == 1
    assert (first.steps, first.summary["state"]) == ([1, 2, 3], "begun_anew")
    assert (second.steps, second.summary["state"]) == ([1, 2], "queued")


async def test_two_integrations_are_two_runs(house: House) -> None:
    async with house.trainer():
        job_id = await house.create_queued(integrations=(PLAIN, WANTED))
        await house.ended(job_id)
        first, second = await logged(house, job_id), await logged(house, job_id, f"{job_id}-2")
    assert (first.headers[0].entity, second.headers[0].entity) == ("", "gardeners")
    assert first.steps == second.steps == list(range(1, STEADY_STEPS + 1))
