"""One request in the engine: its prompt, its cache and its choices, moved on step by step.

A request is never batched with another one, so its text does not depend on what else the engine does.
B choices, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from rose.errors import InvalidRequest, RoseError
from rose.inference.cache import new_cache
from rose.inference.choice import Choice
from rose.inference.generation import Accepted, Done, Failed, Finished, Piece
from rose.inference.request import GenerationRequest
from rose.inference.resident import Resident
from rose.inference.thoughts import ThoughtFilter
from rose.language_models.template import Prompt

PREFILL_TOKENS = 512
"""Prompt tokens read in one step, so that a long prompt does not hold up the other requests."""


class Decoding:
    """The life of one request. Only the engine's thread moves it; `cancelled` may be set from any thread."""

    def __init__(self, request: GenerationRequest, sink: Callable[[Piece], None]) -> None:
        self.request = request
        self.sink = sink
        self.cancelled = False
        self.resident: Resident | None = None
        self._prompt: list[int] = []
        self._read = 0
        """Prompt tokens in the cache."""
        self._cache: Any = None
        self._choices: list[Choice] = []
        self._active: list[Choice] = []
        """Unfinished choices; row i of the cache and the logits belongs to the i-th."""
        self._logits: torch.Tensor | None = None

    def start(self, resident: Resident) -> None:
        """Render the prompt for `resident`, check that it fits, and say so. Raises: InvalidRequest."""
        request = self.request
        asked = resident.template.ask(
            request.messages,
            request.tools,
            thinking=request.thinking,
            options=request.template_options,
            add_generation_prompt=request.add_generation_prompt,
            continue_final_message=request.continue_final_message,
        )
        prompt = asked.ids
        room = resident.context_tokens - len(prompt)
        if room < (0 if request.max_tokens == 0 else 1):
            raise InvalidRequest(
                f"This model's context holds {resident.context_tokens} tokens; "
                f"the messages alone have {len(prompt)} tokens.",
                code="context_length_exceeded",
                param="messages",
                hint="Shorten the messages.",
            )
        max_tokens = room if request.max_tokens is None else min(request.max_tokens, room)
        self.resident, self._prompt = resident, prompt
        self._choices = [
            Choice(request, index, resident, max_tokens, self._thoughts(resident, asked))
            for index in range(request.choices)
        ]
        self._active = list(self._choices) if max_tokens else []
        self._cache = new_cache(resident.config)
        self.sink(Accepted(prompt_tokens=len(prompt)))
        if not max_tokens:
            for choice in self._choices:
                self.sink(Finished(index=choice.index, reason="length"))

    def _thoughts(self, resident: Resident, asked: Prompt) -> ThoughtFilter | None:
        """Return what tells the model's thoughts from its answer, where it can be expected to think."""
        template = resident.template
        if self.request.continue_final_message and not asked.opens_thought:
            return None
        if not (asked.opens_thought or self.request.thinking or template.reads_thoughts):
            return None
        return ThoughtFilter(template.frame, opened=asked.opens_thought)

    def step(self) -> bool:
        """Read a part of the prompt, or make one token of each choice; return whether the request is complete."""
        if self._active and self._read < len(self._prompt):
            self._prefill()
        if self._active and self._logits is not None:
            self._advance(self._logits)
        if self._active:
            return False
        self.sink(
            Done(prompt_tokens=len(self._prompt), completion_tokens=sum(choice.tokens for choice in self._choices))
        )
        return True

    def release(self) -> None:
        """Let go of model and cache, whoever still holds this object."""
        self.resident = self._cache = self._logits = None
        self._choices, self._active = [], []

    def fail(self, error: RoseError) -> None:
        """Say that the request cannot be answered."""
        self.sink(Failed(error=error))

    def _prefill(self) -> None:
        part = self._prompt[self._read : self._read + PREFILL_TOKENS]
        logits = self._forward([part])
        self._read += len(part)
        if self._read < len(self._prompt):
            return
        if len(self._active) > 1:
            self._keep_rows([0] * len(self._active))
        self._logits = logits.expand(len(self._active), -1)

    def _advance(self, logits: torch.Tensor) -> None:
        """Choose a token for every active choice, then run the model on those that go on."""
        chosen: list[int] = []
        rows: list[int] = []
        for row, choice in enumerate(self._active):
            token_id, pieces = choice.advance(logits[row])
            for piece in pieces:
                self.sink(piece)
            if not choice.finished:
                rows.append(row)
                chosen.append(token_id)
        if len(rows) < len(self._active):
            self._active = [self._active[row] for row in rows]
            if rows:
                self._keep_rows(rows)
        if rows:
            self._logits = self._forward([[token_id] for token_id in chosen])

    def _keep_rows(self, rows: list[int]) -> None:
        """Let row i of the cache be what its row `rows[i]` was; the one way that every kind of layer knows."""
        self._cache.reorder_cache(torch.tensor(rows))

    def _forward(self, ids: list[list[int]]) -> torch.Tensor:
        """Run the model on `ids` [B, T] after the cache; return the logits [B, V] of the last position."""
        assert self.resident is not None
        adapter = self.request.target.adapter if self.request.target.kind == "adapter" else None
        return self.resident.forward(ids, self._cache, adapter.sha256 if adapter else None)
