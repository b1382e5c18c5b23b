"""Supervised fine-tuning: learn the assistant's messages, given everything before them.

The loss of a step is sum(weight x cross-entropy) / sum(weight) over all label tokens of the step's examples, however
these are packed into micro-batches. Labels come from the rendered spans and weights, never from a padding token.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rose.domain import training_data
from rose.domain.training_data import ChatExample, Problem
from rose.methods.method import Document, Option, Rendered, Scores, Template, Tensor, Unit

OPTIONS: Mapping[str, Option] = {}
NEEDS_REFERENCE = False
RATE = 1.0


def read(lines: Iterable[bytes]) -> Iterator[ChatExample | Problem]:
    """Yield each conversation, or its first problem."""
    return training_data.read_examples(lines)


def render(item: ChatExample, template: Template, maximum_tokens: int, *, thinking: bool) -> Rendered:
    """Return a conversation as sequences, each learned on its own. Raises: UnusableExample."""
    rendering = template.render(item, maximum_tokens, thinking=thinking)
    units = tuple(Unit((document(one),)) for one in rendering.examples)
    return Rendered(units=units, cut=rendering.cut, caveats=rendering.caveats)


def document(tokenized: Any) -> Document:
    """Return a rendered sequence (Tokenized) in little memory."""
    return Document(ids=array("q", tokenized.ids), weights=array("f", tokenized.weights))


def weight(unit: Unit) -> float:
    """Return the sum of the weights of all targets."""
    return math.fsum(one.label_weight for one in unit.documents)


def blind_loss(units: Sequence[Unit]) -> float:
    """Return the loss in nats per label token of always guessing by the labels' overall frequencies: their entropy."""
    counts: Counter[int] = Counter()
    for one in (document for unit in units for document in unit.documents):
        counts.update(token for token, weight in zip(one.ids, one.weights, strict=True) if weight)
    total = counts.total()
    return -sum(count / total * math.log(count / total) for count in counts.values())


def loss(scores: Scores, options: Mapping[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the sum of weight x cross-entropy, and of the weights of the tokens that were guessed."""
    return -scores.logprobs.sum(), {"mean_token_accuracy": scores.correct.sum()}
