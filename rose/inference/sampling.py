"""Choose the next token from logits. Deterministic by seed on every device: randomness comes from Python's generator.

V is the vocabulary size.
"""

from __future__ import annotations

import math
import random

import torch

from rose.errors import InvalidRequest, RoseError
from rose.inference.request import Sampling

FIRST_LIKELY = 256
"""Tokens that are looked at for top_p before all are sorted."""
LOWEST_TEMPERATURE = 1e-6
"""Below this only the likeliest token is drawn anyway, and in fp32 a number far below it is 0."""


class Sampler:
    """Chooses the tokens of one choice, one after another."""

    def __init__(self, sampling: Sampling, *, seed: int | None, index: int, vocabulary: int) -> None:
        """Take the choice's `index` into the seed, so that choices differ. Raises: InvalidRequest (logit_bias)."""
        for token_id in sampling.logit_bias:
            if token_id >= vocabulary:
                raise InvalidRequest(
                    f"logit_bias names token {token_id}; the model has the tokens 0 to {vocabulary - 1}.",
                    code="invalid_value",
                    param="logit_bias",
                )
        self._sampling = sampling
        self._random = random.Random(None if seed is None else f"{seed}/{index}")
        self._bias: tuple[torch.Tensor, torch.Tensor] | None = None
        """Token ids and what to add, on the device of the logits once these are known."""
        if sampling.logit_bias:
            self._bias = torch.tensor(list(sampling.logit_bias)), torch.tensor(list(sampling.logit_bias.values()))
        self._counts: dict[int, int] | None = {} if sampling.frequency_penalty or sampling.presence_penalty else None

    def choose(self, logits: torch.Tensor, best: tuple[float, int] | None = None) -> int:
        """Return the next token id for `logits` [V], which stay unchanged. Raises: RoseError when they are NaN.

        `best`: the largest logit and its token, found for many rows at once.
        """
        if best is not None and self._bias is None and self._counts is None:
            _check(best[0])
            return best[1] if self._sampling.temperature == 0 else self._draw(logits.float(), best[0])
        scores = self._adjusted(logits.float())
        largest, token_id = torch.max(scores, dim=0)
        _check(largest.item())
        token_id = int(token_id.item()) if self._sampling.temperature == 0 else self._draw(scores, largest.item())
        if self._counts is not None:
            self._counts[token_id] = self._counts.get(token_id, 0) + 1
        return token_id

    def _adjusted(self, logits: torch.Tensor) -> torch.Tensor:
        """Add bias and penalties as OpenAI defines them: logit - count * frequency - (count > 0) * presence."""
        if self._bias is None and not self._counts:
            return logits
        scores = logits.clone()
        if self._bias is not None:
            ids, bias = self._bias = self._bias[0].to(scores.device), self._bias[1].to(scores.device)
            scores[ids] += bias
        if self._counts:
            ids = torch.tensor(list(self._counts), device=scores.device)
            counts = torch.tensor(list(self._counts.values()), dtype=scores.dtype, device=scores.device)
            scores[ids] -= self._sampling.frequency_penalty * counts + self._sampling.presence_penalty
        return scores

    def _draw(self, scores: torch.Tensor, best: float) -> int:
        """Invert the cumulative distribution at one random point in (0, total]; no token of probability 0 is hit."""
        # Shifted first, so that a tiny temperature cannot overflow.
        temperature = max(self._sampling.temperature, LOWEST_TEMPERATURE)
        probabilities = torch.softmax((scores - best) / temperature, dim=0)
        order: torch.Tensor | None = None
        if self._sampling.top_p < 1:
            probabilities, order = _likeliest(probabilities, self._sampling.top_p)
        cumulative = torch.cumsum(probabilities, dim=0)
        point = (1.0 - self._random.random()) * cumulative[-1:]
        position = int(torch.searchsorted(cumulative, point).item())
        return position if order is None else int(order[position].item())


def top_logprobs(logits: torch.Tensor, token_id: int, count: int) -> tuple[float, list[tuple[int, float]]]:
    """Return the log-probability (nats) of `token_id` in `logits` [V], and the `count` most likely ids with theirs.

    They are the model's own: before temperature, bias and penalties.
    """
    logprobs = torch.log_softmax(logits.float(), dim=0)
    values, ids = torch.topk(logprobs, min(count, logprobs.shape[0]))
    return float(logprobs[token_id].item()), list(zip(ids.tolist(), values.tolist(), strict=True))


def _likeliest(probabilities: torch.Tensor, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the most likely tokens that together reach `top_p`, and their ids; always one.

    Sorting a whole vocabulary takes longer than a small model's forward pass: a few are nearly always enough.
    """
    found, order = torch.topk(probabilities, min(FIRST_LIKELY, probabilities.shape[0]))
    if found.shape[0] < probabilities.shape[0] and float(found.sum()) < top_p:
        found, order = torch.sort(probabilities, descending=True, stable=True)
    before = torch.cumsum(found, dim=0) - found
    kept = max(1, int((before < top_p).sum().item()))
    return found[:kept], order[:kept]


def _check(best: float) -> None:
    """Check the largest score. Raises: RoseError when it is no finite number (a NaN anywhere is the largest)."""
    if not math.isfinite(best):
        raise RoseError("The model gives no finite numbers; its training has diverged.", code="model_diverged")
