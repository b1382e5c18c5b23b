"""LoRA by row: many adapters in one forward pass, each token with its own or none.

Adapters of one rank class (8, 16, 32, ...; smaller ranks are filled up with zeros) lie stacked in every layer that one
of them changes. Tokens that decode go through two batched products over the stack, a prompt's chunk through two plain
ones with its own adapter. Which others are loaded or answer changes no bit of a row.

N slots, M most tokens of one adapter in a step, r rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from rose.errors import InvalidRequest
from rose.inference.batching.memory import lazy_zeros
from rose.language_models.adapters import StoredAdapter

SMALLEST_RANK = 8
SMALLEST_ROWS = 4
"""Tokens per adapter in a batched product at least: with fewer the kernels add in another order."""
WASTE = 2
"""So many times the adapters in use may lie in the part of the stack that a step goes over, before they are gathered
at its beginning."""
ALL_SLOTS = 64
FIRST_SLOTS = 4
"""Of a stack on a CPU, where an unused slot takes no memory, and on another device, where it does; it doubles."""


class AdaptedLinear(Protocol):
    """A linear layer that adapters can change."""

    inputs: int
    outputs: int
    example: Tensor
    """A tensor of the activations' dtype, on their device."""
    stacks: dict[int, Stack]
    """By rank class."""


class Stack:
    """One layer's adapters of one rank class."""

    def __init__(self, slots: int, inputs: int, outputs: int, rank: int, like: Tensor) -> None:
        self.a = lazy_zeros((slots, inputs, rank), like)
        """[N, in, r]"""
        self.b = lazy_zeros((slots, rank, outputs), like)
        """[N, r, out], with the adapter's scale in it."""

    def write(self, slot: int, a: Tensor, b: Tensor, scale: float) -> None:
        """Put A [r, in] and B [out, r] into a slot; a smaller rank than the class's is filled up with zeros."""
        self.clear(slot)
        rank = a.shape[0]
        self.a[slot, :, :rank] = a.T.to(self.a)
        self.b[slot, :rank] = b.T.to(self.b) * scale

    def clear(self, slot: int) -> None:
        """Make a slot zeros: an adapter that does not change this layer."""
        self.a[slot] = 0
        self.b[slot] = 0

    def move(self, slot: int, hole: int) -> None:
        """Copy a slot over another."""
        for side in (self.a, self.b):
            side[hole] = side[slot]

    def swap(self, one: int, other: int) -> None:
        """Exchange two slots."""
        for side in (self.a, self.b):
            kept = side[one].clone()
            side[one] = side[other]
            side[other] = kept

    def grow(self, slots: int) -> None:
        """Get more slots."""
        for name in ("a", "b"):
            old: Tensor = getattr(self, name)
            new = old.new_zeros(slots, *old.shape[1:])
            new[: old.shape[0]] = old
            setattr(self, name, new)


class RankClass:
    """All adapters of one rank class: which slot is whose, in every layer alike."""

    def __init__(self, rank: int, slots: int) -> None:
        self.rank = rank
        self.capacity = slots
        self.keys: list[str] = []
        """By slot."""
        self.stacks: dict[str, Stack] = {}
        """Layer name -> its stack."""

    def add(self, key: str) -> int:
        """Return the slot for a new adapter; it may hold what an earlier one left."""
        if len(self.keys) == self.capacity:
            self.capacity *= 2
            for stack in self.stacks.values():
                stack.grow(self.capacity)
        self.keys.append(key)
        return len(self.keys) - 1

    def remove(self, key: str) -> None:
        """Free an adapter's slot; the last one fills the hole."""
        hole, last = self.keys.index(key), len(self.keys) - 1
        if hole != last:
            self.keys[hole] = self.keys[last]
            for stack in self.stacks.values():
                stack.move(last, hole)
        self.keys.pop()

    def swap(self, one: int, other: int) -> None:
        """Exchange two slots in every layer."""
        if one == other:
            return
        self.keys[one], self.keys[other] = self.keys[other], self.keys[one]
        for stack in self.stacks.values():
            stack.swap(one, other)

    def gather(self, used: set[str]) -> int:
        """Bring the adapters in use near the beginning, if they lie too far apart; return how many slots span them."""
        span = max(self.keys.index(key) for key in used) + 1
        if span <= WASTE * len(used):
            return span
        strangers = [slot for slot in range(len(used)) if self.keys[slot] not in used]
        far = [self.keys.index(key) for key in used if self.keys.index(key) >= len(used)]
        for slot, other in zip(strangers, far, strict=True):
            self.swap(slot, other)
        return len(used)


@dataclass
class _Decoding:
    """The decoding tokens of one rank class."""

    slots: int
    rows: int
    """M"""
    gathered: Tensor
    """[N * M]: the token in each place; token 0 stands in those that are free."""
    tokens: Tensor
    """The tokens that have an adapter of this class."""
    run: slice | None
    """The same, if they stand in a row: adding to a view is cheaper."""
    places: Tensor
    """[tokens]: where each stands among the N * M."""
    _input: Tensor | None = None
    _taken: Tensor | None = None

    def add(self, made: Tensor, y: Tensor) -> None:
        """Add each token's part of `made` [N, M, out] to y [1, T, out]."""
        mine = made.flatten(0, 1).index_select(0, self.places)
        if self.run is not None:
            y[0, self.run].add_(mine)
        else:
            y[0].index_add_(0, self.tokens, mine)

    def gather(self, x: Tensor) -> Tensor:
        """Return [N, M, in] of x [1, T, in]; what was gathered last is kept, since several layers have one input."""
        if self._input is not x or self._taken is None:
            self._input, self._taken = x, x[0].index_select(0, self.gathered).view(self.slots, self.rows, -1)
        return self._taken


@dataclass
class _Part:
    """A chunk whose row has an adapter."""

    start: int
    end: int
    slot: int


@dataclass
class Assignment:
    """Which adapter each token of a step goes through; by rank class."""

    decoding: dict[int, _Decoding] = field(default_factory=dict[int, _Decoding])
    parts: dict[int, list[_Part]] = field(default_factory=dict[int, list[_Part]])

    def add(self, stacks: Mapping[int, Stack], x: Tensor, y: Tensor) -> None:
        """Add to y [1, T, out] what a layer's adapters make of x [1, T, in]; without the 1 in some experts."""
        if x.dim() == 2:
            x, y = x[None], y[None]
        for rank, stack in stacks.items():
            decoding = self.decoding.get(rank)
            if decoding is not None:
                hidden = torch.bmm(decoding.gather(x), stack.a[: decoding.slots])
                decoding.add(torch.bmm(hidden, stack.b[: decoding.slots]), y)
            for part in self.parts.get(rank, ()):
                hidden = x[0, part.start : part.end] @ stack.a[part.slot]
                y[0, part.start : part.end].addmm_(hidden, stack.b[part.slot])


class Adapters:
    """The adapters of one model."""

    def __init__(self, layers: Mapping[str, AdaptedLinear]) -> None:
        """`layers`: by the names that adapters use."""
        self._layers = layers
        self._classes: dict[int, RankClass] = {}
        self._ranks: dict[str, int] = {}
        """The rank class of each adapter, in the order of loading."""

    def keys(self) -> list[str]:
        """Return the loaded adapters, in the order of loading."""
        return list(self._ranks)

    def add(self, key: str, stored: StoredAdapter) -> None:
        """See Runner.add_adapter."""
        if key in self._ranks:
            return
        self._check(stored)
        rank = max(SMALLEST_RANK, 1 << (stored.rank - 1).bit_length())
        if rank not in self._classes:
            first = next(iter(self._layers.values())).example
            self._classes[rank] = RankClass(rank, ALL_SLOTS if first.device.type == "cpu" else FIRST_SLOTS)
        into = self._classes[rank]
        slot = into.add(key)
        try:
            self._write(into, slot, stored)
        except Exception:  # of whatever kind, as too little memory: the slot is free again
            into.remove(key)
            raise
        self._ranks[key] = rank

    def _write(self, into: RankClass, slot: int, stored: StoredAdapter) -> None:
        """Fill a slot in all layers of a rank class."""
        for name in stored.layers:
            if name not in into.stacks:
                layer = self._layers[name]
                into.stacks[name] = Stack(into.capacity, layer.inputs, layer.outputs, into.rank, layer.example)
                layer.stacks[into.rank] = into.stacks[name]
        for name, stack in into.stacks.items():
            if name in stored.layers:
                stack.write(slot, *stored.layers[name], stored.scale)
            else:
                stack.clear(slot)

    def remove(self, key: str) -> None:
        """See Runner.remove_adapter."""
        rank = self._ranks.pop(key, None)
        if rank is not None:
            self._classes[rank].remove(key)

    def assign(
        self, decoding: Sequence[str | None], parts: Sequence[tuple[str | None, int, int]], device: torch.device
    ) -> Assignment | None:
        """Return how the tokens go: token i of `decoding` with that adapter, then chunks (adapter, first, end token).

        None when none has an adapter.
        """
        assignment = Assignment()
        for rank, known in self._classes.items():
            mine = [token for token, key in enumerate(decoding) if key is not None and self._ranks[key] == rank]
            chunks = [(key, *place) for key, *place in parts if key is not None and self._ranks[key] == rank]
            if mine:
                keys = [decoding[token] for token in mine]
                span = known.gather({key for key in keys if key is not None})
                assignment.decoding[rank] = _decoding([known.keys.index(str(key)) for key in keys], mine, span, device)
            if chunks:
                assignment.parts[rank] = [_Part(start, end, known.keys.index(key)) for key, start, end in chunks]
        return assignment if assignment.decoding or assignment.parts else None

    def _check(self, stored: StoredAdapter) -> None:
        """Refuse an adapter of another model. Raises: InvalidRequest."""
        for name, (a, b) in stored.layers.items():
            layer = self._layers.get(name)
            shapes = None if layer is None else ((stored.rank, layer.inputs), (layer.outputs, stored.rank))
            if shapes != (tuple(a.shape), tuple(b.shape)):
                raise InvalidRequest(
                    f"The adapter's weights for {name} have another shape than the model's."
                    if layer is not None
                    else f"The adapter changes {name}, which this model does not have as a linear layer.",
                    code="adapter_does_not_fit",
                )


def _decoding(slots: Sequence[int], tokens: Sequence[int], span: int, device: torch.device) -> _Decoding:
    """Return where `tokens` stand, whose adapters have these slots."""
    used = [0] * span
    places: list[tuple[int, int]] = []
    for slot in slots:
        places.append((slot, used[slot]))
        used[slot] += 1
    rows = max(SMALLEST_ROWS, *used)
    gathered = [0] * (span * rows)
    for (slot, row), token in zip(places, tokens, strict=True):
        gathered[slot * rows + row] = token
    return _Decoding(
        slots=span,
        rows=rows,
        gathered=torch.tensor(gathered, device=device),
        tokens=torch.tensor(tokens, device=device),
        run=slice(tokens[0], tokens[-1] + 1) if tokens[-1] - tokens[0] == len(tokens) - 1 else None,
        places=torch.tensor([slot * rows + row for slot, row in places], device=device),
    )
