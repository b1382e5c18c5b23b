"""Hyperparameters as a request gives them: the knobs, their ranges, and what is refused.

Pure. Ranges are OpenAI's where OpenAI has the knob (n_epochs 1-50, batch_size 1-256). What `auto` becomes is decided in
hyperparameters.py, once the data is known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import msgspec

from rose.errors import InvalidRequest

Auto = Literal["auto"]

TARGETS_ALL = "all-linear"
MAX_RANK = 512


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


_RANGES: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "n_epochs": ("auto or a whole number from 1 to 50", lambda v: _whole(v) and 1 <= v <= 50),
    "batch_size": ("auto or a whole number from 1 to 256", lambda v: _whole(v) and 1 <= v <= 256),
    "learning_rate_multiplier": (
        "auto or a number above 0, up to 1000",
        lambda v: _number(v) and 0 < v <= 1000,
    ),
    "validation_split": ("auto or a number from 0 to below 1", lambda v: _number(v) and 0 <= v < 1),
    "early_stopping_patience": (
        "auto, null or a whole number from 1 to 1000",
        lambda v: v is None or (_whole(v) and 1 <= v <= 1000),
    ),
    "warmup_ratio": ("auto or a number from 0 to 1", lambda v: _number(v) and 0 <= v <= 1),
    "use_lora": ("auto, true or false", lambda v: isinstance(v, bool)),
    "thinking": ("auto, on or off", lambda v: isinstance(v, bool) or v in _SWITCH),
}
_SWITCH = {"on": True, "off": False}
_LORA_RANGES: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "r": (f"auto or a whole number from 1 to {MAX_RANK}", lambda v: _whole(v) and 1 <= v <= MAX_RANK),
    "lora_alpha": ("auto or a number above 0, up to 65536", lambda v: _number(v) and 0 < v <= 65536),
    "lora_dropout": ("auto or a number from 0 to below 1", lambda v: _number(v) and 0 <= v < 1),
    "target_modules": (
        "auto, all-linear or a list of 1 to 64 layer names",
        lambda v: (
            v == TARGETS_ALL
            or (
                isinstance(v, (list, tuple))
                and 1 <= len(v) <= 64
                and all(isinstance(name, str) and 0 < len(name) <= 200 for name in v)
            )
        ),
    ),
}
_UNSUPPORTED_LORA: Mapping[str, str] = {
    "use_dora": "DoRA adapters are refused by the serving engines",
    "modules_to_save": "adapters with extra trained modules are refused by the serving engines",
    "bias": "adapters with biases are refused by the serving engines",
}
KEYS = (*_RANGES, "lora_config")
LORA_KEYS = (*_LORA_RANGES, *_UNSUPPORTED_LORA)
_NEVER_TARGETED = ("lm_head", "embed_tokens")


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    # Of whole numbers only the range is asked: a huge one cannot become a float.
    return _whole(value) or (isinstance(value, float) and math.isfinite(value))


def parse(given: Any, *, path: str = "hyperparameters") -> HyperparametersRequest:
    """Read the `hyperparameters` object of a request.

    Raises: InvalidRequest naming the key and its allowed range, also for a key that does not exist and is not null.
    """
    if given is None:
        return HyperparametersRequest()
    if not isinstance(given, Mapping):
        raise InvalidRequest(f"{path} must be an object.", code="invalid_type", param=path)
    values = _checked(
        given, {**_RANGES, "lora_config": ("an object", lambda v: v is None or isinstance(v, Mapping))}, path
    )
    lora = values.pop("lora_config", None)
    if values.get("thinking") in _SWITCH:
        values["thinking"] = _SWITCH[values["thinking"]]
    for key, reason in _UNSUPPORTED_LORA.items():
        if isinstance(lora, Mapping) and lora.get(key) not in (None, False, [], "none"):
            raise InvalidRequest(
                f"{path}.lora_config.{key} is not supported: {reason}.",
                code="unsupported_parameter",
                param=f"{path}.lora_config.{key}",
            )
    shape = _checked(
        {k: v for k, v in (lora or {}).items() if k not in _UNSUPPORTED_LORA},
        _LORA_RANGES,
        f"{path}.lora_config",
    )
    targets = shape.get("target_modules")
    if isinstance(targets, (list, tuple)):
        for name in targets:
            if name.rpartition(".")[2] in _NEVER_TARGETED:
                raise InvalidRequest(
                    f"{path}.lora_config.target_modules names {name!r}, which cannot carry an adapter. Leave it out.",
                    code="unsupported_parameter",
                    param=f"{path}.lora_config.target_modules",
                )
        shape["target_modules"] = tuple(targets)
    if values.get("use_lora") is False and any(value != "auto" for value in shape.values()):
        raise InvalidRequest(
            f"{path}.use_lora is false, so {path}.lora_config has no effect. Remove one of the two.",
            code="invalid_combination",
            param=f"{path}.lora_config",
        )
    return HyperparametersRequest(**values, lora_config=LoraRequest(**shape))


def _checked(
    given: Mapping[Any, Any], ranges: Mapping[str, tuple[str, Callable[[Any], bool]]], path: str
) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in given.items():
        if key not in ranges:
            if value is None:
                continue
            raise InvalidRequest(
                f"Unknown key {path}.{key}; allowed are {', '.join(ranges)}.",
                code="unknown_parameter",
                param=f"{path}.{key}",
            )
        allowed, accepts = ranges[key]
        if value != "auto" and not accepts(value):
            shown = repr(value)[:80]
            raise InvalidRequest(
                f"{path}.{key} is {shown}; it must be {allowed}.", code="invalid_value", param=f"{path}.{key}"
            )
        if value == "auto" and key == "lora_config":
            continue
        values[key] = value
    return values
