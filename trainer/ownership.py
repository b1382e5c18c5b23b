"""A job that this supervisor owns for one epoch: appends that carry the epoch, renewal, what is wanted of the run.

While Postgres is away an append waits and is then made, once: its command id is derived from job, epoch and a name.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from typing import Literal, TypeVar

import anyio
import msgspec

from rose.commands import Commands, Outcome, Request
from rose.domain import files
from rose.domain.job_commands import (
    ChangePhase,
    Fail,
    FinishValidation,
    NoteResume,
    ReleaseRun,
    ReportSteps,
    SaveCheckpoint,
    SaveRecoveryPoint,
    Succeed,
    Warn,
)
from rose.domain.jobs import JobState
from rose.errors import Conflict, StaleEpoch, Unavailable
from rose.leases import Lease, renew
from rose.log.append import Actor, LeaseChange
from rose.log.pool import Pool
from rose.log.read import load_row

log = logging.getLogger(__name__)

RunCommand = (
    FinishValidation
    | ChangePhase
    | NoteResume
    | ReportSteps
    | SaveRecoveryPoint
    | SaveCheckpoint
    | Warn
    | ReleaseRun
    | Fail
)
Wanted = Literal["run", "drain", "stop"]
Answer = TypeVar("Answer")

FIRST_WAIT_SECONDS = 0.1
LONGEST_WAIT_SECONDS = 2.0
MAX_CONFLICTS = 5
"""Each stands for many tries of rose.commands already; more of them are a defect and end the run."""


class OwnedJob:
    """A claimed job. `state` is the newest that is known here; others may have changed the job since."""

    def __init__(
        self, pool: Pool, lease: Lease, state: JobState, *, actor: Actor, lease_seconds: float, renewed_at: float
    ) -> None:
        self.lease = lease
        self.renewed_at = renewed_at
        """When the newest good claim or renewal was asked for (monotonic): the lease lasts at least from then."""
        self.state = state
        self._pool = pool
        self._commands = Commands(pool)
        self._actor = actor
        self._lease_seconds = lease_seconds

    @property
    def name(self) -> str:
        """`<job id>-e<epoch>`: names files of this run."""
        return f"{self.lease.job_id}-e{self.lease.epoch}"

    @property
    def wanted(self) -> Wanted:
        """What the newest known state wants of the run: go on, give the job back, or die."""
        run = self.state.run
        if self.state.is_terminal or run is None or run.epoch != self.lease.epoch:
            return "stop"
        if self.lease.kind == "training" and self.state.status != "running":
            return "drain"
        return "run"

    async def append(self, command: RunCommand, name: str, *, free_in_seconds: float | None = None) -> JobState:
        """Append what `command` leads to, however long Postgres is away; `name` is unique within the epoch.

        With `free_in_seconds` the lease is given back in the same append, and others may claim the job after so long.

        Raises: StaleEpoch once the lease is lost; InvalidState.
        """
        lease = None if free_in_seconds is None else self._release(free_in_seconds)
        request = self._request(name)
        return await self._take(
            lambda: self._commands.job(self.lease.job_id, command, request, fenced=True, lease=lease)
        )

    async def succeed(self, command: Succeed, result_file: files.AddFile) -> JobState:
        """End the job with its model, however long Postgres is away. Raises: StaleEpoch, InvalidState."""
        request = self._request("succeed")
        return await self._take(lambda: self._commands.succeed(self.lease.job_id, command, result_file, request))

    async def renew(self) -> bool:
        """Prolong the lease; False when it is lost. Raises: Unavailable; then it may still live."""
        asked_at = time.monotonic()
        good = await renew(self._pool, self.lease, self._lease_seconds)
        if good:
            self.renewed_at = asked_at
        return good

    async def refresh(self) -> None:
        """Read the job anew. Raises: Unavailable."""
        found = await load_row(self._pool, "jobs", self.lease.job_id)
        if found is not None:
            self.state = msgspec.json.decode(found[0], type=JobState)

    async def insist(self, ask: Callable[[], Awaitable[Answer]]) -> Answer:
        """Return the answer of `ask`, asking again while Postgres is away or others are quicker too often."""
        wait_seconds, conflicts = FIRST_WAIT_SECONDS, 0
        while True:
            try:
                return await ask()
            except Unavailable as error:
                log.warning("%s waits: %s", self.name, error)
            except Conflict as error:
                conflicts += 1
                if isinstance(error, StaleEpoch) or conflicts == MAX_CONFLICTS:
                    raise
                log.warning("%s tries again: %s", self.name, error)
            await anyio.sleep(wait_seconds)
            wait_seconds = min(2 * wait_seconds, LONGEST_WAIT_SECONDS)

    async def _take(self, ask: Callable[[], Awaitable[Outcome[JobState]]]) -> JobState:
        outcome = await self.insist(ask)
        self.state = outcome.state
        return outcome.state

    def _request(self, name: str) -> Request:
        return Request(actor=self._actor, command_id=f"{self.lease.job_id}:{self.lease.epoch}:{name}")

    def _release(self, not_before_seconds: float) -> LeaseChange:
        return LeaseChange(
            action="release",
            job_id=self.lease.job_id,
            kind=self.lease.kind,
            epoch=self.lease.epoch,
            owner=self.lease.owner,
            not_before_seconds=not_before_seconds,
        )
