"""Reads what Weights & Biases' own files say of a job's run, over all attempts, with the package's own records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import psutil
from wandb.proto import wandb_internal_pb2

from trainer.integrations import wandb_files
from trainer.integrations.wandb_mirror import MODULE


class WrittenRun:
    """A run as its files, read from the oldest to the newest, make it; as syncing them in turn would."""

    def __init__(self, job_folder: Path, run_id: str) -> None:
        self.files = wandb_files.files(job_folder, run_id)
        self.history: list[tuple[int, dict[str, Any]]] = []
        self.summary: dict[str, Any] = {}
        self.exit_codes: list[int] = []
        self.headers: list[Any] = []
        self.preempted = 0
        self.text = b"".join(path.read_bytes() for path in self.files)
        for path in self.files:
            for record in wandb_files.records(path.read_bytes()):
                self._take(wandb_internal_pb2.Record.FromString(record))  # type: ignore[attr-defined]

    @property
    def steps(self) -> list[int]:
        """Numbers of the steps in the order of the files."""
        return [step for step, _ in self.history]

    @property
    def config(self) -> dict[str, Any]:
        """Configuration of the newest attempt."""
        return {one.key: json.loads(one.value_json) for one in self.headers[-1].config.update}

    def _take(self, record: Any) -> None:
        match record.WhichOneof("record_type"):
            case "run":
                self.headers.append(record.run)
            case "history":
                row = _values(record.history.item)
                assert row["_step"] == record.history.step.num
                self.history.append((record.history.step.num, row))
            case "summary":
                self.summary |= _values(record.summary.update)
            case "exit":
                self.exit_codes.append(record.exit.exit_code)
            case "preempting":
                self.preempted += 1
            case _:
                pass


def _values(items: Any) -> dict[str, Any]:
    return {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}


def logger_of(job_id: str) -> psutil.Process | None:
    """The living process that logs the job."""
    for process in psutil.process_iter():
        try:
            command = process.cmdline()
            if MODULE in command and job_id in command[-1] and process.status() != psutil.STATUS_ZOMBIE:
                return process
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return None
