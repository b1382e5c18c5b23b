"""Makes the answers that clients see. Pure: a state and a moment in, a struct of schema.py out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

import msgspec

from projections.checkpoints import CheckpointRow
from projections.damage import DAMAGED_ROW
from projections.files import DamagedFile
from projections.models import DamagedModel
from rose.api import schema
from rose.domain import keys, projects
from rose.domain.files import FileState
from rose.domain.jobs import JobState
from rose.domain.messages import JobMessage
from rose.domain.models import ModelState
from rose.domain.permissions import PermissionState
from rose.domain.uploads import UploadState
from rose.domain.webhooks import WebhookState
from rose.language_models.locate import RoseFacts
from rose.methods import options_of
from rose.tenants import PREFIXES

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


class _Named(Protocol):
    @property
    def id(self) -> str: ...


NamedEntry = TypeVar("NamedEntry", bound=_Named)


def listing(data: list[NamedEntry], *, has_more: bool, none: str | None = None) -> schema.Listing[NamedEntry]:
    """Return a page of a list; `none` stands for the ids of an empty one (OpenAI's file list wants a text there)."""
    return schema.Listing(
        data=data,
        first_id=data[0].id if data else none,
        last_id=data[-1].id if data else none,
        has_more=has_more and bool(data),
    )


def file(state: FileState) -> schema.File:
    """Return the file as clients see it; of one whose row is damaged what is left."""
    damaged = isinstance(state, DamagedFile)
    assert state.artifact is not None or damaged
    return schema.File(
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


def job(state: JobState, *, now: float, waiting_for: str | None = None) -> schema.Job:
    """Return the job as clients see it; `now` in Unix seconds, for the estimate while it runs."""
    chosen = state.hyperparameters
    echo = _echoed(state)
    succeeded = state.status == "succeeded"
    return schema.Job(
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
        method={"type": state.method, state.method: {"hyperparameters": echo | _options(state)}},
        seed=state.seed,
        trained_tokens=state.trained_tokens,
        result_files=[state.result_file] if state.result_file else [],
        error=state.error,
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
        served_as_trained=state.served_as_trained,
        training_data=state.training_file.artifact if state.training_file else None,
        code_version=state.code_version,
    )


def job_event(message: JobMessage, created_at: int) -> schema.JobEvent:
    """Return the job event as clients see it, in list and stream alike."""
    return schema.JobEvent(
        id=message.id,
        created_at=created_at,
        level=message.level,
        message=message.message,
        type=message.type,
        data=message.data,
    )


def checkpoint(made: CheckpointRow) -> schema.JobCheckpoint:
    """Return the checkpoint as clients see it."""
    return schema.JobCheckpoint(
        id=made.id,
        created_at=made.created_at,
        fine_tuning_job_id=made.job_id,
        fine_tuned_model_checkpoint=made.model_name,
        step_number=made.step,
        metrics={"step": made.step, **made.metrics},
    )


def fine_tuned_model(state: ModelState, folder: str) -> schema.Model:
    """Return a fine-tuned model as clients see it; `folder` is where its files lie."""
    assert state.artifact is not None
    assert state.base is not None
    return schema.Model(
        id=state.name,
        object="model",
        created=state.created_at,
        owned_by=schema.ORGANIZATION,
        kind=state.kind,
        source=state.base.source,
        job_id=state.job_id,
        base_model=state.base,
        step=state.step,
        artifact=state.artifact,
        folder=folder,
    )


def damaged_model(state: DamagedModel) -> schema.Model:
    """Return what is left of a model whose row is damaged."""
    return schema.Model(
        id=state.name or state.job_id,
        object="model",
        created=state.created_at,
        owned_by=schema.ORGANIZATION,
        kind=state.kind,
        source=state.base.source if state.base else "",
        job_id=state.job_id,
        error=schema.ModelError(code=DAMAGED_ROW, message=state.damage),
    )


def base_model(name: str, source: str, facts: RoseFacts | None = None) -> schema.Model:
    """Return a base model under the name by which it is known here; `facts` if it was imported on this machine."""
    origin = facts.origin if facts else None
    return schema.Model(
        id=name,
        object="model",
        created=0,
        owned_by="system",
        kind="base",
        source=source,
        origin=origin or msgspec.UNSET,
        quantisation=(facts.quantisation if facts else None) or msgspec.UNSET,
    )


def upload(state: UploadState, now: int, made: FileState | None = None) -> schema.Upload:
    """Return the upload as clients see it; `made` is the file once the upload is completed."""
    return schema.Upload(
        id=state.id,
        bytes=state.bytes,
        created_at=state.created_at,
        expires_at=state.expires_at,
        filename=state.filename,
        purpose=state.purpose,
        status=state.status(now),
        file=None if made is None else file(made),
    )


def permission(state: PermissionState) -> schema.Permission:
    """Return the permission as clients see it."""
    return schema.Permission(id=state.id, created_at=state.created_at, project_id=state.grantee)


def project(state: projects.ProjectState) -> schema.Project:
    """Return the project as clients see it."""
    return schema.Project(
        id=state.project,
        name=state.name,
        created_at=state.created_at,
        archived_at=state.archived_at,
        status="active" if state.archived_at is None else "archived",
    )


def service_account(account: keys.ServiceAccount) -> schema.ServiceAccount:
    """Return the service account as clients see it."""
    return schema.ServiceAccount(
        id=account.id,
        object="organization.project.service_account",
        name=account.name,
        created_at=account.created_at,
        role="member",
    )


def fresh_key(state: keys.KeyState, secret: str) -> schema.ServiceAccountKey:
    """Return a key with its secret, as it is shown once."""
    return schema.ServiceAccountKey(
        id=state.id,
        name=state.name,
        created_at=state.created_at,
        value=secret,
        expires_at=state.expires_at,
        scope=state.scope,
        kind=state.kind,
    )


def key(state: keys.KeyState) -> schema.ApiKey:
    """Return the key as clients see it."""
    return schema.ApiKey(
        id=state.id,
        name=state.name,
        redacted_value=f"{PREFIXES[state.kind]}…{state.hint}",
        created_at=state.created_at,
        last_used_at=None,
        expires_at=state.expires_at,
        owner=schema.KeyOwner(service_account=service_account(state.account)),
        scope=state.scope,
        kind=state.kind,
    )


def webhook_endpoint(state: WebhookState) -> schema.WebhookEndpoint:
    """Return the endpoint as clients see it."""
    return schema.WebhookEndpoint(**_endpoint(state))


def webhook_endpoint_with_secret(state: WebhookState, secret: str) -> schema.WebhookEndpointWithSecret:
    """Return the endpoint with its secret, as it is shown once."""
    return schema.WebhookEndpointWithSecret(**_endpoint(state), signing_secret=secret)


def _endpoint(state: WebhookState) -> dict[str, Any]:
    off = state.disabled
    return {
        "id": state.id,
        "created_at": state.created_at,
        "updated_at": state.updated_at,
        "event_types": state.event_types,
        "name": state.name,
        "url": state.url,
        "signing_secret_hint": state.secrets[0].hint,
        "status": "enabled" if off is None else "disabled",
        "disabled_reason": None if off is None else off.reason,
        "disabled_detail": None if off is None else off.detail,
    }


def _echoed(state: JobState) -> dict[str, Any]:
    """Return the hyperparameters as requested, with `auto` replaced by the numbers chosen once there are any."""
    given: Mapping[str, Any] = msgspec.to_builtins(state.hyperparameters or state.requested)
    return {name: given[name] for name in ECHOED}


def _options(state: JobState) -> dict[str, Any]:
    """Return the hyperparameters that only the job's method has; until they are chosen, as requested."""
    asked = dict.fromkeys(options_of(state.method), "auto") | state.requested.options
    return {**asked, **state.hyperparameters.options} if state.hyperparameters else asked


def _progress(state: JobState) -> schema.Progress:
    total = state.hyperparameters.total_steps if state.hyperparameters else None
    if state.is_terminal:
        phase = "done"
    elif state.run is None:
        phase = "wait"
    else:
        phase = state.run.phase
    percent = min(99, 100 * state.last_step // total) if total else 0
    return schema.Progress(
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
