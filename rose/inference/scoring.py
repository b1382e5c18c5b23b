"""A request that writes nothing: how likely a model finds given tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch

from rose.errors import InvalidRequest, RoseError
from rose.inference.cache import new_cache
from rose.inference.generation import Failed, Scored, ScoringRequest
from rose.inference.resident import Resident

PART_TOKENS = 512
"""Tokens read at once: the logits of all of them are in memory."""


class Scoring:
    """The life of one such request; as Decoding, one row a step."""

    def __init__(self, request: ScoringRequest, sink: Callable[[Scored | Failed], None]) -> None:
        self.request = request
        self.sink = sink
        self.cancelled = False
        self.resident: Resident | None = None
        self._logprobs: list[list[float]] = []

    def start(self, resident: Resident) -> None:
        """Check the rows. Raises: InvalidRequest."""
        for number, row in enumerate(self.request.rows):
            if not 2 <= len(row) <= resident.context_tokens or not all(0 <= id < resident.vocabulary for id in row):
                raise InvalidRequest(
                    f"Row {number} must have 2 to {resident.context_tokens} tokens from 0 to {resident.vocabulary - 1}."
                )
        self.resident = resident

    def step(self) -> bool:
        """Score one row; return whether it was the last."""
        rows = self.request.rows
        if len(self._logprobs) < len(rows):
            self._logprobs.append(self._score(rows[len(self._logprobs)]))
        if len(self._logprobs) < len(rows):
            return False
        self.sink(Scored(logprobs=self._logprobs))
        return True

    def release(self) -> None:
        """Let go of the model."""
        self.resident = None

    def fail(self, error: RoseError) -> None:
        """Say that the request cannot be answered."""
        self.sink(Failed(error=error))

    def _score(self, row: list[int]) -> list[float]:
        assert self.resident is not None
        target = self.request.target
        adapter = target.adapter.sha256 if target.adapter is not None and target.kind == "adapter" else None
        past = new_cache(self.resident.config)
        found: list[float] = []
        for start in range(0, len(row) - 1, PART_TOKENS):
            part = row[start : min(start + PART_TOKENS, len(row) - 1)]
            logits = self.resident.all_logits(part, past, adapter).float()
            following = torch.tensor(row[start + 1 : start + 1 + len(part)], device=logits.device)
            found += torch.log_softmax(logits, dim=-1).gather(1, following[:, None])[:, 0].tolist()
        return found
