"""What a supervisor and its child process say to each other: JSON lines, torch-free.

The child reads `Order`s from its standard input and writes `Report`s to the file descriptor named by
`ROSE_REPORT_FD`; its standard output and error are free for logging and drained into the run's log file.
The specification of the work is a JSON file whose path is the child's only argument.
"""

from __future__ import annotations

import msgspec

from rose.domain.artifacts import Artifact
from rose.domain.hyperparameter_requests import HyperparametersRequest
from rose.domain.hyperparameters import Hyperparameters
from rose.domain.job_values import BaseModel, BaseRequest, ParentModel, RecoveryPoint, StepMetrics

EXIT_DRAINED = 75
"""Exit status of a child that made its recovery point and left because it was told to (BSD's EX_TEMPFAIL)."""


class RunSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One run: everything the training child needs. Paths are absolute unless said otherwise."""

    job_id: str
    epoch: int
    """The lease's epoch; artifacts go under jobs/<job_id>/e<epoch>/ in the blob folder."""
    model_name: str
    base: BaseModel
    parent: ParentModel | None
    """Fine-tuned model that training goes on from."""
    blob_root: str
    training_file: str
    validation_file: str | None
    method: str = "supervised"
    """As rose.methods knows it."""
    hyperparameters: Hyperparameters
    recovery_points: tuple[RecoveryPoint, ...] = ()
    """Candidates to resume from, newest first; empty for a fresh run."""
    trained_tokens: int = 0
    models_dir: str
    """Folder of the models that ROSE builds itself."""
    device: str = "auto"
    threads: int | None = None
    recovery_seconds: float = 120.0
    recovery_steps: int | None = None
    abandon_seconds: float = 45.0
    min_free_bytes: int = 0
    hub_offline: bool = False


class ValidationSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One validation: read the files, count tokens, resolve `auto`."""

    job_id: str
    base: BaseRequest
    blob_root: str
    training_file_id: str
    training_file: str
    validation_file_id: str | None
    validation_file: str | None
    method: str
    requested: HyperparametersRequest
    seed: int
    minimum_examples: int
    base_learning_rates: dict[str, float]
    models_dir: str
    hub_offline: bool = False
    abandon_seconds: float = 45.0


# --- child to supervisor


class PhaseChanged(msgspec.Struct, frozen=True, kw_only=True, tag="phase"):
    """The run entered a phase: load, train, evaluate or save."""

    phase: str


class Resumed(msgspec.Struct, frozen=True, kw_only=True, tag="resumed"):
    """The run goes on from a recovery point."""

    from_step: int
    rejected: tuple[str, ...] = ()
    """Recovery points that did not verify, each `step N: reason`."""
    anew: bool = False
    """The run learns otherwise than the one that made the points, so it begins again."""


class StepDone(msgspec.Struct, frozen=True, kw_only=True, tag="step"):
    """One optimizer step and, where the step ends with one, its evaluation."""

    metrics: StepMetrics


class RecoveryPointMade(msgspec.Struct, frozen=True, kw_only=True, tag="recovery_point"):
    """State from which the run can be continued lies on disk, synced."""

    step: int
    artifact: Artifact
    trained_tokens: int


class CheckpointMade(msgspec.Struct, frozen=True, kw_only=True, tag="checkpoint"):
    """A usable model of the state after an epoch lies on disk, synced."""

    step: int
    epoch_number: int
    artifact: Artifact
    metrics: dict[str, float]


class Warned(msgspec.Struct, frozen=True, kw_only=True, tag="warning"):
    """Something that the user should know and that does not stop the run."""

    code: str
    message: str


class Drained(msgspec.Struct, frozen=True, kw_only=True, tag="drained"):
    """The run stopped because it was told to, after its recovery point."""

    step: int


class ScoredRow(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens of the job's data, and how likely the finished model finds those of them that it learns."""

    ids: list[int]
    learned: list[int]
    """Places of the learned tokens in `ids`, ascending, from 1 on."""
    logprobs: list[float | None]
    """Of each learned token, given all before it, in nats; null where it is no number."""


class ScoredRows(msgspec.Struct, frozen=True, kw_only=True):
    """What the trainer's numbers are for some rows, by which the served model is judged."""

    rows: list[ScoredRow]
    held_out: bool
    """Whether they are of the validation data."""
    trained_as: str
    """Coarsest numbers of the trainer's arithmetic: fp32, fp16 or bf16."""
    routed: bool = False
    """Whether the model chooses experts, where the least rounding can choose another one."""


class Finished(msgspec.Struct, frozen=True, kw_only=True, tag="finished"):
    """The run is complete; `artifact` is the final model."""

    artifact: Artifact
    kind: str
    """`adapter` or `full`."""
    step: int
    """Step whose state the final model holds (the best checkpoint's when there is validation)."""
    steps_run: int
    trained_tokens: int
    stopped_early: bool = False
    scored: ScoredRows | None = None
    """Last, so that a complaint about a broken report, which quotes its beginning, never quotes data."""


class ValidationPassed(msgspec.Struct, frozen=True, kw_only=True, tag="valid"):
    """The data can be trained on; every number of the run is decided."""

    base: BaseModel
    hyperparameters: Hyperparameters
    tokens: int
    """Tokens of one pass over the training examples."""
    validation_tokens: int
    needs: dict[str, int | str] = {}
    """What a trainer must have: `memory_bytes` (estimate) and `device`."""
    warnings: tuple[Warned, ...] = ()


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    """The work cannot be done; trying again would end the same way unless `retryable`."""

    code: str
    message: str
    param: str | None = None
    retryable: bool = False
    problems: tuple[str, ...] = ()
    """First 50 problems of the data, each naming example, line and reason."""


Report = (
    PhaseChanged
    | Resumed
    | StepDone
    | RecoveryPointMade
    | CheckpointMade
    | Warned
    | Drained
    | Finished
    | ValidationPassed
    | Failed
)


# --- supervisor to child


class Alive(msgspec.Struct, frozen=True, tag="alive"):
    """The supervisor lives and holds the lease; sent with every renewal."""


class Drain(msgspec.Struct, frozen=True, tag="drain"):
    """Make a recovery point at the next step boundary, report `Drained` and exit with EXIT_DRAINED."""


Order = Alive | Drain


class Begin(msgspec.Struct, frozen=True, tag="begin"):
    """Run this now; the only word to a waiting child (trainer/warm.py), after which it takes orders like any other."""

    specification: str
    """Path of the file that a cold child gets on its command line."""
