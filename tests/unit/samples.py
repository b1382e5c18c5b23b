"""One sample of every event, and jobs in each state, for the tests of the pure domain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from rose.domain import job_commands as ask
from rose.domain import job_events as happened
from rose.domain.artifacts import Artifact
from rose.domain.catalogue import Event
from rose.domain.files import FileDeleted, FileUploaded
from rose.domain.hyperparameter_requests import HyperparametersRequest
from rose.domain.hyperparameters import DataFacts, Hyperparameters, resolve
from rose.domain.job_values import (
    BaseModel,
    BaseRequest,
    Checkpoint,
    JobError,
    PinnedFile,
    StepMetrics,
    Warning,
)
from rose.domain.jobs import JobState, decide, evolve, initial
from rose.domain.keys import KeyCreated, KeyRevoked, ServiceAccount
from rose.domain.models import ModelDeleted, ModelRegistered
from rose.domain.permissions import PermissionGranted, PermissionWithdrawn
from rose.domain.projects import ProjectArchived, ProjectCreated, ProjectRenamed
from rose.domain.uploads import PartAdded, UploadCancelled, UploadCompleted, UploadCreated
from rose.domain.webhooks import (
    WebhookCreated,
    WebhookDeleted,
    WebhookDisabled,
    WebhookEnabled,
    WebhookSecretRotated,
    WebhookUpdated,
)
from tests.hyperparameters import parse

JOB = "ftjob_aaaaaaaaaaaaaaaaaaaa"
FILE = "file_bbbbbbbbbbbbbbbbbbbb"
UPLOAD = "upload_dddddddddddddddddddd"
WEBHOOK = "whe_ffffffffffffffffffff"
PART = "part_eeeeeeeeeeeeeeeeeeee"
NOW = 1_718_109_296
ARTIFACT = Artifact(path=f"files/{FILE}", bytes=12, sha256="0" * 64)
PINNED = PinnedFile(id=FILE, filename="training_data.jsonl", artifact=ARTIFACT)
BASE = BaseModel(source="tiny", revision=None, fingerprint="f" * 64, hidden_size=128, model_type="qwen3")
FACTS = DataFacts(examples=2, validation_file_examples=None, hidden_size=128, model_type="qwen3", context_tokens=512)

REASONS = {"n_epochs": "3 epochs over 2 examples are under 100, so min(25, 100 // 2)"}
"""Kept here, because their words may change and golden events may not."""


def numbers(**given: Any) -> Hyperparameters:
    """Resolved hyperparameters of two examples, with the first version's rates: rules may change, events may not."""
    rate = 8.203087245247474e-05
    return msgspec.structs.replace(resolve(parse(given), FACTS, seed=7), base_learning_rate=rate, learning_rate=rate)


def step(number: int, **more: Any) -> StepMetrics:
    """Metrics of a step."""
    return StepMetrics(
        step=number,
        total_steps=50,
        epoch=number / 2,
        train_loss=1.0 / number,
        train_mean_token_accuracy=0.5,
        learning_rate=1e-3,
        gradient_norm=0.1,
        trained_tokens=10 * number,
        **more,
    )


CREATE = ask.CreateJob(
    job_id=JOB,
    at=NOW,
    project="default",
    model="qwen-coder",
    base_request=BaseRequest(source="tiny"),
    training_file=PINNED,
    validation_file=None,
    suffix="my-model-v1",
    seed=7,
    method="supervised",
    requested=HyperparametersRequest(),
    model_name="qwen-coder-ft-20240611_123456-my-model-v1",
    metadata={"team": "a"},
    code_version="0.1.0",
)
VALIDATE = ask.StartValidation(owner="worker-1", epoch=1, at=NOW)


def validated(epoch: int = 1) -> ask.FinishValidation:
    """The command that ends a validation."""
    return ask.FinishValidation(
        epoch=epoch,
        at=NOW,
        base=BASE,
        hyperparameters=numbers(),
        tokens=40,
        validation_tokens=0,
        needs={"device": "any"},
        warnings=(Warning(code="few_examples", message="2 examples are few"),),
    )


def start(epoch: int, **more: Any) -> ask.StartRun:
    """The command that claims a job."""
    return ask.StartRun(owner="worker-1", host="host", epoch=epoch, at=NOW, **more)


def given(*commands: ask.Command, state: JobState = initial) -> JobState:
    """Return the state after commands that are all allowed."""
    for command in commands:
        state = fold(decide(command, state), state)
    return state


def fold(events: Sequence[Any], state: JobState = initial) -> JobState:
    """Return the state after events."""
    for event in events:
        state = evolve(state, event)
    return state


SAMPLES: tuple[Event, ...] = (
    decide(CREATE, initial)[0],
    happened.ValidationStarted(epoch=1, owner="worker-1", training_file=FILE, validation_file=None),
    happened.FilesValidated(
        epoch=1,
        base=BASE,
        hyperparameters=msgspec.structs.replace(numbers(), reasons=REASONS),
        tokens=40,
        validation_tokens=0,
        needs={"device": "any"},
        warnings=(Warning(code="few_examples", message="2 examples are few"),),
    ),
    happened.JobQueued(reason="validated"),
    happened.RunStarted(epoch=2, owner="worker-1", host="host", at=NOW, attempt=1, device="cpu"),
    happened.LeaseExpired(epoch=2, kind="training"),
    happened.PhaseEntered(epoch=2, phase="train"),
    happened.RunResumed(epoch=2, from_step=3, rejected=("step 4: truncated",)),
    happened.StepsReported(epoch=2, steps=(step(1), step(2, valid_loss=0.5, valid_mean_token_accuracy=0.9))),
    happened.RecoveryPointSaved(epoch=2, step=2, artifact=ARTIFACT, trained_tokens=20),
    happened.CheckpointSaved(
        epoch=2,
        checkpoint=Checkpoint(
            id="ftckpt_cccccccccccccccccccc",
            step=2,
            epoch_number=1,
            model_name="m:ckpt-step-2",
            artifact=ARTIFACT,
            metrics={"train_loss": 0.5},
            created_at=NOW,
        ),
    ),
    happened.JobWarned(epoch=2, warning=Warning(code="no_space", message="a recovery point could not be written")),
    happened.RunReleased(epoch=2, kind="training", reason="crashed", detail="signal 9", log="/logs/run.log"),
    happened.JobPaused(at=NOW, reason="requested"),
    happened.JobCancelled(at=NOW),
    happened.JobSucceeded(
        epoch=2,
        at=NOW,
        model_name="m",
        artifact=ARTIFACT,
        kind="adapter",
        step=50,
        trained_tokens=1000,
        result_file=FILE,
    ),
    happened.JobFailed(at=NOW, error=JobError(code="training_diverged", message="the loss is not a number")),
    FileUploaded(
        project="default",
        file_id=FILE,
        created_at=NOW,
        filename="training_data.jsonl",
        purpose="fine-tune",
        artifact=ARTIFACT,
    ),
    FileDeleted(at=NOW),
    ModelRegistered(
        project="default",
        job_id=JOB,
        name="m",
        created_at=NOW,
        kind="adapter",
        artifact=ARTIFACT,
        base=BASE,
        lora=numbers().lora_config,
        step=50,
    ),
    ModelDeleted(at=NOW),
    ProjectCreated(project="proj_iiiiiiiiiiiiiiiiiiii", created_at=NOW, name="red"),
    ProjectRenamed(name="crimson"),
    ProjectArchived(at=NOW),
    KeyCreated(
        key_id="key_jjjjjjjjjjjjjjjjjjjj",
        project="default",
        created_at=NOW,
        name="bot",
        account=ServiceAccount(id="svc_acct_kkkkkkkkkkkkkkkkkkkk", name="bot", created_at=NOW),
        scope="write",
        hint="wxyz",
        expires_at=NOW + 86400,
    ),
    KeyRevoked(at=NOW),
    PermissionGranted(
        permission_id="cp_llllllllllllllllllll",
        project="default",
        grantee="proj_iiiiiiiiiiiiiiiiiiii",
        model="m",
        created_at=NOW,
    ),
    PermissionWithdrawn(at=NOW),
    UploadCreated(
        project="default",
        upload_id=UPLOAD,
        created_at=NOW,
        expires_at=NOW + 3600,
        filename="training_data.jsonl",
        purpose="fine-tune",
        bytes=12,
        mime_type="text/jsonl",
        file_lifetime_seconds=3600,
    ),
    PartAdded(part_id=PART, at=NOW, artifact=Artifact(path=f"uploads/{UPLOAD}/{PART}", bytes=12, sha256="0" * 64)),
    UploadCompleted(at=NOW, file_id=FILE, part_ids=(PART,), md5="0" * 32),
    UploadCancelled(at=NOW),
    WebhookCreated(
        project="default",
        webhook_id=WEBHOOK,
        created_at=NOW,
        name="ci",
        url="https://example.com/hook",
        event_types=("fine_tuning.job.succeeded",),
        secret_id="whsecret_gggggggggggggggggggg",
        secret_hint="whsec_…Mxs=",
    ),
    WebhookUpdated(at=NOW, name="ci 2", url=None, event_types=("fine_tuning.job.failed",)),
    WebhookSecretRotated(
        at=NOW, secret_id="whsecret_hhhhhhhhhhhhhhhhhhhh", secret_hint="whsec_…b3c=", old_until=NOW + 86400
    ),
    WebhookDisabled(at=NOW, reason="gone", detail="The receiver answered 410 Gone."),
    WebhookEnabled(at=NOW),
    WebhookDeleted(at=NOW),
)
