"""Which example is trained when: the order of an epoch, steps, micro-batches and the rate.

Pure and torch-free: everything is a function of the data, the seed and the step, so a run that is taken up again does
the same as one that was never stopped. Packing only decides what shares a forward pass, never what a step learns from.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

from rose.domain.hyperparameters import Hyperparameters
from rose.methods.method import Document, Unit
from trainer.held_out import Question

ADDED = ("thinking", "options")
"""Hyperparameters that there were not always; where they are empty, a run is what it was without them."""


@dataclass(frozen=True, slots=True)
class Example:
    """One row of a data file. It is one unit, or several where a template renders each answer apart."""

    units: tuple[Unit, ...]
    question: Question
    """What the example asks; examples that ask the same stay on one side of a validation split."""

    @property
    def documents(self) -> list[Document]:
        """All its documents."""
        return [document for unit in self.units for document in unit.documents]

    @property
    def tokens(self) -> int:
        """Tokens of all its documents."""
        return sum(len(document) for document in self.documents)


def epoch_order(examples: int, seed: int, epoch: int) -> list[int]:
    """Return the order in which epoch `epoch` (0-based) visits the examples; a function of seed and epoch alone."""
    return sorted(range(examples), key=lambda index: _hash(f"order/{seed}/{epoch}/{index}"))


class Schedule:
    """What each optimizer step trains on and at which rate. Steps are counted from 1 to `total_steps`."""

    def __init__(self, hyperparameters: Hyperparameters) -> None:
        self.hyperparameters = hyperparameters
        self.examples = hyperparameters.training_examples
        self.steps_per_epoch = math.ceil(self.examples / hyperparameters.batch_size)
        self.total_steps = self.steps_per_epoch * hyperparameters.n_epochs
        self._epoch: int | None = None
        self._order: list[int] = []

    def step_examples(self, step: int) -> list[int]:
        """Return the indexes of the step's examples: batch_size of them, fewer at an epoch's end."""
        epoch, within = divmod(step - 1, self.steps_per_epoch)
        if epoch != self._epoch:
            self._order = epoch_order(self.examples, self.hyperparameters.seed, epoch)
            self._epoch = epoch
        size = self.hyperparameters.batch_size
        return self._order[within * size : (within + 1) * size]

    def ends_epoch(self, step: int) -> bool:
        """Tell whether the step is the last one of an epoch."""
        return step > 0 and step % self.steps_per_epoch == 0

    def evaluates_after(self, step: int) -> bool:
        """Tell whether an evaluation follows the step: at the interval and at each epoch's end."""
        every = self.hyperparameters.evaluate_every_steps
        return every is not None and step > 0 and (step % every == 0 or self.ends_epoch(step))

    def epoch_fraction(self, step: int) -> float:
        """Return the passes over the training data completed after the step."""
        epochs, within = divmod(step, self.steps_per_epoch)
        return epochs + within * self.hyperparameters.batch_size / self.examples

    def learning_rate(self, step: int) -> float:
        """Return the rate of the step: linear from 0 over warmup_steps to the peak, then linear to 0 after the end.

        The same as transformers' get_linear_schedule_with_warmup after the warmup; within it one step ahead, so that
        the first step is not lost at rate 0.
        """
        warmup, peak = self.hyperparameters.warmup_steps, self.hyperparameters.learning_rate
        if step <= warmup:
            return peak * step / warmup
        return peak * (self.total_steps - step + 1) / (self.total_steps - warmup)


def pack(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Put documents into micro-batches of at most `budget` tokens: first fit, longest first, ties in order.

    A document longer than the budget is alone. Returns indexes into `lengths`; each micro-batch is in index order.
    """
    bins: list[list[int]] = []
    places = _Places(len(lengths))
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = places.first(lengths[index])
        if place is None:
            place = len(bins)
            bins.append([])
            places.set(place, budget)
        bins[place].append(index)
        places.set(place, places.room(place) - lengths[index])
    return [sorted(bin) for bin in bins]


class _Places:
    """The room in each bin, as a tree of maxima, in which the first bin that has enough is found in O(log bins).

    Looking at one bin after the other took minutes for an evaluation of a hundred thousand documents.
    """

    def __init__(self, most: int) -> None:
        self._leaves = 1 << max(0, most - 1).bit_length()
        self._largest = [0] * (2 * self._leaves)

    def room(self, place: int) -> int:
        return self._largest[self._leaves + place]

    def set(self, place: int, room: int) -> None:
        node = self._leaves + place
        self._largest[node] = room
        while node > 1:
            node //= 2
            self._largest[node] = max(self._largest[2 * node], self._largest[2 * node + 1])

    def first(self, wanted: int) -> int | None:
        """Return the first place with this much room; None when there is none."""
        if self._largest[1] < wanted:
            return None
        node = 1
        while node < self._leaves:
            node = 2 * node + (self._largest[2 * node] < wanted)
        return node - self._leaves


def plan_hash(
    training: Sequence[Example], validation: Sequence[Example], hyperparameters: Hyperparameters, *more: str
) -> str:
    """Return a hash over all that decides the run's numbers; a recovery point of another plan is not taken up."""
    digest = hashlib.sha256()
    for name in sorted(hyperparameters.__struct_fields__):
        if name in ADDED and not getattr(hyperparameters, name):
            continue  # as in the plans of runs that began before there was the setting
        if name != "reasons":
            digest.update(f"{name}={getattr(hyperparameters, name)!r}\n".encode())
    for text in more:
        digest.update(f"{text}\n".encode())
    for side in (training, validation):
        digest.update(f"{len(side)} examples\n".encode())
        for example in side:
            for document in example.documents:
                digest.update(f"{len(document)}\n".encode())
                digest.update(document.ids.tobytes())
                digest.update(document.weights.tobytes())
    return digest.hexdigest()


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
