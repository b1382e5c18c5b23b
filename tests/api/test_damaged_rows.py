"""A row that a hand, a disk or a defect has spoilt: lists show it as damaged beside the others, a rebuild mends it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import anyio.to_thread
import openai
import pytest
from openai import AsyncOpenAI

from tests.api.running import Running, Trainer

pytestmark = pytest.mark.anyio


@pytest.fixture
def strict(api: Running) -> AsyncOpenAI:
    """A client that refuses what is not of OpenAI's types."""
    return api.openai.copy(_extra_kwargs={"_strict_response_validation": True})


async def damage(api: Running, view: str, id: str, **fields: Any) -> None:
    """Spoil fields of a row by SQL."""
    changed = await api.services.pool.execute(
        f"update rose.{view} set doc = doc || $1::text::jsonb where id = $2", json.dumps(fields), id
    )
    assert changed == "UPDATE 1"


async def rebuild(dsn: str, view: str) -> None:
    """Mend a view through the command line."""

    def run() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "cli.app", "projections", "rebuild", view]
        given = {**os.environ, "ROSE_DATABASE_URL": dsn, "ROSE_CONFIG": "/nonexistent"}
        return subprocess.run(command, env=given, capture_output=True, text=True, check=False)

    done = await anyio.to_thread.run_sync(run)
    assert done.returncode == 0, done.stderr
    assert "1 rows were different" in done.stdout


async def test_a_damaged_job(
    api: Running, strict: AsyncOpenAI, database_dsn: str, seed_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    jobs = [await api.job(seed_file) for _ in range(3)]
    before = await strict.fine_tuning.jobs.retrieve(jobs[1].id)
    await damage(api, "jobs", jobs[1].id, epoch="two", last_metrics=7)

    listed = (await strict.fine_tuning.jobs.list()).data
    assert [job.id for job in listed] == [job.id for job in reversed(jobs)]
    assert [job.status for job in listed] == ["validating_files", "failed", "validating_files"]
    shown = await strict.fine_tuning.jobs.retrieve(jobs[1].id)
    assert shown == listed[1]
    assert shown.error is not None
    assert shown.error.code == "damaged_row"
    assert "rose projections rebuild jobs" in shown.error.message
    assert (shown.model, shown.training_file, shown.created_at) == (
        before.model,
        before.training_file,
        before.created_at,
    )
    assert f"the row of {jobs[1].id} in the view jobs is damaged" in caplog.text

    with pytest.raises(openai.InternalServerError) as refused:
        await api.openai.fine_tuning.jobs.cancel(jobs[1].id)
    assert refused.value.code == "damaged_row"
    assert refused.value.response.headers["x-should-retry"] == "false"
    assert "rose projections rebuild jobs" in refused.value.message

    await rebuild(database_dsn, "jobs")
    assert await strict.fine_tuning.jobs.retrieve(jobs[1].id) == before


@pytest.mark.parametrize("doc", ['"nothing"', "[1]", "{project}", '{project, "error": 7, "created_at": 1e999}'])
async def test_a_job_of_which_nothing_is_left(api: Running, strict: AsyncOpenAI, seed_file: Path, doc: str) -> None:
    job, other = await api.job(seed_file), await api.job(seed_file)
    text = doc.replace("{project", '{"project": "default"')
    await api.services.pool.execute("update rose.jobs set doc = $1::text::jsonb where id = $2", text, job.id)
    seen = {one.id: one.status for one in (await strict.fine_tuning.jobs.list()).data}
    assert seen.pop(other.id) == "validating_files"
    assert seen == ({job.id: "failed"} if "project" in doc else {}), "nobody knows whose it was"


async def test_a_damaged_file(api: Running, strict: AsyncOpenAI, database_dsn: str, seed_file: Path) -> None:
    files = [await api.upload(seed_file) for _ in range(2)]
    before = await strict.files.retrieve(files[0])
    await damage(api, "files", files[0], artifact="gone")

    listed = (await strict.files.list()).data
    assert [(file.id, file.status) for file in listed] == [(files[1], "processed"), (files[0], "error")]
    shown = await strict.files.retrieve(files[0])
    assert shown == listed[1]
    assert "rose projections rebuild files" in (shown.status_details or "")
    assert (shown.filename, shown.created_at) == (before.filename, before.created_at)
    for use in (
        api.openai.files.content(files[0]),
        api.openai.files.delete(files[0]),
        api.openai.fine_tuning.jobs.create(model="tiny", training_file=files[0]),
    ):
        with pytest.raises(openai.InternalServerError) as refused:
            await use
        assert refused.value.code == "damaged_row"

    await rebuild(database_dsn, "files")
    assert await strict.files.retrieve(files[0]) == before


async def test_a_damaged_model(api: Running, strict: AsyncOpenAI, database_dsn: str, seed_file: Path) -> None:
    names: list[str] = []
    for suffix in ("one", "two"):
        job = await api.job(seed_file, suffix=suffix)
        await Trainer(api.services, job.id).run_to_success()
        names.append((await api.openai.fine_tuning.jobs.retrieve(job.id)).fine_tuned_model or "")
    before = await strict.models.retrieve(names[0])
    assert before.model_extra is not None
    await damage(api, "models", before.model_extra["job_id"], step="many")

    listed = {model.id: model for model in (await strict.models.list()).data}
    assert set(names) < set(listed)
    shown = await strict.models.retrieve(names[0])
    assert shown == listed[names[0]]
    assert shown.model_extra is not None
    assert shown.model_extra["error"]["code"] == "damaged_row"
    assert "rose projections rebuild models" in shown.model_extra["error"]["message"]
    assert "error" not in (listed[names[1]].model_extra or {})
    with pytest.raises(openai.InternalServerError) as refused:
        await api.openai.chat.completions.create(model=names[0], messages=[{"role": "user", "content": "Well?"}])
    assert refused.value.code == "damaged_row"

    await rebuild(database_dsn, "models")
    assert await strict.models.retrieve(names[0]) == before
