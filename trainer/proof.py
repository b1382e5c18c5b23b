"""Served as trained: which tokens are compared, and what the difference may be. Pure and torch-free.

docs/operations.md, "A model is served otherwise than it was trained", says what was measured and why the bounds are so.
"""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

from rose.domain.job_values import ServedAsTrained
from rose.inference.generation import ScoringAnswer
from rose.methods.method import Document
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


STANDARD_ERRORS = 4
"""The mean of few differences may be farther off: a difference deviates from the mean by about as much as that is."""
BOUNDS = {"fp32": Bound(0.01, 0.001), "fp16": Bound(0.1, 0.005), "bf16": Bound(2.0, 0.1)}
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
    pairs = _pairs(scored, answer)
    differences = [math.inf if theirs is None else abs(ours - theirs) for ours, theirs in pairs]
    bound = _bound(scored, answer, len(pairs))
    largest, mean = max(differences, default=math.inf), fmean(differences or [math.inf])
    if answer.adapter != artifact_sha256:
        miss = f"the engine answered with other weights ({answer.adapter or 'the base alone'})"
    elif differences and largest == math.inf:
        miss = f"the engine gave no number for {differences.count(math.inf)} of {len(pairs)} tokens"
    elif differences and (largest > bound.largest or mean > bound.mean):
        miss = (
            f"the log-probabilities of {len(pairs)} tokens differ by up to {largest:.2g} (bound {bound.largest:g}), "
            f"by {mean:.2g} on average (bound {bound.mean:.2g})"
        )
    else:
        miss = ""
    return ServedAsTrained(
        status="differs" if miss else "proven" if pairs else "not_proven",
        reason=miss or ("" if pairs else "the trainer had no numbers of its own"),
        rows=len(scored.rows),
        tokens=len(pairs),
        held_out=scored.held_out,
        largest_difference=largest if math.isfinite(largest) else None,
        mean_difference=mean if math.isfinite(mean) else None,
        largest_allowed=bound.largest,
        mean_allowed=bound.mean,
        trained_as=scored.trained_as,
        served_as=_coarsest(answer.weights, answer.dtype),
    )


def _pairs(scored: ScoredRows, answer: ScoringAnswer) -> list[tuple[float, float | None]]:
    """Return the trainer's number and the engine's for each learned token for which the trainer has one."""
    pairs: list[tuple[float, float | None]] = []
    for row, given in zip(scored.rows, answer.logprobs, strict=True):
        if len(given) != len(row.ids) - 1:
            raise ValueError(f"{len(given)} log-probabilities of {len(row.ids)} tokens")
        pairs += [(ours, given[at - 1]) for at, ours in zip(row.learned, row.logprobs, strict=True) if ours is not None]
    return pairs


def _bound(scored: ScoredRows, answer: ScoringAnswer, tokens: int) -> Bound:
    coarsest = "bf16" if scored.routed else _coarsest(scored.trained_as, answer.weights, answer.dtype)
    bound = BOUNDS[coarsest]
    return Bound(bound.largest, bound.mean * (1 + STANDARD_ERRORS / math.sqrt(max(tokens, 1))))


def _coarsest(*forms: str) -> str:
    """Return the coarsest of some forms of numbers, by either name; an unknown one counts as the coarsest there is."""
    order = list(BOUNDS)
    short = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
    places = [order.index(name) if (name := short.get(form, form)) in order else len(order) - 1 for form in forms]
    return order[max(places)]
