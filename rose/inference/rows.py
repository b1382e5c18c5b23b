"""One sequence of tokens that a model reads and goes on with, and what moves such rows: together or in turns.

T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from rose.language_models.adapters import StoredAdapter


class Row:
    """A prompt and what is written after it, or a text whose tokens are scored. Belongs to the engine's thread."""

    def __init__(
        self,
        tokens: Sequence[int],
        *,
        adapter: str | None,
        most_tokens: int,
        project: str = "",
        scored: bool = False,
    ) -> None:
        """`most_tokens`: how long the row may become, prompt included; room for them can always be found in the end."""
        self.project = project
        """Whose it is: what is kept of its prompt is for this project alone."""
        self.adapter = adapter
        """Hash of the adapter that reads it; None: the base alone."""
        self.most_tokens = most_tokens
        self.tokens = list(tokens)
        """The prompt, then the tokens chosen so far."""
        self.prompt_tokens = len(self.tokens)
        self.read = 0
        """Tokens whose keys and values are in the cache."""
        self.cached_tokens = 0
        """Of these, the tokens that were not read but copied from an earlier prompt."""
        self.logprobs: list[float] | None = [] if scored else None
        """For a scored row, of the tokens after the first."""
        self.prefix: list[Any] = []
        """What of its prompt is kept for others; the runner's own."""
        self.place: Any = None
        """Where its keys and values are; the runner's own, None: nowhere."""

    @property
    def pending(self) -> int:
        """Tokens that are not read yet."""
        return len(self.tokens) - self.read

    @property
    def decodes(self) -> bool:
        """Whether only the token that was chosen last is to be read."""
        return self.read >= self.prompt_tokens

    def note_scores(self, logits: Tensor, start: int) -> None:
        """Add the scores that `logits` [T, V] of the tokens from `start` on give to those that follow them."""
        if self.logprobs is None:
            return
        following = self.tokens[start + 1 : start + 1 + logits.shape[0]]
        logprobs = torch.log_softmax(logits[: len(following)].float(), dim=-1)
        chosen = torch.tensor(following, dtype=torch.int64, device=logits.device)
        self.logprobs += logprobs.gather(1, chosen[:, None])[:, 0].tolist()


class Runner(Protocol):
    """A loaded model that moves rows on. Everything is called in one thread."""

    model: Any
    weights: str
    """Form of the linear layers' weights: fp32, fp16 or bf16."""
    batched: bool
    batch_invariant: bool
    context_tokens: int
    """Longest row that the memory for keys and values holds."""

    def admit(self, rows: Sequence[Row]) -> bool:
        """Give rows of one request a place; False: there is no room for all of them now, and none got any."""
        ...

    def ever_fits(self, rows: Sequence[Row]) -> bool:
        """Tell whether these rows of one request get places when nobody else has one."""
        ...

    def step(self, rows: Sequence[Row]) -> tuple[list[Row], Tensor]:
        """Read some pending tokens of `rows` (admitted, oldest first).

        Return the rows that have none left, and the logits [rows, V] after the last token of each. A row that is not
        among them waits for the next step.
        """
        ...

    def fork(self, row: Row, others: Sequence[Row]) -> None:
        """Let `others` have read what `row` has read; they are admitted and have its tokens."""
        ...

    def release(self, row: Row) -> None:
        """Take away a row's place, if it has one."""
        ...

    def adapters(self) -> list[str]:
        """Return the hashes of the loaded adapters."""
        ...

    def add_adapter(self, key: str, stored: StoredAdapter) -> None:
        """Load an adapter; does nothing when it is there.

        Raises: InvalidRequest when it does not fit the model; nothing is loaded then.
        """
        ...

    def remove_adapter(self, key: str) -> None:
        """Forget an adapter that no row has."""
        ...

    def cache_bytes(self) -> int:
        """Return what keys and values take now."""
        ...

    def cache_limit_bytes(self) -> int:
        """Return what they may take; 0: nothing says."""
        ...
