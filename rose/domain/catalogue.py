"""The list of all events: wire name and schema number <-> struct. A new event is one line here.

Fields only ever get added, with defaults; anything else takes a new schema number and an upcaster.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from rose.domain import files, job_events, keys, models, permissions, projects, uploads, webhooks
from rose.domain.projects import DEFAULT_PROJECT
from rose.errors import RoseError

Event = (
    job_events.Event
    | files.Event
    | models.Event
    | projects.Event
    | keys.Event
    | uploads.Event
    | permissions.Event
    | webhooks.Event
)

EVENTS: dict[str, tuple[int, type[Any]]] = {
    "job.created": (2, job_events.JobCreated),
    "job.validation_started": (1, job_events.ValidationStarted),
    "job.files_validated": (1, job_events.FilesValidated),
    "job.queued": (1, job_events.JobQueued),
    "job.started": (1, job_events.RunStarted),
    "job.lease_expired": (1, job_events.LeaseExpired),
    "job.phase_entered": (1, job_events.PhaseEntered),
    "job.run_resumed": (1, job_events.RunResumed),
    "job.steps_reported": (1, job_events.StepsReported),
    "job.recovery_point_saved": (1, job_events.RecoveryPointSaved),
    "job.checkpoint_saved": (1, job_events.CheckpointSaved),
    "job.warned": (1, job_events.JobWarned),
    "job.run_released": (1, job_events.RunReleased),
    "job.paused": (2, job_events.JobPaused),
    "job.cancelled": (1, job_events.JobCancelled),
    "job.succeeded": (1, job_events.JobSucceeded),
    "job.failed": (1, job_events.JobFailed),
    "file.uploaded": (2, files.FileUploaded),
    "file.deleted": (1, files.FileDeleted),
    "model.registered": (2, models.ModelRegistered),
    "model.deleted": (1, models.ModelDeleted),
    "project.created": (1, projects.ProjectCreated),
    "project.renamed": (1, projects.ProjectRenamed),
    "project.archived": (1, projects.ProjectArchived),
    "key.created": (1, keys.KeyCreated),
    "key.revoked": (1, keys.KeyRevoked),
    "permission.granted": (1, permissions.PermissionGranted),
    "permission.withdrawn": (1, permissions.PermissionWithdrawn),
    "upload.created": (1, uploads.UploadCreated),
    "upload.part_added": (1, uploads.PartAdded),
    "upload.completed": (1, uploads.UploadCompleted),
    "upload.cancelled": (1, uploads.UploadCancelled),
    "webhook.created": (1, webhooks.WebhookCreated),
    "webhook.updated": (1, webhooks.WebhookUpdated),
    "webhook.secret_rotated": (1, webhooks.WebhookSecretRotated),
    "webhook.disabled": (1, webhooks.WebhookDisabled),
    "webhook.enabled": (1, webhooks.WebhookEnabled),
    "webhook.deleted": (1, webhooks.WebhookDeleted),
}
UPCASTERS: dict[tuple[str, int], Callable[[dict[str, Any]], dict[str, Any]]] = {
    ("job.created", 1): lambda data: _renamed(
        {**data, "project": DEFAULT_PROJECT}, base="base_request", hyperparameters="requested"
    ),
    ("job.paused", 1): lambda data: {**data, **_pause(data["reason"])},
    ("file.uploaded", 1): lambda data: {**data, "project": DEFAULT_PROJECT},
    ("model.registered", 1): lambda data: {**data, "project": DEFAULT_PROJECT},
}
"""Wire name and schema number -> what makes the data those of the next number."""
_NAMES: dict[type[Any], tuple[str, int]] = {kind: (name, schema) for name, (schema, kind) in EVENTS.items()}


class UnknownEvent(RoseError):
    """The log holds an event that this version of ROSE does not know; a newer ROSE wrote it."""

    default_code = "unknown_event"


def name_of(event: Event) -> str:
    """Return the wire name, for example `job.created`."""
    return _NAMES[type(event)][0]


def encode(event: Event) -> tuple[str, int, bytes]:
    """Return wire name, schema number and JSON."""
    name, schema = _NAMES[type(event)]
    return name, schema, msgspec.json.encode(event)


def decode(name: str, schema: int, data: bytes | str | dict[str, Any]) -> Event:
    """Return the event; one of an older schema number as it would be written today.

    Raises: UnknownEvent for a name or schema number that this version does not know.
    """
    known = EVENTS.get(name)
    if known is not None and known[0] == schema and not isinstance(data, dict):
        return msgspec.json.decode(data, type=known[1])
    found: dict[str, Any] = data if isinstance(data, dict) else msgspec.json.decode(data)
    while known is not None and schema != known[0]:
        upcast = UPCASTERS.get((name, schema))
        if upcast is None:
            break
        found, schema = upcast(found), schema + 1
    if known is None or known[0] != schema:
        raise UnknownEvent(
            f"The log holds {name} (schema {schema}), which this version of ROSE does not know. Update ROSE."
        )
    return msgspec.convert(found, known[1])


def _pause(text: str) -> dict[str, str]:
    """Return reason and detail of a pause, which were one text: `requested`, or `no_space: ` and what happened."""
    if text == "requested":
        return {"reason": text, "detail": ""}
    return {"reason": "no_space", "detail": text.removeprefix("no_space: ")}


def _renamed(data: dict[str, Any], **names: str) -> dict[str, Any]:
    return {names.get(key, key): value for key, value in data.items()}
