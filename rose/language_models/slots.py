"""Several adapters on one base model for answering: each forward pass uses one of them, or none."""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from rose.errors import InvalidRequest
from rose.language_models.adapters import StoredAdapter, linear_layer
from rose.language_models.lora import lora_forward, replace_layer


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
        return lora_forward(x, self.base.weight, self.base.bias, slot.a, slot.b, slot.scale)[0]


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
                weight = self._linear(name).weight
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

    def _linear(self, name: str) -> nn.Linear:
        layer = self._layers.get(name)
        return linear_layer(self.model, name) if layer is None else layer.base

    def _layer(self, name: str) -> SlotLinear:
        if name not in self._layers:
            layer = SlotLinear(self._linear(name), self._selected)
            layer.train(False)
            replace_layer(self.model, name, layer)
            self._layers[name] = layer
        return self._layers[name]
