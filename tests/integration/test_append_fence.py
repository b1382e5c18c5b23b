"""The fence: nothing of a run that lost its lease gets into the log, and a job ends once."""

from __future__ import annotations

from uuid import uuid4

import anyio
import msgspec
import pytest

from projections import jobs as jobs_view
from rose.commands import Commands, Request
from rose.domain import files, job_commands, job_events
from rose.errors import Conflict, InvalidState, StaleEpoch
from rose.ids import new_id
from rose.leases import Lease, renew
from rose.log.append import StreamWrite, append
from rose.log.pool import Pool
from rose.log.read import head, load_row, read_stream
from tests.checker import TERMINAL, check_log
from tests.integration.writes import (
    ACTOR,
    ARTIFACT,
    claim,
    created_job,
    expire,
    lease_change,
    load_job,
    queued_job,
    steps,
    tell,
)

pytestmark = pytest.mark.anyio

RACES = 100


async def append_as_run(pool: Pool, lease: Lease) -> None:
    """Append a metric without asking decide, which would refuse some of these before Postgres does."""
    found = await load_row(pool, "jobs", lease.job_id)
    assert found is not None
    write = StreamWrite(
        stream_id=f"job/{lease.job_id}",
        expected_version=found[1],
        events=(job_events.StepsReported(epoch=lease.epoch, steps=steps(1)),),
        row=jobs_view.row(await load_job(pool, lease.job_id)),
        epoch=lease.epoch,
    )
    await append(pool, [write], command_id=str(uuid4()), actor=ACTOR)


async def test_a_run_appends_while_its_lease_lives(pool: Pool) -> None:
    lease = await claim(pool, await queued_job(pool))
    await append_as_run(pool, lease)
    events = await read_stream(pool, f"job/{lease.job_id}")
    assert [(event.type, event.epoch) for event in events[-2:]] == [
        ("job.started", lease.epoch),
        ("job.steps_reported", lease.epoch),
    ]


async def test_an_expired_lease_is_refused_though_nobody_took_over(pool: Pool) -> None:
    lease = await claim(pool, await queued_job(pool))
    await expire(pool, lease.job_id)
    before = await head(pool)
    with pytest.raises(StaleEpoch, match="has ended"):
        await append_as_run(pool, lease)
    assert await head(pool) == before
    assert not await renew(pool, lease, 60)


async def test_a_stale_epoch_is_refused(pool: Pool, database_dsn: str) -> None:
    first = await claim(pool, await queued_job(pool))
    await expire(pool, first.job_id)
    second = await claim(pool, first.job_id, owner="trainer-2")
    assert second.epoch == first.epoch + 1
    with pytest.raises(StaleEpoch, match=f"epoch {first.epoch} of job/{first.job_id} is stale"):
        await append_as_run(pool, first)
    await tell(pool, second.job_id, job_commands.ReportSteps(epoch=second.epoch, steps=steps(1)), epoch=second.epoch)
    events = [event.type for event in await read_stream(pool, f"job/{first.job_id}")]
    assert events[-4:] == ["job.started", "job.lease_expired", "job.started", "job.steps_reported"]
    assert await check_log(database_dsn) == []


async def test_an_epoch_that_was_never_claimed_is_refused(pool: Pool) -> None:
    job_id = await created_job(pool)
    with pytest.raises(StaleEpoch, match="the newest is 0"):
        await append_as_run(pool, Lease(job_id=job_id, kind="training", epoch=1, owner="nobody"))


async def test_the_lease_that_ends_while_an_append_waits_for_its_turn_is_refused(pool: Pool) -> None:
    """The head row is held by another while the lease, alive at the first look, runs out."""
    lease = await claim(pool, await queued_job(pool), seconds=0.5)
    before = await head(pool)
    refused: list[StaleEpoch] = []

    async def report() -> None:
        with pytest.raises(StaleEpoch, match="ended while") as caught:
            await append_as_run(pool, lease)
        refused.append(caught.value)

    async with pool.acquire() as holder, anyio.create_task_group() as tasks, holder.transaction():
        await holder.execute("select 1 from rose.log_head for update")
        tasks.start_soon(report)
        await holder.execute(
            "select pg_sleep(extract(epoch from lease_until - clock_timestamp()) + 0.1) "
            "from rose.leases where job_id = $1",
            lease.job_id,
        )
    assert len(refused) == 1
    assert await head(pool) == before


async def test_a_released_lease_is_refused(pool: Pool) -> None:
    lease = await claim(pool, await queued_job(pool))
    release = job_commands.ReleaseRun(epoch=lease.epoch, at=3, reason="drained")
    await tell(pool, lease.job_id, release, epoch=lease.epoch, lease=lease_change("release", lease))
    with pytest.raises(StaleEpoch):
        await append_as_run(pool, lease)
    assert (await load_job(pool, lease.job_id)).status == "queued"


async def test_a_cancelled_job_refuses_its_run(pool: Pool, database_dsn: str) -> None:
    lease = await claim(pool, await queued_job(pool))
    await Commands(pool).job(lease.job_id, job_commands.CancelJob(at=3), Request(actor=ACTOR))
    assert not await renew(pool, lease, 60)
    with pytest.raises(StaleEpoch):
        await append_as_run(pool, lease)
    assert await check_log(database_dsn) == []


async def test_a_paused_run_may_still_report_until_it_gives_the_lease_back(pool: Pool, database_dsn: str) -> None:
    lease = await claim(pool, await queued_job(pool))
    await tell(pool, lease.job_id, job_commands.PauseJob(at=3))
    await tell(pool, lease.job_id, job_commands.ReportSteps(epoch=lease.epoch, steps=steps(1)), epoch=lease.epoch)
    release = job_commands.ReleaseRun(epoch=lease.epoch, at=3, reason="paused")
    await tell(pool, lease.job_id, release, epoch=lease.epoch, lease=lease_change("release", lease))
    job = await load_job(pool, lease.job_id)
    assert (job.status, job.run, job.last_step) == ("paused", None, 1)
    assert await check_log(database_dsn) == []


async def test_two_claims_at_once_give_one_owner(pool: Pool, database_dsn: str) -> None:
    job_id = await queued_job(pool)
    owners: list[str] = []

    async def try_to_claim(owner: str) -> None:
        try:
            await claim(pool, job_id, owner=owner)
            owners.append(owner)
        except (Conflict, InvalidState):
            pass  # another one was first

    async with anyio.create_task_group() as tasks:
        for number in range(10):
            tasks.start_soon(try_to_claim, f"trainer-{number}")
    assert len(owners) == 1
    run = (await load_job(pool, job_id)).run
    assert run is not None
    assert run.owner == owners[0]
    assert await check_log(database_dsn) == []


async def test_a_claim_meets_a_live_lease(pool: Pool) -> None:
    """A version that a claimer read before is not enough: the lease itself is in the way."""
    lease = await claim(pool, await queued_job(pool))
    with pytest.raises(Conflict, match="is owned by trainer-1"):
        await claim(pool, lease.job_id, owner="trainer-2")


async def test_an_epoch_is_claimed_once(pool: Pool) -> None:
    lease = await claim(pool, await queued_job(pool))
    await expire(pool, lease.job_id)
    found = await load_row(pool, "jobs", lease.job_id)
    assert found is not None
    again = StreamWrite(
        stream_id=f"job/{lease.job_id}",
        expected_version=found[1],
        events=(),
        row=None,
        lease=msgspec.structs.replace(lease_change("release", lease), action="claim"),
    )
    with pytest.raises(Conflict, match="was claimed before"):
        await append(pool, [again], command_id="c", actor=ACTOR)


async def test_cancel_and_success_race_to_one_end(pool: Pool, database_dsn: str) -> None:
    commands = Commands(pool)
    ends: list[str] = []

    async def succeed(lease: Lease) -> None:
        finished = job_commands.Succeed(
            epoch=lease.epoch,
            at=4,
            artifact=ARTIFACT,
            kind="adapter",
            step=1,
            trained_tokens=1,
            result_file=new_id("file_"),
        )
        result = files.AddFile(
            project="default",
            file_id=finished.result_file,
            at=4,
            filename="r.csv",
            purpose="fine-tune-results",
            artifact=ARTIFACT,
        )
        try:
            await commands.succeed(lease.job_id, finished, result, Request(actor=ACTOR))
            ends.append("succeeded")
        except StaleEpoch:
            pass  # it was cancelled before

    async def cancel(job_id: str) -> None:
        try:
            await commands.job(job_id, job_commands.CancelJob(at=4), Request(actor=ACTOR))
            ends.append("cancelled")
        except InvalidState:
            pass  # it had succeeded before

    for race in range(RACES):
        lease = await claim(pool, await queued_job(pool))
        ends.clear()
        async with anyio.create_task_group() as tasks:
            if race % 2:
                tasks.start_soon(cancel, lease.job_id)
                tasks.start_soon(succeed, lease)
            else:
                tasks.start_soon(succeed, lease)
                tasks.start_soon(cancel, lease.job_id)
        events = [event.type for event in await read_stream(pool, f"job/{lease.job_id}")]
        assert [kind for kind in events if kind in TERMINAL] == [f"job.{end}" for end in ends]
        assert (await load_job(pool, lease.job_id)).status == ends[0]
    assert await check_log(database_dsn) == []
