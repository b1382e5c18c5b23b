"""The supervisor's side of logging a run to Weights & Biases: what the log accepted goes to a process of its own.

Training never waits for it: it reads the job's events as anybody could, at the pace at which they are taken, and its
failure is a warning. After the run it has a bounded time to finish. The package is not imported here.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import msgspec

from rose.blobs import Blobs, no_space_as_error
from rose.bus import Wake
from rose.domain.job_events import RunResumed, RunStarted, StepsReported
from rose.domain.jobs import JobState
from rose.errors import RoseError
from rose.integrations import WANDB
from rose.log.pool import Pool
from rose.log.read import Recorded, read_stream
from rose.settings import Settings
from trainer import child_process
from trainer.child_process import BrokenReport, Child, Launch
from trainer.integrations.wandb_protocol import OFFLINE_WARNING, WARNING, End, Message, Steps, WandbSpec
from trainer.ownership import OwnedJob
from trainer.protocol import Warned

log = logging.getLogger(__name__)

MODULE = "trainer.integrations.wandb_process"
PACE_SECONDS = 1.0
"""Between looks at the log, to which a run is appended about as often."""
PAGE_EVENTS = 50
DRAIN_SECONDS = 15.0
"""After the run, to upload and finish, or to find that nobody answers and write to disk; what is late is not logged."""
STOP_SECONDS = 3.0
"""The same while the trainer itself is about to end."""
MAX_STARTS = 3
"""Each begins behind what the former ones wrote. Once the service has refused they write to disk only."""
RESTART_SECONDS = 1.0

Report = Callable[[Warned], Awaitable[None]]


@asynccontextmanager
async def mirrored(
    owned: OwnedJob, settings: Settings, pool: Pool, blobs: Blobs, *, launch: Launch, report: Report, stop: anyio.Event
) -> AsyncGenerator[None]:
    """Log a training run, for the length of the block, to whatever integrations its job names.

    `report` takes warnings for the job. The block's end is the run's: `owned.state` then says what became of it.
    """
    wanted = owned.state.integrations or () if owned.lease.kind == "training" else ()
    mirrors = [
        Mirror(owned, pool, wandb_spec(owned.state, number, blobs), settings.logs, launch=launch, report=report)
        for number, one in enumerate(wanted)
        if one["type"] == WANDB
    ]
    if not mirrors:
        yield
        return
    async with anyio.create_task_group() as tasks:
        for mirror in mirrors:
            tasks.start_soon(mirror.run)
        yield
        for mirror in mirrors:
            mirror.end()
        tasks.cancel_scope.deadline = anyio.current_time() + (STOP_SECONDS if stop.is_set() else DRAIN_SECONDS)


def wandb_spec(state: JobState, number: int, blobs: Blobs) -> WandbSpec:
    """Return what is logged for the job's integration of that number. Nothing of the data is in it."""
    wanted: dict[str, Any] = (state.integrations or ())[number][WANDB]
    hyperparameters = msgspec.to_builtins(state.hyperparameters)
    del hyperparameters["reasons"]
    facts = {
        "job_id": state.id,
        "model": state.model,
        "base_model": state.base.source if state.base else None,
        "method": state.method,
        "training_file": state.training_file.id if state.training_file else None,
        "validation_file": state.validation_file.id if state.validation_file else None,
    }
    return WandbSpec(
        run_id=state.id if number == 0 else f"{state.id}-{number + 1}",
        folder=str(blobs.path(f"jobs/{state.id}")),
        project=wanted["project"],
        name=wanted["name"] or state.id,
        entity=wanted["entity"],
        tags=tuple(wanted["tags"]),
        config={**facts, **hyperparameters},
        offline=os.environ.get("WANDB_MODE") == "offline",
    )


class Mirror:
    """One job's run at Weights & Biases, for one attempt. `run` never raises what could end the attempt."""

    def __init__(
        self, owned: OwnedJob, pool: Pool, spec: WandbSpec, logs: Path, *, launch: Launch, report: Report
    ) -> None:
        self._owned = owned
        self._pool = pool
        self._spec = spec
        self._first_run_id = spec.run_id
        self._launch = launch
        self._report = report
        self._log_path = logs / "runs" / f"{spec.run_id}-e{owned.lease.epoch}.wandb.log"
        self._wake = Wake()
        self._ended = False
        self._lost = False
        """The job is another trainer's, or cannot be followed."""
        self._refused = False
        """The service cannot be used from here."""
        self._anew = False
        """The run that was followed has ended before the attempt: training began anew, and so does a run."""
        self._position = 0
        """Where the run begins in the log."""
        self._said = {warning.code for warning in owned.state.warnings}

    def end(self) -> None:
        """Say that the attempt is over: what the log has by now is the last that is logged."""
        self._ended = True
        self._wake.set()

    async def run(self) -> None:
        """Log until the attempt is over and everything is written; a process that fails is started again."""
        starts = 0
        while starts < MAX_STARTS:
            if self._spec.offline:
                await self._warn(OFFLINE_WARNING, f"Weights & Biases is offline. {self._spec.where}")
            problem = await self._log()
            if self._lost or (problem is None and not self._anew):
                return
            if problem is not None:
                starts += 1
                log.warning("%s: Weights & Biases: %s", self._owned.name, problem)
                await self._warn(WARNING, f"Weights & Biases could not be used: {problem}")
                self._spec = msgspec.structs.replace(self._spec, offline=self._spec.offline or self._refused)
                await anyio.sleep(RESTART_SECONDS)

    async def _log(self) -> str | None:
        """Run a process that logs; return why it did not come to its end, or None."""
        self._anew = False
        try:
            await self._find_beginning()
            run_id = self._spec.run_id
            command = await anyio.to_thread.run_sync(self._prepare, self._spec)
            async with child_process.start(command, self._log_path, launch=self._launch) as child:
                problem = await self._follow(child)
                ending = await child.wait()
            if ending.status == 0:
                if self._anew:
                    await anyio.to_thread.run_sync(self._mark_left_behind, run_id)
                return None
        except (RoseError, OSError) as error:
            return str(error)
        return problem or f"its process ended ({ending}; last log line: {child.log.last_line or 'none'})."

    def _prepare(self, spec: WandbSpec) -> tuple[str, ...]:
        path = self._log_path.with_suffix(".json")
        with no_space_as_error(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(msgspec.json.format(msgspec.json.encode(spec)))
        return (sys.executable, "-m", MODULE, str(path))

    async def _follow(self, child: Child) -> str | None:
        """Feed the process until it closes its reports; return what it said went wrong, or None."""
        problem = None
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._feed, child)
            try:
                async for report in child.reports():
                    if isinstance(report, Warned) and report.code == WARNING:
                        problem, self._refused = report.message, True
                    elif isinstance(report, Warned):
                        await self._warn(report.code, report.message)
            except BrokenReport as error:
                problem = str(error)
            tasks.cancel_scope.cancel()
        return problem

    async def _feed(self, child: Child) -> None:
        try:
            async for message in self._messages():
                await child.feed(message)
        except (anyio.BrokenResourceError, anyio.ClosedResourceError):
            return  # it is gone; the end of its reports says so, too
        except RoseError as error:  # an event of a newer ROSE, for one
            log.warning("%s cannot be followed: %s", self._owned.name, error)
            self._lost = True
        if self._lost:
            child.kill()

    async def _messages(self) -> AsyncIterator[Message]:
        """Yield the run's steps from the first, as the log has them, then the end; less once the job is another's."""
        position = self._position
        while True:
            ended = self._ended
            page = await self._page(position)
            for found in page:
                position = found.position
                if isinstance(found.event, RunStarted) and found.event.epoch > self._owned.lease.epoch:
                    self._lost = True
                    return
                if self._begins_anew(found):
                    self._anew = True
                    yield End(summary={"state": "begun_anew"}, goes_on=False, succeeded=False)
                    return
                if isinstance(found.event, StepsReported):
                    yield Steps(steps=found.event.steps)
            if ended and not page:
                break
            if not page:
                await self._wake.wait(PACE_SECONDS)
        if self._owned.state.run is None:
            yield farewell(self._owned.state)
        else:
            self._lost = True

    async def _find_beginning(self) -> None:
        """Pass over runs that were logged to their end because training began anew. Raises: UnknownEvent."""
        position = self._position
        while page := await self._page(position):
            for found in page:
                position = found.position
                if self._is_anew(found) and not self._left_behind(self._spec.run_id).exists():
                    return  # an attempt was killed before it had logged all of it
                self._begins_anew(found)

    def _mark_left_behind(self, run_id: str) -> None:
        """Keep that the run has all its steps and its end, so that no later attempt touches it again."""
        path = self._left_behind(run_id)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    def _left_behind(self, run_id: str) -> Path:
        return Path(self._spec.folder) / "wandb" / f"{run_id}.left_behind"

    def _begins_anew(self, found: Recorded) -> bool:
        """Begin another run where the steps count from the first again."""
        match found.event:
            case RunResumed(anew=True, epoch=epoch):
                self._position = found.position
                self._spec = msgspec.structs.replace(self._spec, run_id=f"{self._first_run_id}-e{epoch}")
                return True
            case _:
                return False

    @staticmethod
    def _is_anew(found: Recorded) -> bool:
        return isinstance(found.event, RunResumed) and found.event.anew

    async def _page(self, position: int) -> list[Recorded]:
        stream = f"job/{self._owned.lease.job_id}"
        return await self._owned.insist(
            lambda: read_stream(self._pool, stream, after_position=position, limit=PAGE_EVENTS)
        )

    async def _warn(self, code: str, message: str) -> None:
        """Warn of something on the job, once; a job that has ended takes no warnings any more."""
        if code not in self._said and not self._ended:
            self._said.add(code)
            await self._report(Warned(code=code, message=message))


def farewell(state: JobState) -> End:
    """Return what the run's summary says of the job. Pure."""
    summary = {"state": state.status}
    if state.status == "succeeded":
        summary["fine_tuned_model"] = state.model_name
    if state.error is not None:
        summary["error_code"] = state.error.code
    return End(summary=summary, goes_on=not state.is_terminal, succeeded=state.status == "succeeded")
