"""Served as trained: which tokens are compared, and what the difference may be. Pure and torch-free.

docs/operations.md, "A model is served otherwise than it was trained", says what was measured and why the bounds are so.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

from rose.domain.job_values import ServedAsTrained
from rose.inference.generation import ScoringAnswer
from trainer.batches import Document
from trainer.protocol import ScoredRows

MAX_ROWS = 32
MAX_ROW_TOKENS = 2048
"""Of a longer row its end is compared, where the labels are."""
MAX_TOKENS = 8192
"""Of all rows together: a model of 1.5 billion numbers reads them on two cores in about a minute."""


class Bound(NamedTuple):
    """What two computations of a log-probability (nats) may differ by."""

    largest: float
    mean: float


BOUNDS = {"fp32": Bound(1e-2, 1e-3), "fp16": Bound(2e-2, 2e-3), "bf16": Bound(1.0, 5e-2)}
"""By the coarsest numbers on either side, finest first."""


def sample(documents: Sequence[Document], seed: int) -> list[Document]:
    """Return up to MAX_ROWS documents with something learned, the same for the same data and seed."""

    def place(index: int) -> bytes:
        return hashlib.sha256(f"proof/{seed}/{index}".encode()).digest()

    found: list[Document] = []
    left = MAX_TOKENS
    for index in sorted(range(len(documents)), key=place):
        row = _end(documents[index])
        if len(found) == MAX_ROWS:
            break
        if row.label_weight > 0 and len(row) <= left:
            found.append(row)
            left -= len(row)
    return found


def _end(document: Document) -> Document:
    return Document(ids=array("q", document.ids[-MAX_ROW_TOKENS:]), weights=document.weights[-MAX_ROW_TOKENS:])


def compare(scored: ScoredRows, answer: ScoringAnswer, artifact_sha256: str) -> ServedAsTrained:
    """Return what the engine's numbers say of the published model.

    Raises: ValueError when there are not as many numbers as tokens.
    """
    bound = _bound(scored, answer)
    served_as = _coarsest(answer.weights, answer.dtype)
    pairs: list[tuple[float | None, float | None]] = []
    for row, given in zip(scored.rows, answer.logprobs, strict=True):
        if len(given) != len(row.ids) - 1:
            raise ValueError(f"{len(given)} log-probabilities of {len(row.ids)} tokens")
        pairs += zip(row.logprobs, (given[at - 1] for at in row.learned), strict=True)
    known = [abs(ours - theirs) for ours, theirs in pairs if ours is not None and theirs is not None]
    lost = sum(theirs is None and ours is not None for ours, theirs in pairs)
    largest = max(known) if known and not lost else None
    mean = fmean(known) if known and not lost else None
    reason = ""
    if answer.adapter != artifact_sha256:
        reason = f"the engine answered with other weights ({answer.adapter or 'the base alone'})"
    elif lost:
        reason = f"the engine gave no number for {lost} of {len(pairs)} tokens"
    elif largest is not None and mean is not None and (largest > bound.largest or mean > bound.mean):
        reason = (
            f"the log-probabilities of {len(pairs)} tokens differ by up to {largest:.2g} (bound {bound.largest:g}), "
            f"by {mean:.2g} on average (bound {bound.mean:g})"
        )
    return ServedAsTrained(
        status="differs" if reason else "proven" if known else "not_proven",
        reason=reason if known or reason else "the trainer's own numbers are none",
        rows=len(scored.rows),
        tokens=len(pairs),
        held_out=scored.held_out,
        largest_difference=largest,
        mean_difference=mean,
        largest_allowed=bound.largest,
        mean_allowed=bound.mean,
        trained_as=scored.trained_as,
        served_as=served_as,
    )


def _bound(scored: ScoredRows, answer: ScoringAnswer) -> Bound:
    coarsest = "bf16" if scored.routed else _coarsest(scored.trained_as, answer.weights, answer.dtype)
    return BOUNDS[coarsest]


def _coarsest(*forms: str) -> str:
    """Return the coarsest of some forms of numbers, by either name; an unknown one counts as the coarsest there is."""
    order = list(BOUNDS)
    short = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
    places = [order.index(name) if (name := short.get(form, form)) in order else len(order) - 1 for form in forms]
    return order[max(places)]
