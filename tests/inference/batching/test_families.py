"""Which families answer in batches: their numbers are transformers' own, or they are left as they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rose.inference.batching import attention
from rose.inference.batching.attention import Head
from rose.inference.batching.building import NotBatchable, NotInFp16, build
from tests.inference.batching.models import (
    CONTEXT,
    LIMIT_BYTES,
    Part,
    make_model,
    make_runner,
    make_text,
    own_logits,
    perform,
)

BATCHED = (
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma2",
    "gemma3_text",
    "phi3",
    "olmo2",
    "granite",
    "smollm3",
    "cohere2",
    "glm4",
    "exaone4",
    "starcoder2",
    "gpt_neox",
    "opt",
    "gpt2",
)
EXPERTS = ("qwen3_moe", "gpt_oss", "qwen2_moe")
"""How many tokens an expert gets depends on the others in the step, and so do the bits."""
REFUSED = {"lfm2": "conv", "falcon_h1": "hybrid", "qwen3_next": "linear_attention", "minimax": "linear_attention"}


def assert_own_numbers(model: Any, *, form: str = "fp32", bound: float = 1e-4) -> None:
    """Compare rows that join one after another, with prompts of up to three chunks, with transformers' own logits."""
    texts = [make_text(tokens, seed=tokens) for tokens in (150, 90, 20, 70)]
    expected = [own_logits(model, text) for text in texts]
    runner = make_runner(model, form=form)
    prompts = (140, 65, 6, 64)
    parts = [Part(text, prompt, joins=3 * at) for at, (text, prompt) in enumerate(zip(texts, prompts, strict=True))]
    for found, right, prompt in zip(perform(runner, parts), expected, prompts, strict=True):
        assert found.std() > 0.02
        torch.testing.assert_close(found, right[prompt - 1 :], atol=bound, rtol=0)


@pytest.mark.parametrize("family", [*BATCHED, *EXPERTS])
def test_a_family_that_batches_has_transformers_own_numbers(family: str) -> None:
    assert_own_numbers(make_model(family))


@pytest.mark.parametrize("family", BATCHED)
def test_a_row_has_the_same_bits_alone_and_beside_others(family: str) -> None:
    runner = make_runner(make_model(family))
    assert runner.batch_invariant
    parts = [Part(make_text(prompt + 3, seed=prompt), prompt) for prompt in (1, 65, 190, 30, 250)]
    together = perform(runner, parts)
    for part, found in zip(parts, together, strict=True):
        runner.forget_prompts()
        assert torch.equal(perform(runner, [part])[0], found), part.prompt


@pytest.mark.parametrize("family", EXPERTS)
def test_of_experts_no_bits_are_promised(family: str) -> None:
    assert not make_runner(make_model(family)).batch_invariant


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_keeps_more_than_keys_and_values_is_refused_and_stays_as_it_was(family: str) -> None:
    model = make_model(family)
    text = make_text(30)
    expected = own_logits(model, text)
    kind = model.config._attn_implementation
    with pytest.raises(NotBatchable, match=REFUSED[family]):
        make_runner(model)
    assert model.config._attn_implementation == kind
    assert torch.equal(own_logits(model, text), expected)


@pytest.mark.parametrize("family", ["bloom", "mpt"])
def test_a_model_with_an_attention_of_its_own_is_refused(family: str) -> None:
    small = {"n_layer": 2, "n_head": 4} if family == "bloom" else {"d_model": 64, "n_heads": 4, "n_layers": 2}
    with pytest.raises(NotBatchable, match="its own"):
        make_runner(make_model(family, **small))


@pytest.mark.parametrize("change", [{"scaling": 0.1}, {"window": 5}, {"softcap": 2.0}])
def test_wrong_numbers_are_found_by_the_proof(monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]) -> None:
    def wrong(scaling: float, window: int | None, softcap: float | None, sinks: Any) -> Head:
        return Head(**{"scaling": scaling, "window": window, "softcap": softcap, "sinks": sinks, **change})

    model = make_model("llama")
    text = make_text(30)
    expected = own_logits(model, text)
    with monkeypatch.context() as patch:
        patch.setattr(attention, "Head", wrong)
        with pytest.raises(NotBatchable, match="log-probabilities differ by"):
            make_runner(model)
    assert torch.equal(own_logits(model, text), expected)


def test_a_window_that_attention_is_not_told_of_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts as short as the proof's would not show it."""
    model = make_model("mistral", sliding_window=200)
    told = attention.rows_attention

    def untold(*arguments: Any, sliding_window: int | None = None, **others: Any) -> Any:
        return told(*arguments, **others)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, attention.NAME, untold)
    with pytest.raises(NotBatchable, match="window of None"):
        make_runner(model)


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_places_that_depend_on_the_longest_text_in_a_step_are_refused(kind: str) -> None:
    """Rows of one step would change each other's numbers once one of them is long."""
    if kind == "longrope":
        rope = {"rope_type": kind, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "rope_theta": 10000.0}
        model = make_model("phi3", rope_parameters=rope, original_max_position_embeddings=64)
    else:
        rope = {"rope_type": kind, "factor": 4.0, "rope_theta": 10000.0}
        model = make_model("llama", rope_parameters=rope, max_position_embeddings=64)
    with pytest.raises(NotBatchable, match="longest text"):
        make_runner(model)
    short = build(model, form="fp32", limit_bytes=LIMIT_BYTES, context_tokens=64)
    assert short.context_tokens == 64


def test_a_window_far_behind_the_first_keys() -> None:
    """torch's attention takes 512 keys at a time: here all of the first ones are hidden."""
    model = make_model("mistral")
    text = make_text(700)
    expected = own_logits(model, text)
    (found,) = perform(make_runner(model), [Part(text, 690)])
    torch.testing.assert_close(found, expected[689:], atol=1e-4, rtol=0)


def test_a_model_that_takes_a_weight_for_itself_is_not_packed() -> None:
    """A packed layer's weight has no numbers."""
    model = make_model("llama")
    layer = model.model.layers[0].mlp
    layer.forward = lambda x: layer.down_proj(torch.nn.functional.linear(x, layer.up_proj.weight))
    with pytest.raises(NotInFp16):
        build(model, form="fp16", limit_bytes=LIMIT_BYTES, context_tokens=CONTEXT)
