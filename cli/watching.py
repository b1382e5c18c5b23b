"""`rose finetune watch`: a live progress bar on a terminal, plain lines elsewhere, from the job's event stream."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from cli.job_lines import event_line
from cli.output import console, duration

if TYPE_CHECKING:
    from cli.client import Client
    from cli.options import Common
    from rose.api import schema


def watch_job(client: Client, job_id: str, common: Common) -> schema.Job:
    """Show a job until it ends and return it. Raises: KeyboardInterrupt when the watcher leaves."""
    job = client.job(job_id)
    if job.waiting_for:
        common.output.talk(f"It waits: {job.waiting_for}")
    if sys.stdout.isatty() and not common.json and not common.quiet:
        _watch_live(client, job_id, common)
    else:
        for event in client.stream_events(job_id, common.output.talk):
            if common.json:
                common.output.raw(event)
            else:
                common.output.line(_with_speed(event))
    job = client.job(job_id)
    if job.status == "succeeded":
        if not common.json:
            common.output.show(job, identity=job.fine_tuned_model, lines=[f"Model: {job.fine_tuned_model}"])
        common.output.talk(f'Try it: rose chat "…" --model {job.fine_tuned_model}')
    elif job.error:
        common.output.warn(job.error.message)
        common.output.talk(f"Everything about it: rose finetune get {job_id}; its log: rose logs {job_id}")
    return job


def _watch_live(client: Client, job_id: str, common: Common) -> None:
    from rich.progress import BarColumn, Progress, TaskID, TextColumn

    with Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[numbers]}"), console=console()
    ) as progress:
        task: TaskID = progress.add_task("waiting", total=None, numbers="")
        for event in client.stream_events(job_id, common.output.talk):
            data = event.data
            if event.type != "metrics":
                progress.console.print(event_line(event), soft_wrap=True)  # names are copied: whole
                continue
            progress.update(
                task,
                description=f"step {data['step']}/{data['total_steps']}",
                total=data["total_steps"],
                completed=data["step"],
                numbers=numbers(data),
            )


def numbers(data: dict[str, Any], *, losses: bool = True) -> str:
    """Return epoch, losses, speed and time left of a metrics event."""
    speed = data.get("tokens_per_second") or 0
    parts = [f"epoch {data['epoch']:.2f}"]
    if losses:
        parts.append(f"loss {data['train_loss']:.4f}")
        if data.get("valid_loss") is not None:
            parts.append(f"valid {data['valid_loss']:.4f}")
    parts.append(f"{speed:.0f} tokens/s")
    if speed and data["step"]:
        left = (data["total_steps"] - data["step"]) * data["trained_tokens"] / data["step"] / speed
        parts.append(f"{duration(left)} left")
    return "  ".join(parts)


def _with_speed(event: schema.JobEvent) -> str:
    line = event_line(event)
    return f"{line}  {numbers(event.data, losses=False)}" if event.type == "metrics" else line
