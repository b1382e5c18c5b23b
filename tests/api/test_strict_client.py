"""The official client with strict response validation: every field is of the type that OpenAI's schema says."""

from __future__ import annotations

from pathlib import Path

import pytest
from openai import AsyncOpenAI

from tests.api.running import Running, Trainer

pytestmark = pytest.mark.anyio


async def test_the_whole_workflow_is_valid(api: Running, seed_file: Path) -> None:
    url = f"{api.services.settings.url}/v1"
    async with AsyncOpenAI(base_url=url, api_key="any", max_retries=0, _strict_response_validation=True) as client:
        uploaded = await client.files.create(file=seed_file, purpose="fine-tune")
        assert (await client.files.retrieve(uploaded.id)).id == uploaded.id
        assert (await client.files.wait_for_processing(uploaded.id)).status == "processed"
        upload = await client.uploads.create(bytes=2, filename="a.txt", mime_type="txt", purpose="assistants")
        parts = [(await client.uploads.parts.create(upload.id, data=byte)).id for byte in (b"a", b"b")]
        joined = (await client.uploads.complete(upload.id, part_ids=parts)).file
        assert joined is not None
        assert (await client.files.delete(joined.id)).deleted
        other = await client.uploads.create(bytes=2, filename="a.txt", mime_type="txt", purpose="assistants")
        assert (await client.uploads.cancel(other.id)).status == "cancelled"
        integration = {"type": "wandb", "wandb": {"project": "roses", "tags": ["red"]}}
        jobs = client.fine_tuning.jobs
        job = await jobs.create(
            model="tiny",
            training_file=uploaded.id,
            integrations=[integration],  # type: ignore[list-item]
            method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2}}},
        )
        trainer = Trainer(api.services, job.id)
        await trainer.validate()
        await trainer.start()
        await trainer.steps(1, 2)
        assert (await jobs.retrieve(job.id)).estimated_finish is not None
        await trainer.checkpoint(2)
        await trainer.succeed(2)
        done = await jobs.retrieve(job.id)
        assert done.status == "succeeded"
        assert done.integrations is not None
        assert done.integrations[0].wandb.project == "roses"
        assert len([event async for event in jobs.list_events(job.id, limit=3)]) > 5
        assert len([checkpoint async for checkpoint in jobs.checkpoints.list(job.id)]) == 1
        assert [one.id async for one in jobs.list()] == [job.id]
        assert [file.purpose async for file in client.files.list()] == ["fine-tune-results", "fine-tune"]
        assert done.fine_tuned_model is not None
        assert (await client.models.retrieve(done.fine_tuned_model)).object == "model"
        assert (await client.models.list()).data[0].id == done.fine_tuned_model
        assert (await client.models.delete(done.fine_tuned_model)).deleted
        assert (await client.files.delete(uploaded.id)).deleted
