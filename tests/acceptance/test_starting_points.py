"""From a request to an answer with real trainer and engine: whole models, training on, validation files, deletion."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest
from openai.types.fine_tuning import FineTuningJob

from rose import leases
from rose.log.pool import Pool
from rose.settings import Settings
from tests.api.conftest import serving
from tests.api.running import Running, free_port
from tests.eventually import eventually
from tests.trainers import QUICK, House

pytestmark = [pytest.mark.anyio, pytest.mark.slow, pytest.mark.timeout(400)]

SECONDS = 150
FIRST = ("What is the colour of a rose?", "A rose is red.")
SECOND = ("What is the colour of grass?", "Grass is green.")
UNRELATED = ("How many legs has a spider?", "Eight of them.")


def jsonl(*examples: tuple[str, str]) -> bytes:
    rows = ([{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in examples)
    return b"".join(json.dumps({"messages": messages}).encode() + b"\n" for messages in rows)


class Whole(msgspec.Struct, frozen=True, kw_only=True):
    """API, trainer and engine on one log, asked as a client asks."""

    api: Running
    base: str

    async def upload(self, *examples: tuple[str, str]) -> str:
        made = await self.api.openai.files.create(file=("data.jsonl", jsonl(*examples)), purpose="fine-tune")
        return made.id

    async def create(self, training_file: str, **body: Any) -> FineTuningJob:
        asked: dict[str, Any] = {"model": self.base, "seed": 1, **body}
        return await self.api.openai.fine_tuning.jobs.create(training_file=training_file, **asked)

    async def succeeded(self, job_id: str) -> FineTuningJob:
        """Return the job once it has succeeded."""

        async def over() -> FineTuningJob | None:
            job = await self.api.openai.fine_tuning.jobs.retrieve(job_id)
            return job if job.status in ("succeeded", "failed", "cancelled") else None

        job = await eventually(over, SECONDS)
        assert job.status == "succeeded", job.error
        assert job.fine_tuned_model is not None
        return job

    async def answer(self, model: str | None, question: str) -> str:
        """Return a model's greedy answer."""
        assert model is not None
        said = await self.api.openai.chat.completions.create(
            model=model, messages=[{"role": "user", "content": question}], temperature=0, max_tokens=40
        )
        assert said.model == model
        return said.choices[0].message.content or ""


@pytest.fixture
async def whole(
    settings: Callable[..., Settings], database_dsn: str, pool: Pool, fixture_base: Path
) -> AsyncIterator[Whole]:
    from rose.app import PROCESSES

    given = settings(**QUICK, port=free_port(), database_url=database_dsn, inference_threads=1)
    house = House(pool, given, fixture_base)
    stop = anyio.Event()
    async with serving(given, pool) as api, house.trainer(), anyio.create_task_group() as tasks:
        tasks.start_soon(PROCESSES["inference"], given, stop)
        await eventually(lambda: leases.workers(pool, "inference"))
        yield Whole(api=api, base=str(fixture_base))
        stop.set()


async def test_a_whole_model_answers_and_is_trained_on_although_all_it_came_from_is_deleted(whole: Whole) -> None:
    files = whole.api.openai.files
    data = await whole.upload(FIRST)
    knobs = {"n_epochs": 40, "batch_size": 1, "use_lora": False, "learning_rate_multiplier": 2}
    created = await whole.create(data, hyperparameters=knobs)
    await files.delete(data)  # the job has pinned what it needs
    parent = await whole.succeeded(created.id)
    assert parent.fine_tuned_model is not None
    model = await whole.api.openai.models.retrieve(parent.fine_tuned_model)
    assert model.model_extra is not None
    assert model.model_extra["kind"] == "full"
    assert await whole.answer(parent.fine_tuned_model, FIRST[0]) == FIRST[1]
    assert await whole.answer(whole.base, FIRST[0]) != FIRST[1]

    heir = await whole.create(
        await whole.upload(SECOND), model=parent.fine_tuned_model, hyperparameters={"n_epochs": 40, "batch_size": 1}
    )
    await whole.api.openai.models.delete(parent.fine_tuned_model)
    heir = await whole.succeeded(heir.id)
    assert await whole.answer(heir.fine_tuned_model, SECOND[0]) == SECOND[1]


async def test_training_goes_on_from_a_checkpoint_beside_a_validation_file(whole: Whole) -> None:
    jobs = whole.api.openai.fine_tuning.jobs
    both = await whole.upload(FIRST, SECOND)
    held = await whole.upload(UNRELATED)
    created = await whole.create(both, validation_file=held, hyperparameters={"n_epochs": 20, "batch_size": 1})
    parent = await whole.succeeded(created.id)
    assert parent.validation_file == held
    checkpoints = [found async for found in jobs.checkpoints.list(parent.id)]
    assert len(checkpoints) == 20
    assert all(found.metrics.full_valid_loss is not None for found in checkpoints)
    best = min(checkpoints, key=lambda found: found.metrics.full_valid_loss or 0)
    newest = checkpoints[0].fine_tuned_model_checkpoint
    assert await whole.answer(newest, FIRST[0]) == FIRST[1]
    assert await whole.answer(parent.fine_tuned_model, UNRELATED[0]) == await whole.answer(
        best.fine_tuned_model_checkpoint, UNRELATED[0]
    )

    created = await whole.create(
        await whole.upload(UNRELATED), model=newest, hyperparameters={"n_epochs": 1, "batch_size": 1}
    )
    heir = await whole.succeeded(created.id)
    assert heir.model == newest
    steps = [event async for event in jobs.list_events(heir.id) if event.type == "metrics"]
    assert len(steps) == 1
    # One small step away from its parent, so what that one had learned is still there.
    assert await whole.answer(heir.fine_tuned_model, SECOND[0]) == SECOND[1]
