"""How lines of training data look to a model. Pure: what an engine answers, the API passes on and the CLI prints."""

from __future__ import annotations

import msgspec


class Piece(msgspec.Struct, frozen=True, kw_only=True):
    """Neighbouring tokens of a sequence that are all learned, or all only read."""

    text: str
    tokens: int
    learned: bool


class LinePreview(msgspec.Struct, frozen=True, kw_only=True):
    """One line as the model sees it, or why it cannot be learned from."""

    line: int
    """From 1, as in the file."""
    sequences: list[list[Piece]] = []
    """The text of each sequence, in pieces that are learned or only read."""
    tokens: int = 0
    learned_tokens: int = 0
    cut: bool = False
    """The conversation does not fit into the model's context: this is what is left of it."""
    problem: str | None = None


class Preview(msgspec.Struct, frozen=True, kw_only=True):
    """The lines that were asked for."""

    object: str = "list"
    model: str
    thinking: bool
    context_tokens: int
    data: list[LinePreview]
