"""The process that logs one job to Weights & Biases: `python -m trainer.integrations.wandb_process SPEC.json`.

It is told which steps the log accepted and begins behind the last one that the run has: by what the service says, or
offline by what the files of former attempts hold. So it can be killed at any time and started anew. It says nothing of
the data, the program or the machine: hyperparameters, metrics, state and names only.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from trainer.child import REPORT_FD, log_to_standard_error
from trainer.integrations import wandb_files
from trainer.integrations.wandb_protocol import (
    DISABLED_WARNING,
    OFFLINE_WARNING,
    WARNING,
    End,
    Message,
    Steps,
    WandbSpec,
)
from trainer.protocol import Warned

# Before the package is imported: what goes wrong in it is nobody's business outside of this machine.
os.environ["WANDB_ERROR_REPORTING"] = "false"

import wandb
from wandb.proto import wandb_internal_pb2

log = logging.getLogger(__name__)

NICENESS = 5
"""Training goes first."""
INIT_SECONDS = 10.0
"""For the service's first answer; steps wait in the log meanwhile."""
FINISH_SECONDS = 8.0
"""For the upload of what is left, a little less than the supervisor waits."""
FLUSH_SECONDS = 1.0
"""Between writes to the run's file; what a kill loses is logged again by the next attempt."""


def main(arguments: Sequence[str]) -> int:
    """Log until told that it ends, and return the exit status."""
    log_to_standard_error()
    os.nice(NICENESS)
    spec = msgspec.json.decode(Path(arguments[0]).read_bytes(), type=WandbSpec)
    folder = Path(spec.folder)
    folder.mkdir(parents=True, exist_ok=True)
    wandb_files.wait_until_quiet(folder, spec.run_id)
    wandb_files.mend(folder, spec.run_id)
    written = wandb_files.last_step(folder, spec.run_id, _step_of)
    try:
        run = _begin(spec)
    except wandb.Error as error:
        _warn(WARNING, " ".join(str(error).split()))
        return 1
    if run.disabled:
        _warn(DISABLED_WARNING, "The trainer's environment disables Weights & Biases (WANDB_MODE); nothing goes there.")
    elif run.offline and not spec.offline:
        _warn(OFFLINE_WARNING, f"Weights & Biases is offline. {spec.where}")
    done = written if run.offline else run.starting_step - 1
    log.info("Run %s in %s goes on after step %d", spec.run_id, run.dir, done)
    return 0 if _log(run, done) else 1


def _begin(spec: WandbSpec) -> wandb.Run:
    """Start or continue the run. Raises: wandb.Error."""
    return wandb.init(
        id=spec.run_id,
        resume="allow",
        project=spec.project,
        name=spec.name,
        entity=spec.entity,
        tags=spec.tags,
        config=spec.config,
        allow_val_change=True,
        dir=spec.folder,
        mode="offline" if spec.offline else None,
        settings=wandb.Settings(
            console="off",
            silent=True,
            symlink=False,
            save_code=False,
            disable_code=True,
            disable_git=True,
            disable_job_creation=True,
            init_timeout=INIT_SECONDS,
            finish_timeout=FINISH_SECONDS,
            x_disable_meta=True,
            x_disable_machine_info=True,
            x_disable_stats=True,
            x_save_requirements=False,
            x_transaction_log_flush_interval=FLUSH_SECONDS,
        ),
    )


def _log(run: wandb.Run, done: int) -> bool:
    """Log steps after `done` until the end is told; False when the supervisor went away before that."""
    for message in _messages():
        match message:
            case Steps(steps=steps):
                for step in steps:
                    if step.step > done:
                        run.log(_metrics(msgspec.to_builtins(step)), step=step.step, commit=True)
                        done = step.step
            case End(summary=summary, goes_on=goes_on, succeeded=succeeded):
                run.summary.update(summary)
                if goes_on:
                    run.mark_preempting()
                run.finish(exit_code=0 if succeeded else 1)
                return True
    return False


def _messages() -> Iterator[Message]:
    decoder: msgspec.json.Decoder[Message] = msgspec.json.Decoder(Message)
    return map(decoder.decode, sys.stdin.buffer)


def _metrics(step: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in step.items() if value is not None and name != "step"}


def _step_of(record: bytes) -> int | None:
    parsed: Any = wandb_internal_pb2.Record.FromString(record)  # type: ignore[attr-defined]
    return parsed.history.step.num if parsed.HasField("history") else None


def _warn(code: str, message: str) -> None:
    log.warning("%s", message)
    os.write(int(os.environ[REPORT_FD]), msgspec.json.encode(Warned(code=code, message=message)) + b"\n")


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    if status:
        os._exit(status)  # the package's own exit hook would wait for a service that may never answer
