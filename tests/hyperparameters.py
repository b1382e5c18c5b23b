"""Hyperparameters as a request gives them, for tests of what is done with them."""

from __future__ import annotations

from typing import Any

from rose.api import schema
from rose.api.creating import requested
from rose.decoding import convert
from rose.domain.hyperparameter_requests import HyperparametersRequest


def parse(given: dict[str, Any] | None) -> HyperparametersRequest:
    """Return what a job keeps of the `hyperparameters` of a request. Raises: InvalidRequest."""
    return requested(convert({} if given is None else given, schema.Hyperparameters, "hyperparameters"))
