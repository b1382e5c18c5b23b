"""The key-value cache of one request: transformers' own, with room to grow instead of a copy per token.

`DynamicCache` concatenates each layer anew for every token, which costs as much as attention itself in a long answer.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

FIRST_TOKENS = 128
"""Tokens that a new layer has room for beyond its first update."""


class RoomyLayer(DynamicLayer):
    """Keys and values [B, heads, T, width] as views on buffers whose T doubles when it is full."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._rooms: list[torch.Tensor] = []

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the new states and return all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._rooms = [_room(key_states, FIRST_TOKENS), _room(value_states, FIRST_TOKENS)]
            start = 0
        else:
            start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if end > self._rooms[0].shape[-2]:
            # A prompt is a few updates and an answer many: doubling keeps the copies few in both.
            self._rooms = [_grown(room, start, 2 * end) for room in self._rooms]
        for room, states in zip(self._rooms, (key_states, value_states), strict=True):
            room[:, :, start:end] = states
        self.keys, self.values = (room[:, :, :end] for room in self._rooms)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Keep the rows `beam_idx` of the batch, each as often as it is named."""
        length = self.get_seq_length()
        self._rooms = [room[beam_idx.to(room.device)] for room in self._rooms]
        self.keys, self.values = (room[:, :, :length] for room in self._rooms)


def _room(states: torch.Tensor, spare_tokens: int) -> torch.Tensor:
    batch, heads, length, width = states.shape
    return states.new_empty(batch, heads, length + spare_tokens, width)


def _grown(room: torch.Tensor, used: int, capacity: int) -> torch.Tensor:
    batch, heads, _, width = room.shape
    larger = room.new_empty(batch, heads, capacity, width)
    larger[:, :, :used] = room[:, :, :used]
    return larger


def new_cache(config: Any) -> DynamicCache:
    """Return an empty cache for a model of this configuration; sliding and linear layers stay transformers' own."""
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
