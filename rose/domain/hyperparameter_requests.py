"""Hyperparameters as a job was asked for them: the knobs. Pure.

Ranges are checked when a request comes (rose/api/schema.py) and not here, since what a job was asked for stands in the
log for ever. What `auto` becomes is decided in hyperparameters.py, once the data is known.
"""

from __future__ import annotations

from typing import Literal

import msgspec

Auto = Literal["auto"]

TARGETS_ALL = "all-linear"


class LoraRequest(msgspec.Struct, frozen=True, kw_only=True):
    """`lora_config` as requested."""

    r: int | Auto = "auto"
    """Rank, 1 to 512."""
    lora_alpha: float | Auto = "auto"
    """Scale numerator: the update is multiplied by lora_alpha / r."""
    lora_dropout: float | Auto = "auto"
    """Dropout on the adapter's input, 0 to below 1."""
    target_modules: tuple[str, ...] | str = "auto"
    """Names of linear layers, `all-linear`, or `auto` (the same)."""


class HyperparametersRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Hyperparameters as requested; every one may be `auto`."""

    n_epochs: int | Auto = "auto"
    batch_size: int | Auto = "auto"
    learning_rate_multiplier: float | Auto = "auto"
    validation_split: float | Auto = "auto"
    early_stopping_patience: int | Auto | None = None
    warmup_ratio: float | Auto = "auto"
    use_lora: bool | Auto = "auto"
    lora_config: LoraRequest = LoraRequest()
    thinking: bool | Auto = "auto"
    """Whether the model thinks before it answers; auto: when a learned answer of the file has a thought."""
    options: dict[str, float | Auto] = {}
    """Hyperparameters that only the job's method has, by name."""
