"""A model that moves its rows on in turns, each with transformers' own cache (a Runner, see rows.py).

For models whose layers keep more than keys and values, or whose attention cannot be ours.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rose.inference.cache import new_cache
from rose.inference.rows import Row
from rose.language_models.adapters import StoredAdapter
from rose.language_models.slots import AdapterSlots

PART_TOKENS = 512
"""Prompt tokens read in one step, so that a long prompt does not hold up the other rows."""
MAX_ROWS = 64


class OneByOne:
    """Reads each row's tokens by themselves; what a row's bits are never depends on the others."""

    batched = False
    batch_invariant = True

    def __init__(self, model: Any, *, context_tokens: int) -> None:
        self.model = model
        self.weights = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[model.dtype]
        self.context_tokens = context_tokens
        self._slots = AdapterSlots(model)
        self._rows = 0

    def admit(self, rows: Sequence[Row]) -> bool:
        """See Runner.admit."""
        if self._rows + len(rows) > MAX_ROWS:
            return False
        for row in rows:
            row.place = new_cache(self.model.config)
        self._rows += len(rows)
        return True

    def ever_fits(self, rows: Sequence[Row]) -> bool:
        """See Runner.ever_fits."""
        return len(rows) <= MAX_ROWS

    def step(self, rows: Sequence[Row]) -> tuple[list[Row], Tensor]:
        """See Runner.step."""
        ready: list[Row] = []
        found: list[Tensor] = []
        for row in rows:
            part = row.tokens[row.read : row.read + PART_TOKENS]
            logits = self._forward(row, part)
            row.note_scores(logits, row.read)
            row.read += len(part)
            if not row.pending:
                ready.append(row)
                found.append(logits[-1].float())
        return ready, torch.stack(found) if found else torch.empty(0)

    def fork(self, row: Row, others: Sequence[Row]) -> None:
        """See Runner.fork."""
        for other in others:
            other.place = copy.deepcopy(row.place)
            other.read = row.read

    def release(self, row: Row) -> None:
        """See Runner.release."""
        if row.place is not None:
            row.place = None
            self._rows -= 1

    def adapters(self) -> list[str]:
        """See Runner.adapters."""
        return self._slots.keys()

    def add_adapter(self, key: str, stored: StoredAdapter) -> None:
        """See Runner.add_adapter."""
        self._slots.add(key, stored)

    def remove_adapter(self, key: str) -> None:
        """See Runner.remove_adapter."""
        self._slots.remove(key)

    def cache_bytes(self) -> int:
        """See Runner.cache_bytes; nobody counts here."""
        return 0

    def cache_limit_bytes(self) -> int:
        """See Runner.cache_limit_bytes."""
        return 0

    def _forward(self, row: Row, part: list[int]) -> Tensor:
        """Return the logits [T, V] of `part`, or only of its last token where no more is wanted."""
        ids = torch.tensor([part], device=self.model.device)
        keep = 0 if row.logprobs is not None else 1
        with torch.inference_mode(), self._slots.select(row.adapter):
            output = self.model(input_ids=ids, past_key_values=row.place, use_cache=True, logits_to_keep=keep)
        return output.logits[0]
