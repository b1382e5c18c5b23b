"""Training methods by the name that a job gives them. A method is a module with the functions of `Method`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from rose.language_models.template import ChatTemplate
from trainer.batches import Document, Example
from trainer.methods import sft


class Method(Protocol):
    """What a method's module provides; see trainer/methods/sft.py."""

    def read_examples(
        self, path: Path, *, template: ChatTemplate, maximum_tokens: int, thinking: bool, alive: Callable[[], None]
    ) -> list[Example]:
        """Read a data file, calling `alive` after each example."""
        ...

    def choose_forward(self, model: Any, documents: Sequence[Document], device: torch.device) -> Any:
        """Find out how this model computes label losses."""
        ...

    def assemble(self, documents: Sequence[Document], device: torch.device) -> Any:
        """Make the tensors of a micro-batch."""
        ...

    def loss(self, model: Any, batch: Any, forward: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the weighted sums of cross-entropy and of right answers."""
        ...

    def logprobs(self, model: Any, batch: Any, forward: Any) -> torch.Tensor:
        """Return the log-probability of each label token."""
        ...


METHODS: dict[str, Method] = {"supervised": sft}
