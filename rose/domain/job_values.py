"""Values that job events, commands and state share. Pure data, no behaviour."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from rose.domain.artifacts import Artifact

Status = Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]
RunKind = Literal["validation", "training"]
ReleaseReason = Literal["drained", "paused", "crashed", "stalled", "no_space"]
QueueReason = Literal["validated", "resumed", ReleaseReason]
"""Why a job waits for a trainer: its files are checked, a person resumed it, or why the last run gave it back."""
PauseReason = Literal["requested", "no_space"]
"""Why a job is held: a person asked for it, or the disk is full; the latter ends by itself when there is room again."""


class PinnedFile(msgspec.Struct, frozen=True, kw_only=True):
    """A file whose content a job needs, whatever happens to the file's entry."""

    id: str
    filename: str
    artifact: Artifact


class ParentModel(msgspec.Struct, frozen=True, kw_only=True):
    """A fine-tuned model (or checkpoint of one) that training goes on from."""

    name: str
    kind: str
    """`adapter` or `full`."""
    artifact: Artifact
    lora: dict[str, Any] | None = None
    """The adapter's LoraSettings as JSON."""


class BaseRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What the requested model name stands for, before any file was looked at."""

    source: str
    """Hub id, absolute local folder, or the name of a model that ROSE builds itself (`tiny`) or imported."""
    parent: ParentModel | None = None
    pinned: BaseModel | None = None
    """The exact base that the parent was trained on; no other will do."""


class BaseModel(msgspec.Struct, frozen=True, kw_only=True):
    """A base model, exactly."""

    source: str
    revision: str | None
    """Commit of the hub repository; None for a local folder."""
    fingerprint: str
    """SHA-256 over configuration, tokenizer and weights' headers; the engine refuses an adapter on another base."""
    hidden_size: int = 0
    model_type: str = ""
    origin: str | None = None
    """Name of the file that an imported base was made of."""
    origin_sha256: str | None = None
    quantisation: str | None = None
    """How the numbers of an imported base were rounded before, for example `Q4_1, dequantised to float16`."""


class StepMetrics(msgspec.Struct, frozen=True, kw_only=True):
    """One optimizer step."""

    step: int
    """1-based."""
    total_steps: int
    epoch: float
    """Passes over the training data completed, for example 0.5."""
    train_loss: float
    """Weighted mean cross-entropy per label token, nats."""
    train_mean_token_accuracy: float
    learning_rate: float
    gradient_norm: float
    """Before clipping."""
    trained_tokens: int
    """Tokens of all examples seen so far, in all attempts that count."""
    tokens_per_second: float = 0.0
    memory_bytes: int = 0
    """Peak memory of the device (or the process on a CPU)."""
    valid_loss: float | None = None
    """On validation data, when this step was followed by an evaluation."""
    valid_mean_token_accuracy: float | None = None
    full_valid_loss: float | None = None
    """The same over the whole validation set, at each epoch's end."""
    full_valid_mean_token_accuracy: float | None = None
    measured: dict[str, float] | UnsetType = UNSET
    """What the job's method measures beside it, the mean over the step."""
    valid_measured: dict[str, float] | UnsetType = UNSET
    """The same on validation data."""


class RecoveryPoint(msgspec.Struct, frozen=True, kw_only=True):
    """State on disk from which training goes on exactly."""

    step: int
    artifact: Artifact
    trained_tokens: int = 0
    epoch: int = 0
    """Lease epoch of the run that made it."""


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True):
    """A usable model of the state after an epoch."""

    id: str
    step: int
    epoch_number: int
    model_name: str
    artifact: Artifact
    metrics: dict[str, float] = {}
    created_at: int = 0


class JobError(msgspec.Struct, frozen=True, kw_only=True):
    """Why a job failed, in OpenAI's shape and with what helps."""

    code: str
    message: str
    param: str | None = None
    log: str | None = None
    """Path of the run's log file on the trainer's host."""
    problems: tuple[str, ...] = ()


class ServedAsTrained(msgspec.Struct, frozen=True, kw_only=True):
    """Whether the model, as an inference engine serves it, gives the numbers that the trainer had for the same tokens.

    Differences are those of the log-probabilities (nats) of learned tokens, without their signs.
    """

    status: Literal["proven", "not_proven", "differs"]
    reason: str = ""
    """Why it is not proven, in words."""
    rows: int = 0
    """Rows that were compared."""
    tokens: int = 0
    """Learned tokens that were compared."""
    held_out: bool = False
    """Whether the rows are of the validation data; else they were trained on."""
    largest_difference: float | None = None
    """None when nothing was compared, or when the engine gave something that is no number."""
    mean_difference: float | None = None
    largest_allowed: float | None = None
    mean_allowed: float | None = None
    trained_as: str = ""
    """Coarsest numbers of the trainer's arithmetic: fp32, fp16 or bf16."""
    served_as: str = ""
    """Coarsest numbers of the engine's weights and arithmetic."""


class Warning(msgspec.Struct, frozen=True, kw_only=True):
    """Something a person should know."""

    code: str
    message: str
