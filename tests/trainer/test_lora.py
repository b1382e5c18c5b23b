"""The LoRA layer against PEFT, its file format, and several adapters on one base."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from rose.domain.hyperparameters import LoraSettings
from rose.domain.job_values import BaseModel
from rose.errors import InvalidRequest
from rose.language_models.adapters import merge_adapter_into, read_adapter
from rose.language_models.load import load_model
from rose.language_models.lora import LoraAdapter, attach, load_adapter
from rose.language_models.slots import AdapterSlots
from rose.language_models.tiny import build_fixture

# PEFT 0.21 asks transformers 5.23 by an older name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

BASE = BaseModel(source="fixture", revision=None, fingerprint="f" * 64)
ALL = LoraSettings(r=8, lora_alpha=16.0, lora_dropout=0.0, target_modules=("all-linear",))
SMALL = LoraSettings(r=2, lora_alpha=4.0, lora_dropout=0.0, target_modules=("q_proj",))
LAYERS = 4 * 7
Served = tuple[Any, AdapterSlots, dict[str | None, Any]]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_fixture(tmp_path_factory.mktemp("fixture"), "qwen3")


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 1000, (2, 17), generator=torch.Generator().manual_seed(1))


def randomise(adapter: LoraAdapter, seed: int) -> None:
    """Give B values, as if the adapter had been trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in adapter.layers.values():
            layer.lora_b.normal_(0, 0.05, generator=generator)


def trained(folder: Path, into: Path, seed: int, settings: LoraSettings = ALL) -> torch.nn.Module:
    model = load_model(folder)
    adapter = attach(model, settings, seed)
    randomise(adapter, seed)
    adapter.save(into, BASE)
    return model


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def peft_twin(folder: Path, adapter: LoraAdapter, settings: LoraSettings) -> Any:
    targets = settings.target_modules[0] if settings.target_modules == ("all-linear",) else settings.target_modules
    config = LoraConfig(
        r=settings.r,
        lora_alpha=int(settings.lora_alpha),
        lora_dropout=settings.lora_dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM",
    )
    twin = get_peft_model(load_model(folder), config)
    twin_weights = {
        name.replace(".default.", "."): parameter
        for name, parameter in twin.named_parameters()
        if parameter.requires_grad
    }
    own = adapter.tensors()
    assert own.keys() == twin_weights.keys()
    with torch.no_grad():
        for name, parameter in twin_weights.items():
            parameter.copy_(own[name])
    return twin


@pytest.mark.parametrize("targets", [("all-linear",), ("q_proj", "v_proj"), ("model.layers.1.mlp.up_proj",)])
def test_forward_and_gradients_are_those_of_peft(folder: Path, ids: torch.Tensor, targets: tuple[str, ...]) -> None:
    settings = LoraSettings(r=4, lora_alpha=8.0, lora_dropout=0.0, target_modules=targets)
    model = load_model(folder)
    adapter = attach(model, settings, seed=3)
    randomise(adapter, 3)
    twin = peft_twin(folder, adapter, settings)
    torch.testing.assert_close(model(ids).logits, twin(ids).logits, rtol=1e-5, atol=1e-4)
    model(ids).logits.logsumexp(-1).sum().backward()
    twin(ids).logits.logsumexp(-1).sum().backward()
    theirs = [parameter.grad for parameter in twin.parameters() if parameter.requires_grad]
    ours = [parameter.grad for parameter in adapter.trainable_parameters()]
    assert len(ours) == len(theirs) > 0
    for own, other in zip(ours, theirs, strict=True):
        assert own is not None
        assert other.abs().max() > 0
        assert (own - other).norm() <= 1e-4 * other.norm()


def test_gradients_hold_against_finite_differences(folder: Path) -> None:
    from rose.language_models.lora import _FusedLora  # pyright: ignore[reportPrivateUsage]

    make = torch.Generator().manual_seed(0)
    x, w, bias, a, b = (
        torch.randn(shape, dtype=torch.float64, generator=make) for shape in ((2, 3, 5), (4, 5), (4,), (2, 5), (4, 2))
    )
    for tensor in (x, a, b):
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, a, b: _FusedLora.apply(x, w, bias, a, b, 0.7), (x, a, b))


def test_a_fresh_adapter_changes_nothing_and_only_it_is_trainable(folder: Path, ids: torch.Tensor) -> None:
    model = load_model(folder)
    before = logits(model, ids)
    adapter = attach(model, ALL, seed=0)
    assert torch.equal(logits(model, ids), before)
    assert len(adapter.layers) == LAYERS
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {id(p) for p in trainable} == {id(p) for p in adapter.trainable_parameters()}
    assert all(parameter.dtype == torch.float32 for parameter in trainable)
    randomise(adapter, 1)
    assert not torch.equal(logits(model, ids), before)
    with adapter.off():
        assert torch.equal(logits(model, ids), before)


def test_the_start_follows_from_the_seed(folder: Path) -> None:
    first, again, other = (attach(load_model(folder), ALL, seed).tensors() for seed in (5, 5, 6))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_dropout_acts_in_training_only(folder: Path, ids: torch.Tensor) -> None:
    settings = LoraSettings(r=4, lora_alpha=8.0, lora_dropout=0.5, target_modules=("all-linear",))
    model = load_model(folder)
    randomise(attach(model, settings, 0), 0)
    assert torch.equal(logits(model, ids), logits(model, ids))
    model.train()
    torch.manual_seed(1)
    first, second = logits(model, ids), logits(model, ids)
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(logits(model, ids), first)
    model(ids).logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_bf16_base_keeps_fp32_adapters(folder: Path, ids: torch.Tensor) -> None:
    model = load_model(folder, dtype=torch.bfloat16)
    adapter = attach(model, ALL, 0)
    randomise(adapter, 0)
    assert model(ids).logits.dtype == torch.bfloat16
    model(ids).logits.float().logsumexp(-1).sum().backward()
    for parameter in adapter.trainable_parameters():
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()


@pytest.mark.parametrize("targets", [("all-linear",), ("q_proj", "down_proj"), ("model.layers.1.mlp.up_proj",)])
def test_peft_reads_what_was_saved(folder: Path, ids: torch.Tensor, tmp_path: Path, targets: tuple[str, ...]) -> None:
    settings = LoraSettings(r=4, lora_alpha=6.0, lora_dropout=0.1, target_modules=targets)
    model = trained(folder, tmp_path, 2, settings)
    theirs = PeftModel.from_pretrained(load_model(folder), str(tmp_path)).eval()
    assert sum("lora_A" in name for name, _ in theirs.named_parameters()) == len(read_adapter(tmp_path).layers)
    torch.testing.assert_close(logits(model, ids), logits(theirs, ids), rtol=1e-5, atol=1e-4)


def test_what_peft_saved_is_read(folder: Path, ids: torch.Tensor, tmp_path: Path) -> None:
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules="all-linear", use_rslora=True, init_lora_weights=False, task_type="CAUSAL_LM"
    )
    theirs = get_peft_model(load_model(folder), config).eval()
    theirs.save_pretrained(str(tmp_path))
    stored = read_adapter(tmp_path)
    assert stored.scale == 4.0
    assert stored.facts is None
    model = load_model(folder)
    slots = AdapterSlots(model)
    slots.add("theirs", stored)
    with slots.select("theirs"):
        torch.testing.assert_close(logits(model, ids), logits(theirs, ids), rtol=1e-5, atol=1e-3)


def test_training_goes_on_from_a_stored_adapter(folder: Path, ids: torch.Tensor, tmp_path: Path) -> None:
    expected = logits(trained(folder, tmp_path, 4), ids)
    model = load_model(folder)
    adapter = attach(model, ALL, seed=9)
    load_adapter(adapter, tmp_path, BASE)
    assert torch.equal(logits(model, ids), expected)


def test_an_adapter_of_another_base_or_shape_is_refused(folder: Path, tmp_path: Path) -> None:
    trained(folder, tmp_path, 4)
    other = BaseModel(source="other", revision=None, fingerprint="0" * 64)
    with pytest.raises(InvalidRequest, match="is not the one that the adapter in") as caught:
        read_adapter(tmp_path, other)
    assert caught.value.code == "base_changed"
    smaller = attach(
        load_model(folder), LoraSettings(r=2, lora_alpha=4.0, lora_dropout=0, target_modules=("q_proj",)), 0
    )
    with pytest.raises(InvalidRequest, match="does not fit"):
        load_adapter(smaller, tmp_path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "biases"),
        ({"modules_to_save": ["lm_head"]}, "extra trained modules"),
        ({"rank_pattern": {"q_proj": 2}}, "ranks that differ"),
        ({"peft_type": "IA3"}, "another kind"),
    ],
)
def test_kinds_that_engines_refuse_are_refused(
    folder: Path, tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    import json

    trained(folder, tmp_path, 4)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(InvalidRequest, match=reason):
        read_adapter(tmp_path)


def test_a_truncated_adapter_is_a_plain_error(folder: Path, tmp_path: Path) -> None:
    trained(folder, tmp_path, 4)
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(InvalidRequest, match="cannot be read"):
        read_adapter(tmp_path)


def test_unknown_targets_name_the_available_ones(folder: Path) -> None:
    settings = LoraSettings(r=2, lora_alpha=4.0, lora_dropout=0, target_modules=("q_proj", "c_attn"))
    with pytest.raises(InvalidRequest, match=r"names c_attn, .*has: down_proj, gate_proj, k_proj") as caught:
        attach(load_model(folder), settings, 0)
    assert caught.value.param == "hyperparameters.lora_config.target_modules"


def test_the_output_head_is_never_a_target(folder: Path) -> None:
    settings = LoraSettings(r=2, lora_alpha=4.0, lora_dropout=0, target_modules=("lm_head",))
    with pytest.raises(InvalidRequest, match="lm_head"):
        attach(load_model(folder), settings, 0)


def test_a_merged_adapter_answers_as_the_adapter(folder: Path, ids: torch.Tensor, tmp_path: Path) -> None:
    expected = logits(trained(folder, tmp_path, 4), ids)
    model = load_model(folder)
    merge_adapter_into(model, read_adapter(tmp_path))
    torch.testing.assert_close(logits(model, ids), expected, rtol=1e-4, atol=1e-3)


@pytest.fixture
def served(folder: Path, tmp_path: Path, ids: torch.Tensor) -> Served:
    """A model with adapters `first` and `second` loaded, and what each of them should say."""
    expected: dict[str | None, Any] = {None: logits(load_model(folder), ids)}
    model = load_model(folder)
    slots = AdapterSlots(model)
    for seed, (key, settings) in enumerate({"first": ALL, "second": SMALL}.items()):
        expected[key] = logits(trained(folder, tmp_path / key, seed, settings), ids)
        slots.add(key, read_adapter(tmp_path / key, BASE))
    return model, slots, expected


def test_each_forward_uses_the_selected_adapter_bit_for_bit(served: Served, ids: torch.Tensor) -> None:
    model, slots, expected = served
    assert torch.equal(logits(model, ids), expected[None])
    for key in ("first", "second", None, "first"):
        with slots.select(key):
            assert torch.equal(logits(model, ids), expected[key])
    assert torch.equal(logits(model, ids), expected[None])
    assert slots.memory_bytes("first") > slots.memory_bytes("second") > 0


def test_a_removed_adapter_is_gone_and_the_others_stay(served: Served, ids: torch.Tensor) -> None:
    model, slots, expected = served
    slots.remove("first")
    assert slots.keys() == ["second"]
    with pytest.raises(KeyError), slots.select("first"):
        pass
    with slots.select("second"):
        assert torch.equal(logits(model, ids), expected["second"])
    assert torch.equal(logits(model, ids), expected[None])


def test_threads_select_for_themselves(served: Served, ids: torch.Tensor) -> None:
    model, slots, expected = served
    both_selected = threading.Barrier(2, timeout=30)
    right: dict[str, bool] = {}

    def answer(key: str) -> None:
        with slots.select(key):
            both_selected.wait()
            right[key] = torch.equal(logits(model, ids), expected[key])

    threads = [threading.Thread(target=answer, args=(key,)) for key in ("first", "second")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert right == {"first": True, "second": True}


def test_an_adapter_that_does_not_fit_leaves_the_model_as_it_was(
    served: Served, ids: torch.Tensor, tmp_path: Path
) -> None:
    model, slots, expected = served
    stored = read_adapter(tmp_path / "first")
    name, (a, b) = next(iter(stored.layers.items()))
    stored.layers[name] = (a[:, :-1], b)
    with pytest.raises(InvalidRequest, match="another shape"):
        slots.add("third", stored)
    assert "third" not in slots
    assert torch.equal(logits(model, ids), expected[None])
