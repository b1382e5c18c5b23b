"""What a training method is: how its data is read, what is rendered of it, and what is learned from that.

Packing, accumulation, schedules, recovery, evaluation and reporting belong to the run and know no method. Imports no
torch, so that a file is read alike by the command line, the server and the run; the model's numbers come as tensors.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from rose.domain.training_data import ChatExample

Tensor = Any
"""A tensor of the process that trains."""


@dataclass(frozen=True, slots=True)
class Document:
    """One sequence for the model: token ids and, for each token, its weight as a target (0: only context)."""

    ids: array[int]
    weights: array[float]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def label_weight(self) -> float:
        """Sum of the weights of all targets; the first token has nothing before it and is never a target."""
        return math.fsum(self.weights[1:])


@dataclass(slots=True, eq=False)
class Unit:
    """Documents whose loss is computed together: they never part, whatever else shares their forward pass."""

    documents: tuple[Document, ...]
    reference: tuple[float, ...] | None = None
    """How likely the model found each document before the first step (as Scores.logprobs), for methods that ask."""

    @property
    def tokens(self) -> int:
        """Tokens of all its documents."""
        return sum(len(document) for document in self.documents)


class Item(Protocol):
    """A line of a data file, as a method reads it."""

    @property
    def line(self) -> int:
        """Physical line of the file, from 1."""
        ...

    @property
    def conversations(self) -> tuple[ChatExample, ...]:
        """What is said in it; all ask the same."""
        ...


class Rendered(NamedTuple):
    """An item as the model sees it."""

    units: tuple[Unit, ...]
    cut: bool
    """Whether the oldest turns, or the beginning of a question, were left out because they did not fit."""
    caveats: Sequence[Any]
    """What a person should know of it (rose.language_models.chat.caveats.Caveat)."""

    @property
    def tokens(self) -> int:
        """Tokens of all documents."""
        return sum(unit.tokens for unit in self.units)

    @property
    def label_tokens(self) -> int:
        """Those of them that are learned."""
        documents = [document for unit in self.units for document in unit.documents]
        return sum(len(document) - document.weights.count(0.0) for document in documents)


class Scores(NamedTuple):
    """How likely the model finds the documents of some units, in their order. D documents."""

    units: Sequence[Unit]
    logprobs: Tensor
    """[D] fp32: of each document the sum of weight x log-probability of its targets, nats; with gradients."""
    correct: Tensor
    """[D] fp32: the sum of the weights of those targets that were the likeliest token."""
    reference: Tensor
    """[D] fp32: the logprobs before the first step; zeros where the method does not ask for them."""


class Option(NamedTuple):
    """A hyperparameter that only this method has."""

    default: float
    why: str


class Template(Protocol):
    """A model's chat template (rose.language_models.template.ChatTemplate)."""

    def render(self, example: ChatExample, maximum_tokens: int, *, thinking: bool = False) -> Any:
        """Return a Rendering. Raises: UnusableExample."""
        ...


class Method(Protocol):
    """What a method's module provides. Everything is a function of its arguments."""

    @property
    def OPTIONS(self) -> Mapping[str, Option]:
        """Hyperparameters of this method alone, by the name that `method.<name>.hyperparameters` gives them."""
        ...

    @property
    def NEEDS_REFERENCE(self) -> bool:
        """Whether the loss compares with the model before the first step."""
        ...

    @property
    def RATE(self) -> float:
        """The base learning rate as a multiple of that of supervised fine-tuning."""
        ...

    def read(self, lines: Iterable[bytes]) -> Iterator[Any]:
        """Yield each Item of a file, or the first Problem of its line, in order."""
        ...

    def render(self, item: Any, template: Template, maximum_tokens: int, *, thinking: bool) -> Rendered:
        """Return an item as the model sees it. Raises: UnusableExample."""
        ...

    def weight(self, unit: Unit) -> float:
        """Return what a unit counts in the mean over a step; above 0."""
        ...

    def blind_loss(self, units: Sequence[Unit]) -> float:
        """Return the loss of knowing next to nothing, by which an explosion is known."""
        ...

    def loss(self, scores: Scores, options: Mapping[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, and what else is measured, summed over the units: weight is divided by afterwards.

        `mean_token_accuracy` has fields of its own in the step's report; what else there is stands in its metrics.
        """
        ...
