"""What nothing uses any more is removed; what a job, a model or another log may need stays."""

from __future__ import annotations

import os
from pathlib import Path

import anyio
import anyio.lowlevel
import pytest

from rose.sweeper import run, sweep
from tests.api.running import Running, Trainer
from tests.eventually import eventually

pytestmark = pytest.mark.anyio

AT_ONCE = -60.0
"""A horizon in the future: as if a day had passed."""


async def swept(api: Running, keep_seconds: float = AT_ONCE) -> list[str]:
    """Sweep and return what was removed."""
    return await sweep(api.services.pool, api.services.blobs, keep_seconds=keep_seconds)


def lies(api: Running, path: str) -> bool:
    """Say whether a blob is there."""
    return api.services.blobs.path(path).exists()


async def test_what_is_used_stays(api: Running, seed_file: Path) -> None:
    job = await api.job(seed_file)
    await Trainer(api.services, job.id).run_to_success()
    other = await api.job(seed_file)
    await Trainer(api.services, other.id).validate()
    assert await swept(api) == []
    name = (await api.openai.fine_tuning.jobs.retrieve(job.id)).fine_tuned_model
    assert (await api.http.get(f"/v1/adapters/{name}:ckpt-step-50")).status_code == 200


async def test_a_deleted_file_goes_when_a_day_has_passed_and_no_job_needs_it(api: Running, seed_file: Path) -> None:
    job = await api.job(seed_file)
    needed = job.training_file
    unused = await api.upload(seed_file)
    for file_id in (needed, unused):
        await api.openai.files.delete(file_id)
    assert await swept(api, keep_seconds=3600) == []
    assert await swept(api) == [f"files/{unused}"]
    assert lies(api, f"files/{needed}")
    await api.openai.fine_tuning.jobs.cancel(job.id)
    assert await swept(api) == [f"files/{needed}"]
    assert not lies(api, f"files/{needed}")


async def test_a_deleted_model_goes_unless_a_job_starts_from_it(api: Running, seed_file: Path) -> None:
    job = await api.job(seed_file)
    trainer = Trainer(api.services, job.id)
    await trainer.run_to_success()
    name = (await api.openai.fine_tuning.jobs.retrieve(job.id)).fine_tuned_model
    assert name is not None
    heir = await api.job(seed_file, model=name)
    await api.openai.models.delete(name)
    assert await swept(api, keep_seconds=3600) == []
    assert await swept(api) == [f"jobs/{job.id}/e{trainer.epoch}/step-50"]
    assert lies(api, f"jobs/{job.id}/e{trainer.epoch}/model")
    await api.openai.fine_tuning.jobs.cancel(heir.id)
    assert await swept(api) == [f"jobs/{job.id}"]


async def test_recovery_points_of_an_ended_job_go_and_its_checkpoints_stay(api: Running, seed_file: Path) -> None:
    job = await api.job(seed_file)
    trainer = Trainer(api.services, job.id)
    await trainer.validate()
    await trainer.start()
    await trainer.checkpoint(4)
    recovery = f"jobs/{job.id}/e{trainer.epoch}/recovery"
    folder = api.services.blobs.temporary_folder()
    (folder / "state").write_text("optimizer")
    api.services.blobs.publish_folder(folder, f"{recovery}/step-4")
    assert await swept(api) == []
    await trainer.fail("training_diverged", "The loss became NaN.")
    assert await swept(api) == [recovery]
    assert lies(api, f"jobs/{job.id}/e{trainer.epoch}/step-4")


async def test_an_upload_without_its_event_goes_and_what_is_older_than_the_log_stays(
    api: Running, seed_file: Path
) -> None:
    await api.upload(seed_file)
    for name in ("file_orphan", "file_of_another_log"):
        with api.services.blobs.open_temporary() as blob:
            blob.write(b"{}")
            blob.commit(f"files/{name}")
    os.utime(api.services.blobs.path("files/file_of_another_log"), (1_000_000, 1_000_000))
    assert await swept(api, keep_seconds=3600) == []
    assert await swept(api) == ["files/file_orphan"]


async def test_a_damaged_row_stops_the_sweep_and_not_the_process(
    api: Running, seed_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await api.job(seed_file)
    pool, blobs, stop = api.services.pool, api.services.blobs, anyio.Event()
    await pool.execute("""update rose.jobs set doc = doc || '{"epoch": "two"}'""")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run, pool, blobs, stop, 86400.0)
        await eventually(lambda: "could not be swept" in caplog.text)
        stop.set()


async def test_a_key_is_remembered_for_its_time_and_no_longer(api: Running, seed_file: Path) -> None:
    pool, blobs = api.services.pool, api.services.blobs
    body = {"training_file": await api.upload(seed_file), "model": "tiny"}
    kept = 600.0

    async def ask() -> str:
        answer = await api.http.post("/v1/fine_tuning/jobs", json=body, headers={"idempotency-key": "once"})
        assert answer.status_code == 200, answer.text
        return answer.json()["id"]

    async def commands_after(seconds: float) -> int:
        """Let time pass for the commands, let the sweeper look once, and count them."""
        await pool.execute(
            "update rose.commands set created_at = clock_timestamp() - make_interval(secs => $1)", seconds
        )
        stop = anyio.Event()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run, pool, blobs, stop, kept)
            await anyio.lowlevel.checkpoint()  # it has begun, and ends after what it has begun
            stop.set()
        return await pool.fetchval("select count(*) from rose.commands")

    first = await ask()
    assert await commands_after(kept - 60) == 2
    assert await ask() == first
    assert await commands_after(kept + 60) == 0
    assert await ask() != first, "by then it is a new request"
