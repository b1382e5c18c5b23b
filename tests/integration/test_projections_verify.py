"""Verify names every row that is not what the log says; repair mends it."""

from __future__ import annotations

import anyio
import pytest

from projections import metrics, models
from projections.runner import run
from projections.verify import Difference, repair, verify
from rose.domain.job_values import BaseModel
from rose.domain.models import ModelRegistered, evolve, initial
from rose.errors import InvalidRequest
from rose.log.append import StreamWrite, append
from rose.log.pool import Pool
from tests.integration.events import ACTOR, ARTIFACT, Job, append_file

pytestmark = pytest.mark.anyio


@pytest.fixture
async def job(pool: Pool) -> Job:
    """A log with a job, a file and a model, and every view up to date."""
    job = Job(pool)
    stop = anyio.Event()
    async with anyio.create_task_group() as group:
        group.start_soon(run, pool, stop)
        await job.create()
        await job.steps(1, 5)
        await job.checkpoint(5)
        await append_file(pool, file_id="file_x")
        await register_model(pool, job)
        await metrics.series(pool, job.id)
        await job.steps(6, 8)
        assert len(await metrics.series(pool, job.id)) == 8
        stop.set()
    return job


async def register_model(pool: Pool, job: Job) -> None:
    event = ModelRegistered(
        project="default",
        job_id=job.id,
        name="tiny-ft",
        created_at=1,
        kind="adapter",
        artifact=ARTIFACT,
        base=BaseModel(source="tiny", revision=None, fingerprint="f"),
        lora=None,
        step=5,
    )
    row = models.row(evolve(initial, event))
    write = StreamWrite(stream_id=f"model/{job.id}", expected_version=0, events=(event,), row=row)
    await append(pool, [write], command_id="register", actor=ACTOR)


async def test_views_as_they_are_written_do_not_differ(pool: Pool, job: Job) -> None:
    assert await verify(pool) == []
    assert await repair(pool) == []


@pytest.mark.parametrize(
    ("view", "statement", "words"),
    [
        (
            "jobs",
            """update rose.jobs set doc = doc || '{"status": "succeeded"}'""",
            'status is "succeeded", in the log "v',
        ),
        ("jobs", """update rose.jobs set doc = doc || '{"extra": 1}'""", "extra is 1, in the log null"),
        ("jobs", """update rose.jobs set doc = doc || '{"seed": "one"}'""", "not valid"),
        ("jobs", "update rose.jobs set version = 9", "version is 9, the log has 4 events"),
        ("jobs", "update rose.jobs set created_position = 77", "created_position is 77, in the log 1"),
        ("jobs", "delete from rose.jobs", "there is no row; the log has 4 events"),
        ("files", """update rose.files set doc = doc || '{"filename": "y"}'""", 'filename is "y"'),
        ("models", """update rose.models set doc = doc || '{"name": "y"}'""", 'name is "y", in the log "tiny-ft"'),
        ("metrics", """update rose.metrics set doc = doc || '{"train_loss": 0}' where step = 3""", "doc is"),
        ("metrics", "update rose.metrics set position = 1 where step = 3", "position is 1, from the log 2"),
        ("metrics", "delete from rose.metrics where step = 3", "the row is missing"),
        ("metrics", "update rose.metrics set step = 99 where step = 3", "the log does not make this row"),
        ("checkpoints", "update rose.checkpoints set step = 4", "step is 4, from the log 5"),
    ],
)
async def test_a_row_corrupted_by_hand_is_named_and_mended(
    pool: Pool, job: Job, view: str, statement: str, words: str
) -> None:
    await pool.execute(statement)
    found = await verify(pool)
    assert {difference.view for difference in found} == {view}
    assert any(words in difference.text for difference in found), found
    assert await verify(pool, view) == found
    mended = await repair(pool, view)
    assert mended == found
    assert await verify(pool) == []


async def test_the_difference_names_the_row(pool: Pool, job: Job) -> None:
    await pool.execute("update rose.metrics set position = 1 where step = 3")
    await pool.execute("update rose.jobs set version = 9")
    assert await verify(pool) == [
        Difference(view="jobs", id=job.id, text="version is 9, the log has 4 events"),
        Difference(view="metrics", id=f"{job.id}/3", text="position is 1, from the log 2"),
    ]


async def test_a_row_without_a_stream_is_named_and_removed(pool: Pool, job: Job) -> None:
    await pool.execute("insert into rose.files (id, doc, version) values ('file_ghost', '{}', 1)")
    assert await verify(pool) == [Difference(view="files", id="file_ghost", text="the log has no such stream")]
    await repair(pool, "files")
    assert await verify(pool) == []
    assert await pool.fetchval("select count(*) from rose.files") == 1


async def test_verify_changes_nothing_and_finds_nothing_while_appends_go_on(pool: Pool, job: Job) -> None:
    done = anyio.Event()
    stop = anyio.Event()
    rounds = 0

    async def write() -> None:
        for first in range(9, 209):
            await job.steps(first, first)
        done.set()

    async with anyio.create_task_group() as group:
        group.start_soon(run, pool, stop)
        group.start_soon(write)
        while not done.is_set() or rounds == 0:
            assert await verify(pool) == []
            rounds += 1
        stop.set()
    assert await pool.fetchval("select count(distinct version) from rose.metrics") == 1


async def test_a_row_is_mended_while_appends_go_on(pool: Pool, job: Job) -> None:
    async def write() -> None:
        for first in range(9, 59):
            await job.steps(first, first)

    async with anyio.create_task_group() as group:
        group.start_soon(write)
        for _ in range(20):
            # As the append does it, under the stream's lock, so that the harm itself does not undo an append.
            async with pool.acquire() as connection, connection.transaction():
                await connection.execute("select from rose.streams where stream_id = $1 for update", job.stream_id)
                await connection.execute("update rose.jobs set doc = doc || '{\"seed\": 99}'")
            await repair(pool, "jobs")
    assert await verify(pool, "jobs") == []


async def test_an_unknown_view_is_refused_by_name(pool: Pool) -> None:
    with pytest.raises(InvalidRequest, match=r"nonsense.*One of: jobs, files, models, .*uploads, .*checkpoints"):
        await verify(pool, "nonsense")
