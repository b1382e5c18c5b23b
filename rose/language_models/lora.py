"""LoRA: the layer, and the one adapter that is trained on a model; saved in PEFT's format.

The format is PEFT's (adapter_config.json, adapter_model.safetensors), the forward is ours: it keeps only the input and
the rank-r product for backward and never copies an activation to fp32. The layer computes

    y = x Wᵀ + b + s · (x Aᵀ) Bᵀ        s = alpha / r,  A [r, in], B [out, r]      (Hu et al., arXiv 2106.09685)

with fp32 master A and B that are cast to the dtype of x.
"""

from __future__ import annotations

import json
import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from rose.domain.hyperparameter_requests import TARGETS_ALL
from rose.domain.hyperparameters import LoraSettings
from rose.domain.job_values import BaseModel
from rose.errors import InvalidRequest
from rose.language_models.adapters import CONFIG_FILE, PREFIX, ROSE_FILE, WEIGHTS_FILE, AdapterFacts, read_adapter


class _FusedLora(torch.autograd.Function):
    """x [..., in] -> [..., out] with gradients for x, A and B; W and b are frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        y, hidden = lora_forward(x, weight, bias, a.to(x.dtype), b.to(x.dtype), scale)
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


def lora_forward(
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
            yield f"{PREFIX}{name}.lora_A.weight", layer.lora_a
            yield f"{PREFIX}{name}.lora_B.weight", layer.lora_b

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
        replace_layer(model, name, layer)
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
        if isinstance(module, LoraLinear):
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


def replace_layer(model: Any, name: str, module: nn.Module) -> None:
    """Put `module` in the place of the model's layer of that name."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def load_adapter(adapter: LoraAdapter, folder: Path, base: BaseModel | None = None) -> None:
    """Take over the weights of a stored adapter of the same shape, to train on from it.

    Raises: InvalidRequest as `read_adapter` and `LoraAdapter.load` do.
    """
    stored = read_adapter(folder, base)
    adapter.load(
        {
            f"{PREFIX}{name}.lora_{half}.weight": tensor
            for name, pair in stored.layers.items()
            for half, tensor in zip("AB", pair, strict=True)
        }
    )
