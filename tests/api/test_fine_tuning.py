"""Fine-tuning jobs through the official client; the trainer's side is played through the real log."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import anyio
import openai
import pytest

from rose.leases import WaitingFacts, waiting_facts
from rose.log.pool import Pool
from tests.api.running import BASE, Running, Trainer

pytestmark = pytest.mark.anyio


async def test_a_job_from_creation_to_model(api: Running, seed_file: Path) -> None:
    job = await api.job(seed_file, suffix="my-model-v1", metadata={"team": "a"})
    assert job.id.startswith("ftjob_")
    assert (job.status, job.object, job.model) == ("validating_files", "fine_tuning.job", "tiny")
    assert job.seed in range(2**31)
    assert job.error is None
    assert job.result_files == []
    assert job.metadata == {"team": "a"}
    assert job.hyperparameters.n_epochs == "auto"
    assert job.model_extra is not None
    assert job.model_extra["waiting_for"] == "no trainer is connected"
    assert job.model_extra["progress"] == {"phase": "wait", "step": 0, "total_steps": None, "percent": 0}
    trainer = Trainer(api.services, job.id)
    await trainer.validate()
    queued = await api.openai.fine_tuning.jobs.retrieve(job.id)
    assert (queued.status, queued.hyperparameters.n_epochs) == ("queued", 25)
    assert queued.method is not None
    assert queued.method.supervised is not None
    assert queued.method.supervised.hyperparameters is not None
    assert queued.method.supervised.hyperparameters.batch_size == 1
    assert queued.model_extra is not None
    assert queued.model_extra["resolved_hyperparameters"]["reasons"]["n_epochs"].startswith("3 epochs over 2 examples")
    assert queued.model_extra["base_model"]["fingerprint"] == BASE.fingerprint
    assert queued.model_extra["warnings"] == [{"code": "few_examples", "message": "2 examples are few"}]
    await trainer.start()
    await trainer.steps(1, 10)
    running = await api.openai.fine_tuning.jobs.retrieve(job.id)
    assert running.status == "running"
    assert running.fine_tuned_model is None
    assert running.model_extra is not None
    assert running.model_extra["waiting_for"] is None
    assert running.model_extra["progress"] == {"phase": "train", "step": 10, "total_steps": 50, "percent": 20}
    await trainer.steps(11, 50)
    await trainer.checkpoint(50)
    assert (await api.openai.fine_tuning.jobs.retrieve(job.id)).model_extra["progress"]["percent"] == 99  # type: ignore[index]
    await trainer.succeed(50)
    done = await api.openai.fine_tuning.jobs.retrieve(job.id)
    assert done.status == "succeeded"
    assert done.fine_tuned_model is not None
    assert done.fine_tuned_model.startswith("tiny-ft-20")
    assert done.fine_tuned_model.endswith("-my-model-v1")
    assert done.trained_tokens == 40
    assert done.finished_at is not None
    assert done.estimated_finish is None
    result = await api.openai.files.retrieve(done.result_files[0])
    assert result.purpose == "fine-tune-results"
    assert b"train_loss" in (await api.openai.files.content(result.id)).content
    assert done.fine_tuned_model in [model.id async for model in api.openai.models.list()]


async def test_a_running_job_says_when_it_may_be_done(api: Running, seed_file: Path) -> None:
    job = await api.job(seed_file)
    trainer = Trainer(api.services, job.id)
    await trainer.validate()
    await trainer.start(seconds_ago=10)
    assert (await api.openai.fine_tuning.jobs.retrieve(job.id)).estimated_finish is None
    await trainer.steps(1, 25)
    running = await api.openai.fine_tuning.jobs.retrieve(job.id)
    assert running.estimated_finish is not None
    half = running.estimated_finish - running.created_at
    assert 5 <= half <= 40


async def test_a_failed_job_says_why(api: Running, seed_file: Path) -> None:
    job = await api.job(seed_file)
    trainer = Trainer(api.services, job.id)
    await trainer.validate()
    await trainer.start()
    await trainer.fail("training_diverged", "The loss became NaN at step 3.")
    failed = await api.openai.fine_tuning.jobs.retrieve(job.id)
    assert failed.status == "failed"
    assert failed.error is not None
    assert (failed.error.code, failed.error.param) == ("training_diverged", "training_file")
    assert failed.error.model_extra == {"log": "/logs/run.log", "problems": []}


async def test_lists_are_newest_first_and_filtered(api: Running, seed_file: Path) -> None:
    jobs = [await api.job(seed_file, metadata={"n": str(number % 2)}) for number in range(4)]
    plain = await api.job(seed_file)
    ids = [job.id for job in jobs]
    assert [job.id async for job in api.openai.fine_tuning.jobs.list(limit=2)] == [plain.id, *ids[::-1]]
    odd = await api.openai.fine_tuning.jobs.list(metadata={"n": "1"})
    assert [job.id for job in odd.data] == [ids[3], ids[1]]
    without = await api.http.get("/v1/fine_tuning/jobs?metadata=null")
    assert [job["id"] for job in without.json()["data"]] == [plain.id]
    for query in ("limit=0", "after=after", "metadata[n]=7"):
        answer = await api.http.get(f"/v1/fine_tuning/jobs?{query}")
        assert (answer.status_code, answer.json()["data"], answer.json()["has_more"]) == (200, [], False)


async def test_paging_is_complete_while_jobs_arrive(api: Running, seed_file: Path) -> None:
    ids = [(await api.job(seed_file)).id for _ in range(5)]
    seen: list[str] = []
    async for job in api.openai.fine_tuning.jobs.list(limit=2):
        seen.append(job.id)
        await api.job(seed_file)
    assert seen == ids[::-1]


async def test_cancel_pause_and_resume(api: Running, seed_file: Path) -> None:
    job = await api.job(seed_file)
    jobs = api.openai.fine_tuning.jobs
    trainer = Trainer(api.services, job.id)
    await trainer.validate()
    paused = await jobs.pause(job.id)
    assert paused.status == "paused"
    assert paused.model_extra is not None
    assert paused.model_extra["waiting_for"] == "it is paused (requested); resume it to go on"
    assert (await jobs.resume(job.id)).status == "queued"
    cancelled = await jobs.cancel(job.id)
    assert cancelled.status == "cancelled"
    assert cancelled.model_extra is not None
    assert cancelled.model_extra["waiting_for"] is None
    for change in (jobs.cancel, jobs.pause, jobs.resume):
        with pytest.raises(openai.BadRequestError) as refused:
            await change(job.id)
        assert refused.value.code == "invalid_job_state"
        assert "is cancelled" in refused.value.message


async def test_an_unknown_job_is_not_found(api: Running) -> None:
    jobs = api.openai.fine_tuning.jobs
    for call in (jobs.retrieve, jobs.cancel, jobs.pause, jobs.resume, jobs.list_events, jobs.checkpoints.list):
        with pytest.raises(openai.NotFoundError) as refused:
            await call("ftjob_abc123")
        assert (refused.value.code, refused.value.param) == ("fine_tune_not_found", "fine_tune_id")
        assert refused.value.body["message"].startswith("Could not find fine tune: ftjob_abc123.")  # type: ignore[index]


async def test_a_waiting_job_names_what_it_waits_for(api: Running, seed_file: Path) -> None:
    first, second, third = [await api.job(seed_file) for _ in range(3)]
    trainers = [Trainer(api.services, job.id) for job in (first, second, third)]
    await trainers[0].announce()
    for trainer in trainers:
        await trainer.validate()
    assert await _waiting(api, first.id) == "a trainer to start it"
    assert await _waiting(api, second.id) == "1 job before it"
    assert await _waiting(api, third.id) == "2 jobs before it"
    await trainers[0].start()
    assert await _waiting(api, first.id) is None
    assert await _waiting(api, second.id) == "the running job to finish"
    listed = await api.openai.fine_tuning.jobs.list()
    assert [job.model_extra["waiting_for"] for job in listed.data] == [  # type: ignore[index]
        "1 job before it",
        "the running job to finish",
        None,
    ]


async def test_a_list_asks_once_what_its_jobs_wait_for(
    api: Running, seed_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Sequence[str]] = []

    async def counting(pool: Pool, project: str, job_ids: Sequence[str]) -> dict[str, WaitingFacts]:
        asked.append(job_ids)
        return await waiting_facts(pool, project, job_ids)

    monkeypatch.setattr("rose.api.waiting.waiting_facts", counting)
    jobs = [await api.job(seed_file) for _ in range(5)]
    await api.openai.fine_tuning.jobs.cancel(jobs[2].id)
    asked.clear()
    listed = await api.openai.fine_tuning.jobs.list()
    assert [job.model_extra["waiting_for"] is None for job in listed.data] == [False, False, True, False, False]  # type: ignore[index]
    assert asked == [[job.id for job in listed.data if job.id != jobs[2].id]]
    for job in listed.data:
        if job.status != "cancelled":
            await api.openai.fine_tuning.jobs.cancel(job.id)
    asked.clear()
    assert len((await api.openai.fine_tuning.jobs.list()).data) == 5
    assert asked == []


async def test_checkpoints_are_listed_newest_first(api: Running, seed_file: Path) -> None:
    job = await api.job(seed_file)
    trainer = Trainer(api.services, job.id)
    await trainer.validate()
    await trainer.start()
    for step in (2, 4, 6):
        await trainer.checkpoint(step)
    found = [checkpoint async for checkpoint in api.openai.fine_tuning.jobs.checkpoints.list(job.id, limit=2)]
    assert [checkpoint.step_number for checkpoint in found] == [6, 4, 2]
    newest = found[0]
    assert newest.object == "fine_tuning.job.checkpoint"
    assert newest.fine_tuning_job_id == job.id
    assert newest.fine_tuned_model_checkpoint.endswith(":ckpt-step-6")
    assert (newest.metrics.step, newest.metrics.train_loss) == (6, 0.5)
    empty = await api.http.get(f"/v1/fine_tuning/jobs/{job.id}/checkpoints?after=after")
    assert empty.json() == {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}


async def test_a_key_makes_a_request_safe_to_repeat(api: Running, seed_file: Path) -> None:
    body = {"model": "tiny", "training_file": await api.upload(seed_file)}
    headers = {"Idempotency-Key": "once"}
    first = await api.http.post("/v1/fine_tuning/jobs", json=body, headers=headers)
    again = await api.http.post("/v1/fine_tuning/jobs", json=body, headers=headers)
    assert (first.status_code, again.status_code) == (200, 200)
    assert again.headers["idempotent-replayed"] == "true"
    assert again.json()["id"] == first.json()["id"]
    other = await api.http.post("/v1/fine_tuning/jobs", json={**body, "seed": 1}, headers=headers)
    assert other.status_code == 400
    assert other.json()["error"]["code"] == "idempotency_key_reused"
    cancel = f"/v1/fine_tuning/jobs/{first.json()['id']}/cancel"
    answers = [await api.http.post(cancel, headers={"Idempotency-Key": "c"}) for _ in range(2)]
    assert [(answer.status_code, answer.json()["status"]) for answer in answers] == [(200, "cancelled")] * 2
    assert len((await api.openai.fine_tuning.jobs.list()).data) == 1


async def test_a_key_holds_also_against_requests_at_the_same_time(api: Running, seed_file: Path) -> None:
    body = {"model": "tiny", "training_file": await api.upload(seed_file)}
    answers: list[str] = []

    async def create() -> None:
        answer = await api.http.post("/v1/fine_tuning/jobs", json=body, headers={"Idempotency-Key": "at-once"})
        assert answer.status_code == 200, answer.text
        answers.append(answer.json()["id"])

    async with anyio.create_task_group() as tasks:
        for _ in range(8):
            tasks.start_soon(create)
    assert len(answers) == 8
    assert len(set(answers)) == 1
    assert len((await api.openai.fine_tuning.jobs.list()).data) == 1


async def test_an_sdk_retry_gets_the_first_answer(api: Running, seed_file: Path) -> None:
    body = {"model": "tiny", "training_file": await api.upload(seed_file)}
    first = await api.http.post("/v1/fine_tuning/jobs", json=body)
    retry = await api.http.post("/v1/fine_tuning/jobs", json=body, headers={"x-stainless-retry-count": "1"})
    fresh = await api.http.post("/v1/fine_tuning/jobs", json=body, headers={"x-stainless-retry-count": "0"})
    assert retry.json()["id"] == first.json()["id"]
    assert fresh.json()["id"] != first.json()["id"]


async def test_hyperparameters_of_the_method_win_and_are_echoed_twice(api: Running, seed_file: Path) -> None:
    job = await api.job(
        seed_file,
        hyperparameters={"n_epochs": 2, "batch_size": 3},
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 4, "lora_config": {"r": 8}}}},
    )
    assert (job.hyperparameters.n_epochs, job.hyperparameters.batch_size) == (4, 3)
    assert job.hyperparameters.model_extra is not None
    assert job.hyperparameters.model_extra["lora_config"]["r"] == 8
    assert job.method is not None
    assert job.method.supervised is not None
    assert job.method.supervised.hyperparameters is not None
    assert job.method.supervised.hyperparameters.n_epochs == 4


async def _waiting(api: Running, job_id: str) -> str | None:
    job = await api.openai.fine_tuning.jobs.retrieve(job_id)
    assert job.model_extra is not None
    return job.model_extra["waiting_for"]
