"""Trainers that die, sleep past their lease and ignore its loss, on connections that are killed: the log holds."""

from __future__ import annotations

from collections import Counter
from random import Random
from uuid import uuid4

import anyio
import msgspec
import pytest

from projections import jobs as jobs_view
from rose.commands import Commands, Request
from rose.domain import files, job_commands, jobs
from rose.errors import Conflict, InvalidState, StaleEpoch
from rose.ids import new_id
from rose.leases import Lease, candidates, renew
from rose.log.append import LeaseChange, StreamWrite, append
from rose.log.pool import Pool
from rose.log.read import head, load_row, read_all, read_stream
from rose.log.tail import Tailer
from tests.checker import check, read_dump, unlike
from tests.eventually import eventually
from tests.integration.writes import ACTOR, ARTIFACT, load_job, queued_job, steps

pytestmark = [pytest.mark.anyio, pytest.mark.slow, pytest.mark.timeout(300)]

JOBS = 30
TRAINERS = 6
STEPS = 4
LEASE_SECONDS = 1.0
KILL = """
select pg_terminate_backend(pid) from (
    select pid from pg_stat_activity
    where datname = current_database() and pid <> pg_backend_pid() and backend_type = 'client backend'
    order by random() limit 1
)
"""


class Chaos:
    """Trainers over one database, and what became of their appends."""

    def __init__(self, pool: Pool, seed: int) -> None:
        self.pool = pool
        self.random = Random(seed)
        self.commands = Commands(pool)
        self.counts: Counter[str] = Counter()
        self.over = False

    async def trainer(self, name: str, obeys: bool) -> None:
        """Claim and run jobs until all is over. One that does not obey reports on after it lost its lease."""
        while not self.over:
            for candidate in await candidates(self.pool, "training", limit=3):
                state = msgspec.json.decode(candidate.doc, type=jobs.JobState)
                lease = Lease(job_id=candidate.job_id, kind="training", epoch=state.epoch + 1, owner=name)
                if await self._claim(lease):
                    await self._run(lease, obeys=obeys)
            await anyio.sleep(0.01)

    async def _claim(self, lease: Lease) -> bool:
        start = job_commands.StartRun(owner=lease.owner, host="h", epoch=lease.epoch, at=1, max_attempts=1000)
        change = LeaseChange(action="claim", **msgspec.structs.asdict(lease), lease_seconds=LEASE_SECONDS)
        try:
            await self.commands.job(lease.job_id, start, Request(actor=ACTOR), lease=change)
        except (Conflict, InvalidState):
            self.counts["claims lost"] += 1
            return False
        self.counts["claims"] += 1
        return True

    async def _run(self, lease: Lease, *, obeys: bool) -> None:
        while True:
            fate = self.random.random()
            if fate < 0.1:
                self.counts["deaths"] += 1
                return None
            if fate < 0.25:
                self.counts["pauses longer than the lease"] += 1
                await anyio.sleep(LEASE_SECONDS * 1.2)
            if not await renew(self.pool, lease, LEASE_SECONDS):
                self.counts["leases lost"] += 1
                if obeys:
                    return None
            try:
                if await self._report(lease):
                    return None
            except StaleEpoch:
                self.counts["stale appends refused"] += 1
                return None
            except Conflict:
                self.counts["conflicts"] += 1
            except InvalidState:
                return await self._let_go(lease)

    async def _let_go(self, lease: Lease) -> None:
        """Give a paused job's lease back."""
        release = job_commands.ReleaseRun(epoch=lease.epoch, at=1, reason="paused")
        change = LeaseChange(action="release", **msgspec.structs.asdict(lease))
        try:
            await self.commands.job(lease.job_id, release, Request(actor=ACTOR), fenced=True, lease=change)
            self.counts["releases"] += 1
        except StaleEpoch:
            self.counts["stale appends refused"] += 1

    async def _report(self, lease: Lease) -> bool:
        """Append the next step, or success after the last; True when the job is over. Asks no state for permission."""
        found = await load_row(self.pool, "jobs", lease.job_id)
        assert found is not None
        state, version = msgspec.json.decode(found[0], type=jobs.JobState), found[1]
        if state.last_step >= STEPS:
            return await self._succeed(lease)
        event = jobs.StepsReported(epoch=lease.epoch, steps=steps(state.last_step + 1))
        write = StreamWrite(
            stream_id=f"job/{lease.job_id}",
            expected_version=version,
            events=(event,),
            row=jobs_view.row(jobs.evolve(state, event)),
            epoch=lease.epoch,
        )
        await append(self.pool, [write], command_id=str(uuid4()), actor=ACTOR)
        return False

    async def _succeed(self, lease: Lease) -> bool:
        finished = job_commands.Succeed(
            epoch=lease.epoch,
            at=4,
            artifact=ARTIFACT,
            kind="adapter",
            step=STEPS,
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
        await self.commands.succeed(lease.job_id, finished, result, Request(actor=ACTOR))
        return True

    async def person(self, job_ids: list[str]) -> None:
        """Cancel, pause and resume here and there."""
        while not self.over:
            job_id = self.random.choice(job_ids)
            status = (await load_job(self.pool, job_id)).status
            command = job_commands.PauseJob(at=1) if self.random.random() < 0.8 else job_commands.CancelJob(at=1)
            try:
                await self.commands.job(
                    job_id, job_commands.ResumeJob(at=1) if status == "paused" else command, Request(actor=ACTOR)
                )
            except (InvalidState, Conflict):
                self.counts["refused to a person"] += 1
            await anyio.sleep(0.03)

    async def killer(self) -> None:
        """Kill connections of this database."""
        async with self.pool.acquire() as connection:
            while not self.over:
                self.counts["kills"] += len(await connection.fetch(KILL))
                await anyio.sleep(0.1)

    async def all_ended(self, job_ids: list[str]) -> bool:
        """Say whether every job is over."""
        states = [await load_job(self.pool, job_id) for job_id in job_ids]
        return all(state.is_terminal for state in states)


async def test_no_promise_breaks_under_chaos(pool: Pool, database_dsn: str) -> None:
    chaos = Chaos(pool, seed=1)
    job_ids = [await queued_job(pool) for _ in range(JOBS)]
    before = await read_all(pool, after_position=0, limit=1000)
    async with Tailer(pool) as tailer:
        async with anyio.create_task_group() as tasks:
            for number in range(TRAINERS):
                tasks.start_soon(chaos.trainer, f"trainer-{number}", number % 2 == 0)
            tasks.start_soon(chaos.person, job_ids)
            tasks.start_soon(chaos.killer)
            await eventually(lambda: chaos.all_ended(job_ids), seconds=240)
            chaos.over = True
        end = await head(pool)
        await eventually(lambda: tailer.position == end)
    dump = await read_dump(database_dsn)
    assert check(dump) == []
    news = [event for stream_id in dump.streams for event in tailer.since(stream_id, before[-1].position) or ()]
    assert unlike(before + sorted(news, key=lambda event: event.position), dump) == []
    for job_id in job_ids:
        await assert_whole(pool, job_id)
    for happened in ("claims", "kills", "deaths", "pauses longer than the lease", "stale appends refused"):
        assert chaos.counts[happened] > 0, chaos.counts


async def assert_whole(pool: Pool, job_id: str) -> None:
    """Check that the job ended, and that its steps are there once each, in order, without a gap."""
    state = await load_job(pool, job_id)
    reported = [
        step.step
        for recorded in await read_stream(pool, f"job/{job_id}")
        if isinstance(recorded.event, jobs.StepsReported)
        for step in recorded.event.steps
    ]
    assert reported == list(range(1, state.last_step + 1))
    assert state.status == "cancelled" or (state.status, state.last_step) == ("succeeded", STEPS)
