"""The trainer's supervisor: claims jobs and sees each through, a validation slot beside a training slot. Never torch.

Work is found by asking the database, oldest first, each `poll_seconds` and whenever NATS says that something changed;
a claim is an append like any other, so two workers can never own a job at once.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Awaitable, Callable

import anyio
import anyio.to_thread
import msgspec

from projections import jobs as jobs_view
from rose import leases
from rose.blobs import Blobs
from rose.bus import Bus, Wake
from rose.commands import Commands, Request
from rose.domain.job_commands import ResumeJob, StartRun, StartValidation
from rose.domain.jobs import JobState
from rose.errors import Conflict, InvalidState, Unavailable
from rose.ids import new_id
from rose.leases import Candidate, Kind, Lease
from rose.log.append import Actor, LeaseChange
from rose.log.pool import Pool
from rose.settings import Settings
from rose.subjects import JOB_CHANGES, JOB_CREATED, JOB_QUEUED
from trainer import capabilities
from trainer.capabilities import Capabilities
from trainer.child_process import Launch
from trainer.ownership import OwnedJob
from trainer.spare import Spare
from trainer.supervision import Supervision

log = logging.getLogger(__name__)

ANNOUNCE_SECONDS = 3.0
"""Well within the 15 s after which a silent worker counts as gone."""
SPACE_CHECK_SECONDS = 2.0
SPACE_RETRY_SECONDS = 10.0
"""After a full disk paused a job again, the least time until it is resumed once more; doubled each time."""
LONGEST_SPACE_RETRY_SECONDS = 600.0
WITHDRAW_SECONDS = 2.0


async def run(
    settings: Settings,
    pool: Pool,
    bus: Bus,
    blobs: Blobs,
    stop: anyio.Event,
    *,
    launch: Launch,
    worker_id: str | None = None,
) -> None:
    """Run one trainer until `stop` is set; returns once the running job has drained and was given back.

    `pool` needs at least 4 connections (two slots, each with renewals and appends). `bus` is entered by the caller and
    may be without a server. `launch` is `rose.local.launcher.command`: children die with this process. Call it in the
    process's main thread, which is what the children are tied to. Cancelling it kills the children at once and leaves
    their leases to expire; after `stop` that is the second Ctrl-C.
    """
    found = await anyio.to_thread.run_sync(capabilities.detect, settings.device)
    worker = _Worker(settings, pool, bus, blobs, stop, launch, found, worker_id or new_id("trainer_"))
    await worker.run()


class _Slot:
    """Room for one job of a kind at a time."""

    def __init__(self, kind: Kind, wake: Wake) -> None:
        self.kind: Kind = kind
        self.wake = wake
        self.job_id: str | None = None
        self.look = Wake()
        """Set when somebody heard that the slot's job changed."""


class _Worker:
    def __init__(
        self,
        settings: Settings,
        pool: Pool,
        bus: Bus,
        blobs: Blobs,
        stop: anyio.Event,
        launch: Launch,
        found: Capabilities,
        worker_id: str,
    ) -> None:
        self._settings = settings
        self._pool = pool
        self._bus = bus
        self._blobs = blobs
        self._stop = stop
        self._launch = launch
        self._capabilities = found
        self._id = worker_id
        self._host = socket.gethostname()
        self._actor = Actor(kind="trainer", name=worker_id)
        self._commands = Commands(pool)
        self._validation = _Slot("validation", bus.wake_on(JOB_CREATED))
        self._training = _Slot("training", bus.wake_on(JOB_QUEUED))
        self._spare = Spare(launch, settings.torch_threads) if settings.warm_child else None
        self._announce_now = Wake()
        self._space_retries: dict[str, tuple[float, float]] = {}
        """Job paused by a full disk -> (earliest next resumption, wait after that one)."""
        for subject in JOB_CHANGES:
            bus.subscribe(subject, self._heard_of_change)

    async def run(self) -> None:
        log.info("Trainer %s on %s: %s", self._id, self._host, self._capabilities)
        async with anyio.create_task_group() as background:
            background.start_soon(self._repeat, self._announce, self._announce_now, ANNOUNCE_SECONDS)
            background.start_soon(self._repeat, self._resume_when_there_is_space, Wake(), SPACE_CHECK_SECONDS)
            if self._spare is not None:
                background.start_soon(self._spare.run)
            async with anyio.create_task_group() as slots:
                slots.start_soon(self._run_slot, self._validation)
                slots.start_soon(self._run_slot, self._training)
                await self._stop.wait()
                log.info("Trainer %s stops.", self._id)
                self._validation.wake.set()
                self._training.wake.set()
            background.cancel_scope.cancel()
        with anyio.move_on_after(WITHDRAW_SECONDS):
            try:
                await leases.withdraw(self._pool, self._id)
            except Unavailable as error:
                log.warning("The trainer could not take its leave: %s", error)

    # --- slots ------------------------------------------------------------------------------------------------------

    async def _run_slot(self, slot: _Slot) -> None:
        while not self._stop.is_set():
            try:
                owned = await self._claim(slot.kind)
                if owned is not None:
                    await self._see_through(slot, owned)
                    continue
            except Unavailable as error:
                log.warning("The %s slot waits: %s", slot.kind, error)
            except Exception:  # a defect must not end the trainer: this run's lease expires and it is tried again
                log.exception("The %s slot lost its run by an error", slot.kind)
            await slot.wake.wait(self._settings.poll_seconds)

    async def _see_through(self, slot: _Slot, owned: OwnedJob) -> None:
        slot.job_id = owned.lease.job_id
        self._announce_now.set()
        try:
            await Supervision(
                owned,
                settings=self._settings,
                pool=self._pool,
                blobs=self._blobs,
                launch=self._launch,
                stop=self._stop,
                look=slot.look,
                spare=self._spare if slot.kind == "training" else None,
            ).run()
        finally:
            slot.job_id = None
            self._announce_now.set()
        if slot.kind == "validation":
            self._training.wake.set()

    def _heard_of_change(self, subject: str, _body: bytes) -> None:
        for slot in (self._validation, self._training):
            if slot.job_id is not None and slot.job_id in subject.split("."):
                slot.look.set()

    # --- claiming ---------------------------------------------------------------------------------------------------

    async def _claim(self, kind: Kind) -> OwnedJob | None:
        """Own the oldest job that this worker can run, or None. Raises: Unavailable."""
        async for candidate in leases.each_candidate(self._pool, kind):
            try:
                state = msgspec.json.decode(candidate.doc, type=JobState)
            except msgspec.ValidationError as error:
                log.error("The row of %s is damaged (%s): rose projections rebuild jobs", candidate.job_id, error)
                continue
            lacking = capabilities.unsuitable(state, self._capabilities) or await self._leaves_base_to_others(state)
            if lacking:
                log.debug("%s is left to others: %s", state.id, lacking)
                continue
            owned = await self._try_claim(kind, candidate, state)
            if owned is not None:
                return owned
        return None

    async def _leaves_base_to_others(self, state: JobState) -> str | None:
        """Say that the base's folder is not here; None when it is, or when there is nobody else who might have it.

        Then the job is claimed all the same, and fails with that reason and what to do.
        """
        folder = await anyio.to_thread.run_sync(capabilities.missing_base, state)
        if folder is None or len(await leases.workers(self._pool, "trainer")) <= 1:
            return None
        return f"its base model's folder {folder} does not exist here"

    async def _try_claim(self, kind: Kind, candidate: Candidate, state: JobState) -> OwnedJob | None:
        epoch = state.epoch + 1
        lease = Lease(job_id=state.id, kind=kind, epoch=epoch, owner=self._id)
        change = LeaseChange(
            action="claim",
            job_id=state.id,
            kind=kind,
            epoch=epoch,
            owner=self._id,
            lease_seconds=self._settings.lease_seconds,
        )
        request = Request(actor=self._actor, command_id=f"{state.id}:{epoch}:claim:{self._id}")
        asked_at = time.monotonic()
        try:
            outcome = await self._commands.job(state.id, self._start(kind, epoch), request, lease=change)
        except (Conflict, InvalidState) as error:
            log.debug("%s could not be claimed: %s", state.id, error)
            return None
        if outcome.state.is_terminal:
            log.info("%s failed: its attempts are used up", state.id)
            return None
        log.info("%s claimed for %s, epoch %d%s", state.id, kind, epoch, ", taken over" if candidate.expired else "")
        return OwnedJob(
            self._pool,
            lease,
            outcome.state,
            actor=self._actor,
            lease_seconds=self._settings.lease_seconds,
            renewed_at=asked_at,
        )

    def _start(self, kind: Kind, epoch: int) -> StartRun | StartValidation:
        now, attempts = int(time.time()), self._settings.max_attempts
        if kind == "validation":
            return StartValidation(owner=self._id, epoch=epoch, at=now, max_attempts=attempts)
        return StartRun(
            owner=self._id,
            host=self._host,
            epoch=epoch,
            at=now,
            max_attempts=attempts,
            device=self._capabilities.device,
        )

    # --- in the background ------------------------------------------------------------------------------------------

    async def _repeat(self, act: Callable[[], Awaitable[None]], wake: Wake, seconds: float) -> None:
        while True:
            try:
                await act()
            except Unavailable as error:
                log.debug("Put off: %s", error)
            except Exception:  # a defect here must not end the trainer and with it the run
                log.exception("Something that a trainer does beside its runs went wrong")
            await wake.wait(seconds)

    async def _announce(self) -> None:
        facts = {
            **msgspec.to_builtins(self._capabilities),
            "validating": self._validation.job_id is not None,
            "training": self._training.job_id,
            "waiting_child_bytes": self._spare.memory_bytes if self._spare is not None else None,
        }
        worker = leases.Worker(
            id=self._id, kind="trainer", host=self._host, url=None, capabilities=facts, pid=os.getpid()
        )
        await leases.announce(self._pool, worker)

    async def _resume_when_there_is_space(self) -> None:
        """Queue jobs again that a full disk paused, once it has room for what they save; less and less often."""
        free = await anyio.to_thread.run_sync(self._blobs.free_bytes)
        paused = await jobs_view.paused(self._pool, "no_space")
        self._space_retries = {
            job_id: retry for job_id, retry in self._space_retries.items() if time.monotonic() < sum(retry)
        }
        for state in paused:
            saved_bytes = max((point.artifact.bytes for point in state.recovery_points), default=0)
            earliest, wait_seconds = self._space_retries.get(state.id, (0.0, SPACE_RETRY_SECONDS))
            if free <= self._settings.min_free_bytes + saved_bytes or time.monotonic() < earliest:
                continue
            longer = min(2 * wait_seconds, LONGEST_SPACE_RETRY_SECONDS)
            self._space_retries[state.id] = (time.monotonic() + wait_seconds, longer)
            log.info("%s goes on: the disk has room again", state.id)
            try:
                await self._commands.job(state.id, ResumeJob(at=int(time.time())), Request(actor=self._actor))
            except (Conflict, InvalidState) as error:
                log.debug("%s was not resumed: %s", state.id, error)
