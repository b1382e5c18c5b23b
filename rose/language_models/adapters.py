"""Adapters on disk, in PEFT's format: adapter_config.json and adapter_model.safetensors, with ROSE's facts beside them.

Kinds that serving engines refuse (DoRA, biases, extra trained modules) are never written and not read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from rose.domain.hyperparameters import LoraSettings
from rose.domain.job_values import BaseModel
from rose.errors import InvalidRequest
from rose.language_models.locate import check_base

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
ROSE_FILE = "rose.json"
PREFIX = "base_model.model."
"""What PEFT puts before each layer's name."""


class AdapterFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Content of `rose.json` beside an adapter: what PEFT's configuration has no place for."""

    base: BaseModel
    lora: LoraSettings


class StoredAdapter(msgspec.Struct, frozen=True, kw_only=True):
    """An adapter read from a folder."""

    scale: float
    """alpha / r, or alpha / sqrt(r) for rsLoRA."""
    rank: int
    layers: dict[str, tuple[Any, Any]]
    """Layer name -> (A [r, in], B [out, r]), on the CPU."""
    facts: AdapterFacts | None
    """None for an adapter that ROSE did not train."""


def read_adapter(folder: Path, base: BaseModel | None = None) -> StoredAdapter:
    """Read an adapter in PEFT's format; with `base`, only one that was trained on exactly that base.

    Raises: InvalidRequest when it is of a kind that ROSE does not serve or cannot be read; BaseChanged.
    """
    try:
        config: dict[str, Any] = json.loads((folder / CONFIG_FILE).read_bytes())
        tensors = load_file(folder / WEIGHTS_FILE)
        facts_file = folder / ROSE_FILE
        facts = msgspec.json.decode(facts_file.read_bytes(), type=AdapterFacts) if facts_file.is_file() else None
    except (OSError, ValueError, SafetensorError, msgspec.DecodeError) as error:
        raise InvalidRequest(
            f"The adapter in {folder} cannot be read: {error}.", code="adapter_not_readable"
        ) from error
    _check_kind(folder, config)
    if base is not None and facts is not None:
        check_base(base, facts.base, f"the adapter in {folder}")
    rank = int(config["r"])
    alpha = float(config["lora_alpha"])
    return StoredAdapter(
        scale=alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank,
        rank=rank,
        layers=_pairs(folder, tensors),
        facts=facts,
    )


def _check_kind(folder: Path, config: Mapping[str, Any]) -> None:
    refused = {
        "another kind than LoRA": config.get("peft_type") != "LORA",
        "DoRA": bool(config.get("use_dora")),
        "biases": config.get("bias", "none") != "none",
        "extra trained modules": bool(config.get("modules_to_save")),
        "ranks that differ by layer": bool(config.get("rank_pattern")) or bool(config.get("alpha_pattern")),
    }
    for kind, present in refused.items():
        if present:
            raise InvalidRequest(
                f"The adapter in {folder} has {kind}, which is not supported.", code="unsupported_adapter"
            )


def _pairs(folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, tuple[Any, Any]]:
    names = {name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in tensors}
    try:
        return {
            name: (tensors[f"{PREFIX}{name}.lora_A.weight"], tensors[f"{PREFIX}{name}.lora_B.weight"])
            for name in sorted(names)
        }
    except KeyError as error:
        raise InvalidRequest(
            f"The adapter in {folder} has no weight {error.args[0]}.", code="adapter_not_readable"
        ) from None


def merge_adapter_into(model: Any, stored: StoredAdapter) -> None:
    """Add the adapter to the model's own weights, W + s·BA in fp32, so that full fine-tuning can go on from it.

    Raises: InvalidRequest when the model has no such layer.
    """
    with torch.no_grad():
        for name, (a, b) in stored.layers.items():
            weight = linear_layer(model, name).weight
            update = (b.float() @ a.float()).mul_(stored.scale).to(weight.device)
            weight.copy_((weight.float() + update).to(weight.dtype))


def linear_layer(model: Any, name: str) -> nn.Linear:
    """Return the layer that an adapter's weights belong to. Raises: InvalidRequest when there is none."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        module = None
    if not isinstance(module, nn.Linear):
        raise InvalidRequest(
            f"The adapter has weights for {name}, which the model does not have.", code="adapter_does_not_fit"
        )
    return module
