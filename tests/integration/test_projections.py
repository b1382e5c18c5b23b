"""The asynchronous views: exactly once, stopped by a failing event, rebuilt beside the old version."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import anyio
import msgspec
import pytest

from projections import checkpoints, metrics, runner
from projections.positions import alarms, list_projections, wait_until
from projections.runner import VIEWS, ViewStopped, advance, rebuild, run
from projections.views import View
from rose.domain.job_events import RunResumed
from rose.errors import InvalidRequest
from rose.log.pool import AnyConnection, Pool
from rose.log.read import Recorded, head
from tests.eventually import eventually
from tests.integration import following
from tests.integration.events import Job, append_files

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).parents[2]


async def catch_up(pool: Pool, view: View) -> None:
    """Take steps until the view is at the log's end."""
    end = await head(pool)
    with anyio.fail_after(60):
        while not await wait_until(pool, view.name, end, timeout_seconds=0.0):
            await advance(pool, view)


async def test_the_runner_follows_appends_and_reads_wait_for_it(pool: Pool) -> None:
    job = Job(pool)
    stop = anyio.Event()
    async with anyio.create_task_group() as group:
        group.start_soon(run, pool, stop)
        await job.create()
        for first in range(1, 100, 10):
            await job.steps(first, first + 9)
            series = await metrics.series(pool, job.id)  # waits for the view: a read shows what the job's row shows
            assert [step.step for step in series] == list(range(1, first + 10))
        stop.set()
    assert [step.step for step in await metrics.series(pool, job.id, after_step=97)] == [98, 99, 100]
    assert [step.step for step in await metrics.series(pool, job.id, after_step=10, limit=2)] == [11, 12]
    assert series[0].train_loss == 1.0


async def test_a_run_that_begins_anew_makes_what_was_reported_before_void(pool: Pool) -> None:
    job, other = Job(pool), Job(pool)
    for one in (job, other):
        await one.create()
        await one.steps(1, 20)
        await one.checkpoint(10)
    await job.append(RunResumed(epoch=2, from_step=0, rejected=("step 20: other tokens",), anew=True))
    assert (job.state.last_step, job.state.checkpoints) == (0, ())
    await job.steps(1, 3)
    for view in (metrics.VIEW, checkpoints.VIEW):
        await catch_up(pool, view)
    assert [step.step for step in await metrics.series(pool, job.id)] == [1, 2, 3]
    assert await checkpoints.newest_first(pool, job.id, limit=9) == []
    assert len(await metrics.series(pool, other.id)) == 20
    assert len(await checkpoints.newest_first(pool, other.id, limit=9)) == 1


async def test_checkpoints_are_listed_newest_first_and_page_by_page(pool: Pool) -> None:
    job, other = Job(pool), Job(pool)
    await job.create()
    await other.create()
    for number in (1, 2, 3):
        await job.checkpoint(number)
    await other.checkpoint(1)
    await catch_up(pool, checkpoints.VIEW)

    first = await checkpoints.newest_first(pool, job.id, limit=2)
    assert [row.step for row in first] == [3, 2]
    assert first[0].model_name == f"tiny-ft-{job.id}:ckpt-step-3"
    assert first[0].metrics == {"train_loss": 1.5}
    assert [row.step for row in await checkpoints.newest_first(pool, job.id, limit=2, after=first[1].id)] == [1]
    assert await checkpoints.newest_first(pool, job.id, limit=2, after="ftckpt_unknown") == []
    (foreign,) = await checkpoints.newest_first(pool, other.id, limit=2)
    assert await checkpoints.newest_first(pool, job.id, limit=2, after=foreign.id) == []


async def test_a_position_moves_over_events_that_the_view_does_not_take(pool: Pool) -> None:
    last = await append_files(pool, 3)
    await catch_up(pool, metrics.VIEW)
    (progress,) = await list_projections(pool)
    assert (progress.name, progress.position, progress.head, progress.status) == ("metrics", last, last, "running")


async def test_an_event_counts_once_when_a_runner_dies_between_writing_and_committing(pool: Pool) -> None:
    await pool.execute(following.TABLE)
    applied = 0

    async def apply(connection: AnyConnection, version: int, events: Sequence[Recorded]) -> None:
        nonlocal applied
        await following.count(connection, version, events)
        applied += 1
        if applied <= 3:
            raise ConnectionResetError("the runner dies here")

    view = msgspec.structs.replace(following.VIEW, apply=apply)
    job = Job(pool)
    await job.create()
    for number in range(1, 6):
        await job.steps(number, number)
    await advance(pool, view)
    for _ in range(3):
        with pytest.raises(ConnectionResetError):
            await advance(pool, view)
        assert await following.counted(pool, job.stream_id) == 0
    await catch_up(pool, view)
    await advance(pool, view)
    assert await following.counted(pool, job.stream_id) == 5


async def test_an_event_counts_once_when_runners_are_killed(pool: Pool, database_dsn: str) -> None:
    """Two processes follow the same view; one after the other is killed in the middle of it."""
    await pool.execute(following.TABLE)
    job = Job(pool)
    await job.create()

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-m", "tests.integration.following", database_dsn], cwd=ROOT)

    async def write(count: int) -> None:
        for _ in range(count):
            await job.steps(1, 1)

    runners = [start(), start()]
    total = 0
    try:
        for kill in range(4):
            async with anyio.create_task_group() as group:
                group.start_soon(write, 80)
                await eventually(lambda total=total: reached(pool, job, total + 20))
                runners[kill % 2].kill()
                runners[kill % 2].wait(timeout=30)
            total += 80
            runners[kill % 2] = start()
        assert await wait_until(pool, "counts", await head(pool), timeout_seconds=60)
    finally:
        for runner in runners:
            runner.kill()
            runner.wait(timeout=30)
    assert await following.counted(pool, job.stream_id) == total


async def reached(pool: Pool, job: Job, count: int) -> bool:
    return await following.counted(pool, job.stream_id) >= count


async def test_two_runners_apply_each_event_once(pool: Pool) -> None:
    await pool.execute(following.TABLE)
    job = Job(pool)
    await job.create()
    stops = [anyio.Event(), anyio.Event()]
    async with anyio.create_task_group() as group:
        for stop in stops:
            group.start_soon(lambda stop: run(pool, stop, views=(following.VIEW,)), stop)
        for number in range(1, 101):
            position = await job.steps(number, number)
        assert await wait_until(pool, "counts", position, timeout_seconds=30)
        for stop in stops:
            stop.set()
    assert await following.counted(pool, job.stream_id) == 100


async def test_a_failing_event_stops_its_view_and_no_other(pool: Pool, caplog: pytest.LogCaptureFixture) -> None:
    broken = True

    async def apply(connection: AnyConnection, version: int, events: Sequence[Recorded]) -> None:
        for event in events:
            if broken and event.version == 4:
                raise KeyError("no such thing")
        await metrics.apply(connection, version, events)

    view = msgspec.structs.replace(metrics.VIEW, apply=apply)
    job = Job(pool)
    await job.create()
    for number in range(1, 6):
        await job.steps(number, number)
    last = await head(pool)
    stop = anyio.Event()
    async with anyio.create_task_group() as group:
        group.start_soon(lambda: run(pool, stop, views=(view, checkpoints.VIEW)))
        (alarm,) = await eventually(lambda: alarms(pool))
        assert await wait_until(pool, "checkpoints", last, timeout_seconds=30)
        stop.set()
    failing = last - 2
    assert (alarm.name, alarm.position) == ("metrics", failing - 1)
    assert alarm.error is not None
    assert f"event {failing} (job.steps_reported of {job.stream_id})" in alarm.error
    assert "KeyError" in alarm.error
    assert "ALARM" in caplog.text
    # What came before the failing event is there, nothing after it.
    assert [step.step for step in await metrics.series(pool, job.id)] == [1, 2]
    assert await advance(pool, view) is False
    assert [step.step for step in await metrics.series(pool, job.id)] == [1, 2]

    with pytest.raises(ViewStopped, match="no such thing"):
        await rebuild(pool, "metrics", views=(view,))
    assert [step.step for step in await metrics.series(pool, job.id)] == [1, 2]
    broken = False
    assert await rebuild(pool, "metrics", views=(view,)) == last
    assert [step.step for step in await metrics.series(pool, job.id)] == [1, 2, 3, 4, 5]
    assert await alarms(pool) == []


async def test_an_event_of_a_newer_rose_stops_only_the_views_that_take_it(pool: Pool) -> None:
    job = Job(pool)
    await job.create()
    await pool.execute(
        "select rose.append('x', null, null, '{}', jsonb_build_array(jsonb_build_object("
        "'stream_id', $1::text, 'expected_version', 1, 'row', null, 'epoch', null, 'lease', null, 'events', "
        """'[{"type": "job.steps_reported", "schema": 99, "data": {}}]'::jsonb)))""",
        job.stream_id,
    )
    end = await head(pool)
    await catch_up(pool, checkpoints.VIEW)
    await advance(pool, metrics.VIEW)
    await advance(pool, metrics.VIEW)
    (alarm,) = await alarms(pool)
    assert (alarm.name, alarm.position) == ("metrics", end - 1)
    assert alarm.error is not None
    assert "UnknownEvent" in alarm.error


async def test_a_reader_never_sees_less_during_a_rebuild(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "WINDOW", 8)  # a rebuild of many transactions
    jobs = [Job(pool) for _ in range(3)]
    for job in jobs:
        await job.create()
        for first in range(1, 401, 10):
            await job.steps(first, first + 9)
    seen = 0
    stop = anyio.Event()

    async def read() -> None:
        """Read on and on: the series only ever grows, and is whole."""
        nonlocal seen
        length = 0
        while not stop.is_set():
            series = await metrics.series(pool, jobs[0].id)
            assert [step.step for step in series] == list(range(1, len(series) + 1))
            assert len(series) >= length
            length = len(series)
            seen += 1

    async def write() -> None:
        for number in range(401, 700):
            if stop.is_set():
                return
            await jobs[0].steps(number, number)

    await catch_up(pool, metrics.VIEW)
    async with anyio.create_task_group() as group:
        group.start_soon(run, pool, stop)
        group.start_soon(read)
        group.start_soon(write)
        for _ in range(3):
            before = seen
            await rebuild(pool, "metrics")
            assert seen > before
        stop.set()
    versions = await pool.fetch("select distinct version from rose.metrics")
    assert [row["version"] for row in versions] == [4]
    assert [progress.version for progress in await list_projections(pool) if progress.name == "metrics"] == [4]


async def test_a_rebuild_shows_no_less_than_the_version_it_replaces(pool: Pool) -> None:
    """The old version moves on after the new one has read the end of the log: the switch catches up first."""
    job = Job(pool)
    await job.create()
    await job.steps(1, 5)
    await catch_up(pool, metrics.VIEW)
    overtaken = False

    async def apply(connection: AnyConnection, version: int, events: Sequence[Recorded]) -> None:
        nonlocal overtaken
        await metrics.apply(connection, version, events)
        if not overtaken:
            overtaken = True
            await job.steps(6, 9)
            await catch_up(pool, metrics.VIEW)

    await rebuild(pool, "metrics", views=(msgspec.structs.replace(metrics.VIEW, apply=apply),))
    assert overtaken
    rows = await pool.fetch("select step from rose.metrics order by step")
    assert [row["step"] for row in rows] == list(range(1, 10))
    assert await wait_until(pool, "metrics", await head(pool), timeout_seconds=0)


async def test_a_rebuild_clears_what_a_killed_one_has_left(pool: Pool) -> None:
    job = Job(pool)
    await job.create()
    await job.steps(1, 3)
    await catch_up(pool, metrics.VIEW)
    await pool.execute("insert into rose.projections (name, version, status) values ('metrics', 7, 'building')")
    await pool.execute("insert into rose.metrics select 7, job_id, step, '{}', 1 from rose.metrics where step = 1")
    assert [step.step for step in await metrics.series(pool, job.id)] == [1, 2, 3]
    await rebuild(pool, "metrics")
    assert await pool.fetchval("select count(*) from rose.metrics") == 3
    assert len(await list_projections(pool)) == 1


async def test_a_rebuild_of_something_else_names_the_views(pool: Pool) -> None:
    with pytest.raises(InvalidRequest, match="checkpoints") as caught:
        await rebuild(pool, "nonsense")
    assert caught.value.code == "unknown_projection"


async def test_every_view_has_a_table_with_its_key(pool: Pool) -> None:
    for view in VIEWS:
        columns = {
            row["attname"]
            for row in await pool.fetch(
                "select attname from pg_attribute where attrelid = $1::text::regclass and attnum > 0", view.table
            )
        }
        assert {"version", *view.key} <= columns
