"""The objects that clients see: OpenAI's fields and ROSE's own beside them (docs/api.md).

Pure: a state and a moment in, a struct out. Fields marked "ROSE" are not in OpenAI's schema; the SDKs pass them on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Generic, Literal, Protocol, TypeVar

import msgspec

from projections.checkpoints import CheckpointRow
from projections.damage import DAMAGED_ROW
from projections.files import DamagedFile
from projections.models import DamagedModel
from rose.domain.artifacts import Artifact
from rose.domain.files import FileState
from rose.domain.job_values import BaseModel, JobError, Warning
from rose.domain.jobs import JobState
from rose.domain.messages import JobMessage
from rose.domain.models import ModelState
from rose.language_models.locate import Origin, RoseFacts

ORGANIZATION = "org-rose"
ECHOED = (
    "n_epochs",
    "batch_size",
    "learning_rate_multiplier",
    "validation_split",
    "early_stopping_patience",
    "warmup_ratio",
    "thinking",
    "use_lora",
    "lora_config",
)
"""The hyperparameters that a request may name and a job echoes."""

Entry = TypeVar("Entry")


class Listing(msgspec.Struct, Generic[Entry], frozen=True, kw_only=True):
    """One page of a list; `after` takes `last_id` for the next one."""

    object: Literal["list"] = "list"
    data: list[Entry]
    first_id: str | None
    last_id: str | None
    has_more: bool


class _Named(Protocol):
    @property
    def id(self) -> str: ...


NamedEntry = TypeVar("NamedEntry", bound=_Named)


def listing(data: list[NamedEntry], *, has_more: bool, none: str | None = None) -> Listing[NamedEntry]:
    """Return a page of a list; `none` stands for the ids of an empty one (OpenAI's file list wants a text there)."""
    return Listing(
        data=data,
        first_id=data[0].id if data else none,
        last_id=data[-1].id if data else none,
        has_more=has_more and bool(data),
    )


class Deleted(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to a deletion."""

    id: str
    object: str
    deleted: bool = True


class File(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A file. Optional fields are left out, not null."""

    id: str
    object: str
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: str
    """processed; error when the row in the database is damaged."""
    status_details: str | msgspec.UnsetType = msgspec.UNSET
    """Why the status is error, and what helps."""
    sha256: str
    """ROSE: hash of the content; an identical file need not be uploaded again."""
    expires_at: int | msgspec.UnsetType = msgspec.UNSET
    job_id: str | msgspec.UnsetType = msgspec.UNSET
    """ROSE: the job that made this result file."""


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """ROSE: how far a job is."""

    phase: str
    """wait, download, build, validate, load, train, evaluate, save or done."""
    step: int
    total_steps: int | None
    """None until the file is validated."""
    percent: int
    """100 only when the model answers."""


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """A fine-tuning job."""

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    finished_at: int | None
    estimated_finish: int | None
    status: str
    model: str
    fine_tuned_model: str | None
    organization_id: str = ORGANIZATION
    training_file: str
    validation_file: str | None
    hyperparameters: dict[str, Any]
    method: dict[str, Any]
    seed: int
    trained_tokens: int | None
    result_files: list[str]
    error: dict[str, Any] | None
    """code, message, param; ROSE: log (path of the run's log file), problems."""
    integrations: list[dict[str, Any]] | None
    metadata: dict[str, str] | None
    user_provided_suffix: str | None
    base_model: BaseModel | None
    """ROSE: the base exactly, once the job is validated."""
    reserved_model: str
    """ROSE: the name that the fine-tuned model has or will have."""
    resolved_hyperparameters: dict[str, Any] | None
    """ROSE: every number of the run, and under `reasons` why it is that number."""
    waiting_for: str | None
    """ROSE: why nothing happens at the moment; null while something does."""
    progress: Progress
    warnings: list[Warning]
    stopped_early: bool
    training_data: Artifact | None
    """ROSE: path, size and hash of the training content that this job uses."""
    code_version: str
    """ROSE: version of the code that created the job."""


class JobEvent(msgspec.Struct, frozen=True, kw_only=True):
    """Something that happened to a job."""

    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: str
    message: str
    type: str
    data: dict[str, Any]


class JobCheckpoint(msgspec.Struct, frozen=True, kw_only=True):
    """A usable model of the state after an epoch."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuning_job_id: str
    fine_tuned_model_checkpoint: str
    step_number: int
    metrics: dict[str, float]


class ModelError(msgspec.Struct, frozen=True, kw_only=True):
    """Why a model cannot be used."""

    code: str
    """damaged_row: its row in the database is damaged."""
    message: str


class Model(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A model that answers, or a base that can be trained."""

    id: str
    object: str
    created: int
    owned_by: str
    kind: str
    """ROSE: base, adapter or full."""
    source: str
    """ROSE: hub id, folder, built-in or imported name of the base."""
    job_id: str | msgspec.UnsetType = msgspec.UNSET
    """ROSE: the job that made it."""
    base_model: BaseModel | msgspec.UnsetType = msgspec.UNSET
    """ROSE: the base exactly."""
    step: int | msgspec.UnsetType = msgspec.UNSET
    """ROSE: training step whose state this is."""
    artifact: Artifact | msgspec.UnsetType = msgspec.UNSET
    """ROSE: path in the blob folder, size and hash."""
    folder: str | msgspec.UnsetType = msgspec.UNSET
    """ROSE: absolute folder of the adapter (PEFT) or model, on the server's host."""
    origin: Origin | msgspec.UnsetType = msgspec.UNSET
    """ROSE: the file that an imported base was made of."""
    quantisation: str | msgspec.UnsetType = msgspec.UNSET
    """ROSE: how an imported base's numbers were rounded before, for example `Q4_1, dequantised to float16`."""
    error: ModelError | msgspec.UnsetType = msgspec.UNSET
    """ROSE: why it cannot be used."""


def file(state: FileState) -> File:
    """Return the file as clients see it; of one whose row is damaged what is left."""
    damaged = isinstance(state, DamagedFile)
    assert state.artifact is not None or damaged
    return File(
        id=state.id,
        object="file",
        bytes=state.artifact.bytes if state.artifact else 0,
        created_at=state.created_at,
        filename=state.filename,
        purpose=state.purpose,
        status="error" if damaged else "processed",
        status_details=state.damage if damaged else msgspec.UNSET,
        sha256=state.artifact.sha256 if state.artifact else "",
        expires_at=msgspec.UNSET if state.expires_at is None else state.expires_at,
        job_id=msgspec.UNSET if state.job_id is None else state.job_id,
    )


def job(state: JobState, *, now: float, waiting_for: str | None = None) -> Job:
    """Return the job as clients see it; `now` in Unix seconds, for the estimate while it runs."""
    chosen = state.hyperparameters
    echo = _echoed(state)
    succeeded = state.status == "succeeded"
    return Job(
        id=state.id,
        created_at=state.created_at,
        finished_at=state.finished_at,
        estimated_finish=_estimated_finish(state, now),
        status=state.status,
        model=state.model,
        fine_tuned_model=state.model_name if succeeded else None,
        training_file=state.training_file.id if state.training_file else "",
        validation_file=state.validation_file.id if state.validation_file else None,
        hyperparameters=echo,
        method={"type": state.method, state.method: {"hyperparameters": echo}},
        seed=state.seed,
        trained_tokens=state.trained_tokens,
        result_files=[state.result_file] if state.result_file else [],
        error=_error(state.error),
        integrations=list(state.integrations) if state.integrations is not None else None,
        metadata=state.metadata,
        user_provided_suffix=state.suffix,
        base_model=state.base,
        reserved_model=state.model_name,
        resolved_hyperparameters=msgspec.to_builtins(chosen) if chosen else None,
        waiting_for=waiting_for,
        progress=_progress(state),
        warnings=list(state.warnings),
        stopped_early=state.stopped_early,
        training_data=state.training_file.artifact if state.training_file else None,
        code_version=state.code_version,
    )


def job_event(message: JobMessage, created_at: int) -> JobEvent:
    """Return the job event as clients see it, in list and stream alike."""
    return JobEvent(
        id=message.id,
        created_at=created_at,
        level=message.level,
        message=message.message,
        type=message.type,
        data=message.data,
    )


def checkpoint(made: CheckpointRow) -> JobCheckpoint:
    """Return the checkpoint as clients see it."""
    return JobCheckpoint(
        id=made.id,
        created_at=made.created_at,
        fine_tuning_job_id=made.job_id,
        fine_tuned_model_checkpoint=made.model_name,
        step_number=made.step,
        metrics={"step": made.step, **made.metrics},
    )


def fine_tuned_model(state: ModelState, folder: str) -> Model:
    """Return a fine-tuned model as clients see it; `folder` is where its files lie."""
    assert state.artifact is not None
    assert state.base is not None
    return Model(
        id=state.name,
        object="model",
        created=state.created_at,
        owned_by=ORGANIZATION,
        kind=state.kind,
        source=state.base.source,
        job_id=state.job_id,
        base_model=state.base,
        step=state.step,
        artifact=state.artifact,
        folder=folder,
    )


def damaged_model(state: DamagedModel) -> Model:
    """Return what is left of a model whose row is damaged."""
    return Model(
        id=state.name or state.job_id,
        object="model",
        created=state.created_at,
        owned_by=ORGANIZATION,
        kind=state.kind,
        source=state.base.source if state.base else "",
        job_id=state.job_id,
        error=ModelError(code=DAMAGED_ROW, message=state.damage),
    )


def base_model(name: str, source: str, facts: RoseFacts | None = None) -> Model:
    """Return a base model under the name by which it is known here; `facts` if it was imported on this machine."""
    origin = facts.origin if facts else None
    return Model(
        id=name,
        object="model",
        created=0,
        owned_by="system",
        kind="base",
        source=source,
        origin=origin or msgspec.UNSET,
        quantisation=(facts.quantisation if facts else None) or msgspec.UNSET,
    )


def _echoed(state: JobState) -> dict[str, Any]:
    """Return the hyperparameters as requested, with `auto` replaced by the numbers chosen once there are any."""
    given: Mapping[str, Any] = msgspec.to_builtins(state.hyperparameters or state.requested)
    return {name: given[name] for name in ECHOED}


def _error(error: JobError | None) -> dict[str, Any] | None:
    if error is None:
        return None
    return {
        "code": error.code,
        "message": error.message,
        "param": error.param,
        "log": error.log,
        "problems": list(error.problems),
    }


def _progress(state: JobState) -> Progress:
    total = state.hyperparameters.total_steps if state.hyperparameters else None
    if state.is_terminal:
        phase = "done"
    elif state.run is None:
        phase = "wait"
    else:
        phase = state.run.phase
    percent = min(99, 100 * state.last_step // total) if total else 0
    return Progress(
        phase=phase,
        step=state.last_step,
        total_steps=total,
        percent=100 if state.status == "succeeded" else percent,
    )


def _estimated_finish(state: JobState, now: float) -> int | None:
    """Return when the steps that are left will be done at the present run's pace; None when that is unknown."""
    run = state.run
    if state.status != "running" or run is None or run.first_step is None or state.hyperparameters is None:
        return None
    done = state.last_step - run.first_step
    left = state.hyperparameters.total_steps - state.last_step
    elapsed = now - run.started_at
    if done <= 0 or elapsed <= 0:
        return None
    return int(now + max(left, 0) * elapsed / done)
