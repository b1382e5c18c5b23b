"""Usage of projects through the official client: it adds up, and is the same after the views are made anew."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import httpx2
import msgspec
import openai
import pytest

from projections import runner
from projections.verify import repair, verify
from rose.log.pool import Pool
from rose.settings import Settings
from rose.usage import HOUR_SECONDS, Meter
from tests.api.conftest import serving
from tests.api.running import SEED, Running, Trainer, free_port
from tests.api.teams import House

pytestmark = pytest.mark.anyio

DAY_SECONDS = 24 * HOUR_SECONDS
LOGGED_SECONDS = """
with runs as (
    select stream_id, epoch, min(recorded_at) filter (where type = 'job.started') as began, max(recorded_at) as ended
    from rose.events where epoch is not null group by 1, 2
)
select extract(epoch from sum(ended - began)) from runs
"""
USAGE = "/v1/organization/projects/{}/usage"


async def _usage(api: Running, project: str = "current") -> dict[str, Any]:
    answer = await api.http.get(USAGE.format(project))
    assert answer.status_code == 200, answer.text
    return answer.json()


async def test_a_project_that_did_nothing_has_used_nothing(api: Running) -> None:
    assert await _usage(api) == {
        "object": "organization.project.usage",
        "project_id": "default",
        "jobs": dict.fromkeys(
            ("validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"), 0
        ),
        "trained_tokens": 0,
        "training_seconds": 0,
        "stored_bytes": {"files": 0, "uploads": 0, "models": 0, "total": 0},
        "completions": {"num_model_requests": 0, "input_tokens": 0, "output_tokens": 0},
        "limits": dict.fromkeys(
            ("requests_per_minute", "tokens_per_minute", "unfinished_jobs", "stored_bytes", "event_streams")
        ),
    }


async def test_jobs_add_up_and_stay_so_after_a_rebuild(api: Running, seed_file: Any) -> None:
    done, failed, running, cancelled = [await api.job(seed_file, suffix=f"s{number}") for number in range(4)]
    await api.job(seed_file, suffix="new")
    await Trainer(api.services, done.id).run_to_success(4)  # 40 tokens
    for job, steps in ((failed, 2), (running, 3), (cancelled, 1)):
        trainer = Trainer(api.services, job.id)
        await trainer.validate()
        await trainer.start()
        await trainer.steps(1, steps)  # 10 tokens each
        if job is failed:
            await trainer.fail("training_diverged", "nan")
        if job is cancelled:
            await api.openai.fine_tuning.jobs.cancel(job.id)
    used = await _usage(api)
    assert {status: count for status, count in used["jobs"].items() if count} == {
        "succeeded": 1,
        "failed": 1,
        "running": 1,
        "cancelled": 1,
        "validating_files": 1,
    }
    assert used["trained_tokens"] == 40 + 20 + 30 + 10
    seconds = await api.services.pool.fetchval(LOGGED_SECONDS)
    assert used["training_seconds"] == pytest.approx(float(seconds), abs=0.001)
    assert seconds > 0
    files = [file async for file in api.openai.files.list()]
    model = (await api.http.get(f"/v1/fine_tuning/jobs/{done.id}/checkpoints")).json()
    assert len(model["data"]) == 1
    stored = used["stored_bytes"]
    assert stored["files"] == sum(file.bytes for file in files) > 5 * len(SEED)
    weights = len("{}") + len("final weights") + len("{}") + len("weights of step 4")
    assert (stored["uploads"], stored["models"], stored["total"]) == (0, weights, stored["files"] + weights)

    pool = api.services.pool
    before = await pool.fetch("select job_id, epoch, started_at, last_at from rose.runs order by job_id")
    assert len(before) == 4
    await pool.execute("update rose.runs set last_at = last_at + interval '1 hour'")
    await pool.execute("delete from rose.jobs where id = $1", failed.id)
    assert {one.view for one in await verify(pool)} == {"jobs", "runs"}
    await repair(pool)
    await runner.rebuild(pool, "runs")
    after = await pool.fetch("select job_id, epoch, started_at, last_at from rose.runs order by job_id")
    assert after == before
    assert await _usage(api) == used


async def test_what_is_deleted_is_not_stored_any_more(api: Running, seed_file: Any) -> None:
    job = await api.job(seed_file)
    await Trainer(api.services, job.id).run_to_success()
    tuned = (await api.openai.fine_tuning.jobs.retrieve(job.id)).fine_tuned_model
    await api.openai.models.delete(tuned or "")
    for file in [file async for file in api.openai.files.list()]:
        await api.openai.files.delete(file.id)
    upload = await api.openai.uploads.create(bytes=77, filename="a.jsonl", mime_type="text/plain", purpose="fine-tune")
    assert (await _usage(api))["stored_bytes"] == {"files": 0, "uploads": 77, "models": 0, "total": 77}
    await api.openai.uploads.cancel(upload.id)
    assert (await _usage(api))["stored_bytes"]["total"] == 0


async def test_limits_are_told(settings: Callable[..., Settings], pool: Pool) -> None:
    given = settings(port=free_port(), requests_per_minute=99, max_project_jobs=7)
    async with serving(given, pool) as api:
        limits = (await _usage(api))["limits"]
        assert (limits["requests_per_minute"], limits["unfinished_jobs"], limits["stored_bytes"]) == (99, 7, None)


# --- tokens of answers


async def test_two_processes_add_up_and_writing_again_counts_nothing_twice(pool: Pool, api: Running) -> None:
    async with Meter(pool) as other:
        for meter in (other, api.services.meter):
            meter.note("default", "tiny", 10, 3)
            meter.note("default", "tiny", 20, 4)
            await meter.flush()
            meter._changed |= set(meter._counts)  # as after an outcome that stayed unknown
            await meter.flush()
            meter.note("default", "other", 1, 1)
    counted = (await _usage(api))["completions"]  # one has written the rest when it ended, the other is asked
    assert counted == {"num_model_requests": 6, "input_tokens": 62, "output_tokens": 16}


async def test_counts_wait_for_an_absent_database(pool: Pool, database_dsn: str) -> None:
    from rose.errors import Unavailable
    from rose.log.pool import open_pool

    closed = await open_pool(database_dsn)
    meter = Meter(closed)
    meter.note("default", "tiny", 10, 3)
    await closed.close()
    with pytest.raises(Unavailable):
        await meter.flush()
    meter._pool = pool
    await meter.flush()
    assert await pool.fetchval("select prompt_tokens from rose.usage") == 10


async def _answers(pool: Pool, *rows: tuple[str, int, str, int, int]) -> None:
    await pool.executemany(
        "insert into rose.usage (project, hour, model, process, requests, prompt_tokens, completion_tokens) "
        "values ($1, $2, $3, 'meter_1', 1, $4, $5)",
        rows,
    )


async def test_tokens_by_day_project_and_model_as_the_sdk_reads_them(house: House) -> None:
    admin = await house.administrator()
    red_id, red = await house.team(admin, "red")
    blue_id, _ = await house.team(admin, "blue")
    today = int(time.time()) // DAY_SECONDS * DAY_SECONDS
    first = today - 9 * DAY_SECONDS
    await _answers(
        house.api.services.pool,
        (red_id, first, "m1", 1, 10),
        (red_id, first + HOUR_SECONDS, "m1", 2, 20),
        (red_id, first + HOUR_SECONDS, "m2", 4, 40),
        (blue_id, first, "m1", 8, 80),
        (blue_id, first + 8 * DAY_SECONDS, "m1", 16, 160),
    )
    usage = admin.admin.organization.usage
    page = await usage.completions(start_time=first + 5, group_by=["project_id", "model"])
    assert (page.object, len(page.data), page.has_more) == ("page", 7, True)
    assert [bucket.start_time for bucket in page.data] == [first + day * DAY_SECONDS for day in range(7)]

    def shown(bucket: Any) -> list[Any]:
        return [(one.project_id, one.model, one.input_tokens, one.output_tokens) for one in bucket.results]

    assert sorted(shown(page.data[0])) == sorted([(red_id, "m1", 3, 30), (red_id, "m2", 4, 40), (blue_id, "m1", 8, 80)])
    assert page.data[1].results == []
    rest = await usage.completions(start_time=first, group_by=["model"], page=page.next_page or "")
    assert (len(rest.data), rest.has_more, rest.next_page) == (3, False, None)
    assert [shown(bucket) for bucket in rest.data] == [[], [(None, "m1", 16, 160)], []]

    whole = await usage.completions(start_time=first, end_time=first + DAY_SECONDS)
    assert [shown(bucket) for bucket in whole.data] == [[(None, None, 15, 150)]]
    hours = await usage.completions(
        start_time=first, end_time=first + 2 * HOUR_SECONDS, bucket_width="1h", project_ids=[red_id], models=["m1"]
    )
    assert [shown(bucket) for bucket in hours.data] == [[(None, None, 1, 10)], [(None, None, 2, 20)]]

    own = await red.admin.organization.usage.completions(start_time=first, group_by=["project_id"])
    assert shown(own.data[0]) == [(red_id, None, 7, 70)]
    others = await red.admin.organization.usage.completions(start_time=first, project_ids=[blue_id])
    assert all(bucket.results == [] for bucket in others.data)


async def test_only_an_administrator_sees_another_projects_usage(house: House) -> None:
    admin = await house.administrator()
    red_id, red = await house.team(admin, "red")
    blue_id, _ = await house.team(admin, "blue")

    async def status(client: openai.AsyncOpenAI, project: str) -> tuple[int, str]:
        try:
            path = f"/organization/projects/{project}/usage"
            return 200, (await client.get(path, cast_to=httpx2.Response)).json()["project_id"]
        except openai.NotFoundError as error:
            return 404, str(msgspec.to_builtins(error.body)["code"])

    assert await status(red, "current") == (200, red_id)
    assert await status(red, red_id) == (200, red_id)
    missing = (404, "project_not_found")
    assert [await status(red, one) for one in (blue_id, "default", "proj_nobody")] == [missing] * 3
    assert await status(admin, blue_id) == (200, blue_id)
    assert await status(admin, "proj_nobody") == missing


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("", "start_time"),
        ("start_time=soon", "start_time"),
        ("start_time=5&end_time=5", "end_time"),
        ("start_time=5&bucket_width=1m", "bucket_width"),
        ("start_time=5&group_by[]=user_id", "group_by[0]"),
        ("start_time=5&limit=0", "limit"),
        ("start_time=5&page=2", "page"),
    ],
)
async def test_what_cannot_be_is_named(api: Running, query: str, param: str) -> None:
    answer = await api.http.get(f"/v1/organization/usage/completions?{query}")
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
