r"""Fine-tuning jobs: state, decide, evolve; commands are in job_commands.py, events in job_events.py.

    validating_files -> queued -> running -> succeeded | failed | cancelled
                          ^  \      |
                          |   `-> paused <-'     (released runs go back to queued)

Terminal states never change. A run (validation or training) is owned by an epoch; everything it reports carries that
epoch and is refused once the run was released, lost or ended.
"""

from __future__ import annotations

from typing import assert_never

import msgspec

from rose.domain.artifacts import Artifact
from rose.domain.hyperparameter_requests import HyperparametersRequest
from rose.domain.hyperparameters import Hyperparameters
from rose.domain.job_commands import (
    CancelJob,
    ChangePhase,
    Command,
    CreateJob,
    Fail,
    FinishValidation,
    NoteResume,
    PauseJob,
    ReleaseRun,
    ReportSteps,
    ResumeJob,
    RunCommand,
    SaveCheckpoint,
    SaveRecoveryPoint,
    StartRun,
    StartValidation,
    Succeed,
    Warn,
)
from rose.domain.job_events import (
    CheckpointSaved,
    Event,
    FilesValidated,
    JobCancelled,
    JobCreated,
    JobFailed,
    JobPaused,
    JobQueued,
    JobSucceeded,
    JobWarned,
    LeaseExpired,
    PhaseEntered,
    RecoveryPointSaved,
    RunReleased,
    RunResumed,
    RunStarted,
    StepsReported,
    ValidationStarted,
)
from rose.domain.job_order import JobOrder, fields_of
from rose.domain.job_values import (
    BaseModel,
    BaseRequest,
    Checkpoint,
    JobError,
    PauseReason,
    PinnedFile,
    RecoveryPoint,
    ReleaseReason,
    RunKind,
    ServedAsTrained,
    Status,
    StepMetrics,
    Warning,
)
from rose.errors import InvalidState, StaleEpoch

TERMINAL: frozenset[Status] = frozenset({"succeeded", "failed", "cancelled"})
MAX_WARNINGS = 50
KEPT_RECOVERY_POINTS = 2
BLAMELESS: frozenset[ReleaseReason] = frozenset({"drained", "paused", "no_space"})
"""Why a run may end without being counted as an attempt."""


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """A validation or training in progress, owned by an epoch."""

    kind: RunKind
    epoch: int
    owner: str
    host: str = ""
    phase: str = ""
    started_at: int = 0
    first_step: int | None = None
    """Last step known when this run started to report; time left is estimated from there."""


class JobState(JobOrder, frozen=True, kw_only=True):
    """A job as its events make it; its JSON is the entity row's `doc`."""

    id: str = ""
    status: Status = "validating_files"
    created_at: int = 0
    finished_at: int | None = None
    base: BaseModel | None = None
    hyperparameters: Hyperparameters | None = None
    tokens: int = 0
    needs: dict[str, int | str] = msgspec.field(default_factory=dict[str, int | str])
    epoch: int = 0
    """Newest epoch claimed; the next claim takes one more."""
    attempts: int = 0
    """Consecutive attempts that reached no new recovery point."""
    run: Run | None = None
    last_step: int = 0
    last_metrics: StepMetrics | None = None
    recovery_points: tuple[RecoveryPoint, ...] = ()
    """The newest two, newest first."""
    checkpoints: tuple[Checkpoint, ...] = ()
    warnings: tuple[Warning, ...] = ()
    paused_because: PauseReason | None = None
    pause_detail: str = ""
    error: JobError | None = None
    artifact: Artifact | None = None
    artifact_kind: str | None = None
    result_file: str | None = None
    trained_tokens: int | None = None
    stopped_early: bool = False
    served_as_trained: ServedAsTrained | None = None
    """What the comparison at the end found; None of a job that has not come there."""

    @property
    def is_terminal(self) -> bool:
        """True when no command can change the job any more."""
        return self.status in TERMINAL


initial = JobState(
    project="",
    model="",
    base_request=BaseRequest(source=""),
    training_file=PinnedFile(id="", filename="", artifact=Artifact(path="", bytes=0, sha256="")),
    validation_file=None,
    suffix=None,
    seed=0,
    method="supervised",
    requested=HyperparametersRequest(),
    model_name="",
)
"""No job yet: its first event brings what it is."""


def decide(command: Command, state: JobState) -> tuple[Event, ...]:
    """Return the events that `command` causes in `state`; none when it is already so.

    Raises: InvalidState when the state does not allow it; StaleEpoch when a run speaks that no longer owns the job.
    """
    match command:
        case CreateJob():
            return _create(command)
        case StartValidation():
            return _start_validation(command, state)
        case StartRun():
            return _start_run(command, state)
        case CancelJob():
            _require(state, "cancel", ("validating_files", "queued", "running", "paused"))
            return (JobCancelled(at=command.at),)
        case PauseJob():
            _require(state, "pause", ("queued", "running"))
            return (JobPaused(at=command.at, reason="requested"),)
        case ResumeJob():
            _require(state, "resume", ("paused",))
            return (JobQueued(reason="resumed"),)
        case _:
            run = state.run
            if state.is_terminal or run is None or run.epoch != command.epoch:
                raise StaleEpoch(f"Epoch {command.epoch} of {state.id} does not own the job (status {state.status}).")
            return _decide_for_run(command, state, run)


def _decide_for_run(command: RunCommand, state: JobState, run: Run) -> tuple[Event, ...]:
    epoch = command.epoch
    match command:
        case FinishValidation():
            validated = FilesValidated(
                epoch=epoch,
                base=command.base,
                hyperparameters=command.hyperparameters,
                tokens=command.tokens,
                validation_tokens=command.validation_tokens,
                needs=command.needs,
                warnings=command.warnings[:MAX_WARNINGS],
            )
            return (validated, JobQueued(reason="validated"))
        case ChangePhase(phase=phase):
            return () if run.phase == phase else (PhaseEntered(epoch=epoch, phase=phase),)
        case NoteResume():
            return (RunResumed(epoch=epoch, from_step=command.from_step, rejected=command.rejected, anew=command.anew),)
        case ReportSteps(steps=steps):
            fresh = tuple(step for step in steps if step.step > state.last_step)
            return (StepsReported(epoch=epoch, steps=fresh),) if fresh else ()
        case SaveRecoveryPoint():
            return (
                RecoveryPointSaved(
                    epoch=epoch,
                    step=command.step,
                    artifact=command.artifact,
                    trained_tokens=command.trained_tokens,
                ),
            )
        case SaveCheckpoint():
            return _save_checkpoint(command, state)
        case Warn():
            if len(state.warnings) >= MAX_WARNINGS:
                return ()
            return (JobWarned(epoch=epoch, warning=Warning(code=command.code, message=command.message)),)
        case ReleaseRun():
            return _release(command, state, run)
        case Succeed():
            if state.status != "running":
                raise InvalidState(f"The job {state.id} is {state.status}; only a running job can succeed.")
            return (
                JobSucceeded(
                    epoch=epoch,
                    at=command.at,
                    model_name=state.model_name,
                    artifact=command.artifact,
                    kind=command.kind,
                    step=command.step,
                    trained_tokens=command.trained_tokens,
                    result_file=command.result_file,
                    stopped_early=command.stopped_early,
                    served_as_trained=command.served_as_trained,
                ),
            )
        case Fail():
            return (JobFailed(at=command.at, error=command.error, served_as_trained=command.served_as_trained),)
        case _:
            assert_never(command)


def _create(command: CreateJob) -> tuple[Event, ...]:
    return (JobCreated(job_id=command.job_id, created_at=command.at, **fields_of(command)),)


def _start_validation(command: StartValidation, state: JobState) -> tuple[Event, ...]:
    _require(state, "validate", ("validating_files",))
    before = _former_run(command, state)
    if state.attempts >= command.max_attempts:
        return (*before, _given_up(command.at, state, "validation"))
    started = ValidationStarted(
        epoch=command.epoch,
        owner=command.owner,
        training_file=state.training_file.id,
        validation_file=state.validation_file.id if state.validation_file else None,
    )
    return (*before, started)


def _start_run(command: StartRun, state: JobState) -> tuple[Event, ...]:
    _require(state, "start", ("queued", "running") if state.run else ("queued",))
    before = _former_run(command, state)
    if state.attempts >= command.max_attempts:
        return (*before, _given_up(command.at, state, "training"))
    started = RunStarted(
        epoch=command.epoch,
        owner=command.owner,
        host=command.host,
        at=command.at,
        attempt=state.attempts + 1,
        device=command.device,
    )
    return (*before, started)


def _former_run(command: StartValidation | StartRun, state: JobState) -> tuple[Event, ...]:
    if command.epoch != state.epoch + 1:
        raise StaleEpoch(f"The next epoch of {state.id} is {state.epoch + 1}, not {command.epoch}.")
    if state.run is None:
        return ()
    return (LeaseExpired(epoch=state.run.epoch, kind=state.run.kind),)


def _given_up(at: int, state: JobState, kind: RunKind) -> JobFailed:
    return JobFailed(
        at=at,
        error=JobError(
            code="attempts_exhausted",
            message=f"{state.attempts} attempts in a row ended without progress during {kind}. "
            "The run's log file tells why each ended; create the job again once that is mended.",
        ),
    )


def _save_checkpoint(command: SaveCheckpoint, state: JobState) -> tuple[Event, ...]:
    if any(known.step == command.step for known in state.checkpoints):
        return ()
    checkpoint = Checkpoint(
        id=command.checkpoint_id,
        step=command.step,
        epoch_number=command.epoch_number,
        model_name=f"{state.model_name}:ckpt-step-{command.step}",
        artifact=command.artifact,
        metrics=command.metrics,
        created_at=command.at,
    )
    return (CheckpointSaved(epoch=command.epoch, checkpoint=checkpoint),)


def _release(command: ReleaseRun, state: JobState, run: Run) -> tuple[Event, ...]:
    released = RunReleased(
        epoch=command.epoch, kind=run.kind, reason=command.reason, detail=command.detail, log=command.log
    )
    if state.status == "paused":
        return (released,)
    if command.reason == "no_space" and run.kind == "training":
        return (released, JobPaused(at=command.at, reason="no_space", detail=command.detail))
    if command.reason in ("crashed", "stalled") and state.attempts >= command.max_attempts:
        error = JobError(
            code="attempts_exhausted",
            message=f"{state.attempts} attempts in a row ended without progress; "
            f"the last one {command.reason}: {command.detail}",
            log=command.log,
        )
        return (released, JobFailed(at=command.at, error=error))
    return (
        (released,)
        if run.kind == "validation" or state.status == "queued"
        else (released, JobQueued(reason=command.reason))
    )


def _require(state: JobState, verb: str, allowed: tuple[Status, ...]) -> None:
    if state.status not in allowed:
        raise InvalidState(
            f"The job {state.id} is {state.status}; {verb} is possible only when it is {' or '.join(allowed)}."
        )


def evolve(state: JobState, event: Event) -> JobState:
    """Return the state after `event`. Total: every event of the catalogue has its branch."""
    change = msgspec.structs.replace
    match event:
        case JobCreated():
            return _created(event)
        case ValidationStarted():
            run = Run(kind="validation", epoch=event.epoch, owner=event.owner, phase="validate")
            return change(state, epoch=event.epoch, attempts=state.attempts + 1, run=run)
        case FilesValidated():
            return change(
                state,
                base=event.base,
                hyperparameters=event.hyperparameters,
                tokens=event.tokens,
                needs=event.needs,
                warnings=(*state.warnings, *event.warnings)[:MAX_WARNINGS],
                attempts=0,
                run=None,
            )
        case JobQueued(reason=reason):
            attempts = 0 if reason in ("resumed", "drained", "paused") else state.attempts
            return change(state, status="queued", attempts=attempts, paused_because=None, pause_detail="")
        case RunStarted():
            run = Run(
                kind="training",
                epoch=event.epoch,
                owner=event.owner,
                host=event.host,
                phase="load",
                started_at=event.at,
            )
            return change(state, status="running", epoch=event.epoch, attempts=event.attempt, run=run)
        case LeaseExpired():
            return change(state, run=None)
        case PhaseEntered():
            return change(state, run=change(state.run, phase=event.phase) if state.run else None)
        case RunResumed(anew=True):
            return change(
                state,
                last_step=0,
                last_metrics=None,
                recovery_points=(),
                checkpoints=(),
                run=_from_the_start(state.run),
            )
        case RunResumed():
            return state
        case StepsReported():
            return _stepped(state, event)
        case RecoveryPointSaved():
            point = RecoveryPoint(
                step=event.step,
                artifact=event.artifact,
                trained_tokens=event.trained_tokens,
                epoch=event.epoch,
            )
            older = tuple(known for known in state.recovery_points if known.step < event.step)
            newest = max((known.step for known in state.recovery_points), default=-1)
            return change(
                state,
                recovery_points=(point, *older)[:KEPT_RECOVERY_POINTS],
                attempts=0 if event.step > newest else state.attempts,
            )
        case CheckpointSaved(checkpoint=checkpoint):
            return change(state, checkpoints=(*state.checkpoints, checkpoint))
        case JobWarned(warning=warning):
            return change(state, warnings=(*state.warnings, warning)[:MAX_WARNINGS])
        case RunReleased(reason=reason):
            return change(state, run=None, attempts=0 if reason in BLAMELESS else state.attempts)
        case JobPaused():
            return change(state, status="paused", paused_because=event.reason, pause_detail=event.detail)
        case JobCancelled():
            return change(state, status="cancelled", finished_at=event.at, run=None)
        case JobSucceeded():
            return change(
                state,
                status="succeeded",
                finished_at=event.at,
                run=None,
                artifact=event.artifact,
                artifact_kind=event.kind,
                trained_tokens=event.trained_tokens,
                result_file=event.result_file,
                stopped_early=event.stopped_early,
                served_as_trained=event.served_as_trained,
            )
        case JobFailed():
            return change(
                state,
                status="failed",
                finished_at=event.at,
                run=None,
                error=event.error,
                served_as_trained=event.served_as_trained,
            )
        case _:
            assert_never(event)


def _created(event: JobCreated) -> JobState:
    return JobState(id=event.job_id, created_at=event.created_at, **fields_of(event))


def _from_the_start(run: Run | None) -> Run | None:
    return None if run is None else msgspec.structs.replace(run, first_step=None)


def _stepped(state: JobState, event: StepsReported) -> JobState:
    newest = event.steps[-1]
    run = state.run
    if run is not None and run.first_step is None:
        run = msgspec.structs.replace(run, first_step=event.steps[0].step - 1)
    return msgspec.structs.replace(state, last_step=newest.step, last_metrics=newest, run=run)
