"""Tiny random models of many families, adapters with random numbers, and rows that join and leave as a test says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from rose.inference.batching.building import build
from rose.inference.batching.model import BatchedModel
from rose.inference.rows import Row
from rose.language_models.adapters import StoredAdapter

VOCABULARY = 128
CONTEXT = 1024
WINDOW = 8
LIMIT_BYTES = 1 << 26
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.2,  # with the usual one nothing that attention does could be seen
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_OF_FAMILY: dict[str, dict[str, Any]] = {
    "cohere2": {"sliding_window": WINDOW, "num_hidden_layers": 4},
    "exaone4": {"sliding_window": WINDOW, "num_hidden_layers": 4},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8},
    "gemma2": {"sliding_window": WINDOW, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 3.0},
    "gemma3_text": {
        "sliding_window": WINDOW,
        "query_pre_attn_scalar": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gpt2": {"n_positions": CONTEXT, "n_embd": 64, "n_layer": 2, "n_head": 4},
    "gpt_oss": {
        "sliding_window": WINDOW,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "minimax": {"num_local_experts": 2},
    "mistral": {"sliding_window": WINDOW},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 64},
    "qwen3_moe": _EXPERTS,
    "qwen3_next": {**_EXPERTS, "shared_expert_intermediate_size": 64},
    "starcoder2": {"sliding_window": WINDOW},
}


def make_model(family: str, **changes: Any) -> Any:
    """Return a tiny random model with fp32 weights; the same one each time."""
    config = AutoConfig.for_model(family, **{**_COMMON, **_OF_FAMILY.get(family, {}), **changes})
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        if not parameter.any():  # sinks and biases, that would do nothing
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def make_runner(model: Any, *, form: str = "fp32", limit_bytes: int = LIMIT_BYTES) -> BatchedModel:
    """Return the model as a runner."""
    return build(model, form=form, limit_bytes=limit_bytes, context_tokens=CONTEXT)


def make_text(tokens: int, *, seed: int = 0, vocabulary: int = VOCABULARY) -> list[int]:
    """Return random token ids; the first ones are the same whatever the length."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocabulary, (2048,), generator=generator)[:tokens].tolist()


def own_logits(model: Any, text: Sequence[int]) -> Tensor:
    """Return what transformers itself computes, [T, V]."""
    with torch.inference_mode():
        return model(input_ids=torch.tensor([text]), use_cache=False).logits[0].float()


def make_adapter(
    runner: BatchedModel, *, rank: int, seed: int, scale: float = 2.0, only: str = "", std: float = 0.1
) -> StoredAdapter:
    """Return an adapter of the inner layers (those whose name ends with `only`)."""
    generator = torch.Generator().manual_seed(seed)
    layers = {
        name: (
            torch.randn(rank, layer.inputs, generator=generator) * std,
            torch.randn(layer.outputs, rank, generator=generator) * std,
        )
        for name, layer in runner._adapters._layers.items()
        if name.endswith(only) and "head" not in name
    }
    return StoredAdapter(scale=scale, rank=rank, layers=layers, facts=None)


@dataclass(frozen=True)
class Part:
    """A row's: it reads `text[:prompt]` and then chooses the others."""

    text: Sequence[int]
    prompt: int
    adapter: str | None = None
    joins: int = 0
    """The step before which it comes."""
    leaves: int | None = None
    """After so many chosen tokens, before its end."""


def perform(
    runner: BatchedModel, parts: Sequence[Part], *, before: Mapping[int, Callable[[], None]] | None = None
) -> list[Tensor]:
    """Return the logits [chosen, V] of every part; what `before` has for a step is called before it."""
    rows = [Row(part.text[: part.prompt], adapter=part.adapter, most_tokens=len(part.text)) for part in parts]
    logits: list[list[Tensor]] = [[] for _ in parts]
    active: list[Row] = []
    last = max(part.joins for part in parts)
    step = 0
    while active or step <= last:
        for row, part in zip(rows, parts, strict=True):
            if part.joins == step:
                assert runner.admit([row])
                active.append(row)
        if before is not None and step in before:
            before[step]()
        ready, found = runner.step(active)
        for row, one in zip(ready, found, strict=True):
            number = rows.index(row)
            logits[number].append(one.clone())
            _choose(runner, active, row, parts[number], len(logits[number]))
        step += 1
    return [torch.stack(one) for one in logits]


def _choose(runner: BatchedModel, active: list[Row], row: Row, part: Part, chosen: int) -> None:
    """Give a row its next token, or let it go."""
    if len(row.tokens) == len(part.text) or chosen == part.leaves:
        active.remove(row)
        runner.release(row)
    else:
        row.tokens.append(part.text[len(row.tokens)])
