"""Jobs and job events as lines of text: the same facts on a terminal, in a pipe and in the watch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cli.output import duration, moment

if TYPE_CHECKING:
    from rose.api import schema
    from rose.domain.job_values import BaseModel, ServedAsTrained

EXIT_BY_STATUS = {"succeeded": 0, "failed": 8, "cancelled": 9}
BEFORE_TRAINING = {
    "download": "downloading the base model",
    "build": "building the base model",
    "validate": "checking the files",
}


def outcome_status(job: schema.Job) -> int:
    """Return the exit status that tells how a job ended: 0, 8 (failed) or 9 (cancelled)."""
    return EXIT_BY_STATUS.get(job.status, 0)


def event_line(event: schema.JobEvent) -> str:
    """Return one event: time, level unless it is info, message."""
    level = "" if event.level == "info" else f"{event.level}: "
    return f"{moment(event.created_at)}  {level}{event.message}"


def job_lines(job: schema.Job) -> list[str]:
    """Return everything about a job that a person wants to know, a fact a line."""
    facts: list[tuple[str, Any]] = [
        ("id", job.id),
        ("status", job.status),
        ("waits", job.waiting_for),
        ("progress", progress_text(job)),
        ("model", job.model),
        ("base", _base(job.base_model)),
        ("result", job.fine_tuned_model or _reserved(job)),
        ("training", job.training_file),
        ("validation", job.validation_file),
        ("seed", job.seed),
        ("created", moment(job.created_at)),
        ("finished", moment(job.finished_at)),
        ("tokens", job.trained_tokens),
        ("served", served_text(job.served_as_trained) if job.served_as_trained else ""),
        ("result file", ", ".join(job.result_files)),
        ("code", job.code_version),
    ]
    lines = [f"{name:<12}{value}" for name, value in facts if value not in (None, "")]
    lines.extend(_settings(job))
    lines.extend(f"warning     {warning.message}" for warning in job.warnings)
    if job.error is not None:
        lines.append(f"error       {job.error.code}: {job.error.message}")
        lines.extend(f"            {one}" for one in job.error.problems)
        if job.error.log:
            lines.append(f"log         {job.error.log}")
    if job.status == "succeeded":
        lines.append(f'try         rose chat "…" --model {job.fine_tuned_model}')
    return lines


def progress_text(job: schema.Job) -> str:
    """Return phase, step and share done; before the files are validated what is done for that, or an empty text."""
    progress = job.progress
    if not progress.total_steps:
        return BEFORE_TRAINING.get(progress.phase, "")
    text = f"step {progress.step}/{progress.total_steps} ({progress.percent:.0f} %)"
    text = f"{progress.phase}, {text}"
    if job.estimated_finish:
        import time

        text += f", {duration(job.estimated_finish - time.time())} left"
    return text


def served_text(found: ServedAsTrained) -> str:
    """Return what is known of the served model's numbers beside the trainer's."""
    if found.status == "not_proven":
        return f"not proven to be as trained: {found.reason}"
    if found.status == "differs":
        return f"not as trained: {found.reason}"
    rows = "held-out rows" if found.held_out else "trained rows"
    return (
        f"as trained: largest difference {found.largest_difference:.2g} (bound {found.largest_allowed:g}), mean "
        f"{found.mean_difference:.2g}, over {found.tokens} tokens of {found.rows} {rows}; trained in "
        f"{found.trained_as}, served in {found.served_as}"
    )


def _settings(job: schema.Job) -> list[str]:
    knobs = dict(job.resolved_hyperparameters or job.hyperparameters)
    reasons = knobs.pop("reasons", None) or {}
    lora = knobs.pop("lora_config", None) or {}
    knobs.update({f"lora_config.{name}": value for name, value in lora.items()})
    lines = []
    for name, value in knobs.items():
        why = f"   ({reasons[name]})" if name in reasons else ""
        lines.append(f"  {name} = {_shown(value)}{why}")
    return ["settings", *lines] if lines else []


def _shown(value: Any) -> str:
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _base(base: BaseModel | None) -> str:
    if not base:
        return ""
    revision = f" at {base.revision[:12]}" if base.revision else ""
    origin = f", from {base.origin}" if base.origin else ""
    numbers = f", {base.quantisation}" if base.quantisation else ""
    return f"{base.source}{revision} ({base.fingerprint[:12]}){origin}{numbers}"


def _reserved(job: schema.Job) -> str:
    name = job.reserved_model
    return f"{name} (reserved)" if name and job.status not in ("failed", "cancelled") else ""
