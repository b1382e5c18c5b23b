"""The memory for keys and values: slots by size class, counted in bytes, given so that every row can come to its end.

A class holds slots of one capacity (256, 512, 1024, ... tokens). Slots in use are 0 to n-1, so that a class is one view
for attention; a hole is filled with the last one. A row that outgrows its class moves to the next.

H key-value heads, T tokens of capacity, D width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rose.inference.batching.memory import Slots, is_lazy, whole_pages
from rose.inference.rows import Row

SMALLEST_CLASS = 256
"""Tokens; smaller ones would only make more classes, each with an attention of its own in every step."""
LENGTH_STEP = 64
"""Attention goes over lengths rounded up to a multiple: then a row's bits do not depend on how long others are."""
FIRST_SLOTS = 4
"""Of a class on a device whose memory is taken at once; they double, and halve when three quarters are free."""


@dataclass(frozen=True)
class LayerShape:
    """Keys and values of one token in one layer."""

    heads: int
    key_width: int
    value_width: int

    @property
    def numbers(self) -> int:
        """Numbers per token."""
        return self.heads * (self.key_width + self.value_width)


@dataclass
class Place:
    """Where a row lies."""

    pool: Pool
    slot: int


class Pool:
    """All slots of one capacity. A CPU's memory is taken when a slot is written, and given back with it."""

    def __init__(
        self, capacity: int, slots: int, layers: Sequence[LayerShape], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.capacity = capacity
        self.rows: list[Row] = []
        """The row in each slot in use."""
        self.keys: list[Tensor] = []
        """By layer, [slots, H, T, D]."""
        self.values: list[Tensor] = []
        self._layers = tuple(layers)
        self._like = torch.empty(0, dtype=dtype, device=device)
        self._lazy = is_lazy(device)
        self._most = slots
        self._make(slots if self._lazy else min(slots, FIRST_SLOTS))

    def _make(self, slots: int) -> None:
        """Set aside so many slots, and move what is there into them."""
        before = [*self.keys, *self.values]
        numbers = whole_pages(sum(layer.numbers for layer in self._layers) * self.capacity, self._like.dtype)
        self._slots = Slots(slots, numbers, self._like)
        self.count = slots
        self.keys, self.values = [], []
        start = 0
        for layer in self._layers:
            for views, width in ((self.keys, layer.key_width), (self.values, layer.value_width)):
                shape, strides = (slots, layer.heads, self.capacity, width), (numbers, self.capacity * width, width, 1)
                views.append(self._slots.numbers.as_strided(shape, strides, start))
                start += layer.heads * self.capacity * width
        for old, new in zip(before, [*self.keys, *self.values], strict=False):
            new[: len(self.rows)] = old[: len(self.rows)]

    def take(self, row: Row) -> None:
        """Give `row` the next slot."""
        if len(self.rows) == self.count:
            self._make(min(2 * self.count, self._most))
        row.place = Place(self, len(self.rows))
        self.rows.append(row)

    def free(self, row: Row) -> None:
        """Take the slot of `row` back; the last row fills the hole."""
        hole, last = row.place.slot, len(self.rows) - 1
        self._slots.clear(hole)  # a masked NaN would still be one
        if hole != last:
            moved = self.rows[last]
            self.copy(Place(self, last), Place(self, hole), moved.read)
            self.rows[hole] = moved
            moved.place = Place(self, hole)
            self._slots.clear(last)
        self.rows.pop()
        row.place = None
        if not self._lazy and self.count > FIRST_SLOTS and 4 * len(self.rows) <= self.count:
            self._make(max(FIRST_SLOTS, self.count // 2))

    @staticmethod
    def copy(source: Place, target: Place, tokens: int) -> None:
        """Copy the first `tokens` of a slot to another one, of whatever class."""
        for sides in ("keys", "values"):
            for one, other in zip(getattr(source.pool, sides), getattr(target.pool, sides), strict=True):
                other[target.slot, :, :tokens] = one[source.slot, :, :tokens]


class Room:
    """Gives rows their places within a limit of bytes.

    What a row may come to need is known when it comes. A place is given only while there is an order in which all rows
    can grow as far as they may and end (the banker's algorithm, Dijkstra, EWD 623): a row may have to wait for others,
    but none is ever stuck or thrown out.
    """

    def __init__(
        self,
        layers: Sequence[LayerShape],
        *,
        dtype: torch.dtype,
        device: torch.device,
        limit_bytes: int,
        context_tokens: int,
        slots: int,
    ) -> None:
        self.layers = tuple(layers)
        self.token_bytes = sum(layer.numbers for layer in layers) * dtype.itemsize
        self.limit_bytes = limit_bytes
        self.context_tokens = min(context_tokens, self._fitting(limit_bytes))
        self.held_bytes = 0
        self._dtype, self._device, self._slots = dtype, device, slots
        self._pools: dict[int, Pool] = {}
        self._rows: list[Row] = []

    def _fitting(self, limit_bytes: int) -> int:
        """Return the capacity of the largest class of which a slot fits into the limit."""
        fitting = SMALLEST_CLASS
        while 2 * fitting * self.token_bytes <= limit_bytes:
            fitting *= 2
        return fitting

    def capacity_for(self, tokens: int) -> int:
        """Return the capacity of the class for rows of so many tokens."""
        return max(SMALLEST_CLASS, 1 << (tokens - 1).bit_length())

    def admit(self, rows: Sequence[Row]) -> bool:
        """See Runner.admit."""
        claims = [self._claim(row) for row in rows]
        if len(self._rows) + len(rows) > self._slots or not self._is_safe([*self._claims(), *claims]):
            return False
        for row, (capacity, _) in zip(rows, claims, strict=True):
            self._pool(capacity).take(row)
            self._rows.append(row)
            self.held_bytes += capacity * self.token_bytes
        return True

    def ever_fits(self, rows: Sequence[Row]) -> bool:
        """Tell whether these rows get places when nobody else has one."""
        claims = [self._claim(row) for row in rows]
        return len(rows) <= self._slots and self._is_safe(claims)

    def grow(self, row: Row) -> bool:
        """Make room for one more token; False: others must end first."""
        pool: Pool = row.place.pool
        if row.read < pool.capacity:
            return True
        larger = self.capacity_for(row.read + 1)
        claims = [
            (larger if other is row else held, most)
            for other, (held, most) in zip(self._rows, self._claims(), strict=True)
        ]
        if not self._is_safe(claims):
            return False
        old = Place(pool, row.place.slot)
        self._pool(larger).take(row)
        Pool.copy(old, row.place, row.read)
        place, row.place = row.place, old
        pool.free(row)
        row.place = place
        self.held_bytes += (larger - pool.capacity) * self.token_bytes
        return True

    def release(self, row: Row) -> None:
        """See Runner.release."""
        if row.place is None:
            return
        self._rows.remove(row)
        self.held_bytes -= row.place.pool.capacity * self.token_bytes
        row.place.pool.free(row)

    def _pool(self, capacity: int) -> Pool:
        if capacity not in self._pools:
            fitting = max(1, self.limit_bytes // (capacity * self.token_bytes))
            slots = min(self._slots, fitting) + 1  # one more: a row that moves is in two for a moment
            self._pools[capacity] = Pool(capacity, slots, self.layers, self._dtype, self._device)
        return self._pools[capacity]

    def _claim(self, row: Row) -> tuple[int, int]:
        """As _claims, of a row that comes; one that is only read needs no room for a token after it."""
        most = self.capacity_for(row.most_tokens)
        return min(self.capacity_for(row.prompt_tokens + 1), most), most

    def _claims(self) -> list[tuple[int, int]]:
        """Return what each row has and the most that it may need, in tokens of capacity."""
        return [(row.place.pool.capacity, self.capacity_for(row.most_tokens)) for row in self._rows]

    def _is_safe(self, claims: list[tuple[int, int]]) -> bool:
        """Tell whether all rows can end one after another, those first that need least beyond what they have."""
        free = self.limit_bytes // self.token_bytes - sum(held for held, _ in claims)
        if free < 0:
            return False
        for needed, held in sorted((most - held, held) for held, most in claims):
            if needed > free:
                return False
            free += held
        return True
