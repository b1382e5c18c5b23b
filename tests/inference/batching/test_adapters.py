"""Each token goes through its own adapter, whatever was loaded, removed or moved before; numbers as PEFT's."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn

from rose.errors import InvalidRequest
from rose.inference.batching import adapters as module
from rose.inference.batching.adapters import Adapters, Stack
from rose.language_models.adapters import StoredAdapter, read_adapter
from tests.inference.batching.models import Part, make_adapter, make_model, make_runner, make_text, own_logits, perform

# PEFT 0.21 asks transformers 5.23 by an older name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@dataclass
class Layer:
    """An AdaptedLinear without a base."""

    inputs: int
    outputs: int
    example: Tensor = field(default_factory=lambda: torch.empty(0))
    stacks: dict[int, Stack] = field(default_factory=dict[int, Stack])


def make_layers() -> dict[str, Layer]:
    return {"one": Layer(24, 40), "two": Layer(40, 16), "three": Layer(8, 8)}


def random_adapter(layers: dict[str, Layer], chance: random.Random) -> StoredAdapter:
    rank = chance.choice([1, 3, 8, 9, 16, 20, 40, 64])
    names = chance.sample(sorted(layers), chance.randint(1, len(layers)))
    pairs = {name: (torch.randn(rank, layers[name].inputs), torch.randn(layers[name].outputs, rank)) for name in names}
    return StoredAdapter(scale=chance.uniform(0.1, 3), rank=rank, layers=pairs, facts=None)


def assert_products(
    adapters: Adapters, layers: dict[str, Layer], loaded: dict[str, StoredAdapter], keys: list[str | None], chunks: int
) -> None:
    """Let decoding tokens with `keys` and then chunks of 1, 6, 11... tokens go through all layers."""
    parts: list[tuple[str | None, int, int]] = []
    start = len(keys)
    for number in range(chunks):
        parts.append((keys[-1 - number % len(keys)], start, start + 1 + 5 * number))
        start = parts[-1][2]
    assignment = adapters.assign(keys, parts, torch.device("cpu"))
    of = [*keys, *(key for key, first, end in parts for _ in range(first, end))]
    for name, layer in layers.items():
        x = torch.randn(1, start + 2, layer.inputs)
        y = torch.zeros(1, start + 2, layer.outputs)
        if assignment is not None:
            assignment.add(layer.stacks, x, y)
        expected = torch.zeros(start + 2, layer.outputs)
        for token, key in enumerate(of):
            if key is not None and name in loaded[key].layers:
                a, b = loaded[key].layers[name]
                expected[token] = loaded[key].scale * (b @ (a @ x[0, token]))
        torch.testing.assert_close(y[0], expected, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("seed", range(6))
def test_adapters_keep_their_numbers_through_any_order_of_events(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setattr(module, "ALL_SLOTS", 2)  # so that stacks grow
    torch.manual_seed(seed)
    chance, layers = random.Random(seed), make_layers()
    adapters, loaded = Adapters(layers), dict[str, StoredAdapter]()
    for event in range(60):
        if loaded and chance.random() < 0.35:
            key = chance.choice(sorted(loaded))
            adapters.remove(key)
            del loaded[key]
        else:
            key = f"a{event}"
            loaded[key] = random_adapter(layers, chance)
            adapters.add(key, loaded[key])
        assert sorted(adapters.keys()) == sorted(loaded)
        keys = [chance.choice([None, *sorted(loaded)[-4:]]) for _ in range(chance.randint(1, 9))]
        assert_products(adapters, layers, loaded, keys, chance.randint(0, 3))


def test_few_adapters_in_use_are_gathered_at_the_beginning() -> None:
    chance, layers = random.Random(0), make_layers()
    adapters, loaded = Adapters(layers), dict[str, StoredAdapter]()
    for number in range(20):
        pairs = {name: (torch.randn(8, one.inputs), torch.randn(one.outputs, 8)) for name, one in layers.items()}
        loaded[f"a{number}"] = StoredAdapter(scale=1.0, rank=8, layers=pairs, facts=None)
        adapters.add(f"a{number}", loaded[f"a{number}"])
    for _ in range(10):
        used = [f"a{number}" for number in chance.sample(range(20), 3)]
        assignment = adapters.assign(used, [], torch.device("cpu"))
        assert assignment is not None
        assert assignment.decoding[8].slots <= 6
        assert_products(adapters, layers, loaded, [*used, None, used[0]], 2)


def test_no_adapter_no_work() -> None:
    layers = make_layers()
    adapters = Adapters(layers)
    adapters.add("a", random_adapter(layers, random.Random(0)))
    assert adapters.assign([None, None], [(None, 2, 5)], torch.device("cpu")) is None


def test_adding_twice_changes_nothing_and_removing_a_stranger_does_not_either() -> None:
    layers = make_layers()
    adapters, first = Adapters(layers), random_adapter(layers, random.Random(0))
    adapters.add("a", first)
    adapters.add("a", random_adapter(layers, random.Random(1)))
    adapters.remove("b")
    assert_products(adapters, layers, {"a": first}, ["a"], 1)


@pytest.mark.parametrize("wrong", ["name", "inputs", "outputs", "rank"])
def test_an_adapter_that_does_not_fit_is_refused_and_leaves_nothing(wrong: str) -> None:
    layers = make_layers()
    adapters, good = Adapters(layers), random_adapter(layers, random.Random(0))
    adapters.add("good", good)
    a, b = torch.randn(8, 24), torch.randn(40, 8)
    pairs = {
        "name": {"four": (a, b)},
        "inputs": {"one": (a[:, 1:], b)},
        "outputs": {"one": (a, b[1:])},
        "rank": {"one": (torch.randn(70, 24), torch.randn(40, 70))},
    }[wrong]
    for _ in range(2):
        with pytest.raises(InvalidRequest, match="four" if wrong == "name" else "one"):
            adapters.add("bad", StoredAdapter(scale=1.0, rank=8, layers=pairs, facts=None))
    assert adapters.keys() == ["good"]
    adapters.add("bad", random_adapter(layers, random.Random(0)))
    assert_products(adapters, layers, {"good": good}, ["good", None], 1)


def test_an_adapter_for_which_memory_ends_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    chance, layers = random.Random(2), make_layers()
    adapters, loaded = Adapters(layers), {"a": random_adapter(layers, chance)}
    adapters.add("a", loaded["a"])
    again = msgspec.structs.replace(loaded["a"], scale=0.3)
    with monkeypatch.context() as patch:
        patch.setattr(Stack, "write", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            adapters.add("b", again)
    assert adapters.keys() == ["a"]
    loaded["b"] = again
    adapters.add("b", again)
    assert_products(adapters, layers, loaded, ["b", "a", None], 2)
    adapters.remove("b")
    assert_products(adapters, layers, loaded, ["a"], 2)


def save(stored: StoredAdapter, folder: Path, *, rslora: bool) -> None:
    """Write an adapter as PEFT does, with alpha 12."""
    folder.mkdir()
    targets = sorted({name.rpartition(".")[2] for name in stored.layers})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": stored.rank,
        "lora_alpha": 12,
        "use_rslora": rslora,
        "target_modules": targets,
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors: dict[str, Tensor] = {}
    for name, (a, b) in stored.layers.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = a
        tensors[f"base_model.model.{name}.lora_B.weight"] = b
    save_file(tensors, folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("rank", "only", "rslora"), [(1, "", False), (8, "q_proj", False), (20, "", True), (64, "", False), (20, "", False)]
)
def test_numbers_are_pefts(tmp_path: Path, rank: int, only: str, rslora: bool) -> None:
    runner = make_runner(make_model("llama"))
    text = make_text(90)
    stored = make_adapter(runner, rank=rank, seed=rank, only=only, std=0.2)
    save(stored, tmp_path / "adapter", rslora=rslora)
    runner.add_adapter("red", read_adapter(tmp_path / "adapter"))
    runner.add_adapter("other", make_adapter(runner, rank=16, seed=1))
    plain = make_model("llama")
    base = own_logits(plain, text)
    model: Any = PeftModel.from_pretrained(plain, str(tmp_path / "adapter"))
    expected = own_logits(model, text)
    assert (expected - base).abs().max() > 0.1
    parts = [Part(text, 70, "red"), Part(text, 75), Part(text, 20, "other", joins=1)]
    found, of_base, _ = perform(runner, parts)
    torch.testing.assert_close(found, expected[69:], atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(of_base, base[74:], atol=1e-4, rtol=0)


def test_layers_that_get_tokens_without_a_first_dimension() -> None:
    """As a shared expert does."""
    model = make_model("qwen2_moe")
    runner = make_runner(model)
    name = "shared_expert.up_proj"
    assert isinstance(make_model("qwen2_moe").model.layers[0].mlp.shared_expert.up_proj, nn.Linear)
    stored = make_adapter(runner, rank=8, seed=3, only=name, std=0.3)
    assert stored.layers
    runner.add_adapter("red", stored)
    merged = make_model("qwen2_moe")
    with torch.no_grad():
        for layer, (a, b) in stored.layers.items():
            merged.get_submodule(layer).weight += stored.scale * b @ a
    text = make_text(30)
    found, _ = perform(runner, [Part(text, 20, "red"), Part(text, 9)])
    torch.testing.assert_close(found, own_logits(merged, text)[19:], atol=2e-4, rtol=1e-4)
