"""Packing, masking and the chunked loss give what a plain padded forward of transformers gives."""

from __future__ import annotations

import random
from array import array
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.gemma2 import Gemma2Config
from transformers.models.granite import GraniteConfig
from transformers.models.lfm2 import Lfm2Config
from transformers.models.qwen2 import Qwen2Config
from transformers.models.qwen3 import Qwen3Config

from rose.language_models.load import load_model
from rose.language_models.tiny import Architecture, build_fixture
from rose.methods.method import Document
from trainer.attention import use_packed_attention
from trainer.forward import Forward, choose_forward, likelihoods
from trainer.losses import label_cross_entropy, logits_cross_entropy

CPU = torch.device("cpu")
PACKED = Forward(packed=True, own_head=True)
VOCABULARY = 1024


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module", params=["qwen3", "qwen2", "llama"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    architecture: Architecture = request.param
    return load_model(build_fixture(tmp_path_factory.mktemp(architecture), architecture))


def documents(*lengths: int, seed: int = 0, vocabulary: int = VOCABULARY) -> list[Document]:
    """Random documents of which the second half is labelled."""
    draw = random.Random(seed)
    return [
        Document(
            ids=array("q", [draw.randrange(vocabulary) for _ in range(length)]),
            weights=array("f", [0.0] * (length // 2) + [1.0] * (length - length // 2)),
        )
        for length in lengths
    ]


def loss(model: Any, rows: list[Document], forward: Forward) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sums of weight x cross-entropy and of right answers."""
    found = likelihoods(model, rows, forward, CPU)
    return -found.logprobs.sum(), found.correct.sum()


def padded_loss(model: Any, rows: list[Document]) -> torch.Tensor:
    """The mean over all label tokens, as transformers computes it from a right-padded batch."""
    longest = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask = torch.zeros(len(rows), longest, dtype=torch.int64)
    labels = torch.full((len(rows), longest), -100)
    for index, row in enumerate(rows):
        size = len(row)
        ids[index, :size] = torch.tensor(row.ids)
        mask[index, :size] = 1
        labels[index, :size] = torch.where(torch.tensor(row.weights) > 0, ids[index, :size], -100)
    return model(input_ids=ids, attention_mask=mask, labels=labels).loss


def test_the_packed_loss_equals_the_padded_loss_of_transformers(model: Any) -> None:
    rows = documents(40, 7, 23, 2, 61)
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        expected = padded_loss(model, rows)
        use_packed_attention(model)
        total, _ = loss(model, rows, PACKED)
    assert float(total) / sum(row.label_weight for row in rows) == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.parametrize("parts", [[[0, 1, 2, 3]], [[0, 2], [1, 3]], [[0], [1], [2], [3]]])
def test_gradients_do_not_depend_on_what_shares_a_micro_batch(model: Any, parts: list[list[int]]) -> None:
    rows = documents(40, 7, 23, 61)
    model.set_attn_implementation("sdpa")
    weight: Any = model.model.layers[1].mlp.up_proj.weight
    weight.requires_grad_(True)
    try:
        padded_loss(model, rows).backward()
        expected, weight.grad = weight.grad, None
        use_packed_attention(model)
        denominator = sum(row.label_weight for row in rows)
        for part in parts:
            total, _ = loss(model, [rows[index] for index in part], PACKED)
            (total / denominator).backward()
        assert torch.allclose(weight.grad, expected, atol=1e-6, rtol=1e-4)
    finally:
        weight.grad = None
        weight.requires_grad_(False)


def test_weights_scale_their_tokens_and_zero_is_no_label(model: Any) -> None:
    (row,) = documents(30)
    use_packed_attention(model)

    def total(weights: list[float]) -> float:
        document = Document(ids=row.ids, weights=array("f", weights))
        with torch.no_grad():
            return float(loss(model, [document], PACKED)[0])

    first, second = [0.0] * 30, [0.0] * 30
    first[10], second[20] = 1.0, 1.0
    both = [a + 0.5 * b for a, b in zip(first, second, strict=True)]
    assert total(both) == pytest.approx(total(first) + 0.5 * total(second), rel=1e-5)
    assert total([1.0] + [0.0] * 29) == 0.0


def test_accuracy_counts_the_likeliest_token(model: Any) -> None:
    (row,) = documents(20)
    use_packed_attention(model)
    with torch.no_grad():
        states = model.model(input_ids=torch.tensor(row.ids)[None], use_cache=False).last_hidden_state[0]
        likeliest = model.lm_head(states).argmax(-1).tolist()
        ids = array("q", row.ids)
        ids[19] = likeliest[18]
        weights = array("f", [0.0] * 18 + [1.0, 3.0])
        _, correct = loss(model, [Document(ids=ids, weights=weights)], PACKED)
    assert float(correct) in (3.0, 4.0)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("scale", [torch.full((10,), 1 / 3), torch.linspace(-1, 1, 10)], ids=["alike", "each"])
def test_the_chunked_loss_has_the_gradients_of_the_plain_one(
    with_bias: bool, scale: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.losses.CHUNK_NUMBERS", 3 * 50)
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 50, bias=with_bias)
    rows = torch.randn(10, 8, requires_grad=True)
    targets, weights = torch.randint(50, (10,)), torch.rand(10)
    results = []
    for compute in (
        lambda: label_cross_entropy(rows, head, targets, weights),
        lambda: logits_cross_entropy(head(rows), targets, weights),
    ):
        rows.grad = None
        head.zero_grad()
        losses, correct = compute()
        (losses * scale).sum().backward()
        results.append([losses, correct, rows.grad, *(parameter.grad for parameter in head.parameters())])
    for got, want in zip(*results, strict=True):
        assert torch.allclose(got, want, atol=1e-6)


def test_a_usual_model_is_packed(model: Any) -> None:
    assert choose_forward(model, documents(40, 12, 30), CPU) == (PACKED, None)
    assert choose_forward(model, documents(12), CPU) == (PACKED, None)


SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def small(config: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).requires_grad_(False).eval()


@pytest.mark.parametrize("kind", [Qwen2Config, Qwen3Config])
def test_sliding_windows_are_kept_when_packed(kind: Any) -> None:
    windowed = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0, "head_dim": 16}
    model = small(kind(**SMALL, **windowed))
    assert "sliding_attention" in model.config.layer_types
    forward, caveat = choose_forward(model, documents(20, 11, vocabulary=64), CPU)
    assert (forward, caveat) == (PACKED, None)


def test_a_model_that_mixes_neighbours_is_not_packed() -> None:
    model = small(Lfm2Config(**SMALL, layer_types=["conv", "full_attention"]))
    forward, caveat = choose_forward(model, documents(20, 11, vocabulary=64), CPU)
    assert not forward.packed
    assert caveat is not None
    assert "one by one" in caveat
    (row,) = documents(20, vocabulary=64)
    with torch.no_grad():
        total, _ = loss(model, [row], forward)
        assert float(total) / row.label_weight == pytest.approx(float(padded_loss(model, [row])), abs=1e-5)


@pytest.mark.parametrize(
    ("config", "packed"),
    [(GraniteConfig(**SMALL, logits_scaling=0.1), True), (Gemma2Config(**SMALL, final_logit_softcapping=1.0), False)],
)
def test_scaled_and_capped_logits_are_left_to_the_model(config: Any, packed: bool) -> None:
    model = small(config)
    forward, _ = choose_forward(model, documents(20, 11, vocabulary=64), CPU)
    assert forward == Forward(packed=packed, own_head=False)
    (row,) = documents(20, vocabulary=64)
    with torch.no_grad():
        total, _ = loss(model, [row], forward)
        assert float(total) / row.label_weight == pytest.approx(float(padded_loss(model, [row])), abs=1e-5)


def test_a_decoder_without_states_is_left_to_the_model(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Llama 4's, which is the whole model and gives logits."""
    monkeypatch.setattr(type(model), "get_decoder", lambda self: self)
    model.set_attn_implementation("sdpa")
    forward, caveat = choose_forward(model, documents(20, 11), CPU)
    assert forward == Forward(packed=False, own_head=False)
    assert caveat is not None
    assert model.config._attn_implementation == "sdpa"
    (row,) = documents(20)
    with torch.no_grad():
        total, _ = loss(model, [row], forward)
        assert float(total) / row.label_weight == pytest.approx(float(padded_loss(model, [row])), abs=1e-5)
