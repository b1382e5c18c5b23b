"""Hyperparameters of a run: every number, and how `auto` becomes one, with the reason.

Pure; what a request may say is in hyperparameter_requests.py. Sources of the defaults:
n_epochs: OpenAI's cookbook (chat fine-tuning data preparation). batch_size: clamp(round(n/64), 1, 32), lowered until
the plan has 30 steps (LoRA dislikes large batches, Thinking Machines' "LoRA without regret"). Base learning rate:
tinker-cookbook `hyperparam_utils.py`, 5e-4 x (2000/width)^p, fitted at batch 128; smaller batches: measured, see below.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import msgspec

from rose.domain.hyperparameter_requests import TARGETS_ALL, Auto, HyperparametersRequest, LoraRequest
from rose.errors import InvalidRequest

AUTO_RANKS = (16, 32, 64, 128)


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
    thinking: bool = False
    """The model thinks before it answers: it is trained so, and asked so."""
    options: dict[str, float] = {}
    """Hyperparameters that only the job's method has, by name."""
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
    thoughts: int = 0
    """Examples of the training file in which a learned answer has a thought."""
    method_rate: float = 1.0
    """The method's base learning rate as a multiple of that of supervised fine-tuning."""
    method_options: dict[str, tuple[float, str]] = {}
    """The method's own hyperparameters: default, and why it is that."""
    lora_numbers_per_rank: int = 0
    """Numbers that one rank adds to the targeted layers: outputs and inputs of all of them."""


def held_out(examples: int, split: float) -> int:
    """Return how many of `examples` a validation split holds out: round(n x split), at least 1 when n >= 2."""
    if split <= 0 or examples < 2:
        return 0
    return min(max(1, round(examples * split)), examples - 1)


def base_learning_rate(hidden_size: int, model_type: str, batch_size: int, *, lora: bool = True) -> float:
    """Return ROSE's base rate: clip(5e-4 x (2000/width)^p x (batch/128)^q, 5e-5, 1e-3).

    p is 0.781 for Llama, 0.0775 for Qwen (tinker-cookbook, hyperparam_utils.py) and 0.4, uncalibrated, for others. q is
    1/2 for a whole model and 1/4 for an adapter: with 1/2 the small batches of small files learned too little
    (benchmarks/quality.py: two facts in five, where rates three to twelve times as high learned them all).
    """
    power = 0.781 if model_type.startswith("llama") else 0.0775 if model_type.startswith("qwen") else 0.4
    rate = 5e-4 * (2000 / hidden_size) ** power * (batch_size / 128) ** _batch_power(lora)
    return min(max(rate, 5e-5), 1e-3)


def _batch_power(lora: bool) -> float:
    return 0.25 if lora else 0.5


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
    use_lora = choose(
        "use_lora",
        asked.use_lora,
        lambda: (
            True,
            "LoRA reaches full fine-tuning's quality on files of this kind at a fraction of the memory",
        ),
    )
    if facts.base_learning_rate is not None:
        rate, why = facts.base_learning_rate, "set for this base model"
    else:
        rate = base_learning_rate(facts.hidden_size, facts.model_type, batch, lora=use_lora)
        why = f"5e-4 x (2000/{facts.hidden_size})^p x ({batch}/128)^{_batch_power(use_lora):g}, within 5e-5 and 1e-3"
        if steps < 100:
            rate, why = rate * 1.5, why + f", x 1.5 because {steps} steps are few"
    if facts.method_rate != 1:
        rate, why = rate * facts.method_rate, f"{why}, x {facts.method_rate:g} for this method"
    reasons["base_learning_rate"] = why
    multiplier = choose(
        "learning_rate_multiplier", asked.learning_rate_multiplier, lambda: (1.0, "the base rate as it is")
    )
    warmup_ratio = choose("warmup_ratio", asked.warmup_ratio, lambda: (0.05, "5 % of the steps, at least 2"))
    warmup = math.ceil(steps * warmup_ratio)
    if asked.warmup_ratio == "auto":
        warmup = min(max(2, warmup), max(steps - 1, 0))
    patience = _patience(asked.early_stopping_patience, validation, reasons)
    lora = _lora(asked.lora_config, facts, reasons) if use_lora else None
    if lora is None:
        reasons["lora_config"] = "the whole model is trained"
    thinking, reasons["thinking"] = resolve_thinking(asked.thinking, facts.thoughts)
    options = {
        name: choose(name, asked.options.get(name, "auto"), lambda rule=rule: rule)
        for name, rule in facts.method_options.items()
    }
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
        thinking=thinking,
        options={name: float(value) for name, value in options.items()},
        reasons=reasons,
    )


def resolve_thinking(asked: bool | Auto, thoughts: int) -> tuple[bool, str]:
    """Say whether the model thinks before it answers, and why, for a file with so many examples with thoughts."""
    if asked != "auto":
        return asked, "given by the request"
    if thoughts:
        return True, f"{thoughts} example(s) have an answer with a thought"
    return False, "no answer has a thought"


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
