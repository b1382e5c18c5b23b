"""Hyperparameters: what a request may say, and how `auto` becomes a number, with the reason.

Pure. Ranges are OpenAI's where OpenAI has the knob (n_epochs 1-50, batch_size 1-256). Sources of the defaults:
n_epochs: OpenAI's cookbook (chat fine-tuning data preparation). batch_size: clamp(round(n/64), 1, 32), lowered until
the plan has 30 steps (LoRA dislikes large batches, Thinking Machines' "LoRA without regret"). Base learning rate:
tinker-cookbook `hyperparam_utils.py`, 5e-4 x (2000/width)^p, fitted at batch 128 and scaled by sqrt(batch/128).
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
AUTO_RANKS = (16, 32, 64, 128)


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


class LoraSettings(msgspec.Struct, frozen=True, kw_only=True):
    """`lora_config` as it is trained."""

    r: int
    lora_alpha: float
    lora_dropout: float
    target_modules: tuple[str, ...]
    """Layer names, or the single entry `all-linear`: every linear layer except the output head."""


class Hyperparameters(msgspec.Struct, frozen=True, kw_only=True):
    """Every number of a run, resolved. This is what the trainer obeys; nothing else decides."""

    n_epochs: int
    batch_size: int
    """Examples per optimizer step."""
    learning_rate_multiplier: float
    base_learning_rate: float
    """ROSE's own rate for this model and batch size, before the multiplier."""
    learning_rate: float
    """Peak rate: base_learning_rate x learning_rate_multiplier."""
    warmup_ratio: float
    warmup_steps: int
    validation_split: float
    early_stopping_patience: int | None
    """Evaluations without improvement after which the run ends; None: never."""
    use_lora: bool
    lora_config: LoraSettings | None
    """None for full fine-tuning."""
    seed: int
    total_steps: int
    """ceil(training examples / batch_size) x n_epochs."""
    evaluate_every_steps: int | None
    """Steps between evaluations (an epoch's end also evaluates); None without validation data."""
    training_examples: int
    validation_examples: int
    maximum_tokens: int
    """Longest example in tokens, the model's context; longer ones lose their oldest turns."""
    weight_decay: float = 0.0
    max_gradient_norm: float = 1.0
    reasons: dict[str, str] = {}
    """Why each value is what it is: given by the request, or the rule that chose it."""


class DataFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What validation learned of data and base; `resolve` needs nothing else."""

    examples: int
    """Usable examples in the training file, before any split."""
    validation_file_examples: int | None
    """Usable examples of the validation file; None when there is none."""
    hidden_size: int
    model_type: str
    """`model_type` of the base's config, for example `qwen3`."""
    context_tokens: int
    base_learning_rate: float | None = None
    """Rate set for this base in the settings or built into it; None: the formula."""
    parent_lora: LoraSettings | None = None
    """Shape of the adapter that training goes on from."""
    label_tokens: int = 0
    """Tokens that are learned in the training file, before any split."""
    lora_numbers_per_rank: int = 0
    """Numbers that one rank adds to the targeted layers: outputs and inputs of all of them."""


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
}
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
_NEVER_TARGETED = ("lm_head", "embed_tokens")


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    # Of whole numbers only the range is asked: a huge one cannot become a float.
    return _whole(value) or (isinstance(value, float) and math.isfinite(value))


def parse(given: Any, *, path: str = "hyperparameters") -> HyperparametersRequest:
    """Read the `hyperparameters` object of a request.

    Raises: InvalidRequest naming the key and its allowed range, also for a key that does not exist.
    """
    if given is None:
        return HyperparametersRequest()
    if not isinstance(given, Mapping):
        raise InvalidRequest(f"{path} must be an object.", code="invalid_type", param=path)
    values = _checked(
        given, {**_RANGES, "lora_config": ("an object", lambda v: v is None or isinstance(v, Mapping))}, path
    )
    lora = values.pop("lora_config", None)
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


def held_out(examples: int, split: float) -> int:
    """Return how many of `examples` a validation split holds out: round(n x split), at least 1 when n >= 2."""
    if split <= 0 or examples < 2:
        return 0
    return min(max(1, round(examples * split)), examples - 1)


def base_learning_rate(hidden_size: int, model_type: str, batch_size: int) -> float:
    """Return ROSE's base rate: clip(5e-4 x (2000/width)^p x sqrt(batch/128), 5e-5, 1e-3).

    p is 0.781 for Llama, 0.0775 for Qwen (tinker-cookbook, hyperparam_utils.py) and 0.4, uncalibrated, for others.
    """
    power = 0.781 if model_type.startswith("llama") else 0.0775 if model_type.startswith("qwen") else 0.4
    rate = 5e-4 * (2000 / hidden_size) ** power * math.sqrt(batch_size / 128)
    return min(max(rate, 5e-5), 1e-3)


def resolve(asked: HyperparametersRequest, facts: DataFacts, seed: int) -> Hyperparameters:
    """Turn a request into the numbers of a run, with a reason for each.

    Raises: InvalidRequest when a combination is impossible (a split beside a validation file, another shape than the
    adapter that training goes on from).
    """
    reasons: dict[str, str] = {}

    def choose(name: str, value: Any, automatic: Callable[[], tuple[Any, str]]) -> Any:
        if value != "auto":
            reasons[name] = "given by the request"
            return value
        chosen, why = automatic()
        reasons[name] = why
        return chosen

    split = choose("validation_split", asked.validation_split, lambda: (0.0, "nothing is held out unless asked for"))
    if split > 0 and facts.validation_file_examples is not None:
        raise InvalidRequest(
            "validation_split and validation_file exclude each other. Remove one.",
            code="invalid_combination",
            param="hyperparameters.validation_split",
        )
    validation = (
        held_out(facts.examples, split) if facts.validation_file_examples is None else facts.validation_file_examples
    )
    n = facts.examples - (validation if facts.validation_file_examples is None else 0)
    epochs = choose("n_epochs", asked.n_epochs, lambda: _auto_epochs(n))
    batch = choose("batch_size", asked.batch_size, lambda: _auto_batch(n, epochs))
    steps = math.ceil(n / batch) * epochs
    reasons["total_steps"] = f"ceil({n} examples / batch_size {batch}) x {epochs} epochs"
    if facts.base_learning_rate is not None:
        rate, why = facts.base_learning_rate, "set for this base model"
    else:
        rate = base_learning_rate(facts.hidden_size, facts.model_type, batch)
        why = f"5e-4 x (2000/{facts.hidden_size})^p x sqrt({batch}/128), within 5e-5 and 1e-3"
        if steps < 100:
            rate, why = rate * 1.5, why + f", x 1.5 because {steps} steps are few"
    reasons["base_learning_rate"] = why
    multiplier = choose(
        "learning_rate_multiplier", asked.learning_rate_multiplier, lambda: (1.0, "the base rate as it is")
    )
    warmup_ratio = choose("warmup_ratio", asked.warmup_ratio, lambda: (0.05, "5 % of the steps, at least 2"))
    warmup = math.ceil(steps * warmup_ratio)
    if asked.warmup_ratio == "auto":
        warmup = min(max(2, warmup), max(steps - 1, 0))
    patience = _patience(asked.early_stopping_patience, validation, reasons)
    use_lora = choose(
        "use_lora",
        asked.use_lora,
        lambda: (
            True,
            "LoRA reaches full fine-tuning's quality on files of this kind at a fraction of the memory",
        ),
    )
    lora = _lora(asked.lora_config, facts, reasons) if use_lora else None
    if lora is None:
        reasons["lora_config"] = "the whole model is trained"
    evaluate_every = max(1, round(steps / 20)) if validation else None
    reasons |= _derived_reasons(facts, validation)
    return Hyperparameters(
        n_epochs=epochs,
        batch_size=batch,
        learning_rate_multiplier=float(multiplier),
        base_learning_rate=rate,
        learning_rate=rate * multiplier,
        warmup_ratio=float(warmup_ratio),
        warmup_steps=warmup,
        validation_split=float(split),
        early_stopping_patience=patience,
        use_lora=use_lora,
        lora_config=lora,
        seed=seed,
        total_steps=steps,
        evaluate_every_steps=evaluate_every,
        training_examples=n,
        validation_examples=validation,
        maximum_tokens=facts.context_tokens,
        reasons=reasons,
    )


def _derived_reasons(facts: DataFacts, validation: int) -> dict[str, str]:
    """Return the reasons of the values that nobody asks for."""
    rows = f"{facts.examples} in the training file"
    training, held = rows, "nothing is held out"
    if facts.validation_file_examples is not None:
        held = "all of the validation file"
    elif validation:
        training, held = f"{rows}, less what is held out", f"round({facts.examples} x validation_split), at least 1"
    every = "about 20 evaluations, and one at each epoch's end" if validation else "there is no validation data"
    return {
        "learning_rate": "base_learning_rate x learning_rate_multiplier, the peak",
        "warmup_steps": "warmup_ratio x total_steps, rounded up",
        "seed": "given by the request, or drawn when the job was created",
        "evaluate_every_steps": every,
        "training_examples": training,
        "validation_examples": held,
        "maximum_tokens": "the model's context",
        "weight_decay": "short runs do not gain from it",
        "max_gradient_norm": "the usual bound; a larger gradient is scaled down to it",
    }


def _auto_epochs(n: int) -> tuple[int, str]:
    if n * 3 < 100:
        return max(1, min(25, 100 // n)), f"3 epochs over {n} examples are under 100, so min(25, 100 // {n})"
    if n * 3 > 25_000:
        return max(1, 25_000 // n), f"3 epochs over {n} examples are over 25,000, so max(1, 25000 // {n})"
    return 3, "3 epochs, for 100 to 25,000 examples seen"


def _auto_batch(n: int, epochs: int) -> tuple[int, str]:
    batch = min(max(round(n / 64), 1), 32)
    while batch > 1 and math.ceil(n / batch) * epochs < 30:
        batch -= 1
    return batch, f"{n} examples / 64, from 1 to 32, lowered until there are 30 steps"


def _patience(asked: int | Auto | None, validation: int, reasons: dict[str, str]) -> int | None:
    name = "early_stopping_patience"
    if asked is None:
        reasons[name] = "not asked for"
        return None
    if not validation:
        reasons[name] = "without validation data there is nothing to stop on"
        return None
    if asked == "auto":
        reasons[name] = "5 evaluations without improvement"
        return 5
    reasons[name] = "given by the request"
    return asked


def _auto_rank(facts: DataFacts) -> tuple[int, str]:
    """Return 16, or the first rank above it that gives the adapter a number for each learned token (Tinker's rule)."""
    numbers, tokens = facts.lora_numbers_per_rank, facts.label_tokens
    rank = next((r for r in AUTO_RANKS if r * numbers >= tokens), AUTO_RANKS[-1]) if numbers else AUTO_RANKS[0]
    if rank == AUTO_RANKS[0]:
        return rank, "16 holds far more than a file of this size teaches"
    return rank, f"{rank * numbers:,} numbers, for a file of {tokens:,} learned tokens"


def _lora(asked: LoraRequest, facts: DataFacts, reasons: dict[str, str]) -> LoraSettings:
    parent = facts.parent_lora
    rank, why_rank = _auto_rank(facts)
    defaults = parent or LoraSettings(r=rank, lora_alpha=32.0, lora_dropout=0.0, target_modules=(TARGETS_ALL,))
    why = "as in the adapter that training goes on from" if parent else None
    rules = {
        "r": why_rank,
        "lora_alpha": "32 at every rank keeps the learning rate independent of the rank",
        "lora_dropout": "0; short runs do not gain from dropout",
        "target_modules": "all linear layers except the output head",
    }
    values: dict[str, Any] = {}
    for name, rule in rules.items():
        value = getattr(asked, name)
        values[name] = getattr(defaults, name) if value == "auto" else value
        reasons[f"lora_config.{name}"] = (why or rule) if value == "auto" else "given by the request"
    if isinstance(values["target_modules"], str):
        values["target_modules"] = (values["target_modules"],)
    values["lora_alpha"] = float(values["lora_alpha"])
    values["lora_dropout"] = float(values["lora_dropout"])
    lora = LoraSettings(**values)
    if parent is not None and (lora.r, lora.target_modules) != (parent.r, parent.target_modules):
        raise InvalidRequest(
            f"This model's adapter has r {parent.r} and target_modules {list(parent.target_modules)}; "
            "training goes on from it with the same shape. "
            "Leave r and target_modules out, or start from the base model.",
            code="invalid_combination",
            param="hyperparameters.lora_config",
        )
    return lora
