"""What can happen to a job. Fields are only ever added, with defaults: the log is for ever."""

from __future__ import annotations

import msgspec

from rose.domain.artifacts import Artifact
from rose.domain.hyperparameters import Hyperparameters
from rose.domain.job_order import JobOrder
from rose.domain.job_values import (
    BaseModel,
    Checkpoint,
    JobError,
    PauseReason,
    QueueReason,
    ReleaseReason,
    RunKind,
    ServedAsTrained,
    StepMetrics,
    Warning,
)


class JobCreated(JobOrder, frozen=True, kw_only=True):
    """A job was asked for; its model's name is reserved."""

    job_id: str
    created_at: int


class ValidationStarted(msgspec.Struct, frozen=True, kw_only=True):
    """A trainer reads the files."""

    epoch: int
    owner: str
    training_file: str
    validation_file: str | None


class FilesValidated(msgspec.Struct, frozen=True, kw_only=True):
    """The files are usable; every number of the run is decided."""

    epoch: int
    base: BaseModel
    hyperparameters: Hyperparameters
    tokens: int
    validation_tokens: int
    needs: dict[str, int | str]
    warnings: tuple[Warning, ...] = ()


class JobQueued(msgspec.Struct, frozen=True, kw_only=True):
    """The job waits for a trainer."""

    reason: QueueReason


class RunStarted(msgspec.Struct, frozen=True, kw_only=True):
    """A trainer owns the job."""

    epoch: int
    owner: str
    host: str
    at: int
    attempt: int
    """Consecutive attempts without a new recovery point, this one included."""
    device: str = ""


class LeaseExpired(msgspec.Struct, frozen=True, kw_only=True):
    """The owner stopped renewing: its process, host or network died."""

    epoch: int
    kind: RunKind


class PhaseEntered(msgspec.Struct, frozen=True, kw_only=True):
    """The run entered a phase."""

    epoch: int
    phase: str


class RunResumed(msgspec.Struct, frozen=True, kw_only=True):
    """The run goes on after `from_step`; nothing before it is trained again for the model."""

    epoch: int
    from_step: int
    rejected: tuple[str, ...] = ()
    anew: bool = False
    """What is learned has changed since the job began, so what was reported before counts no longer."""


class StepsReported(msgspec.Struct, frozen=True, kw_only=True):
    """Metrics of consecutive steps."""

    epoch: int
    steps: tuple[StepMetrics, ...]


class RecoveryPointSaved(msgspec.Struct, frozen=True, kw_only=True):
    """Training can go on from here."""

    epoch: int
    step: int
    artifact: Artifact
    trained_tokens: int


class CheckpointSaved(msgspec.Struct, frozen=True, kw_only=True):
    """A usable model of an epoch's end exists."""

    epoch: int
    checkpoint: Checkpoint


class JobWarned(msgspec.Struct, frozen=True, kw_only=True):
    """Something a person should know."""

    epoch: int
    warning: Warning


class RunReleased(msgspec.Struct, frozen=True, kw_only=True):
    """The run ended before the job did."""

    epoch: int
    kind: RunKind
    reason: ReleaseReason
    detail: str = ""
    log: str | None = None


class JobPaused(msgspec.Struct, frozen=True, kw_only=True):
    """The job is held until it is resumed."""

    at: int
    reason: PauseReason
    detail: str = ""
    """What happened, in words; empty when it was asked for."""


class JobCancelled(msgspec.Struct, frozen=True, kw_only=True):
    """The job was ended by a person."""

    at: int


class JobSucceeded(msgspec.Struct, frozen=True, kw_only=True):
    """The model exists and answers."""

    epoch: int
    at: int
    model_name: str
    artifact: Artifact
    kind: str
    step: int
    trained_tokens: int
    result_file: str
    stopped_early: bool = False
    served_as_trained: ServedAsTrained | None = None


class JobFailed(msgspec.Struct, frozen=True, kw_only=True):
    """The job ended without a model."""

    at: int
    error: JobError
    served_as_trained: ServedAsTrained | None = None
    """What was found, when that is why the job failed."""


Event = (
    JobCreated
    | ValidationStarted
    | FilesValidated
    | JobQueued
    | RunStarted
    | LeaseExpired
    | PhaseEntered
    | RunResumed
    | StepsReported
    | RecoveryPointSaved
    | CheckpointSaved
    | JobWarned
    | RunReleased
    | JobPaused
    | JobCancelled
    | JobSucceeded
    | JobFailed
)
