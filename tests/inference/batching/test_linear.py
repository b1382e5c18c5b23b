"""Weights in another form give nearly the same numbers, and the form is chosen by time."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rose.inference.batching import linear
from rose.inference.batching.building import NotInFp16, build
from rose.inference.batching.linear import BatchLinear, fastest_form, fits_fp16, has_fp16
from rose.inference.batching.model import BatchedModel
from tests.inference.batching.models import CONTEXT, LIMIT_BYTES, Part, make_model, make_runner, make_text, perform

needs_fp16 = pytest.mark.skipif(not has_fp16(), reason="this torch has no fp16 weights")


@pytest.mark.parametrize("form", ["fp32", pytest.param("fp16", marks=needs_fp16)])
@pytest.mark.parametrize("bias", [True, False])
def test_the_product_is_the_layers(form: str, bias: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(96, 64, bias=bias)
    if bias:
        plain.bias.data += 5
    batched = BatchLinear(plain, form)
    assert (batched.inputs, batched.outputs) == (batched.in_features, batched.out_features) == (96, 64)
    for tokens in (1, 3, 17):
        x = torch.randn(1, tokens, 96)
        with torch.inference_mode():
            expected, found = plain(x), batched(x)
        assert found.dtype == torch.float32
        if form == "fp32":
            assert torch.equal(found, expected)
        assert float((found - expected).norm() / expected.norm()) < 1e-2 if bias else 1e-3
        torch.testing.assert_close(found, expected, atol=1e-2, rtol=1e-2)


@needs_fp16
def test_packed_weights_keep_shape_and_dtype_and_no_fp32_numbers() -> None:
    batched = BatchLinear(nn.Linear(32, 16), "fp16")
    assert batched.weight.shape == (16, 32)
    assert batched.weight.dtype == batched.example.dtype == torch.float32
    assert batched.weight.is_meta
    assert batched.bias is None  # it is in the packed weight


@needs_fp16
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt2"])
def test_a_model_in_fp16_says_nearly_the_same(family: str) -> None:
    parts = [Part(make_text(80), 70), Part(make_text(30, seed=1), 20)]
    exact = perform(make_runner(make_model(family, initializer_range=0.1)), parts)
    packed = make_runner(make_model(family, initializer_range=0.1), form="fp16")
    assert packed.weights == "fp16"
    for found, right in zip(perform(packed, parts), exact, strict=True):
        difference = (found.log_softmax(-1) - right.log_softmax(-1)).abs().max()
        assert 0 < difference < 1e-2


@pytest.mark.parametrize("weight", [1e6, -1e5, float("inf"), float("nan")])
def test_a_weight_that_fp16_cannot_hold(weight: float) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    assert fits_fp16(model)
    model[1].weight.data[2, 1] = weight
    assert not fits_fp16(model)


def test_a_model_with_such_a_weight_stays_in_fp32() -> None:
    model = make_model("llama")
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = 1e6
    with pytest.raises(NotInFp16, match="too large"):
        build(model, form="fp16", limit_bytes=LIMIT_BYTES, context_tokens=CONTEXT)
    assert isinstance(make_runner(model), BatchedModel)  # nothing was packed yet


def test_one_candidate_or_no_layer_needs_no_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_time", lambda *_: pytest.fail("timed"))
    assert fastest_form([(8, 8)], ["fp32"]) == "fp32"
    assert fastest_form([], ["fp16", "fp32"]) == "fp16"


@needs_fp16
def test_each_shape_is_timed_once_and_counts_as_often_as_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp16 is a little faster on the shape that comes often, and much slower on the other one."""
    timed: list[tuple[str, int]] = []
    forms: list[str] = []
    plain = linear._product

    def product(weight: torch.Tensor, form: str) -> object:
        forms.append(form)
        return plain(weight, form)

    def seconds(_: object, x: torch.Tensor, share: float) -> float:
        timed.append((forms[-1], x.shape[1]))
        assert share > 0
        return {("fp16", 8): 1.0, ("fp32", 8): 2.0, ("fp16", 16): 9.0, ("fp32", 16): 2.0}[timed[-1]]

    monkeypatch.setattr(linear, "_product", product)
    monkeypatch.setattr(linear, "_time", seconds)
    assert fastest_form([(4, 8)] * 10 + [(4, 16)], ["fp16", "fp32"]) == "fp16"
    assert len(timed) == 2 * 2 * len(linear.TIMED_ROWS)
    assert fastest_form([(4, 8)] * 2 + [(4, 16)], ["fp16", "fp32"]) == "fp32"


def test_bf16_has_to_be_clearly_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"fp32": 1.0, "bf16": 0.9}
    monkeypatch.setattr(linear, "_product", lambda weight, form: form)
    monkeypatch.setattr(linear, "_time", lambda form, x, share: seconds[form])
    assert fastest_form([(64, 64)], ["bf16", "fp32"]) == "fp32"
    seconds["bf16"] = 0.7
    assert fastest_form([(64, 64)], ["bf16", "fp32"]) == "bf16"


def test_the_fastest_of_real_products_is_one_of_the_candidates() -> None:
    assert fastest_form([(64, 64)], ["bf16", "fp32"]) in {"bf16", "fp32"}
