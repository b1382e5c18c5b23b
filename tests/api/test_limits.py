"""Limits of a project through the official client: rates with their headers, jobs, stored bytes, event streams."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import anyio
import openai
import pytest

from rose.log.pool import Pool
from rose.settings import Settings
from tests.api.conftest import serving
from tests.api.running import SEED, Running, Trainer, free_port
from tests.api.teams import House
from tests.eventually import eventually

pytestmark = pytest.mark.anyio

ROOM = 3 * len(SEED)


@pytest.fixture
async def limited(settings: Callable[..., Settings], pool: Pool) -> AsyncIterator[Running]:
    """An API with limits."""
    given = settings(
        port=free_port(), max_project_jobs=5, max_project_bytes=ROOM, max_project_event_streams=2, min_free_bytes=0
    )
    async with serving(given, pool) as running:
        yield running


def _error(problem: openai.APIStatusError) -> dict[str, Any]:
    assert isinstance(problem.body, dict)
    return problem.body


# --- rates


async def test_without_a_limit_no_answer_speaks_of_one(api: Running) -> None:
    answer = await api.openai.files.with_raw_response.list()
    assert not [name for name in answer.headers if name.startswith("x-ratelimit")]


async def test_answers_say_what_is_left_and_the_next_request_is_told_when_to_come_back(
    settings: Callable[..., Settings], pool: Pool
) -> None:
    async with serving(settings(port=free_port(), requests_per_minute=3), pool) as api:
        first = await api.openai.files.with_raw_response.list()
        assert first.headers["x-ratelimit-limit-requests"] == "3"
        assert first.headers["x-ratelimit-remaining-requests"] == "2"
        assert first.headers["x-ratelimit-reset-requests"] == "20s"
        with pytest.raises(openai.NotFoundError) as refused:  # an error counts, and says so, too
            await api.openai.fine_tuning.jobs.retrieve("ftjob_nobody")
        assert refused.value.response.headers["x-ratelimit-remaining-requests"] == "1"
        await api.openai.files.list()
        with pytest.raises(openai.RateLimitError) as limited:
            await api.openai.files.list()
        error, headers = _error(limited.value), limited.value.response.headers
        assert (error["type"], error["code"], error["param"]) == ("rate_limit_error", "rate_limit_exceeded", None)
        assert error["message"].startswith(
            "Rate limit reached for the project default: 3 requests per minute. Please try again in 19"
        )
        assert headers["retry-after"] == "20"
        assert 19_000 < int(headers["retry-after-ms"]) <= 20_000
        assert headers["x-ratelimit-remaining-requests"] == "0"
        for path in ("/health", "/ready", "/docs", "/openapi.json", "/"):
            answer = await api.http.get(path)
            assert answer.status_code == 200
            assert "x-ratelimit-limit-requests" not in answer.headers


async def test_the_sdks_own_retry_waits_as_long_as_it_is_told(settings: Callable[..., Settings], pool: Pool) -> None:
    async with serving(settings(port=free_port(), requests_per_minute=30), pool) as api:
        for _ in range(30):
            await api.openai.files.list()
        patient = api.openai.with_options(max_retries=1)
        began = time.monotonic()
        answer = await patient.files.with_raw_response.list()
        assert answer.retries_taken == 1
        assert 1.0 < time.monotonic() - began < 10.0, "one request in two seconds comes back"


async def test_a_refused_upload_is_read_to_its_end_so_that_its_client_sees_why(
    settings: Callable[..., Settings], pool: Pool
) -> None:
    large = b"x" * (24 << 20)
    given = settings(port=free_port(), requests_per_minute=2, max_project_bytes=1 << 20, min_free_bytes=0)
    async with serving(given, pool) as api:
        for match in ("bytes", "bytes", "2 requests per minute"):
            with pytest.raises(openai.RateLimitError, match=match):
                await api.openai.files.create(file=("large.jsonl", large), purpose="user_data")


async def test_a_project_that_asks_too_much_is_nothing_to_the_others(
    settings: Callable[..., Settings], pool: Pool
) -> None:
    async with serving(settings(port=free_port(), requests_per_minute=100), pool) as api:
        house = House(api)
        admin = await house.administrator()
        (_, red), (_, blue) = await house.team(admin, "red"), await house.team(admin, "blue")

        async def list_without_end() -> None:
            while True:  # some come back meanwhile
                await red.files.list()

        with pytest.raises(openai.RateLimitError, match=r"for the project proj_\w+: 100 requests"):
            await list_without_end()
        answer = await blue.files.with_raw_response.list()
        assert answer.headers["x-ratelimit-remaining-requests"] == "99"
        await house.close()


# --- jobs


async def test_ten_creations_at_once_at_a_limit_of_five_give_five_jobs(limited: Running, seed_file: Path) -> None:
    file_id = await limited.upload(seed_file)
    made: list[str] = []
    refused: list[openai.RateLimitError] = []

    async def create(number: int) -> None:
        try:
            job = await limited.openai.fine_tuning.jobs.create(
                model="tiny", training_file=file_id, suffix=f"number-{number}"
            )
            made.append(job.id)
        except openai.RateLimitError as error:
            refused.append(error)

    async with anyio.create_task_group() as tasks:
        for number in range(10):
            tasks.start_soon(create, number)
    assert (len(made), len(refused)) == (5, 5)
    jobs = [job.id async for job in limited.openai.fine_tuning.jobs.list()]
    assert sorted(jobs) == sorted(made)
    error = _error(refused[0])
    assert error["code"] == "project_jobs_limit"
    assert error["message"].startswith("The project default has 5 unfinished jobs of 5 (ftjob_")
    assert all(job in error["message"] for job in made)
    assert error["hint"] == "Cancel one, or wait until one has ended."
    assert refused[0].response.headers["x-should-retry"] == "false"

    await limited.openai.fine_tuning.jobs.cancel(made[0])
    after = await limited.openai.fine_tuning.jobs.create(model="tiny", training_file=file_id)
    assert after.status == "validating_files"


async def test_a_repeated_creation_is_answered_also_when_the_project_is_full(limited: Running, seed_file: Path) -> None:
    file_id = await limited.upload(seed_file)
    keyed = {"extra_headers": {"Idempotency-Key": "once"}}
    first = await limited.openai.fine_tuning.jobs.create(model="tiny", training_file=file_id, **keyed)
    for _ in range(4):
        await limited.openai.fine_tuning.jobs.create(model="tiny", training_file=file_id)
    again = await limited.openai.fine_tuning.jobs.create(model="tiny", training_file=file_id, **keyed)
    assert again.id == first.id


async def test_a_jobs_limit_is_each_projects_own(limited: Running) -> None:
    house = House(limited)
    admin = await house.administrator()
    for name in ("red", "blue"):
        _, team = await house.team(admin, name)
        file = await team.files.create(file=("a.jsonl", SEED), purpose="fine-tune")
        for _ in range(5):
            await team.fine_tuning.jobs.create(model="tiny", training_file=file.id)
        with pytest.raises(openai.RateLimitError, match="has 5 unfinished jobs of 5"):
            await team.fine_tuning.jobs.create(model="tiny", training_file=file.id)
    await house.close()


# --- stored bytes


async def test_files_uploads_and_models_together_stay_below_the_bytes(limited: Running, seed_file: Path) -> None:
    size = len(SEED)
    file_id = await limited.upload(seed_file)
    announced = await limited.openai.uploads.create(
        bytes=size, filename="b.jsonl", mime_type="text/plain", purpose="fine-tune"
    )
    await limited.upload(seed_file)
    with pytest.raises(openai.RateLimitError) as full:
        await limited.upload(seed_file)
    error = _error(full.value)
    assert error["code"] == "project_bytes_limit"
    assert error["message"].startswith(
        f"The project default stores {ROOM} of {ROOM} bytes "
        f"(files {2 * size}, uploads {size}, models and checkpoints 0); {size} more do not fit."
    )
    assert full.value.response.headers["x-should-retry"] == "false"
    with pytest.raises(openai.RateLimitError, match=f"{size} more do not fit"):
        await limited.openai.uploads.create(bytes=size, filename="c.jsonl", mime_type="text/plain", purpose="fine-tune")
    part = await limited.openai.uploads.parts.create(announced.id, data=("part", SEED))
    done = await limited.openai.uploads.complete(announced.id, part_ids=[part.id])  # takes the announced place
    assert done.file is not None
    await limited.openai.files.delete(done.file.id)
    await limited.openai.files.delete(file_id)
    job = await limited.job(seed_file)
    trainer = Trainer(limited.services, job.id)
    await trainer.run_to_success()  # a job's own result is never refused
    with pytest.raises(openai.RateLimitError, match=r"models and checkpoints [1-9]"):
        await limited.openai.files.create(file=("d.jsonl", SEED * 2), purpose="fine-tune")


async def test_ten_uploads_at_once_stay_below_the_bytes_and_leave_nothing_of_the_refused(
    limited: Running, seed_file: Path
) -> None:
    codes: list[str] = []

    async def upload() -> None:
        try:
            await limited.upload(seed_file)
            codes.append("stored")
        except openai.RateLimitError as error:
            codes.append(_error(error)["code"])

    async with anyio.create_task_group() as tasks:
        for _ in range(10):
            tasks.start_soon(upload)
    assert sorted(codes) == ["project_bytes_limit"] * 7 + ["stored"] * 3
    folder = limited.services.blobs.root / "files"
    assert len(list(folder.iterdir())) == 3


# --- event streams


async def test_a_closed_stream_makes_room_for_another(limited: Running, seed_file: Path) -> None:
    job = await limited.job(seed_file)
    path = f"/v1/fine_tuning/jobs/{job.id}/events?stream=true"
    async with AsyncExitStack() as stack:
        for _ in range(2):
            opened = await stack.enter_async_context(limited.http.stream("GET", path))
            assert opened.status_code == 200
        refused = await limited.http.get(path)
        assert refused.status_code == 429
        error = refused.json()["error"]
        assert error["code"] == "project_event_streams_limit"
        assert "2 of 2 event streams" in error["message"]
        assert refused.headers["retry-after"] == "5"
        listed = await limited.http.get(f"/v1/fine_tuning/jobs/{job.id}/events")
        assert listed.status_code == 200

    async def opens() -> bool:
        async with limited.http.stream("GET", path) as answer:
            return answer.status_code == 200

    await eventually(opens, seconds=10)


async def test_a_stream_that_nobody_begins_to_read_holds_no_place(limited: Running, seed_file: Path) -> None:
    limits = limited.services.limits
    slots = [limits.take_stream("default") for _ in range(2)]
    with pytest.raises(Exception, match="2 of 2"):
        limits.take_stream("default")
    del slots
    limits.take_stream("default")
