"""`rose finetune …`: create, look at and change fine-tuning jobs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Group, Parameter
from cyclopts.validators import Number

from cli.job_lines import event_line, job_lines, outcome_status
from cli.options import COMMON, Common
from cli.output import moment
from rose.errors import InvalidRequest

if TYPE_CHECKING:
    from cli.client import Client
    from rose.api import schema

_LORA = Group("LoRA")


def create(
    file: str,
    /,
    *,
    model: Annotated[str, Parameter(name=["--model", "-m"], env_var="ROSE_MODEL")],
    suffix: Annotated[str | None, Parameter(env_var="ROSE_SUFFIX")] = None,
    method: Annotated[str | None, Parameter(env_var="ROSE_METHOD")] = None,
    beta: Annotated[str | None, Parameter(env_var="ROSE_BETA")] = None,
    epochs: Annotated[str | None, Parameter(env_var="ROSE_EPOCHS")] = None,
    batch_size: Annotated[str | None, Parameter(env_var="ROSE_BATCH_SIZE")] = None,
    learning_rate: Annotated[str | None, Parameter(env_var="ROSE_LEARNING_RATE")] = None,
    validation_file: Annotated[str | None, Parameter(env_var="ROSE_VALIDATION_FILE")] = None,
    validation_split: Annotated[str | None, Parameter(env_var="ROSE_VALIDATION_SPLIT")] = None,
    early_stopping_patience: Annotated[str | None, Parameter(env_var="ROSE_EARLY_STOPPING_PATIENCE")] = None,
    warmup_ratio: Annotated[str | None, Parameter(env_var="ROSE_WARMUP_RATIO")] = None,
    thinking: Annotated[Literal["auto", "on", "off"] | None, Parameter(env_var="ROSE_THINKING")] = None,
    use_lora: Annotated[bool | None, Parameter(env_var="ROSE_USE_LORA")] = None,
    lora_r: Annotated[str | None, Parameter(env_var="ROSE_LORA_R", group=_LORA)] = None,
    lora_alpha: Annotated[str | None, Parameter(env_var="ROSE_LORA_ALPHA", group=_LORA)] = None,
    lora_dropout: Annotated[str | None, Parameter(env_var="ROSE_LORA_DROPOUT", group=_LORA)] = None,
    target_modules: Annotated[
        list[str] | None, Parameter(env_var="ROSE_TARGET_MODULES", group=_LORA, negative="")
    ] = None,
    seed: Annotated[int | None, Parameter(env_var="ROSE_SEED")] = None,
    metadata: Annotated[list[str] | None, Parameter(env_var="ROSE_METADATA", negative="")] = None,
    watch_it: Annotated[bool, Parameter(name="--watch", env_var="ROSE_WATCH", negative="")] = False,
    common: Common = COMMON,
) -> int:
    """Create a fine-tuning job.

    Parameters
    ----------
    file
        An uploaded file's id, a unique beginning of it, `last`, or the path of a file, which is uploaded first.
    model
        An alias, a hub id, a local folder, or a fine-tuned model to go on from.
    suffix
        Last part of the new model's name.
    method
        supervised (default), or dpo to learn from pairs of a preferred and another answer.
    beta
        How near the model stays to where it began, above 0 to 2, or auto (0.1); of the method dpo.
    epochs
        Passes over the data, 1 to 50, or auto.
    batch_size
        Examples per step, 1 to 256, or auto.
    learning_rate
        Multiplier of ROSE's base learning rate, or auto (1).
    validation_file
        File to measure on while training: id or path.
    validation_split
        Share of the training file to hold out instead, 0 to below 1.
    early_stopping_patience
        Evaluations without improvement after which training stops.
    warmup_ratio
        Share of the steps in which the learning rate rises, 0 to 1.
    thinking
        Whether the model thinks before it answers; auto (default): when a learned answer of the file has a thought.
    use_lora
        Train an adapter (default) or, with --no-use-lora, the whole model.
    lora_r
        Rank of the adapter.
    lora_alpha
        Scale of the adapter: its update is multiplied by alpha / r.
    lora_dropout
        Dropout on the adapter's input.
    target_modules
        Layers that get an adapter; repeat for several.
    seed
        The same seed, data and settings give the same model.
    metadata
        key=value to keep with the job; repeat for several.
    watch_it
        Watch the job until it ends.
    """
    lora = {
        "r": _number(lora_r, "--lora-r"),
        "lora_alpha": _number(lora_alpha, "--lora-alpha"),
        "lora_dropout": _number(lora_dropout, "--lora-dropout"),
        "target_modules": target_modules,
    }
    knobs: dict[str, Any] = {
        "n_epochs": _number(epochs, "--epochs"),
        "batch_size": _number(batch_size, "--batch-size"),
        "learning_rate_multiplier": _number(learning_rate, "--learning-rate"),
        "validation_split": _number(validation_split, "--validation-split"),
        "early_stopping_patience": _number(early_stopping_patience, "--early-stopping-patience"),
        "warmup_ratio": _number(warmup_ratio, "--warmup-ratio"),
        "thinking": thinking,
        "use_lora": use_lora,
        "lora_config": _given(lora) or None,
    }
    own = _given({"beta": _number(beta, "--beta")})
    pairs = _pairs(metadata) if metadata else None
    with common.client() as client:
        body: dict[str, Any] = {
            "model": _model(model),
            "training_file": _file_id(client, file, common),
            "validation_file": _file_id(client, validation_file, common) if validation_file else None,
            "suffix": suffix,
            "seed": seed,
            "method": _method(method, own),
            "hyperparameters": _given(knobs) or None,
            "metadata": pairs,
        }
        job = client.create_job(_given(body))
        common.output.show(job, identity=job.id, lines=[f"Fine-tuning job created: {job.id}"])
        if job.waiting_for:
            common.output.talk(f"It waits: {job.waiting_for}")
        if watch_it:
            return _watch(client, job.id, common)
        common.output.talk(f"Watch it with: rose finetune watch {job.id}")
    return 0


def _method(name: str | None, own: dict[str, Any]) -> dict[str, Any] | None:
    """Return the method of a request, with the hyperparameters that only it has."""
    if name is None and not own:
        return None
    kind = name or "dpo"
    return {"type": kind, **({kind: {"hyperparameters": own}} if own else {})}


def list_jobs(
    *,
    limit: Annotated[int | None, Parameter(env_var="ROSE_LIMIT", validator=Number(gte=1))] = None,
    common: Common = COMMON,
) -> None:
    """List jobs, newest first.

    Parameters
    ----------
    limit
        Show only this many.
    """
    with common.client() as client:
        found = client.jobs(limit)
    rows = [(job.id, job.status, job.model, job.fine_tuned_model or "", moment(job.created_at)) for job in found]
    common.output.table(
        ("id", "status", "model", "fine-tuned model", "created"),
        rows,
        things=found,
        empty="No jobs yet. Try: rose finetune create data.jsonl --model qwen-coder",
    )


def get(job: str, /, *, common: Common = COMMON) -> None:
    """Show a job: its state, what it waits for, every setting and why.

    Parameters
    ----------
    job
        Its id, a unique beginning of it, or `last`.
    """
    with common.client() as client:
        found = client.job(client.resolve(job, "ftjob_"))
    common.output.show(found, identity=found.id, lines=job_lines(found))


def events(
    job: str,
    /,
    *,
    follow: Annotated[bool, Parameter(env_var="ROSE_FOLLOW")] = True,
    common: Common = COMMON,
) -> int:
    """Stream a job's events until it ends.

    Parameters
    ----------
    job
        Its id, a unique beginning of it, or `last`.
    follow
        Wait for new events; --no-follow prints those there are.
    """
    with common.client() as client:
        job_id = client.resolve(job, "ftjob_")
        if not follow:
            for event in reversed(client.job_events(job_id)):
                _print_event(event, common)
            return 0
        try:
            for event in client.stream_events(job_id, common.output.talk):
                _print_event(event, common)
        except KeyboardInterrupt:
            return _detached(job_id, "events", common)
        return outcome_status(client.job(job_id))


def watch(job: str, /, *, common: Common = COMMON) -> int:
    """Watch a job train: step, epoch, loss, speed, time left. Ctrl-C leaves the job running.

    Parameters
    ----------
    job
        Its id, a unique beginning of it, or `last`.
    """
    with common.client() as client:
        return _watch(client, client.resolve(job, "ftjob_"), common)


def checkpoints(job: str, /, *, common: Common = COMMON) -> None:
    """List a job's checkpoints, newest first.

    Parameters
    ----------
    job
        Its id, a unique beginning of it, or `last`.
    """
    with common.client() as client:
        found = client.checkpoints(client.resolve(job, "ftjob_"))
    rows = [
        (
            item.fine_tuned_model_checkpoint,
            str(item.step_number),
            _loss(item.metrics),
            moment(item.created_at),
        )
        for item in found
    ]
    common.output.table(("model", "step", "loss", "created"), rows, things=found, empty="No checkpoints yet.")


def cancel(job: str, /, *, common: Common = COMMON) -> None:
    """End a job.

    Parameters
    ----------
    job
        Its id, a unique beginning of it, or `last`.
    """
    _change(job, "cancel", "Job cancelled", common)


def pause(job: str, /, *, common: Common = COMMON) -> None:
    """Hold a job until it is resumed.

    Parameters
    ----------
    job
        Its id, a unique beginning of it, or `last`.
    """
    _change(job, "pause", "Job paused", common)


def resume(job: str, /, *, common: Common = COMMON) -> None:
    """Go on with a paused job.

    Parameters
    ----------
    job
        Its id, a unique beginning of it, or `last`.
    """
    _change(job, "resume", "Job resumed", common)


def _change(job: str, verb: str, said: str, common: Common) -> None:
    with common.client() as client:
        changed = client.change_job(client.resolve(job, "ftjob_"), verb)
    common.output.show(changed, identity=changed.id, lines=[f"{said}: {changed.id}"])


def _watch(client: Client, job_id: str, common: Common) -> int:
    from cli.watching import watch_job

    try:
        job = watch_job(client, job_id, common)
    except KeyboardInterrupt:
        return _detached(job_id, "watch", common)
    return outcome_status(job)


def _detached(job_id: str, command: str, common: Common) -> int:
    common.output.talk(f"\nThe job goes on. Come back with: rose finetune {command} {job_id}")
    return 130


def _print_event(event: schema.JobEvent, common: Common) -> None:
    if common.json:
        import msgspec

        common.output.piece(msgspec.json.encode(event).decode() + "\n")
    elif common.quiet:
        common.output.piece(event.message + "\n")
    else:
        common.output.line(event_line(event))


def _file_id(client: Client, given: str, common: Common) -> str:
    from cli.commands.files import require_good_data, upload_once

    path = Path(given)
    if not path.is_file():
        if path.suffix == ".jsonl" or "/" in given:
            raise InvalidRequest(f"There is no file {given}.", code="no_such_file", param="training_file")
        return client.resolve(given, "file_")
    require_good_data(path, "nothing was uploaded")
    uploaded, known = upload_once(client, path, common.output)
    common.output.talk(f"{'Already uploaded' if known else 'File uploaded'}: {uploaded.id}")
    return uploaded.id


def _model(given: str) -> str:
    """Make a local folder's path absolute, since the server runs elsewhere."""
    if given.startswith(("./", "../", "~")):
        return str(Path(given).expanduser().absolute())
    return given


def _number(text: str | None, flag: str) -> int | float | str | None:
    if text is None or text == "auto":
        return text
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    raise InvalidRequest(f"{flag} is {text!r}; it must be a number or auto.", code="invalid_value", param=flag)


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _pairs(given: list[str]) -> dict[str, str]:
    pairs = [one.partition("=") for one in given]
    for key, mark, _ in pairs:
        if not mark or not key:
            raise InvalidRequest(f"--metadata {key!r} is not key=value.", code="invalid_value", param="metadata")
    return {key: value for key, _, value in pairs}


def _loss(metrics: dict[str, float]) -> str:
    loss = metrics.get("full_valid_loss", metrics.get("valid_loss", metrics.get("train_loss")))
    return "" if loss is None else f"{loss:.4f}"
