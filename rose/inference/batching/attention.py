"""Attention of one forward pass in which every token knows its row: no padding, no mask over all tokens.

All tokens of a step stand in one line, [1, T]. transformers calls `rows_attention` in each layer with the queries, keys
and values of the line; it writes keys and values to their rows and lets each row attend to its own.

H heads, G query heads per key-value head, R rows that decode, C tokens of a chunk, L length of the keys, D width.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rose.inference.batching.adapters import Assignment
from rose.inference.batching.room import LENGTH_STEP, LayerShape, Pool
from rose.inference.rows import Row

LONG_STEP = 512
"""torch's attention takes so many keys at a time."""
NAME = "rose_rows"
"""Of the attention in transformers' interface."""


@dataclass(frozen=True)
class Head:
    """What a model wants of attention in one layer."""

    scaling: float
    window: int | None
    """Each token attends to so many, itself included."""
    softcap: float | None
    sinks: Tensor | None
    """[H]: a score per head that takes part in the softmax and has no value."""

    @property
    def is_plain(self) -> bool:
        """Whether torch's own attention computes it."""
        return self.softcap is None and self.sinks is None


class Masks:
    """The masks of some queries, 0 or -inf, made once for each window. Queries know the place of their own token."""

    def __init__(self, places: Tensor, length: int, dtype: torch.dtype) -> None:
        """`places`: int64, [R, 1, 1, 1] or [C, 1]; keys are at the places 0 to `length` - 1."""
        self._places, self._dtype = places, dtype
        self._keys = torch.arange(length, device=places.device)
        self._made: dict[int | None, Tensor] = {}

    def get(self, window: int | None) -> Tensor:
        """Return [..., L]."""
        if window not in self._made:
            hidden = self._keys > self._places
            if window is not None:
                hidden |= self._keys <= self._places - window
            mask = torch.zeros(hidden.shape, dtype=self._dtype, device=hidden.device)
            self._made[window] = mask.masked_fill_(hidden, -math.inf)
        return self._made[window]


class Queries:
    """Rows of one pool that attend together, over keys of one length."""

    def __init__(self, rows: Sequence[tuple[int, int, int]], length: int, device: torch.device) -> None:
        """`rows`: number, slot and length of each, by slot."""
        self.numbers = torch.tensor([number for number, _, _ in rows], device=device)
        self._slots = torch.tensor([slot for _, slot, _ in rows], device=device)
        self._used = rows[-1][1] + 1
        self._dense = self._used == len(rows)
        self._length = length
        places = torch.zeros(self._used, 1, 1, 1, dtype=torch.int64, device=device)  # who does not attend: one key
        places[self._slots] = torch.tensor([length - 1 for _, _, length in rows], device=device)[:, None, None, None]
        self._places = places
        self._masks: Masks | None = None

    def attend(self, head: Head, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Return [R, H / G, G, D] for these queries of the rows."""
        if not self._dense:
            spread = queries.new_zeros(self._used, *queries.shape[1:])
            spread[self._slots] = queries
            queries = spread
        if self._masks is None:
            self._masks = Masks(self._places, self._length, queries.dtype)
        keys, values = (side[: self._used, :, : self._length] for side in (keys, values))
        found = scaled_attention(queries, keys, values, self._masks.get(head.window), head)
        return found if self._dense else found[self._slots]


class DecodingRows:
    """Rows of one size class with one token each."""

    def __init__(self, pool: Pool, rows: Sequence[Row], start: int, device: torch.device) -> None:
        """`rows`, by slot, have the tokens from `start` on."""
        self.start, self.end = start, start + len(rows)
        self._pool = pool
        self._device = device
        self._rows = [(number, row.place.slot, row.read + 1) for number, row in enumerate(rows)]
        self._slots = torch.tensor([slot for _, slot, _ in self._rows], device=device)
        self._places = torch.tensor([row.read for row in rows], device=device)
        self._parts: dict[tuple[int, int, int], list[Queries]] = {}
        """By the kind of head."""

    def attend(self, layer: int, head: Head, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return [R, H, D] for `query` [R, H, D] and `key`, `value` [R, H / G, D] of the rows' tokens."""
        keys, values = self._pool.keys[layer], self._pool.values[layer]
        keys[self._slots, :, self._places] = key
        values[self._slots, :, self._places] = value
        rows, heads, width = query.shape
        queries = query.reshape(rows, keys.shape[1], -1, width)
        if query.device.type == "cpu" and not head.is_plain:
            found = self._one_by_one(head, queries, keys, values)
        else:
            found = self._in_parts(head, queries, keys, values)
        return found.reshape(rows, heads, -1)

    def _in_parts(self, head: Head, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Return [R, H / G, G, D]; nearly always there is one part."""
        parts = self._together(queries, values)
        if len(parts) == 1:
            return parts[0].attend(head, queries, keys, values)
        found = queries.new_empty(*queries.shape[:3], values.shape[3])
        for part in parts:
            found[part.numbers] = part.attend(head, queries[part.numbers], keys, values)
        return found

    def _one_by_one(self, head: Head, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Let each row attend to its own keys alone: plain products have other bits over another length."""
        found: list[Tensor] = []
        for number, slot, length in self._rows:
            first = 0 if head.window is None else max(0, length - head.window)
            own = slice(slot, slot + 1), slice(None), slice(first, length)
            found.append(scaled_attention(queries[number : number + 1], keys[own], values[own], None, head))
        return torch.cat(found)

    def _together(self, queries: Tensor, values: Tensor) -> list[Queries]:
        """Return who attends with whom: all, but for those of which no good length has room in a slot."""
        kind = queries.shape[2], queries.shape[3], values.shape[3]
        if kind not in self._parts:
            lengths = [_rounded(length) for _, _, length in self._rows]
            if self._device.type == "cpu":
                lengths = [good_length(length, *kind, queries.dtype) for length in lengths]
            capacity = self._pool.capacity
            both = [row for row in zip(self._rows, lengths, strict=True) if row[1] <= capacity]
            over = [row for row, length in zip(self._rows, lengths, strict=True) if length > capacity]
            parts = [([row for row, _ in both], max((length for _, length in both), default=0)), (over, capacity)]
            self._parts[kind] = [Queries(rows, length, self._device) for rows, length in parts if rows]
        return self._parts[kind]


class Chunk:
    """Tokens of one row that stand next to each other."""

    def __init__(self, row: Row, count: int, start: int, device: torch.device, dtype: torch.dtype, first: int) -> None:
        """The row's tokens from place `first` on have the step's tokens from `start` on."""
        self.row, self.count, self.first = row, count, first
        self.start, self.end = start, start + count
        self._length = _rounded(first + count)
        places = torch.arange(first, first + count, device=device)[:, None]
        self._masks = Masks(places, self._length, dtype)

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Keep `key` and `value` [C, H / G, D]."""
        pool, slot = self.row.place.pool, self.row.place.slot
        pool.keys[layer][slot, :, self.first : self.first + self.count] = key.transpose(0, 1)
        pool.values[layer][slot, :, self.first : self.first + self.count] = value.transpose(0, 1)

    def attend(self, layer: int, head: Head, query: Tensor) -> Tensor:
        """Return [C, H, D] for `query` [C, H, D]."""
        pool, slot = self.row.place.pool, self.row.place.slot
        keys, values = (side[layer][slot : slot + 1, :, : self._length] for side in (pool.keys, pool.values))
        count, heads, width = query.shape
        groups = heads // keys.shape[1]
        queries = query.transpose(0, 1).reshape(1, keys.shape[1], groups * count, width)
        mask = self._masks.get(head.window).repeat(groups, 1)
        found = scaled_attention(queries, keys, values, mask, head)
        return found.reshape(heads, count, -1).transpose(0, 1)


@dataclass
class Step:
    """One forward pass: what stands where in the line. Tokens after the last row's are there for their number only."""

    decoding: list[DecodingRows]
    chunks: list[Chunk]
    adapters: Assignment | None = None

    def attend(self, layer: int, head: Head, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return [1, T, H, D] for query [1, H, T, D] and key, value [1, H / G, T, D]."""
        query, key, value = (side[0].transpose(0, 1) for side in (query, key, value))
        output = query.new_empty(*query.shape[:2], value.shape[-1])
        for rows in self.decoding:
            part = slice(rows.start, rows.end)
            output[part] = rows.attend(layer, head, query[part], key[part], value[part])
        for chunk in self.chunks:  # all first: a row's next chunk may be in the same step
            chunk.write(layer, key[chunk.start : chunk.end], value[chunk.start : chunk.end])
        end = self.decoding[-1].end if self.decoding else 0
        for chunk in self.chunks:
            output[chunk.start : chunk.end] = chunk.attend(layer, head, query[chunk.start : chunk.end])
            end = chunk.end
        output[end:] = 0
        return output[None]


@dataclass
class Recording:
    """A forward pass over one row without any cache that notes what each layer keeps."""

    layers: dict[int, LayerShape] = field(default_factory=dict[int, LayerShape])
    windows: dict[int, int | None] = field(default_factory=dict[int, int | None])
    adapters: Assignment | None = None

    def attend(self, layer: int, head: Head, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """As Step.attend."""
        self.layers[layer] = LayerShape(key.shape[1], key.shape[3], value.shape[3])
        self.windows[layer] = head.window
        _, heads, count, width = query.shape
        groups = heads // key.shape[1]
        places = torch.arange(count, device=query.device)[:, None]
        mask = Masks(places, count, query.dtype).get(head.window).repeat(groups, 1)
        found = scaled_attention(query.reshape(1, key.shape[1], groups * count, width), key, value, mask, head)
        return found.reshape(1, heads, count, -1).transpose(1, 2)


class _Current(threading.local):
    """The step whose forward pass runs in this thread."""

    step: Step | Recording | None = None


current = _Current()


def rows_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention in the shapes of transformers' interface (query [1, H, T, D]); returns [1, T, H, D]."""
    assert current.step is not None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    head = Head(scale, sliding_window, softcap, s_aux)
    return current.step.attend(module.layer_idx, head, query, key, value), None


def scaled_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, head: Head) -> Tensor:
    """Return softmax(query keyᵀ · scaling + mask) value for [N, H / G, queries, D] and [N, H / G, L, D]."""
    if head.is_plain:
        return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=head.scaling)
    scores = query @ key.transpose(-1, -2) * head.scaling
    if head.softcap is not None:
        scores = torch.tanh(scores / head.softcap) * head.softcap
    if mask is not None:
        scores = scores + mask
    if head.sinks is None:
        return torch.softmax(scores.float(), dim=-1).to(value.dtype) @ value
    # A group's heads lie one after another, each with as many queries as the others.
    sinks = head.sinks.reshape(1, key.shape[1], -1, 1)
    sinks = sinks.repeat_interleave(query.shape[2] // sinks.shape[2], dim=2).expand(query.shape[0], -1, -1, -1)
    weights = torch.softmax(torch.cat([scores, sinks.to(scores.dtype)], dim=-1).float(), dim=-1)
    return weights[..., :-1].to(value.dtype) @ value


@cache
def good_length(length: int, group: int, key_width: int, value_width: int, dtype: torch.dtype) -> int:
    """Return the length of keys, not below `length`, over which torch's attention has the bits that it has over longer.

    With four queries or more in a group, products add in another order over some lengths. Found on the machine.
    """
    longest = math.ceil(length / LONG_STEP) * LONG_STEP
    generator = torch.Generator().manual_seed(0)
    query, keys, values = (
        torch.randn(1, 1, count, width, generator=generator).to(dtype)
        for count, width in ((group, key_width), (longest, key_width), (longest, value_width))
    )

    def attend(over: int, valid: int) -> Tensor:
        mask = torch.zeros(1, 1, 1, over, dtype=dtype)
        mask[..., valid:] = -math.inf
        return functional.scaled_dot_product_attention(query, keys[:, :, :over], values[:, :, :over], attn_mask=mask)

    candidates = range(_rounded(length), longest, LENGTH_STEP)
    return next((one for one in candidates if torch.equal(attend(one, one), attend(longest, one))), longest)


def _rounded(length: int) -> int:
    return math.ceil(length / LENGTH_STEP) * LENGTH_STEP


ALL_ATTENTION_FUNCTIONS.register(NAME, rows_attention)
