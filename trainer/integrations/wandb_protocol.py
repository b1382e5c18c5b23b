"""What the supervisor tells the process that logs a job to Weights & Biases. Pure.

The specification is a JSON file; then a line per message on its standard input. It answers with `Warned` reports and,
in the end, its exit status: 0 when everything it was told is with Weights & Biases or in the run's folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from rose.domain.job_values import StepMetrics

WARNING = "wandb"
"""Code of the job's warning that Weights & Biases could not be used as asked; as a report, that it cannot be."""
OFFLINE_WARNING = "wandb_offline"
"""Code of the job's notice that its run is only written to disk, and where."""
DISABLED_WARNING = "wandb_disabled"
"""Code of the job's warning that the trainer's environment switches Weights & Biases off."""


class WandbSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One run at Weights & Biases."""

    run_id: str
    """Derived from the job's id, so that every attempt continues the same run."""
    folder: str
    """Of the job; the package makes its folder `wandb` in it."""
    project: str
    name: str
    entity: str | None
    tags: tuple[str, ...]
    config: dict[str, Any]
    offline: bool
    """Only write to disk, whatever the environment says."""

    @property
    def where(self) -> str:
        """Where the run is when it is offline, and what uploads it, as a sentence."""
        written = Path(self.folder) / "wandb"
        return f"It is written below {written}; `wandb sync {written}/offline-run-*-{self.run_id}` uploads it."


class Steps(msgspec.Struct, frozen=True, kw_only=True, tag="steps"):
    """Steps that the log accepted, each once and in order, those of former attempts as well."""

    steps: tuple[StepMetrics, ...]


class End(msgspec.Struct, frozen=True, kw_only=True, tag="end"):
    """The attempt is over: finish the run. Nothing follows."""

    summary: dict[str, str]
    """The job's state and, once there is one, the name of its model."""
    goes_on: bool
    """Another attempt will continue the run."""
    succeeded: bool


Message = Steps | End
