"""Log events -> OpenAI job events. Pure; the list and the stream both show exactly what this makes.

A job event's id is computed from the log position and the index within that event, so it is ordered, reversible and
the same after any rebuild. It is at once the OpenAI id, the server-sent event's id and the cursor of `after`.
"""

from __future__ import annotations

from typing import Any, Literal, assert_never

import msgspec

from rose.domain import job_events as events
from rose.domain.job_values import ServedAsTrained, StepMetrics
from rose.errors import InvalidRequest

PREFIX = "ftevent_"
_DIGITS = "0123456789abcdefghijklmnopqrstuv"
"""Base 32 whose order is that of ASCII, so ids sort like positions."""
_POSITION_WIDTH = 13
_INDEX_WIDTH = 3
_LAST_POSITION = (1 << 63) - 1

Level = Literal["info", "warn", "error"]
DISK_FULL = "The disk is full"


class JobMessage(msgspec.Struct, frozen=True, kw_only=True):
    """One job event, in OpenAI's shape once `object` and `created_at` are added."""

    id: str
    level: Level
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any]


def event_id(position: int, index: int) -> str:
    """Return the id of message `index` of the log event at `position`."""
    return PREFIX + _encode(position, _POSITION_WIDTH) + _encode(index, _INDEX_WIDTH)


def parse_event_id(text: str) -> tuple[int, int]:
    """Return position and index. Raises: InvalidRequest when `text` is no job event id."""
    digits = text.removeprefix(PREFIX)
    if not text.startswith(PREFIX) or len(digits) != _POSITION_WIDTH + _INDEX_WIDTH or set(digits) - set(_DIGITS):
        raise _no_id(text)
    position, index = int(digits[:_POSITION_WIDTH], 32), int(digits[_POSITION_WIDTH:], 32)
    if position > _LAST_POSITION:
        raise _no_id(text)
    return position, index


def _no_id(text: str) -> InvalidRequest:
    return InvalidRequest(f"{text[:60]!r} is not the id of a job event.", code="invalid_value", param="after")


def job_messages(position: int, event: events.Event) -> tuple[JobMessage, ...]:
    """Return the job events that the log event at `position` causes, oldest first; often none."""
    return tuple(
        JobMessage(id=event_id(position, index), level=level, message=text, type=kind, data=data)
        for index, (level, text, kind, data) in enumerate(_texts(event))
    )


_Line = tuple[Level, str, Literal["message", "metrics"], dict[str, Any]]


def _texts(event: events.Event) -> list[_Line]:
    match event:
        case events.JobCreated():
            return [_info(f"Created fine-tuning job: {event.job_id}")]
        case events.ValidationStarted():
            files = f"training file: {event.training_file}"
            if event.validation_file:
                files += f" and validation file: {event.validation_file}"
            return [_info(f"Validating {files}")]
        case events.FilesValidated():
            chosen = event.hyperparameters
            text = (
                f"Files validated, moving job to queued state: {chosen.total_steps} steps, "
                f"learning rate {chosen.learning_rate:.3g}"
            )
            warnings = [_warn(warning.message, warning.code) for warning in event.warnings]
            data = {"hyperparameters": msgspec.to_builtins(chosen), "base_model": msgspec.to_builtins(event.base)}
            return [*warnings, ("info", text, "message", data)]
        case events.JobQueued(reason="resumed"):
            return [_info("Job resumed, moving it to queued state")]
        case events.JobQueued():
            return []
        case events.RunStarted(attempt=1, epoch=epoch):
            return [_info("Fine-tuning job started", epoch=epoch, host=event.host)]
        case events.RunStarted():
            return [_info(f"Fine-tuning job goes on (attempt {event.attempt})", epoch=event.epoch, host=event.host)]
        case events.LeaseExpired():
            return [_warn("The trainer stopped answering; the job is taken up again", "lease_expired")]
        case events.PhaseEntered(phase="download"):
            return [_info("Downloading the base model")]
        case events.PhaseEntered(phase="build"):
            return [_info("Building the base model, which takes about a minute")]
        case events.PhaseEntered():
            return []
        case events.RunResumed():
            rejected = [
                _warn(f"A recovery point could not be used: {text}", "recovery_point_rejected")
                for text in event.rejected
            ]
            if event.anew:
                text = "What is learned from the file has changed since the job began, so training begins anew"
                return [*rejected, _warn(text, "training_begins_anew")]
            return [*rejected, _info(f"Training resumed from step {event.from_step}", from_step=event.from_step)]
        case events.StepsReported():
            return [_metrics(step) for step in event.steps]
        case events.RecoveryPointSaved():
            return []
        case events.CheckpointSaved(checkpoint=checkpoint):
            text = f"Checkpoint created at step {checkpoint.step} with Snapshot ID: {checkpoint.model_name}"
            return [_info(text, step=checkpoint.step, checkpoint=checkpoint.id)]
        case events.JobWarned(warning=warning):
            return [_warn(warning.message, warning.code)]
        case events.RunReleased():
            return _released(event)
        case events.JobPaused():
            return [_info(f"Job paused: {_pause(event)}")]
        case events.JobCancelled():
            return [_info("The job was cancelled")]
        case events.JobSucceeded():
            return [
                *_served_as_trained(event.served_as_trained),
                _info(f"New fine-tuned model created: {event.model_name}", fine_tuned_model=event.model_name),
                _info("The job has successfully completed"),
            ]
        case events.JobFailed(error=error):
            return [
                ("error", f"The job failed: {error.message}", "message", {"code": error.code, "param": error.param})
            ]
        case _:
            assert_never(event)


def _pause(event: events.JobPaused) -> str:
    if event.reason == "requested":
        return event.reason
    return f"{DISK_FULL}: {event.detail}" if event.detail else DISK_FULL


def _released(event: events.RunReleased) -> list[_Line]:
    if event.reason == "drained":
        return [_info("The trainer was stopped; the job goes on when one is there again")]
    if event.reason == "paused":
        return []
    texts = {
        "crashed": "The training process ended unexpectedly",
        "stalled": "The training process hung and was stopped",
        "no_space": DISK_FULL,
    }
    return [_warn(f"{texts[event.reason]}: {event.detail}" if event.detail else texts[event.reason], event.reason)]


def _served_as_trained(found: ServedAsTrained | None) -> list[_Line]:
    if found is None:
        return []
    data = msgspec.to_builtins(found)
    if found.status != "proven":
        return [("info", f"Not proven to be served as it was trained: {found.reason}", "message", data)]
    text = (
        f"The served model gives the trainer's numbers: largest difference {found.largest_difference:.2g} over "
        f"{found.tokens} tokens (bound {found.largest_allowed:g})"
    )
    return [("info", text, "message", data)]


def _info(text: str, **data: Any) -> _Line:
    return ("info", text, "message", data)


def _warn(text: str, code: str) -> _Line:
    return ("warn", text, "message", {"code": code})


def _metrics(step: StepMetrics) -> _Line:
    text = f"Step {step.step}/{step.total_steps}: training loss={step.train_loss:.2f}"
    if step.valid_loss is not None:
        text += f", validation loss={step.valid_loss:.2f}"
    if step.full_valid_loss is not None:
        text += f", full validation loss={step.full_valid_loss:.2f}"
    data = {name: value for name, value in msgspec.to_builtins(step).items() if value is not None}
    data |= data.pop("measured", {})
    data |= {f"valid_{name}": value for name, value in data.pop("valid_measured", {}).items()}
    return ("info", text, "metrics", data)


def _encode(number: int, width: int) -> str:
    digits = []
    for _ in range(width):
        number, digit = divmod(number, 32)
        digits.append(_DIGITS[digit])
    if number:
        raise ValueError("the number does not fit the id's width")
    return "".join(reversed(digits))
