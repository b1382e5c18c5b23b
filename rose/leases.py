"""Leases and workers: who owns a job, who is there, what can be claimed.

Claiming, releasing and revoking happen inside rose.append (rose/log/append.py), with the event that says so; here a
lease is renewed and read. Times are the database's: no clock of a worker matters.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Literal

import anyio
import msgspec

from rose.errors import Unavailable
from rose.log.pool import Pool, fetch, fetch_row
from rose.log.queries import QUERIES

Kind = Literal["validation", "training"]

LIVE_SECONDS = 15.0
"""A worker that was not seen for so long is gone."""
ANNOUNCE_SECONDS = 3.0
"""How often a process says that it is there."""
WITHDRAW_SECONDS = 2.0
"""How long a process that ends may take to say that it is gone."""

logger = logging.getLogger(__name__)


class Lease(msgspec.Struct, frozen=True, kw_only=True):
    """Ownership of a job by an epoch."""

    job_id: str
    kind: Kind
    epoch: int
    owner: str


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """A job that may be claimed now."""

    job_id: str
    doc: bytes
    """JSON of its JobState."""
    version: int
    expired: bool
    """True when a former run still stands in the state: its owner is gone."""
    runs: int
    """Runs that the job's project has at the moment."""
    created_position: int
    """With `runs` the place in the order of candidates: where the next page begins."""


class Worker(msgspec.Struct, frozen=True, kw_only=True):
    """A process of ROSE that is there."""

    id: str
    kind: str
    """api, projections, trainer or inference."""
    host: str
    url: str | None
    capabilities: dict[str, Any]
    pid: int


class LeaseFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The lease of a job at the moment of reading."""

    kind: Kind
    epoch: int
    owner: str
    alive: bool
    seconds_left: float
    """Until it ends; 0 or less when it is over."""
    seconds_held_back: float
    """Until the job may be claimed again; 0 when at once."""
    attempts: int
    """Claims so far, of both kinds."""


LEASE_FIELDS = LeaseFacts.__struct_fields__
MOST_COUNTED = 1000
"""Jobs in front of a job that are counted one by one; the cost of a list does not grow with the queue."""


class WaitingFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What explains why a job waits."""

    job_id: str
    queued_before: int
    """Of a queued job: those of the same project that are older; counted up to MOST_COUNTED."""
    running_now: int
    """Other jobs of the project with a living run."""
    lease: LeaseFacts | None
    trainers: tuple[Worker, ...]
    """Trainers that are there, with what they have."""


async def renew(pool: Pool, lease: Lease, seconds: float) -> bool:
    """Prolong a living lease to `seconds` from now; False when it is lost: expired, released or taken over.

    Raises: Unavailable; the lease may then still live.
    """
    row = await fetch_row(
        pool, QUERIES["renew_lease"], lease.job_id, lease.kind, lease.epoch, lease.owner, float(seconds)
    )
    return row is not None


async def candidates(pool: Pool, kind: Kind, limit: int = 20, *, after: tuple[int, int] = (-1, 0)) -> list[Candidate]:
    """Return up to `limit` jobs that may be claimed for `kind`, behind the place `after` (runs and position).

    Those of the project with the fewest runs come first, within a project the oldest: nobody's queue stops another's.

    Raises: Unavailable.
    """
    rows = await fetch(pool, QUERIES[f"{kind}_candidates"], limit, *after)
    return [
        Candidate(
            job_id=row["id"],
            doc=row["doc"].encode(),
            version=row["version"],
            expired=row["expired"],
            runs=row["runs"],
            created_position=row["created_position"],
        )
        for row in rows
    ]


async def each_candidate(pool: Pool, kind: Kind, *, page: int = 20) -> AsyncGenerator[Candidate]:
    """Yield every job that may be claimed for `kind`, in that order: behind many that this worker cannot run, too.

    Raises: Unavailable.
    """
    after = (-1, 0)
    while found := await candidates(pool, kind, page, after=after):
        for candidate in found:
            yield candidate
        after = (found[-1].runs, found[-1].created_position)


async def announce(pool: Pool, worker: Worker) -> None:
    """Say that a process is there; repeat it well within LIVE_SECONDS. Raises: Unavailable."""
    capabilities = msgspec.json.encode(worker.capabilities).decode()
    await fetch(
        pool,
        QUERIES["announce_worker"],
        worker.id,
        worker.kind,
        worker.host,
        worker.url,
        capabilities,
        worker.pid,
    )


async def withdraw(pool: Pool, worker_id: str) -> None:
    """Say that a process is gone. Raises: Unavailable."""
    await fetch(pool, QUERIES["withdraw_worker"], worker_id)


@asynccontextmanager
async def announced(pool: Pool, worker: Callable[[], Worker]) -> AsyncGenerator[None]:
    """Keep a process in the table `workers` as long as the context lasts; `worker` is asked anew for its facts."""

    async def repeat() -> None:
        while True:
            try:
                await announce(pool, worker())
            except Unavailable as error:
                logger.warning("%s", error.message)
            await anyio.sleep(ANNOUNCE_SECONDS)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(repeat)
        try:
            yield
        finally:
            tasks.cancel_scope.cancel()
            with anyio.move_on_after(WITHDRAW_SECONDS, shield=True):
                try:
                    await withdraw(pool, worker().id)
                except Unavailable as error:
                    logger.warning("%s", error.message)


async def workers(pool: Pool, kind: str | None = None, live_seconds: float = LIVE_SECONDS) -> list[Worker]:
    """Return the processes (of one kind) that are there, oldest first. Raises: Unavailable."""
    rows = await fetch(pool, QUERIES["live_workers"], kind, float(live_seconds))
    return [
        Worker(
            id=row["id"],
            kind=row["kind"],
            host=row["host"],
            url=row["url"],
            capabilities=msgspec.json.decode(row["capabilities"]),
            pid=row["pid"],
        )
        for row in rows
    ]


async def waiting_facts(pool: Pool, project: str, job_ids: Sequence[str]) -> dict[str, WaitingFacts]:
    """Return by id what explains why jobs of the project wait, in one query. Raises: Unavailable."""
    rows = await fetch(pool, QUERIES["waiting_facts"], project, list(job_ids), MOST_COUNTED, LIVE_SECONDS)
    trainers = msgspec.json.decode(rows[0]["trainers"], type=tuple[Worker, ...]) if rows else ()
    return {
        row["id"]: WaitingFacts(
            job_id=row["id"],
            queued_before=row["queued_before"],
            running_now=row["running_now"],
            lease=None if row["epoch"] is None else LeaseFacts(**{name: row[name] for name in LEASE_FIELDS}),
            trainers=trainers,
        )
        for row in rows
    }
