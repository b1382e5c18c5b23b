"""A model that moves all its rows on in one forward pass (a Runner, see rows.py).

T tokens of a step, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from rose.inference.batching.adapters import Adapters
from rose.inference.batching.attention import Chunk, DecodingRows, Step, current
from rose.inference.batching.linear import BatchLinear
from rose.inference.batching.prefixes import Prefixes
from rose.inference.batching.room import Pool, Room
from rose.inference.batching.sizes import MOST_ADDED, GoodSizes, Product
from rose.inference.rows import Row
from rose.language_models.adapters import StoredAdapter

CHUNK_TOKENS = 32
"""Prompts are cut at its multiples, whatever else is being read: a chunk's bits depend on where it begins."""
TOKENS_ALONE = 256
"""Prompt tokens in a step in which nobody waits for a next token."""
FREE_TOKENS = {"cpu": 13}
"""So many tokens cost as much as reading the weights once does (measured with fp16 weights on AVX2 and AVX512)."""
FREE_TOKENS_ELSEWHERE = 256
TIMES = 3
"""A step with prompt tokens costs at most about so many times more than one without."""
MOST_OF_ONE = 48
"""Prompt tokens of one row in such a step: a short prompt whole, a long one a chunk."""
MAX_ROWS = 64
VECTOR = 64
"""Numbers; what a step's numbers leave over by it goes another way through an activation than the others."""


class BatchedModel:
    """Everything happens in the thread that calls; rows lie in `room`."""

    batched = True

    def __init__(self, model: Any, room: Room, *, weights: str, chunk_tokens: int = CHUNK_TOKENS) -> None:
        """`model`: its attention is rows_attention; with BatchLinear layers it takes adapters."""
        self.model = model
        self.room = room
        self.weights = weights
        self.batch_invariant = False
        self.context_tokens = room.context_tokens
        self._chunk_tokens = chunk_tokens
        self._prefixes = Prefixes(room, chunk_tokens)
        embedding = model.get_input_embeddings().weight
        self._device, self._dtype = embedding.device, embedding.dtype
        self._adapters = Adapters({name: one for name, one in model.named_modules() if isinstance(one, BatchLinear)})
        head = model.get_output_embeddings()
        inner = _products([one for one in model.modules() if one is not head])
        between = {Product(width, _activations) for width, _ in inner if 1 < _vectors(width) <= MOST_ADDED}
        exact = self._device.type == "cpu"
        self._sizes = GoodSizes([*inner.values(), *between], dtype=self._dtype) if exact else None
        self._head_sizes = GoodSizes(list(_products([head]).values()), dtype=self._dtype) if exact else None

    def admit(self, rows: Sequence[Row]) -> bool:
        """See Runner.admit."""
        if not self.room.admit(rows):
            return False
        self._prefixes.shrink()
        if rows[0].logprobs is None:
            self._prefixes.take(rows[0])
        return True

    def ever_fits(self, rows: Sequence[Row]) -> bool:
        """See Runner.ever_fits."""
        return self.room.ever_fits(rows)

    def step(self, rows: Sequence[Row]) -> tuple[list[Row], Tensor]:
        """See Runner.step."""
        decoding = [row for row in rows if row.decodes and self._grow(row)]
        decoding.sort(key=lambda row: (row.place.pool.capacity, row.place.slot))
        chunks = self._chunks(rows, len(decoding))
        if not decoding and not chunks:
            return [], torch.empty(0)
        logits = self._forward(decoding, chunks)
        return self._taken(decoding, chunks, logits)

    def fork(self, row: Row, others: Sequence[Row]) -> None:
        """See Runner.fork."""
        for other in others:
            Pool.copy(row.place, other.place, row.read)
            other.read, other.cached_tokens = row.read, row.cached_tokens

    def release(self, row: Row) -> None:
        """See Runner.release."""
        self.room.release(row)

    def adapters(self) -> list[str]:
        """See Runner.adapters."""
        return self._adapters.keys()

    def add_adapter(self, key: str, stored: StoredAdapter) -> None:
        """See Runner.add_adapter."""
        self._adapters.add(key, stored)

    def remove_adapter(self, key: str) -> None:
        """See Runner.remove_adapter."""
        self._adapters.remove(key)

    def cache_bytes(self) -> int:
        """See Runner.cache_bytes."""
        return self.room.held_bytes + self._prefixes.held_bytes()

    def cache_limit_bytes(self) -> int:
        """See Runner.cache_limit_bytes."""
        return self.room.limit_bytes

    def forget_prompts(self) -> None:
        """Read every prompt anew from now on."""
        self._prefixes.clear()

    def _grow(self, row: Row) -> bool:
        there = self.room.grow(row)
        self._prefixes.shrink()
        return there

    def _chunks(self, rows: Sequence[Row], decoding: int) -> list[Chunk]:
        """Return what is read of prompts: the oldest first, whole chunks or none."""
        left = TOKENS_ALONE
        if decoding:
            free = FREE_TOKENS.get(self._device.type, FREE_TOKENS_ELSEWHERE)
            left = max(self._chunk_tokens, min(left, TIMES * (free + decoding)))
        start, chunks = decoding, list[Chunk]()
        for row in rows:
            first = len(row.tokens) if row.decodes else row.read
            while first < len(row.tokens):
                count = min(self._chunk_tokens, len(row.tokens) - first)
                if count > left or (decoding and first + count - row.read > MOST_OF_ONE):
                    break
                chunks.append(Chunk(row, count, start, self._device, self._dtype, first))
                first, start, left = first + count, start + count, left - count
        return chunks

    def _forward(self, decoding: Sequence[Row], chunks: Sequence[Chunk]) -> Tensor:
        """Return the logits [rows, V] of the tokens that `_wanted` names."""
        ids = [row.tokens[row.read] for row in decoding]
        positions = [row.read for row in decoding]
        for chunk in chunks:
            end = chunk.first + chunk.count
            ids += chunk.row.tokens[chunk.first : end]
            positions += range(chunk.first, end)
        wanted = _wanted(len(decoding), chunks) or [0]
        added = 0 if self._sizes is None else self._sizes.at_least(len(ids)) - len(ids)
        kept = len(wanted) if self._head_sizes is None else self._head_sizes.at_least(len(wanted))
        current.step = self._step(decoding, chunks)
        try:
            with torch.inference_mode():
                output = self.model(
                    input_ids=torch.tensor([ids + [0] * added], device=self._device),
                    position_ids=torch.tensor([positions + [0] * added], device=self._device),
                    use_cache=False,
                    logits_to_keep=torch.tensor(wanted + wanted[-1:] * (kept - len(wanted)), device=self._device),
                )
        finally:
            current.step = None
        return output.logits[0].float()

    def _step(self, decoding: Sequence[Row], chunks: Sequence[Chunk]) -> Step:
        classes: list[DecodingRows] = []
        start = 0
        while start < len(decoding):
            pool: Pool = decoding[start].place.pool
            rows = [row for row in decoding[start:] if row.place.pool is pool]
            classes.append(DecodingRows(pool, rows, start, self._device))
            start += len(rows)
        parts = [(chunk.row.adapter, chunk.start, chunk.end) for chunk in chunks]
        adapters = self._adapters.assign([row.adapter for row in decoding], parts, self._device)
        return Step(classes, list(chunks), adapters)

    def _taken(self, decoding: Sequence[Row], chunks: Sequence[Chunk], logits: Tensor) -> tuple[list[Row], Tensor]:
        """Note what was read; return the rows that have nothing left with their logits."""
        ready, places = list(decoding), list(range(len(decoding)))
        for row in decoding:
            row.read += 1
        at = len(decoding)
        for chunk in chunks:
            row = chunk.row
            row.read += chunk.count
            if row.logprobs is not None:
                row.note_scores(logits[at : at + chunk.count], chunk.first)
                at += chunk.count
            else:
                self._prefixes.keep(row, chunk.first)
                at += not row.pending
            if not row.pending:
                ready.append(row)
                places.append(at - 1)
        return ready, logits[: len(ready)] if places == list(range(len(ready))) else logits[places]


def _products(modules: Sequence[Any]) -> dict[tuple[int, int], Product]:
    """Return one product of each kind (outputs, inputs)."""
    found = {(one.outputs, one.inputs): Product(one.inputs, one.product) for one in modules if type(one) is BatchLinear}
    return found | {(one.nf, one.nx): Product(one.nx, one) for one in modules if isinstance(one, Conv1D)}


def _activations(x: Tensor) -> Tensor:
    return torch.cat([functional.silu(x), functional.gelu(x), functional.gelu(x, approximate="tanh")], dim=-1)


def _vectors(width: int) -> int:
    """Return how many rows of this width fill whole vectors."""
    return VECTOR // math.gcd(VECTOR, width)


def _wanted(decoding: int, chunks: Sequence[Chunk]) -> list[int]:
    """Return the tokens of which logits are wanted: the last one of a row, all of a scored one."""
    wanted = list(range(decoding))
    for chunk in chunks:
        if chunk.row.logprobs is not None:
            wanted += range(chunk.start, chunk.end)
        elif chunk.first + chunk.count == len(chunk.row.tokens):
            wanted.append(chunk.end - 1)
    return wanted
