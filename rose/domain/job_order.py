"""What a job is asked to be: the fields that the command, the birth event and the state share. Pure data."""

from __future__ import annotations

from typing import Any

import msgspec

from rose.domain.hyperparameter_requests import HyperparametersRequest
from rose.domain.job_values import BaseRequest, PinnedFile


class JobOrder(msgspec.Struct, frozen=True, kw_only=True):
    """A job as it was asked for, with every name looked up."""

    project: str
    """Whose job it is."""
    model: str
    """As requested."""
    base_request: BaseRequest
    training_file: PinnedFile
    validation_file: PinnedFile | None
    suffix: str | None
    seed: int
    method: str
    requested: HyperparametersRequest
    model_name: str
    """Name that the fine-tuned model will have; unique in its project."""
    metadata: dict[str, str] | None = None
    integrations: tuple[dict[str, Any], ...] | None = None
    code_version: str = ""


def fields_of(order: JobOrder) -> dict[str, Any]:
    """Return the fields of an order, of whatever carries one, by name."""
    return {name: getattr(order, name) for name in JobOrder.__struct_fields__}
