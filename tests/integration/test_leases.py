"""Leases and workers: what can be claimed and when, who is there, why a job waits."""

from __future__ import annotations

import msgspec
import pytest

from rose.domain import job_commands, jobs
from rose.domain.projects import DEFAULT_PROJECT
from rose.errors import Conflict
from rose.leases import (
    WaitingFacts,
    Worker,
    announce,
    candidates,
    each_candidate,
    renew,
    waiting_facts,
    withdraw,
    workers,
)
from rose.log.pool import Pool
from tests.integration.writes import claim, created_job, expire, lease_change, load_job, queued_job, steps, tell

pytestmark = pytest.mark.anyio


async def ids(pool: Pool, kind: str) -> list[str]:
    return [
        candidate.job_id for candidate in await candidates(pool, "training" if kind == "training" else "validation")
    ]


async def test_queued_jobs_are_candidates_oldest_first(pool: Pool) -> None:
    born = [await created_job(pool) for _ in range(3)]
    assert await ids(pool, "validation") == born
    assert await ids(pool, "training") == []
    queued = [await queued_job(pool) for _ in range(3)]
    assert await ids(pool, "training") == queued
    assert [one.job_id for one in await candidates(pool, "training", limit=2)] == queued[:2]


async def test_every_candidate_is_reached_page_by_page(pool: Pool) -> None:
    queued = [await queued_job(pool) for _ in range(5)]
    assert [one.job_id async for one in each_candidate(pool, "training", page=2)] == queued
    assert [one.job_id async for one in each_candidate(pool, "validation", page=2)] == []


async def test_a_candidate_carries_state_and_version(pool: Pool) -> None:
    job_id = await queued_job(pool)
    (candidate,) = await candidates(pool, "training")
    state = msgspec.json.decode(candidate.doc, type=jobs.JobState)
    assert (state.id, state.status, candidate.version, candidate.expired) == (job_id, "queued", 4, False)


async def test_owned_jobs_are_no_candidates_until_the_lease_ends(pool: Pool) -> None:
    lease = await claim(pool, await queued_job(pool))
    assert await ids(pool, "training") == []
    await expire(pool, lease.job_id)
    (candidate,) = await candidates(pool, "training")
    assert (candidate.job_id, candidate.expired) == (lease.job_id, True)


async def test_a_validation_whose_owner_died_is_a_candidate_again(pool: Pool) -> None:
    lease = await claim(pool, await created_job(pool), "validation")
    assert await ids(pool, "validation") == []
    await expire(pool, lease.job_id)
    (candidate,) = await candidates(pool, "validation")
    assert (candidate.job_id, candidate.expired) == (lease.job_id, True)
    assert (await claim(pool, lease.job_id, "validation", owner="other")).epoch == lease.epoch + 1


async def test_paused_and_finished_jobs_are_no_candidates(pool: Pool) -> None:
    paused, cancelled = await queued_job(pool), await queued_job(pool)
    await tell(pool, paused, job_commands.PauseJob(at=1))
    await tell(pool, cancelled, job_commands.CancelJob(at=1))
    assert await ids(pool, "training") == []
    await tell(pool, paused, job_commands.ResumeJob(at=1))
    assert await ids(pool, "training") == [paused]


async def test_a_run_paused_and_resumed_before_it_let_go_waits_for_its_lease(pool: Pool) -> None:
    lease = await claim(pool, await queued_job(pool))
    await tell(pool, lease.job_id, job_commands.PauseJob(at=1))
    await tell(pool, lease.job_id, job_commands.ResumeJob(at=1))
    assert await ids(pool, "training") == []
    await expire(pool, lease.job_id)
    (candidate,) = await candidates(pool, "training")
    assert candidate.expired
    assert (await claim(pool, lease.job_id)).epoch == lease.epoch + 1


async def test_not_before_delays_the_next_claim(pool: Pool) -> None:
    lease = await claim(pool, await queued_job(pool))
    release = job_commands.ReleaseRun(epoch=lease.epoch, at=1, reason="crashed")
    change = lease_change("release", lease, not_before_seconds=60)
    await tell(pool, lease.job_id, release, epoch=lease.epoch, lease=change)
    assert await ids(pool, "training") == []
    facts = await facts_of(pool, lease.job_id)
    assert facts.lease is not None
    assert not facts.lease.alive
    assert 50 < facts.lease.seconds_held_back <= 60
    with pytest.raises(Conflict, match="may not be claimed before"):
        await claim(pool, lease.job_id)
    await pool.execute("update rose.leases set not_before = clock_timestamp()")
    assert await ids(pool, "training") == [lease.job_id]
    await claim(pool, lease.job_id)


async def test_a_renewal_prolongs_a_living_lease(pool: Pool) -> None:
    lease = await claim(pool, await queued_job(pool), seconds=10)
    assert await renew(pool, lease, 100)
    facts = await facts_of(pool, lease.job_id)
    assert facts.lease is not None
    assert facts.lease.alive
    assert 90 < facts.lease.seconds_left <= 100
    assert (facts.lease.owner, facts.lease.epoch, facts.lease.kind) == ("trainer-1", lease.epoch, "training")


@pytest.mark.parametrize("change", [{"owner": "other"}, {"epoch": 1}, {"kind": "validation"}])
async def test_only_the_owner_renews(pool: Pool, change: dict[str, object]) -> None:
    lease = await claim(pool, await queued_job(pool))
    assert lease.epoch == 2
    assert not await renew(pool, msgspec.structs.replace(lease, **change), 100)


async def test_an_expired_lease_is_not_revived(pool: Pool) -> None:
    lease = await claim(pool, await queued_job(pool))
    await expire(pool, lease.job_id)
    assert not await renew(pool, lease, 100)
    assert [candidate.job_id for candidate in await candidates(pool, "training")] == [lease.job_id]


async def facts_of(pool: Pool, job_id: str) -> WaitingFacts:
    return (await waiting_facts(pool, DEFAULT_PROJECT, [job_id]))[job_id]


def a_worker(worker_id: str, kind: str = "trainer") -> Worker:
    return Worker(id=worker_id, kind=kind, host="here", url=None, capabilities={"device": "cpu"}, pid=7)


async def test_workers_are_listed_while_they_are_seen(pool: Pool) -> None:
    await announce(pool, a_worker("trainer-1"))
    engine = Worker(id="e", kind="inference", host="here", url="http://127.0.0.1:1", capabilities={"busy": 1}, pid=8)
    await announce(pool, engine)
    assert await workers(pool) == [a_worker("trainer-1"), engine]
    assert await workers(pool, "inference") == [engine]
    busier = msgspec.structs.replace(engine, capabilities={"busy": 2})
    await announce(pool, busier)
    assert await workers(pool, "inference") == [busier]
    await pool.execute("update rose.workers set last_seen = last_seen - interval '20 s' where id = 'e'")
    assert await workers(pool, "inference") == []
    assert await workers(pool, "inference", live_seconds=60) == [busier]
    await withdraw(pool, "trainer-1")
    assert await workers(pool) == []


async def test_waiting_facts_count_what_is_before_a_job(pool: Pool) -> None:
    running = await claim(pool, await queued_job(pool))
    orphan = await claim(pool, await queued_job(pool))
    await expire(pool, orphan.job_id)
    first, second = await queued_job(pool), await queued_job(pool)
    await announce(pool, a_worker("trainer-1"))
    await announce(pool, a_worker("api-1", "api"))
    facts = await facts_of(pool, second)
    assert (facts.job_id, facts.queued_before, facts.running_now) == (second, 1, 1)
    assert facts.trainers == (a_worker("trainer-1"),)
    page = await waiting_facts(pool, DEFAULT_PROJECT, [running.job_id, orphan.job_id, first, second, "ftjob_unknown"])
    assert {job_id: (one.queued_before, one.running_now) for job_id, one in page.items()} == {
        running.job_id: (0, 0),
        orphan.job_id: (0, 1),
        first: (0, 1),
        second: (1, 1),
    }
    assert [page[one.job_id].lease is not None and page[one.job_id].lease.alive for one in (running, orphan)] == [
        True,
        False,
    ]
    assert await waiting_facts(pool, "proj_other", [second]) == {}


async def test_a_long_queue_is_counted_up_to_a_bound(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rose.leases.MOST_COUNTED", 2)
    queued = [await queued_job(pool) for _ in range(4)]
    page = await waiting_facts(pool, DEFAULT_PROJECT, queued)
    assert [page[job_id].queued_before for job_id in queued] == [0, 1, 2, 2]


async def test_a_job_nobody_touched_has_no_lease(pool: Pool) -> None:
    facts = await facts_of(pool, await created_job(pool))
    assert (facts.lease, facts.trainers, facts.queued_before) == (None, (), 0)


async def test_steps_do_not_end_a_claim(pool: Pool) -> None:
    lease = await claim(pool, await queued_job(pool))
    for number in range(1, 4):
        report = job_commands.ReportSteps(epoch=lease.epoch, steps=steps(number))
        await tell(pool, lease.job_id, report, epoch=lease.epoch)
    assert (await load_job(pool, lease.job_id)).last_step == 3
    assert await renew(pool, lease, 60)
