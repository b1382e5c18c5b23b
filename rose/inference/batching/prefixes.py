"""Keys and values of prompts that were read, kept for the next prompt that begins alike.

Only whole chunks of a prompt are kept and taken, cut where every prompt is cut: what a row copies has the bits that it
would have made itself. Each adapter (and the base) has its own, since it makes other keys and values of the same text.
So has each project: none learns from a count or a time what another one asked.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from torch import Tensor

from rose.inference.batching.room import Place, Room
from rose.inference.rows import Row

SHARE = 2
"""At most the limit of the cache divided by this is kept; rows that need the memory get it at once."""

_Begin = tuple[str, "str | None"]
"""Project and adapter."""
_Key = tuple["int | _Begin", tuple[int, ...]]
"""The number of the chunk before it, or whose a first one is, and the chunk's tokens."""


@dataclass(frozen=True)
class _Chunk:
    number: int
    sides: list[tuple[Tensor, Tensor]]
    """By layer, [H, tokens, D]."""


class Prefixes:
    """What is kept, the least recently used first."""

    def __init__(self, room: Room, chunk_tokens: int) -> None:
        self._room = room
        self._tokens = chunk_tokens
        self._chunks: OrderedDict[_Key, _Chunk] = OrderedDict()
        self._made = 0
        self._bytes = chunk_tokens * room.token_bytes

    def held_bytes(self) -> int:
        """Return what is taken now."""
        return len(self._chunks) * self._bytes

    def take(self, row: Row) -> None:
        """Copy the longest beginning that is known into the new row's place; one token at least stays to be read."""
        place: Place = row.place
        taken: list[_Key] = []
        before: int | _Begin = (row.project, row.adapter)
        for start in range(0, row.prompt_tokens - self._tokens, self._tokens):
            key = (before, tuple(row.tokens[start : start + self._tokens]))
            chunk = self._chunks.get(key)
            if chunk is None:
                break
            for keys, values, (key_side, value_side) in zip(
                place.pool.keys, place.pool.values, chunk.sides, strict=True
            ):
                keys[place.slot, :, start : start + self._tokens] = key_side
                values[place.slot, :, start : start + self._tokens] = value_side
            taken.append(key)
            before = chunk.number
        row.read = row.cached_tokens = len(taken) * self._tokens
        row.prefix = taken
        self._touch(row)

    def keep(self, row: Row, start: int) -> None:
        """Keep the chunk of the prompt that was read from `start` on, if all before it are kept."""
        end = start + self._tokens
        if end > row.prompt_tokens or len(row.prefix) * self._tokens != start:
            return
        before = self._chunks.get(row.prefix[-1]) if row.prefix else None
        if row.prefix and before is None:
            return
        key = ((row.project, row.adapter) if before is None else before.number, tuple(row.tokens[start:end]))
        if key not in self._chunks:
            place: Place = row.place
            sides = [
                (keys[place.slot, :, start:end].clone(), values[place.slot, :, start:end].clone())
                for keys, values in zip(place.pool.keys, place.pool.values, strict=True)
            ]
            self._made += 1
            self._chunks[key] = _Chunk(self._made, sides)
        row.prefix.append(key)
        self._touch(row)
        self.shrink()

    def shrink(self) -> None:
        """Forget what there is no room for beside the rows."""
        limit = min(self._room.limit_bytes // SHARE, self._room.limit_bytes - self._room.held_bytes)
        while self._chunks and self.held_bytes() > limit:
            self._chunks.popitem(last=False)

    def clear(self) -> None:
        """Forget all."""
        self._chunks.clear()

    def _touch(self, row: Row) -> None:
        """Note the use of a row's chunks, the first one last: what follows a chunk must not outlive it."""
        for key in reversed(row.prefix):
            if key in self._chunks:
                self._chunks.move_to_end(key)
