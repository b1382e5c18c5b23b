"""Every request and every answer of the API, as the struct that it is read into or made from.

Pure, and without the web framework, so that the command line reads answers with the same structs. Ranges stand here and
nowhere else: `rose.decoding` makes the refusals of them, `/openapi.json` shows them. What clients see are OpenAI's
fields and ROSE's own beside them, which are marked "ROSE"; the SDKs pass those on. How a state becomes an answer is in
wire.py. What the sources of the ranges are: OpenAI's reference where OpenAI has the field.
"""

from __future__ import annotations

from typing import Annotated, Any, Generic, Literal, TypeVar

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from rose.decoding import json_schema
from rose.domain.artifacts import Artifact
from rose.domain.job_values import BaseModel, JobError, ServedAsTrained, Warning
from rose.domain.keys import Kind, Scope
from rose.domain.uploads import MAX_PARTS, Status
from rose.domain.webhooks import EVENT_TYPES
from rose.graders.kinds import Multi, Python, ScoreModel, StringCheck, TextSimilarity
from rose.graders.results import Errors, Usage
from rose.language_models.locate import Origin

ORGANIZATION = "org-rose"
SHORTEST_LIFE_SECONDS = 3600
LONGEST_LIFE_SECONDS = 2_592_000
LONGEST_KEY_LIFE_SECONDS = 10 * 366 * 86400
MAX_SEED = 2_147_483_647
MAX_RANK = 512
MAX_PREVIEWED = 50
MAX_METRIC_STEPS = 10_000
"""Most steps of one answer."""
LAST_STEP = (1 << 31) - 1

Entry = TypeVar("Entry")
Auto = Literal["auto"]
Name = Annotated[str, Meta(min_length=1, max_length=512)]
Id = Annotated[str, Meta(min_length=1, max_length=512)]
Purpose = Literal["assistants", "batch", "fine-tune", "vision", "user_data", "evals"]
Thinking = Literal["auto", "on", "off"]
ThePart = Annotated[str, Meta(extra_json_schema={"format": "binary"})]
"""A file in a form; what is read of it here is its name."""
FileLifeSeconds = Annotated[int, Meta(ge=SHORTEST_LIFE_SECONDS, le=LONGEST_LIFE_SECONDS)]
Limit = Annotated[int, Meta(ge=0, description="Entries on the page; a larger number than the most counts as the most.")]
Second = Annotated[int, Meta(ge=0, le=1 << 40)]
After = Annotated[str, Meta(description="Id of the entry to go on behind.")]


# --- errors and lists


class ErrorBody(Struct, frozen=True, kw_only=True):
    """What went wrong; all keys are always there."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None
    hint: str | None = None
    """ROSE: what helps, alone; `message` ends with it, too."""


class ErrorAnswer(Struct, frozen=True, kw_only=True):
    """The body of every answer that is not a success."""

    error: ErrorBody


class Listing(Struct, Generic[Entry], frozen=True, kw_only=True):
    """One page of a list; `after` takes `last_id` for the next one."""

    object: Literal["list"] = "list"
    data: list[Entry]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Deleted(Struct, frozen=True, kw_only=True):
    """The answer to a deletion."""

    id: str
    object: str
    deleted: bool = True


class PageQuery(Struct, frozen=True, kw_only=True):
    """Which page of a list is wanted."""

    limit: Limit = 20
    after: After = ""


# --- files and uploads


class File(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A file. Optional fields are left out, not null."""

    id: str
    object: str
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: str
    """processed; error when the row in the database is damaged."""
    status_details: str | UnsetType = UNSET
    """Why the status is error, and what helps."""
    sha256: str
    """ROSE: hash of the content; an identical file need not be uploaded again."""
    expires_at: int | UnsetType = UNSET
    job_id: str | UnsetType = UNSET
    """ROSE: the job that made this result file."""


class FileForm(Struct, frozen=True, kw_only=True):
    """An upload in one piece."""

    purpose: Purpose
    file: ThePart
    anchor: Literal["created_at"] | UnsetType = msgspec.field(name="expires_after[anchor]", default=UNSET)
    seconds: FileLifeSeconds | UnsetType = msgspec.field(name="expires_after[seconds]", default=UNSET)


class FilesQuery(Struct, frozen=True, kw_only=True):
    """Which files to list."""

    limit: Annotated[int, Meta(ge=0, le=10_000)] = 10_000
    after: After = ""
    order: Annotated[Literal["asc", "desc"], Meta(description="By creation; newest first is the default.")] = "desc"
    purpose: Annotated[str, Meta(description="Only files of this purpose.")] = ""


class PreviewFile(Struct, frozen=True, kw_only=True):
    """Which lines of a file to show, and to which model."""

    model: Name
    line: Annotated[int, Meta(ge=1, le=1 << 40)] | None = None
    """The first one, from 1."""
    count: Annotated[int, Meta(ge=1, le=MAX_PREVIEWED)] | None = None
    thinking: Thinking | None = None


class PreviewContent(PreviewFile, frozen=True, kw_only=True):
    """The same of a text that was not uploaded."""

    content: str
    """JSONL."""


class ExpiresAfter(Struct, frozen=True, kw_only=True):
    """When a file expires."""

    anchor: Literal["created_at"]
    seconds: FileLifeSeconds


class CreateUpload(Struct, frozen=True, kw_only=True):
    """A file that will come in parts."""

    bytes: Annotated[int, Meta(ge=0)]
    filename: Name
    mime_type: Annotated[str, Meta(min_length=1, max_length=255)]
    purpose: Purpose
    expires_after: ExpiresAfter | None = None


class PartForm(Struct, frozen=True, kw_only=True):
    """A part."""

    data: ThePart


class CompleteUpload(Struct, frozen=True, kw_only=True):
    """Which parts make the file, in this order."""

    part_ids: Annotated[list[str], Meta(max_length=MAX_PARTS)]
    md5: str | None = None
    """32 hexadecimal digits."""


class Upload(Struct, frozen=True, kw_only=True):
    """A file that comes in parts."""

    id: str
    object: Literal["upload"] = "upload"
    bytes: int
    """Size of the whole file, as it was announced."""
    created_at: int
    expires_at: int
    """When it is too late for parts and completion."""
    filename: str
    purpose: str
    status: Status
    file: File | None
    """The file, once the upload is completed."""


class UploadPart(Struct, frozen=True, kw_only=True):
    """A part that arrived."""

    id: str
    object: Literal["upload.part"] = "upload.part"
    created_at: int
    upload_id: str


# --- jobs


class LoraConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Shape of the adapter."""

    r: Annotated[int, Meta(ge=1, le=MAX_RANK)] | Auto | UnsetType = UNSET
    lora_alpha: Annotated[float, Meta(gt=0, le=65536)] | Auto | UnsetType = UNSET
    lora_dropout: Annotated[float, Meta(ge=0, lt=1)] | Auto | UnsetType = UNSET
    target_modules: (
        Annotated[list[Annotated[str, Meta(min_length=1, max_length=200)]], Meta(min_length=1, max_length=64)]
        | Literal["auto", "all-linear"]
        | UnsetType
    ) = UNSET
    use_dora: Any = None
    """Only as far as it changes nothing: refused when it is true."""
    modules_to_save: Any = None
    bias: Any = None


class Hyperparameters(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to train; what is left out or `auto` is chosen from the data."""

    n_epochs: Annotated[int, Meta(ge=1, le=50)] | Auto | UnsetType = UNSET
    batch_size: Annotated[int, Meta(ge=1, le=256)] | Auto | UnsetType = UNSET
    learning_rate_multiplier: Annotated[float, Meta(gt=0, le=1000)] | Auto | UnsetType = UNSET
    validation_split: Annotated[float, Meta(ge=0, lt=1)] | Auto | UnsetType = UNSET
    early_stopping_patience: Annotated[int, Meta(ge=1, le=1000)] | Auto | UnsetType | None = UNSET
    warmup_ratio: Annotated[float, Meta(ge=0, le=1)] | Auto | UnsetType = UNSET
    use_lora: bool | Auto | UnsetType = UNSET
    thinking: bool | Thinking | UnsetType = UNSET
    lora_config: LoraConfig | Auto | UnsetType | None = UNSET


class SupervisedMethod(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of supervised fine-tuning."""

    hyperparameters: Hyperparameters | None = None


class DpoHyperparameters(Hyperparameters, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to train on preferences."""

    beta: Annotated[float, Meta(gt=0, le=2)] | Auto | UnsetType = UNSET
    """How near the model stays to where it began; auto: 0.1."""


class DpoMethod(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of direct preference optimization."""

    hyperparameters: DpoHyperparameters | None = None


class Method(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which method trains. What stands here of other methods than `type` names is not read."""

    type: Annotated[str, Meta(min_length=1, max_length=64)] = "supervised"
    """supervised, dpo, or one that a package of this installation brings."""
    supervised: SupervisedMethod | None = None
    dpo: DpoMethod | None = None
    reinforcement: dict[str, Any] | None = None


class Wandb(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where Weights & Biases shows the run."""

    project: Annotated[str, Meta(min_length=1, max_length=128)]
    name: Name | None = None
    entity: Name | None = None
    tags: Annotated[list[Annotated[str, Meta(min_length=1, max_length=64)]], Meta(max_length=50)] | None = None


class Integration(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Another service that is told of the run."""

    type: Literal["wandb"]
    wandb: Wandb


class CreateJob(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A job to create. A key that nobody reads is refused: a job that trains otherwise than asked would cost hours."""

    model: Name
    training_file: Id
    validation_file: Id | None = None
    suffix: str | None = None
    """1 to 64 letters, digits, dots, dashes or underscores."""
    seed: Annotated[int, Meta(ge=0, le=MAX_SEED)] | None = None
    method: Method | None = None
    hyperparameters: Hyperparameters | None = None
    """Deprecated by OpenAI; what `method` says wins."""
    metadata: (
        Annotated[
            dict[Annotated[str, Meta(min_length=1, max_length=64)], Annotated[str, Meta(max_length=512)]],
            Meta(max_length=16),
        ]
        | None
    ) = None
    integrations: Annotated[list[Integration], Meta(max_length=5)] | None = None


class JobsQuery(PageQuery, frozen=True, kw_only=True):
    """Which jobs to list; also `metadata[KEY]=VALUE`."""

    metadata: Annotated[str, Meta(description="`null`: only jobs without metadata.")] = ""


class JobEventsQuery(PageQuery, frozen=True, kw_only=True):
    """Which events of a job to list, or to stream."""

    stream: (
        Annotated[
            Literal["true", "True", "1", "false", "False", "0"],
            Meta(description="Server-sent events, oldest first, until the job ends."),
        ]
        | UnsetType
    ) = UNSET


class JobCheckpointsQuery(PageQuery, frozen=True, kw_only=True):
    """Which checkpoints of a job to list."""

    limit: Limit = 10


class Progress(Struct, frozen=True, kw_only=True):
    """ROSE: how far a job is."""

    phase: str
    """wait, download, build, validate, load, train, evaluate, save, prove or done."""
    step: int
    total_steps: int | None
    """None until the file is validated."""
    percent: int
    """100 only when the model answers."""


class Job(Struct, frozen=True, kw_only=True):
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
    error: JobError | None
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
    served_as_trained: ServedAsTrained | None
    """ROSE: whether an engine gave the trainer's numbers for the finished model; null until the job comes there."""
    training_data: Artifact | None
    """ROSE: path, size and hash of the training content that this job uses."""
    code_version: str
    """ROSE: version of the code that created the job."""


class JobEvent(Struct, frozen=True, kw_only=True):
    """Something that happened to a job."""

    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: str
    message: str
    type: str
    data: dict[str, Any]


class JobCheckpoint(Struct, frozen=True, kw_only=True):
    """A usable model of the state after an epoch."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuning_job_id: str
    fine_tuned_model_checkpoint: str
    step_number: int
    metrics: dict[str, float]


class JobMetricsQuery(Struct, frozen=True, kw_only=True):
    """Which series of a job, and which of its steps."""

    metrics: Annotated[str, Meta(description="Names of series, with commas; all when absent.")] = ""
    after: Annotated[int, Meta(ge=0, le=LAST_STEP, description="The step to go on behind.")] = 0
    limit: (
        Annotated[
            int,
            Meta(
                ge=0,
                le=MAX_METRIC_STEPS,
                description=f"Steps of the answer, {MAX_METRIC_STEPS} when absent. Not together with points.",
            ),
        ]
        | UnsetType
    ) = UNSET
    points: (
        Annotated[
            int,
            Meta(
                ge=0,
                le=MAX_METRIC_STEPS,
                description="Leave out steps, so that at most so many stay: the first, the last, and the lowest and "
                "highest of each series in each part of the run, others at even distances. At least 2, and 2 more for "
                "each series.",
            ),
        ]
        | UnsetType
    ) = UNSET


class JobMetrics(Struct, frozen=True, kw_only=True):
    """Series of a job. `steps` and every list in `series` are equally long."""

    object: str
    job_id: str
    steps: list[int]
    series: dict[str, list[float | None]]
    """By name; null at a step where that was not measured."""
    has_more: bool
    """There are later steps: ask again with `after`, the last step here."""
    downsampled_from: int | None
    """How many steps these stand for; null when none was left out."""


# --- models, and who may use them


class ModelError(Struct, frozen=True, kw_only=True):
    """Why a model cannot be used."""

    code: str
    """damaged_row: its row in the database is damaged."""
    message: str


class Model(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A model that answers, or a base that can be trained."""

    id: str
    object: str
    created: int
    owned_by: str
    kind: str
    """ROSE: base, adapter or full."""
    source: str
    """ROSE: hub id, folder, built-in or imported name of the base."""
    job_id: str | UnsetType = UNSET
    """ROSE: the job that made it."""
    base_model: BaseModel | UnsetType = UNSET
    """ROSE: the base exactly."""
    step: int | UnsetType = UNSET
    """ROSE: training step whose state this is."""
    artifact: Artifact | UnsetType = UNSET
    """ROSE: path in the blob folder, size and hash."""
    folder: str | UnsetType = UNSET
    """ROSE: absolute folder of the adapter (PEFT) or model, on the server's host."""
    origin: Origin | UnsetType = UNSET
    """ROSE: the file that an imported base was made of."""
    quantisation: str | UnsetType = UNSET
    """ROSE: how an imported base's numbers were rounded before, for example `Q4_1, dequantised to float16`."""
    error: ModelError | UnsetType = UNSET
    """ROSE: why it cannot be used."""


class ModelListing(Struct, frozen=True, kw_only=True):
    """All models; this list has no pages."""

    object: str = "list"
    data: list[Model]


class CreatePermissions(Struct, frozen=True, kw_only=True):
    """Which projects may use a model."""

    project_ids: Annotated[list[str], Meta(min_length=1, max_length=100)]


class PermissionsQuery(Struct, frozen=True, kw_only=True):
    """Which permissions to list."""

    limit: Limit = 10
    after: After = ""
    order: Annotated[
        Literal["ascending", "descending"], Meta(description="By creation; newest first is the default.")
    ] = "descending"
    project_id: Annotated[str, Meta(description="Only the permission of this project.")] = ""


class Permission(Struct, frozen=True, kw_only=True):
    """That a project may use the model."""

    id: str
    object: Literal["checkpoint.permission"] = "checkpoint.permission"
    created_at: int
    project_id: str


# --- graders

_Grader = StringCheck | TextSimilarity | Python | ScoreModel | Multi
GraderObject = Annotated[
    dict[str, Any], Meta(description="A grader: see docs/graders.md.", extra_json_schema=json_schema(_Grader))
]
"""Read by rose/graders/reading.py, since a multi grader takes more than one form."""


class RunGrader(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A grader to try."""

    grader: GraderObject
    model_sample: str
    """The answer that is graded."""
    item: dict[str, Any] | None = None
    """What templates know as `item`."""


class ValidateGrader(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A grader to check."""

    grader: GraderObject


class GraderMetadata(Struct, frozen=True, kw_only=True):
    """How the reward came about."""

    name: str
    type: str
    errors: Errors
    execution_time: float
    """Seconds."""
    scores: dict[str, float]
    """Of a multi grader: the reward of each."""
    token_usage: int | None
    """Tokens of all grading models together; null when none was asked."""
    sampled_model_name: str | None
    """The grading model of a score_model grader."""


class GraderRun(Struct, frozen=True, kw_only=True):
    """The result of a grader."""

    reward: float
    """0 where an error stands in `metadata.errors`."""
    metadata: GraderMetadata
    sub_rewards: dict[str, float]
    """Of a multi grader: the reward of each."""
    model_grader_token_usage_per_model: dict[str, Usage]


class ValidGrader(Struct, frozen=True, kw_only=True):
    """A grader that can be used."""

    grader: dict[str, Any]


# --- projects and keys


class NameProject(Struct, frozen=True, kw_only=True):
    """What a project is called."""

    name: Annotated[str, Meta(min_length=1, max_length=100)]


class ProjectsQuery(PageQuery, frozen=True, kw_only=True):
    """Which projects to list."""

    include_archived: Annotated[Literal["true", "false"], Meta(description="Archived ones, too.")] = "false"


class CreateKey(Struct, frozen=True, kw_only=True):
    """Another key of a service account."""

    name: Annotated[str, Meta(min_length=1, max_length=100)] | None = None
    scope: Scope | None = None
    """ROSE: read, write or admin."""
    expires_in_seconds: Annotated[int, Meta(ge=1, le=LONGEST_KEY_LIFE_SECONDS)] | None = None
    kind: Kind | None = None
    """ROSE: api, or nats for a key that reads the project's events on NATS, and nothing else."""


class CreateServiceAccount(Struct, frozen=True, kw_only=True):
    """A service account with its first key."""

    name: Annotated[str, Meta(min_length=1, max_length=100)]
    scope: Scope | None = None
    """ROSE: read, write or admin."""
    expires_in_seconds: Annotated[int, Meta(ge=1, le=LONGEST_KEY_LIFE_SECONDS)] | None = None
    kind: Kind | None = None
    """ROSE: api, or nats for a key that reads the project's events on NATS, and nothing else."""
    create_service_account_only: bool | None = None
    """Refused when it is true: here a service account begins with its first key."""


class Project(Struct, frozen=True, kw_only=True):
    """A project."""

    id: str
    object: Literal["organization.project"] = "organization.project"
    name: str
    created_at: int
    archived_at: int | None
    status: str
    """active or archived"""


class StoredBytes(Struct, frozen=True, kw_only=True):
    """What a project stores."""

    files: int
    """Usable ones, also result files."""
    uploads: int
    """Announced by uploads in parts that are not completed yet."""
    models: int
    """Models that answer, and checkpoints."""
    total: int


class AnsweredTokens(Struct, frozen=True, kw_only=True):
    """Answers that a project got, and their tokens."""

    num_model_requests: int
    input_tokens: int
    output_tokens: int


class ProjectLimits(Struct, frozen=True, kw_only=True):
    """Limits of each project; null: none."""

    requests_per_minute: int | None
    tokens_per_minute: int | None
    unfinished_jobs: int | None
    stored_bytes: int | None
    event_streams: int | None


class ProjectUsage(Struct, frozen=True, kw_only=True):
    """ROSE: what a project has done and what it stores."""

    object: Literal["organization.project.usage"] = "organization.project.usage"
    project_id: str
    jobs: dict[str, int]
    """How many there are by status."""
    trained_tokens: int
    training_seconds: float
    """Of all runs together, from the start of each to the last that it reported."""
    stored_bytes: StoredBytes
    completions: AnsweredTokens
    limits: ProjectLimits


class CompletionsUsageQuery(Struct, frozen=True, kw_only=True):
    """Which answers to add up, and by what."""

    start_time: Annotated[Second, Meta(description="Unix seconds, inclusive.")]
    end_time: Annotated[Second, Meta(description="Unix seconds, exclusive; default: now.")] | None = None
    bucket_width: Annotated[Literal["1h", "1d"], Meta(description="ROSE counts by the hour.")] = "1d"
    group_by: Annotated[list[Literal["project_id", "model"]], Meta(max_length=2)] | None = None
    project_ids: Annotated[list[Id], Meta(max_length=1000)] | None = None
    models: Annotated[list[Name], Meta(max_length=1000)] | None = None
    limit: Annotated[int, Meta(ge=1, description="Buckets on the page: 7 of up to 31 days, 24 of up to 168 hours.")] | (
        None
    ) = None
    page: Annotated[str, Meta(description="`next_page` of the page before.")] | None = None


class CompletionsUsageResult(AnsweredTokens, frozen=True, kw_only=True):
    """Answers of a bucket, of a project or model where it was grouped by it."""

    object: Literal["organization.usage.completions.result"] = "organization.usage.completions.result"
    project_id: str | None = None
    model: str | None = None
    user_id: None = None
    api_key_id: None = None
    batch: None = None
    service_tier: None = None


class UsageBucket(Struct, frozen=True, kw_only=True):
    """A time and what was counted in it."""

    object: Literal["bucket"] = "bucket"
    start_time: int
    end_time: int
    results: list[CompletionsUsageResult]


class UsagePage(Struct, frozen=True, kw_only=True):
    """One page of buckets, oldest first."""

    object: Literal["page"] = "page"
    data: list[UsageBucket]
    has_more: bool
    next_page: str | None


class ServiceAccountKey(Struct, frozen=True, kw_only=True):
    """A fresh key, with its secret: it is shown this once."""

    id: str
    object: Literal["organization.project.service_account.api_key"] = "organization.project.service_account.api_key"
    name: str
    created_at: int
    value: str
    expires_at: int | None
    scope: str
    """ROSE: read, write or admin."""
    kind: str
    """ROSE: api, or nats; of the latter `id` is the user's name on NATS and the secret its password."""


class ServiceAccount(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Whose keys are."""

    id: str
    object: str
    name: str
    created_at: int
    role: str
    api_key: ServiceAccountKey | UnsetType = UNSET


class KeyOwner(Struct, frozen=True, kw_only=True):
    """Whose a key is."""

    type: Literal["service_account"] = "service_account"
    service_account: ServiceAccount
    user: None = None


class ApiKey(Struct, frozen=True, kw_only=True):
    """A key, without its secret."""

    id: str
    object: Literal["organization.project.api_key"] = "organization.project.api_key"
    name: str
    redacted_value: str
    created_at: int
    last_used_at: int | None
    """Always null: ROSE does not write on each call."""
    expires_at: int | None
    owner: KeyOwner
    owner_project_access: Literal["active", "inactive"] = "active"
    scope: str
    """ROSE: read, write or admin."""
    kind: str
    """ROSE: api, or nats; of the latter `id` is the user's name on NATS and the secret its password."""


# --- webhooks

EventType = Annotated[str, Meta(extra_json_schema={"enum": list(EVENT_TYPES)})]
EndpointName = Annotated[str, Meta(min_length=1, max_length=256)]


class CreateWebhookEndpoint(Struct, frozen=True, kw_only=True):
    """What an endpoint shall be."""

    event_types: Annotated[list[EventType], Meta(min_length=1)]
    name: EndpointName
    url: str


class UpdateWebhookEndpoint(Struct, frozen=True, kw_only=True):
    """What shall be different."""

    event_types: Annotated[list[EventType], Meta(min_length=1)] | UnsetType = UNSET
    name: EndpointName | UnsetType = UNSET
    url: str | UnsetType = UNSET
    status: Literal["enabled", "disabled"] | UnsetType = UNSET
    """ROSE."""


class RotateWebhookSecret(Struct, frozen=True, kw_only=True):
    """What becomes of the old secret."""

    keep_old_secret_active_for_24_hours: bool = False


class TestWebhookEndpoint(Struct, frozen=True, kw_only=True):
    """Which event to make up."""

    event_type: EventType


class WebhookEndpoint(Struct, frozen=True, kw_only=True):
    """Where events go."""

    id: str
    object: Literal["webhook_endpoint"] = "webhook_endpoint"
    created_at: int
    updated_at: int
    """Last change of the configuration or the secret."""
    event_types: tuple[str, ...]
    name: str
    url: str
    signing_secret_hint: str
    status: Literal["enabled", "disabled"]
    """ROSE: to a disabled one nothing is sent; an update with the status enabled or another address ends that."""
    disabled_reason: str | None
    """ROSE: requested, gone (the receiver answered 410) or failing (nothing arrived for three days)."""
    disabled_detail: str | None
    """ROSE: what happened."""


class WebhookEndpointWithSecret(WebhookEndpoint, frozen=True, kw_only=True):
    """The same, with the secret: it is shown this once."""

    signing_secret: str


class WebhookTestResult(Struct, frozen=True, kw_only=True):
    """What the receiver answered."""

    object: Literal["webhook_endpoint.test"] = "webhook_endpoint.test"
    event_type: str
    status_code: int
    success: Literal[True] = True
    """That there was an answer, whatever its status."""
    webhook_endpoint_id: str


class WebhookEventTypes(Struct, frozen=True, kw_only=True):
    """Events that ROSE sends."""

    object: Literal["list"] = "list"
    data: tuple[str, ...]


# --- the server


class Welcome(Struct, frozen=True, kw_only=True):
    """What answers here."""

    name: str
    version: str
    about: str
    base_url: str
    """What SDKs take as `base_url` or OPENAI_BASE_URL."""
    openapi: str
    documentation: str
    try_this: str


class Health(Struct, frozen=True, kw_only=True):
    """The process answers."""

    status: str


class Readiness(Struct, frozen=True, kw_only=True):
    """Whether requests can be served, and what is missing."""

    status: str
    """ready, degraded (all but the announcement of events works), or not_ready."""
    postgres: str
    migrations: str
    nats: str
    """connected, away or unknown, as the relay sees it."""
    projections: dict[str, str]
    """Each view that is read from the log: running, building or stopped."""
    trainers: int
    engines: int
    waiting_for_engine: int
    """Requests that wait here for a place at an engine."""
