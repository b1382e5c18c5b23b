"""What can be asked of a job. Time, ids, seeds and names are decided by the caller, so that deciding stays pure."""

from __future__ import annotations

import msgspec

from rose.domain.artifacts import Artifact
from rose.domain.hyperparameters import Hyperparameters
from rose.domain.job_order import JobOrder
from rose.domain.job_values import BaseModel, JobError, ReleaseReason, ServedAsTrained, StepMetrics, Warning


class CreateJob(JobOrder, frozen=True, kw_only=True):
    """Create a job; ids, time, seed and name are decided outside, so that deciding stays pure."""

    job_id: str
    at: int


class StartValidation(msgspec.Struct, frozen=True, kw_only=True):
    """Claim the validation of a job."""

    owner: str
    epoch: int
    at: int
    max_attempts: int = 3


class FinishValidation(msgspec.Struct, frozen=True, kw_only=True):
    """The data is usable; all numbers are decided."""

    epoch: int
    at: int
    base: BaseModel
    hyperparameters: Hyperparameters
    tokens: int
    validation_tokens: int
    needs: dict[str, int | str]
    warnings: tuple[Warning, ...] = ()


class StartRun(msgspec.Struct, frozen=True, kw_only=True):
    """Claim a queued job, or one whose lease ran out."""

    owner: str
    host: str
    epoch: int
    at: int
    max_attempts: int = 3
    device: str = ""


class ChangePhase(msgspec.Struct, frozen=True, kw_only=True):
    """The run entered load, train, evaluate or save."""

    epoch: int
    phase: str


class NoteResume(msgspec.Struct, frozen=True, kw_only=True):
    """The run goes on from a recovery point."""

    epoch: int
    from_step: int
    rejected: tuple[str, ...] = ()
    anew: bool = False
    """It begins again, because it would learn otherwise than before."""


class ReportSteps(msgspec.Struct, frozen=True, kw_only=True):
    """Metrics of steps; those already known are dropped."""

    epoch: int
    steps: tuple[StepMetrics, ...]


class SaveRecoveryPoint(msgspec.Struct, frozen=True, kw_only=True):
    """A recovery point lies on disk."""

    epoch: int
    step: int
    artifact: Artifact
    trained_tokens: int


class SaveCheckpoint(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint lies on disk."""

    epoch: int
    at: int
    checkpoint_id: str
    step: int
    epoch_number: int
    artifact: Artifact
    metrics: dict[str, float]


class Warn(msgspec.Struct, frozen=True, kw_only=True):
    """Tell the user something."""

    epoch: int
    code: str
    message: str


class ReleaseRun(msgspec.Struct, frozen=True, kw_only=True):
    """Give the job back before its end. Counts against the attempts unless drained or paused."""

    epoch: int
    at: int
    reason: ReleaseReason
    detail: str = ""
    log: str | None = None
    max_attempts: int = 3


class Succeed(msgspec.Struct, frozen=True, kw_only=True):
    """The final model lies on disk and answers."""

    epoch: int
    at: int
    artifact: Artifact
    kind: str
    step: int
    trained_tokens: int
    result_file: str
    stopped_early: bool = False
    served_as_trained: ServedAsTrained | None = None


class Fail(msgspec.Struct, frozen=True, kw_only=True):
    """The job cannot succeed."""

    epoch: int
    at: int
    error: JobError
    served_as_trained: ServedAsTrained | None = None


class PauseJob(msgspec.Struct, frozen=True, kw_only=True):
    """Stop the job so that it can be resumed."""

    at: int


class ResumeJob(msgspec.Struct, frozen=True, kw_only=True):
    """Queue a paused job again."""

    at: int


class CancelJob(msgspec.Struct, frozen=True, kw_only=True):
    """End the job."""

    at: int


RunCommand = (
    FinishValidation
    | ChangePhase
    | NoteResume
    | ReportSteps
    | SaveRecoveryPoint
    | SaveCheckpoint
    | Warn
    | ReleaseRun
    | Succeed
    | Fail
)
"""What only the run that owns the job may say."""
Command = CreateJob | StartValidation | StartRun | PauseJob | ResumeJob | CancelJob | RunCommand
