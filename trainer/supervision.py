"""One claimed job from its claim to its end: the child, the lease, the watchdog, and what the end means.

The supervisor's side only: no torch, no training, no claiming. The outcome is what the child reported, never its exit
status; a lost lease ends everything here at once and quietly, because then somebody else decides.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import anyio
import anyio.to_thread
import msgspec

from rose import leases
from rose.blobs import BlobMismatch, Blobs, no_space_as_error
from rose.bus import Wake
from rose.domain.files import AddFile
from rose.domain.job_commands import ChangePhase, Fail, FinishValidation, ReleaseRun, Succeed
from rose.domain.job_values import JobError, ReleaseReason, ServedAsTrained, Warning
from rose.errors import InvalidState, NoSpace, StaleEpoch, Unavailable
from rose.ids import new_id
from rose.inference.request import Target
from rose.log.pool import Pool
from rose.settings import Settings
from trainer import child_process
from trainer.child_process import BrokenReport, Child, Launch
from trainer.integrations.wandb_mirror import mirrored
from trainer.journal import Journal, clean
from trainer.ownership import OwnedJob
from trainer.protocol import (
    Alive,
    Drain,
    Drained,
    Failed,
    Finished,
    PhaseChanged,
    Report,
    RunSpec,
    StepDone,
    ValidationPassed,
    ValidationSpec,
)
from trainer.proving import not_proven, prove
from trainer.results import write_result_file
from trainer.spare import Spare
from trainer.specifications import TRAINING_MODULE, VALIDATION_MODULE, training_spec, validation_spec
from trainer.watchdog import Stall, Watchdog

log = logging.getLogger(__name__)

BACKOFF_SECONDS = (1.0, 5.0, 15.0)
"""Before the next attempt, after the first, second and any later one in a row that ended without progress."""
SPACE_SECONDS = 30.0
"""Before a validation for which the disk was full, as when a base is downloaded, is tried again."""
STACK_SECONDS = 2.0
"""Time for a hung child to print its stacks before it is killed."""
FAREWELL_SECONDS = 8.0
"""Time for the last appends of a stopping trainer, after the drain; `rose up` gives it ten seconds."""
EXIT_SECONDS = 10.0
"""Time for a child to exit once it has closed its reports; nothing it still does counts."""
LONGEST_TICK_SECONDS = 1.0
LONGEST_RENEWAL_SECONDS = 10.0
SECONDS_PER_BYTE = 1 / 100_000
"""Validation reports no steps: a large file gets this much more time than a phase."""
RESULT_FILENAME = "step_metrics.csv"

Outcome = Finished | Drained | Failed | ValidationPassed


class Supervision:
    """Runs one owned job. `look` is set by whoever heard that the job changed; `stop` drains.

    `spare` has a child that waits for a training run. A run that has to be given back is given back; on cancellation
    the child is killed and the lease left to expire.
    """

    def __init__(
        self,
        owned: OwnedJob,
        *,
        settings: Settings,
        pool: Pool,
        blobs: Blobs,
        launch: Launch,
        stop: anyio.Event,
        look: Wake,
        spare: Spare | None = None,
    ) -> None:
        self._owned = owned
        self._settings = settings
        self._pool = pool
        self._blobs = blobs
        self._launch = launch
        self._stop = stop
        self._look = look
        self._spare = spare
        self._journal = Journal(owned, blobs)
        self._leave = anyio.Event()
        self._child: Child | None = None
        self._stall: Stall | None = None
        self._abandoned = False
        self._outcome: Outcome | None = None
        self._how_it_ended = ""
        self.log_path = settings.logs / "runs" / f"{owned.name}.log"

    async def run(self) -> None:
        """Bring the job to the end of this run, and the log with it."""
        async with mirrored(
            self._owned,
            self._settings,
            self._pool,
            self._blobs,
            launch=self._launch,
            report=self._journal.put,
            stop=self._stop,
        ):
            await self._run()

    async def _run(self) -> None:
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._keep_lease)
                tasks.start_soon(self._journal.write)
                tasks.start_soon(self._leave_on_stop)
                await self._run_child()
                await self._journal.flush()
                await self._conclude()
                tasks.cancel_scope.cancel()
        except* StaleEpoch as stale:
            log.info("%s is not ours any more: %s", self._owned.name, stale.exceptions[0])
        await self._tidy_up()

    async def _tidy_up(self) -> None:
        """Delete the recovery points of a job that has ended. A failure only costs disk space."""
        try:
            await self._owned.refresh()
            if self._owned.state.is_terminal:
                for point in self._owned.state.recovery_points:
                    await anyio.to_thread.run_sync(self._blobs.delete, point.artifact.path)
        except (Unavailable, OSError) as error:
            log.warning("The recovery points of %s were not deleted: %s", self._owned.name, error)

    # --- the child --------------------------------------------------------------------------------------------------

    async def _run_child(self) -> None:
        try:
            spec = await anyio.to_thread.run_sync(self._prepare)
        except NoSpace as error:
            self._outcome = Failed(code="no_space", message=str(error))
            return
        async with self._started(spec) as child:
            self._child = child
            watchdog = self._watchdog()
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._watch, child, watchdog)
                tasks.start_soon(self._drain, child)
                await self._read_reports(child, watchdog)
                tasks.cancel_scope.cancel()
            self._how_it_ended = await self._ending(child)
        self._child = None
        log.info("%s: the child is gone (%s)", self._owned.name, self._how_it_ended)

    def _prepare(self) -> RunSpec | ValidationSpec:
        """Write the specification and return it."""
        owned, settings, blobs = self._owned, self._settings, self._blobs
        if owned.lease.kind == "training":
            spec = training_spec(owned.state, owned.lease.epoch, settings, blobs)
        else:
            spec = validation_spec(owned.state, settings, blobs)
        path = self._spec_path
        with no_space_as_error(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(msgspec.json.format(msgspec.json.encode(spec)))
        return spec

    @property
    def _spec_path(self) -> Path:
        return self.log_path.with_suffix(".json")

    @asynccontextmanager
    async def _started(self, spec: RunSpec | ValidationSpec) -> AsyncGenerator[Child, None]:
        """Give the specification to the child that waits, else to a new one; dead at the end of the block."""
        name, path = self._owned.name, self._spec_path
        async with AsyncExitStack() as stack:
            child = None
            if self._spare is not None and isinstance(spec, RunSpec):
                stack.callback(self._spare.replace)
                child = await stack.enter_async_context(
                    self._spare.begin(path, threads=spec.threads, log_path=self.log_path)
                )
            kind = "waiting child" if child else "child"
            if child is None:
                module = TRAINING_MODULE if isinstance(spec, RunSpec) else VALIDATION_MODULE
                command = (sys.executable, "-m", module, str(path))
                child = await stack.enter_async_context(
                    child_process.start(command, self.log_path, launch=self._launch)
                )
            log.info("%s: %s %d, log %s", name, kind, child.pid, self.log_path)
            yield child

    async def _read_reports(self, child: Child, watchdog: Watchdog) -> None:
        try:
            async for report in child.reports():
                await self._take(report, watchdog)
        except BrokenReport as error:
            self._outcome = Failed(code="broken_report", message=str(error), retryable=True)

    async def _take(self, report: Report, watchdog: Watchdog) -> None:
        match report:
            case Finished() | Drained() | Failed() | ValidationPassed():
                self._outcome = report
                watchdog.alive()
            case _:
                match report:
                    case PhaseChanged(phase=phase):
                        watchdog.entered(phase)
                    case StepDone():
                        watchdog.stepped()
                        if self._spare is not None:
                            self._spare.replace()
                    case _:
                        watchdog.alive()
                await self._journal.put(report)

    async def _ending(self, child: Child) -> str:
        with anyio.move_on_after(EXIT_SECONDS):
            return f"{await child.wait()}; last log line: {child.log.last_line or '(none)'}"
        child.kill()
        return f"it did not exit within {EXIT_SECONDS:g} s; last log line: {child.log.last_line or '(none)'}"

    # --- watching ---------------------------------------------------------------------------------------------------

    def _watchdog(self) -> Watchdog:
        settings, state = self._settings, self._owned.state
        phase_seconds = settings.phase_seconds
        if self._owned.lease.kind == "validation":
            files = (state.training_file, state.validation_file)
            phase_seconds += SECONDS_PER_BYTE * sum(file.artifact.bytes for file in files if file)
        return Watchdog(
            stall_seconds=settings.stall_seconds,
            phase_seconds=phase_seconds,
            tick_seconds=self._tick_seconds,
            clock=time.monotonic,
        )

    @property
    def _tick_seconds(self) -> float:
        settings = self._settings
        return min(LONGEST_TICK_SECONDS, settings.stall_seconds / 4, settings.abandon_seconds / 4)

    async def _watch(self, child: Child, watchdog: Watchdog) -> None:
        """Kill the child when it hangs, or when nobody may vouch for it any more."""
        while True:
            await anyio.sleep(self._tick_seconds)
            if time.monotonic() - self._owned.renewed_at > self._settings.abandon_seconds:
                log.warning("%s: no renewal for %g s", self._owned.name, self._settings.abandon_seconds)
                self._abandoned = True
                return child.kill()
            if self._journal.full:
                watchdog.alive()
            stall = watchdog.check()
            if stall is not None:
                log.warning("%s hangs: %s", self._owned.name, stall)
                self._stall = stall
                child.dump_stack()
                await anyio.sleep(min(STACK_SECONDS, self._settings.stall_seconds))
                return child.kill()

    async def _keep_lease(self) -> None:
        """Renew the lease and look at the job, on time and whenever somebody heard of a change.

        Raises: StaleEpoch when the lease is lost.
        """
        while True:
            await self._look.wait(self._settings.renew_seconds)
            try:
                with anyio.fail_after(min(LONGEST_RENEWAL_SECONDS, self._settings.abandon_seconds / 2)):
                    if not await self._owned.renew():
                        raise StaleEpoch(f"The lease of {self._owned.name} is lost.")
                    if self._child is not None:
                        await self._child.order(Alive())
                    await self._owned.refresh()
            except (Unavailable, TimeoutError) as error:
                log.warning("%s could not be renewed: %s", self._owned.name, str(error) or "no answer in time")
                continue
            self._obey()

    def _obey(self) -> None:
        match self._owned.wanted:
            case "stop":
                raise StaleEpoch(f"{self._owned.name} is {self._owned.state.status}.")
            case "drain":
                self._leave.set()
            case "run":
                pass

    # --- leaving ----------------------------------------------------------------------------------------------------

    async def _leave_on_stop(self) -> None:
        """Drain when the trainer stops; without Postgres nothing can be given back, and that is not waited for long."""
        await self._stop.wait()
        self._leave.set()
        await anyio.sleep(self._settings.drain_seconds + FAREWELL_SECONDS)
        raise StaleEpoch(f"{self._owned.name} could not be given back in time; its lease will expire.")

    async def _drain(self, child: Child) -> None:
        """Once the run has to leave: let it make its recovery point within the bound, else kill it."""
        await self._leave.wait()
        if self._owned.lease.kind == "training":
            await child.order(Drain())
            await anyio.sleep(self._settings.drain_seconds)
            log.warning("%s did not drain within %g s", self._owned.name, self._settings.drain_seconds)
        child.kill()

    # --- the end ----------------------------------------------------------------------------------------------------

    async def _conclude(self) -> None:
        """Append what the end of the child means. Raises: StaleEpoch."""
        try:
            match self._outcome:
                case Finished() as finished:
                    await self._succeed(finished)
                case ValidationPassed() as passed:
                    await self._finish_validation(passed)
                case Failed() as failed:
                    await self._fail(failed)
                case Drained():
                    await self._release(self._leave_reason, "")
                case None:
                    await self._give_back()
        except InvalidState as error:  # paused while the child finished: it finishes again once resumed
            await self._release(self._leave_reason, str(error))
        except NoSpace as error:
            await self._release("no_space", str(error))
        except BlobMismatch as error:
            await self._release("crashed", str(error))

    async def _succeed(self, finished: Finished) -> None:
        if finished.artifact.path.split("/")[:3] != ["jobs", self._owned.lease.job_id, f"e{self._owned.lease.epoch}"]:
            raise BlobMismatch(f"The model {finished.artifact.path} is not from this run.")
        await anyio.to_thread.run_sync(self._blobs.verify, finished.artifact)
        found = await self._compare(finished)
        if found is None:
            await self._release(self._leave_reason, "before the served model was compared with the trained one")
        elif found.status == "differs":
            await self._fail_as_served(found)
        else:
            await self._register(finished, found)

    async def _register(self, finished: Finished, found: ServedAsTrained) -> None:
        job_id, file_id, now = self._owned.lease.job_id, new_id("file_"), int(time.time())
        artifact = await self._owned.insist(
            lambda: write_result_file(self._pool, self._blobs, job_id, file_id, self._settings.result_file_encoding)
        )
        command = Succeed(
            epoch=self._owned.lease.epoch,
            at=now,
            artifact=finished.artifact,
            kind=finished.kind,
            step=finished.step,
            trained_tokens=finished.trained_tokens,
            result_file=file_id,
            stopped_early=finished.stopped_early,
            served_as_trained=found,
        )
        file = AddFile(
            project=self._owned.state.project,
            file_id=file_id,
            at=now,
            filename=RESULT_FILENAME,
            purpose="fine-tune-results",
            artifact=artifact,
            job_id=job_id,
        )
        await self._owned.succeed(command, file)

    async def _compare(self, finished: Finished) -> ServedAsTrained | None:
        """Return whether the published model is served as it was trained; None when the run has to leave before.

        Raises: StaleEpoch.
        """
        state, epoch = self._owned.state, self._owned.lease.epoch
        assert state.base is not None
        if not await self._owned.insist(lambda: leases.workers(self._pool, "inference")):
            return not_proven("no inference engine is connected")
        await self._owned.append(ChangePhase(epoch=epoch, phase="prove"), "prove")
        target = Target(
            model=state.model_name,
            base=state.base,
            adapter=finished.artifact,
            kind="full" if finished.kind == "full" else "adapter",
            project=state.project,
        )
        found: ServedAsTrained | None = None
        async with anyio.create_task_group() as tasks:

            async def leave() -> None:
                await self._leave.wait()
                tasks.cancel_scope.cancel()

            tasks.start_soon(leave)
            settings = self._settings
            found = await prove(
                finished.scored, target, self._pool, token=settings.inference_token, seconds=settings.proof_seconds
            )
            tasks.cancel_scope.cancel()
        if found is not None:
            log.info("%s, served as trained: %s", self._owned.name, found)
        return found

    async def _fail_as_served(self, found: ServedAsTrained) -> None:
        """End the job for good: what was trained is not what would answer. Raises: StaleEpoch."""
        error = JobError(
            code="served_differs",
            message=clean(f"The published model does not answer as it was trained: {found.reason}."),
            log=str(self.log_path),
        )
        command = Fail(epoch=self._owned.lease.epoch, at=int(time.time()), error=error, served_as_trained=found)
        await self._owned.append(command, "end")

    async def _finish_validation(self, passed: ValidationPassed) -> None:
        command = FinishValidation(
            epoch=self._owned.lease.epoch,
            at=int(time.time()),
            base=passed.base,
            hyperparameters=passed.hyperparameters,
            tokens=passed.tokens,
            validation_tokens=passed.validation_tokens,
            needs=passed.needs,
            warnings=tuple(Warning(code=clean(one.code), message=clean(one.message)) for one in passed.warnings),
        )
        await self._owned.append(command, "end", free_in_seconds=0.0)

    async def _fail(self, failed: Failed) -> None:
        message = clean(failed.message)
        if failed.code == NoSpace.default_code:
            await self._release("no_space", message)
        elif failed.retryable:
            await self._release("crashed", f"{failed.code}: {message}")
        else:
            error = JobError(
                code=clean(failed.code),
                message=message,
                param=failed.param,
                log=str(self.log_path) if self._owned.lease.kind == "training" else None,
                problems=tuple(map(clean, failed.problems[:50])),
            )
            await self._owned.append(Fail(epoch=self._owned.lease.epoch, at=int(time.time()), error=error), "end")

    async def _give_back(self) -> None:
        if self._stall is not None:
            await self._release(
                "stalled", f"{self._stall}; unless it was stopped, its log has the stacks of its threads"
            )
        elif self._abandoned:
            await self._release("drained", f"Postgres did not renew the lease for {self._settings.abandon_seconds:g} s")
        elif self._leave.is_set():
            await self._release(self._leave_reason, f"without a new recovery point: {self._how_it_ended}")
        else:
            await self._release("crashed", self._how_it_ended)

    @property
    def _leave_reason(self) -> ReleaseReason:
        return "paused" if self._owned.wanted == "drain" else "drained"

    async def _release(self, reason: ReleaseReason, detail: str) -> None:
        """Give the job back so that it is taken up again; after a failed attempt not at once."""
        free_in = 0.0
        if reason == "no_space" and self._owned.lease.kind == "validation":
            free_in = SPACE_SECONDS
        elif reason in ("crashed", "stalled", "no_space"):
            free_in = BACKOFF_SECONDS[min(max(self._owned.state.attempts, 1), len(BACKOFF_SECONDS)) - 1]
        command = ReleaseRun(
            epoch=self._owned.lease.epoch,
            at=int(time.time()),
            reason=reason,
            detail=clean(detail),
            log=str(self.log_path),
            max_attempts=self._settings.max_attempts,
        )
        await self._owned.append(command, "end", free_in_seconds=free_in)
