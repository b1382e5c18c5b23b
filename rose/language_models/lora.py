"""LoRA: the layer, attaching it for training, serving several adapters on one base, PEFT's file format in and out.

The format is PEFT's (adapter_config.json, adapter_model.safetensors), the forward is ours: it keeps only the input and
the rank-r product for backward and never copies an activation to fp32. The layer computes

    y = x Wᵀ + b + s · (x Aᵀ) Bᵀ        s = alpha / r,  A [r, in], B [out, r]      (Hu et al., arXiv 2106.09685)

with fp32 master A and B that are cast to the dtype of x. Kinds that serving engines refuse (DoRA, biases, extra
trained modules) are never written and not read.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from rose.domain.hyperparameters import TARGETS_ALL, LoraSettings
from rose.domain.job_values import BaseModel
from rose.errors import InvalidRequest

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
ROSE_FILE = "rose.json"
_PREFIX = "base_model.model."


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


# --- the layer


class _FusedLora(torch.autograd.Function):
    """x [..., in] -> [..., out] with gradients for x, A and B; W and b are frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        y, hidden = _lora_forward(x, weight, bias, a.to(x.dtype), b.to(x.dtype), scale)
        ctx.save_for_backward(x, hidden, weight, a, b)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        x, hidden, weight, a, b = ctx.saved_tensors
        g = gradients[0].reshape(-1, gradients[0].shape[-1])
        g_b = (g @ b.to(g.dtype)).mul_(ctx.scale)
        grad_a = (g_b.T @ x.reshape(-1, x.shape[-1])).to(a.dtype) if ctx.needs_input_grad[3] else None
        grad_b = (g.T @ hidden).to(b.dtype).mul_(ctx.scale) if ctx.needs_input_grad[4] else None
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (g @ weight).addmm_(g_b, a.to(g.dtype)).view(x.shape)
        return grad_x, None, None, grad_a, grad_b, None


def _lora_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Return (y [..., out], x Aᵀ [T, r]); a and b have the dtype of x."""
    y = functional.linear(x, weight, bias)
    hidden = x.reshape(-1, x.shape[-1]) @ a.T
    y.view(-1, y.shape[-1]).addmm_(hidden, b.T, alpha=scale)
    return y, hidden


class LoraLinear(nn.Module):
    """A frozen linear layer with one trainable adapter beside it."""

    def __init__(self, base: nn.Linear, switch: LoraSwitch, settings: LoraSettings, generator: torch.Generator) -> None:
        super().__init__()
        self.base = base
        self.switch = switch
        self.scale = settings.lora_alpha / settings.r
        self.dropout = settings.lora_dropout
        device = base.weight.device
        # A is kaiming-uniform with a = sqrt(5) as in PEFT, B zero: the adapter starts as nothing.
        a = torch.empty(settings.r, base.in_features)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        self.lora_a = nn.Parameter(a.to(device))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, settings.r, device=device))

    def forward(self, x: Tensor) -> Tensor:
        if not self.switch.on:
            return self.base(x)
        if self.dropout and self.training:
            dropped = functional.dropout(x, self.dropout)
            hidden = functional.linear(dropped, self.lora_a.to(x.dtype)) * self.scale
            return self.base(x) + functional.linear(hidden, self.lora_b.to(x.dtype))
        y: Any = _FusedLora.apply(x, self.base.weight, self.base.bias, self.lora_a, self.lora_b, self.scale)
        return y


class LoraSwitch:
    """Whether the adapter of a model takes part in its forward."""

    on: bool = True


# --- training


class LoraAdapter:
    """The one adapter that is being trained on a model."""

    def __init__(self, model: Any, settings: LoraSettings, layers: dict[str, LoraLinear], switch: LoraSwitch) -> None:
        self.model = model
        self.settings = settings
        self.layers = layers
        self._switch = switch

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Return every A and B, fp32, always in the same order."""
        return [parameter for layer in self.layers.values() for parameter in (layer.lora_a, layer.lora_b)]

    def tensors(self) -> dict[str, Tensor]:
        """Return copies of all weights on the CPU, in fp32, named as in PEFT's file."""
        return {name: parameter.detach().to("cpu", copy=True) for name, parameter in self._named()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over weights as `tensors` gives them.

        Raises: InvalidRequest when a layer is missing, is one too many or has another shape.
        """
        own = dict(self._named())
        wrong = sorted(own.keys() ^ tensors.keys())
        wrong += [name for name in own.keys() & tensors.keys() if own[name].shape != tensors[name].shape]
        if wrong:
            raise InvalidRequest(
                f"The adapter does not fit this model: {len(wrong)} weights differ, first {wrong[0]}.",
                code="adapter_does_not_fit",
            )
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(tensors[name])

    def save(self, folder: Path, base: BaseModel) -> None:
        """Write the adapter in PEFT's format, with ROSE's facts beside it, into `folder` (made if need be)."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG_FILE).write_text(json.dumps(self._peft_config(base), indent=2) + "\n")
        save_file(self.tensors(), folder / WEIGHTS_FILE, metadata={"format": "pt"})
        facts = AdapterFacts(base=base, lora=self.settings)
        (folder / ROSE_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(facts)) + b"\n")

    @contextmanager
    def off(self) -> Generator[None]:
        """Run the base alone inside the block."""
        self._switch.on = False
        try:
            yield
        finally:
            self._switch.on = True

    def _named(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, layer in self.layers.items():
            yield f"{_PREFIX}{name}.lora_A.weight", layer.lora_a
            yield f"{_PREFIX}{name}.lora_B.weight", layer.lora_b

    def _peft_config(self, base: BaseModel) -> dict[str, Any]:
        alpha = self.settings.lora_alpha
        return {
            "base_model_name_or_path": base.source,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": True,
            "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
            "lora_dropout": self.settings.lora_dropout,
            "modules_to_save": None,
            "peft_type": "LORA",
            "r": self.settings.r,
            "revision": base.revision,
            "target_modules": _short_names(self.model, self.layers),
            "task_type": "CAUSAL_LM",
            "use_dora": False,
            "use_rslora": False,
        }


def attach(model: Any, settings: LoraSettings, seed: int) -> LoraAdapter:
    """Put a fresh adapter on `model`, whose own weights are frozen by this. Deterministic in `seed`.

    Raises: InvalidRequest when a target does not exist, naming those that do.
    """
    names = find_targets(model, settings.target_modules)
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    switch = LoraSwitch()
    layers: dict[str, LoraLinear] = {}
    for name in names:
        layer = LoraLinear(model.get_submodule(name), switch, settings, generator)
        layer.train(model.training)
        _replace(model, name, layer)
        layers[name] = layer
    return LoraAdapter(model, settings, layers, switch)


def find_targets(model: Any, targets: Sequence[str]) -> list[str]:
    """Return the full names of the linear layers that `targets` (`all-linear`, or ends of names) stand for.

    Raises: InvalidRequest when a target matches nothing.
    """
    linear = _linear_names(model)
    if tuple(targets) == (TARGETS_ALL,):
        matched = linear
    else:
        matched = [name for name in linear if any(_matches(name, target) for target in targets)]
    unknown = [t for t in targets if t != TARGETS_ALL and not any(_matches(name, t) for name in linear)]
    if unknown or not matched:
        available = sorted({name.rpartition(".")[2] for name in linear})
        raise InvalidRequest(
            f"lora_config.target_modules names {', '.join(unknown) or 'nothing'}, which this model does not have. "
            f"It has: {', '.join(available) or 'no linear layers'}.",
            code="invalid_value",
            param="hyperparameters.lora_config.target_modules",
        )
    return matched


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


def _linear_names(model: Any) -> list[str]:
    """Every linear layer except the output head, which shares its weights with the embedding in many models."""
    head = model.get_output_embeddings()
    found: list[str] = []
    wrapped: set[str] = set()
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear | SlotLinear):
            found.append(name)
            wrapped.add(f"{name}.base")
        elif isinstance(module, nn.Linear) and module is not head and name not in wrapped and "lm_head" not in name:
            found.append(name)
    return found


def _short_names(model: Any, layers: Mapping[str, Any]) -> list[str]:
    """Return the last parts of the layers' names when these select exactly the layers, else the full names."""
    short = sorted({name.rpartition(".")[2] for name in layers})
    selected = [name for name in _linear_names(model) if any(_matches(name, part) for part in short)]
    return short if set(selected) == set(layers) else sorted(layers)


def _replace(model: Any, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


# --- stored adapters


def read_adapter(folder: Path, base: BaseModel | None = None) -> StoredAdapter:
    """Read an adapter in PEFT's format; with `base`, only one that was trained on exactly that base.

    Raises: InvalidRequest when it is of a kind that ROSE does not serve, belongs to another base or cannot be read.
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
    if base is not None and facts is not None and facts.base.fingerprint != base.fingerprint:
        raise InvalidRequest(
            f"The adapter in {folder} was trained on {facts.base.source} (fingerprint "
            f"{facts.base.fingerprint[:12]}), not on {base.source} ({base.fingerprint[:12]}).",
            code="wrong_base_model",
        )
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
    names = {name.removeprefix(_PREFIX).rpartition(".lora_")[0] for name in tensors}
    try:
        return {
            name: (tensors[f"{_PREFIX}{name}.lora_A.weight"], tensors[f"{_PREFIX}{name}.lora_B.weight"])
            for name in sorted(names)
        }
    except KeyError as error:
        raise InvalidRequest(
            f"The adapter in {folder} has no weight {error.args[0]}.", code="adapter_not_readable"
        ) from None


def load_adapter(adapter: LoraAdapter, folder: Path, base: BaseModel | None = None) -> None:
    """Take over the weights of a stored adapter of the same shape, to train on from it.

    Raises: InvalidRequest as `read_adapter` and `LoraAdapter.load` do.
    """
    stored = read_adapter(folder, base)
    adapter.load(
        {
            f"{_PREFIX}{name}.lora_{half}.weight": tensor
            for name, pair in stored.layers.items()
            for half, tensor in zip("AB", pair, strict=True)
        }
    )


def merge_adapter_into(model: Any, stored: StoredAdapter) -> None:
    """Add the adapter to the model's own weights, W + s·BA in fp32, so that full fine-tuning can go on from it.

    Raises: InvalidRequest when the model has no such layer.
    """
    with torch.no_grad():
        for name, (a, b) in stored.layers.items():
            weight = _linear(model, name).weight
            update = (b.float() @ a.float()).mul_(stored.scale).to(weight.device)
            weight.copy_((weight.float() + update).to(weight.dtype))


def _linear(model: Any, name: str) -> nn.Linear:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        module = None
    if isinstance(module, SlotLinear):
        return module.base
    if not isinstance(module, nn.Linear):
        raise InvalidRequest(
            f"The adapter has weights for {name}, which the model does not have.", code="adapter_does_not_fit"
        )
    return module


# --- serving


class _Slot:
    """Weights of one adapter at one layer, in the base's dtype."""

    __slots__ = ("a", "b", "scale")

    def __init__(self, a: Tensor, b: Tensor, scale: float) -> None:
        self.a, self.b, self.scale = a, b, scale


class SlotLinear(nn.Module):
    """A frozen linear layer that carries several adapters, of which each forward uses one or none."""

    def __init__(self, base: nn.Linear, selected: ContextVar[str | None]) -> None:
        super().__init__()
        self.base = base
        self.selected = selected
        self.slots: dict[str, _Slot] = {}

    def forward(self, x: Tensor) -> Tensor:
        key = self.selected.get()
        slot = None if key is None else self.slots.get(key)
        if slot is None:
            return self.base(x)
        return _lora_forward(x, self.base.weight, self.base.bias, slot.a, slot.b, slot.scale)[0]


class AdapterSlots:
    """Adapters that lie ready on one base model, keyed by the hash of their content.

    Without a selection the model answers exactly, bit for bit, as without this class. The selection belongs to the
    thread or task that made it. `add` and `remove` may run while another thread computes.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._selected: ContextVar[str | None] = ContextVar("selected_adapter", default=None)
        self._layers: dict[str, SlotLinear] = {}
        self._bytes: dict[str, int] = {}
        self._changing = threading.Lock()

    def __contains__(self, key: str) -> bool:
        return key in self._bytes

    def keys(self) -> list[str]:
        """Return the loaded adapters, in the order of loading."""
        return list(self._bytes)

    def memory_bytes(self, key: str) -> int:
        """Return what a loaded adapter takes of the device's memory."""
        return self._bytes[key]

    def add(self, key: str, stored: StoredAdapter) -> None:
        """Load an adapter under `key`; does nothing when it is there.

        Raises: InvalidRequest when it does not fit the model; nothing is loaded then.
        """
        with self._changing, torch.no_grad():
            if key in self._bytes:
                return
            prepared: dict[str, _Slot] = {}
            for name, (a, b) in stored.layers.items():
                weight = _linear(self.model, name).weight
                if a.shape[1] != weight.shape[1] or b.shape[0] != weight.shape[0]:
                    raise InvalidRequest(
                        f"The adapter's weights for {name} have another shape than the model's.",
                        code="adapter_does_not_fit",
                    )
                place = {"device": weight.device, "dtype": weight.dtype}
                prepared[name] = _Slot(a.to(**place), b.to(**place), stored.scale)
            for name, slot in prepared.items():
                self._layer(name).slots[key] = slot
            self._bytes[key] = sum(t.numel() * t.element_size() for s in prepared.values() for t in (s.a, s.b))

    def remove(self, key: str) -> None:
        """Forget an adapter; a forward that uses it must not be running."""
        with self._changing:
            self._bytes.pop(key, None)
            for layer in self._layers.values():
                layer.slots.pop(key, None)

    @contextmanager
    def select(self, key: str | None) -> Generator[None]:
        """Use this adapter (None: the base alone) for every forward inside the block.

        Raises: KeyError when it is not loaded.
        """
        if key is not None and key not in self._bytes:
            raise KeyError(key)
        token = self._selected.set(key)
        try:
            yield
        finally:
            self._selected.reset(token)

    def _layer(self, name: str) -> SlotLinear:
        if name not in self._layers:
            layer = SlotLinear(_linear(self.model, name), self._selected)
            layer.train(False)
            _replace(self.model, name, layer)
            self._layers[name] = layer
        return self._layers[name]
