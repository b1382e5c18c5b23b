"""Cross-entropy of label rows, without ever holding the logits of more than a chunk of them.

Prompt tokens never meet the output head: with a vocabulary of 150,000 its logits would be the largest tensor of a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

CHUNK_NUMBERS = 1 << 25
"""Logits held at once: 128 MiB in fp32."""


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Gradients are made in the forward pass, chunk by chunk, while the chunk's logits exist; backward only scales.

    d(w * ce)/d logits = w * (softmax(logits) - onehot(target)).
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        head: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        weights: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        made = _chunks(rows, head, bias, targets, weights, ctx.needs_input_grad[:3])
        ctx.gradients = made.gradients
        ctx.dtypes = (rows.dtype, head.dtype, None if bias is None else bias.dtype)
        trains_head = ctx.needs_input_grad[1]
        ctx.save_for_backward(*((rows, head, bias, targets, weights) if trains_head else ()))
        ctx.mark_non_differentiable(made.correct)
        return made.losses, made.correct

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        scale, gradients = upstream[0], ctx.gradients
        ctx.gradients = ()
        if ctx.saved_tensors:
            if not bool((scale == scale[:1]).all()):  # the head's gradient is a sum over rows, so each needs its own
                rows, head, bias, targets, weights = ctx.saved_tensors
                made = _chunks(rows, head, bias, targets, weights * scale, ctx.needs_input_grad[:3])
                gradients, scale = made.gradients, torch.ones_like(scale)
            by_row, overall = scale[:, None], scale[0]
        else:
            by_row = overall = scale[:, None]
        scaled = (
            None if gradient is None else (gradient * factor).to(dtype)
            for gradient, factor, dtype in zip(gradients, (by_row, overall, overall), ctx.dtypes, strict=True)
        )
        return (*scaled, None, None)


class _Made(NamedTuple):
    """What one pass over the label rows gives."""

    losses: torch.Tensor
    """[R]"""
    correct: torch.Tensor
    """[R]"""
    gradients: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]
    """Of the sum of the losses for rows [R, D], head [V, D] and bias [V], where they are needed."""


def _chunks(
    rows: torch.Tensor,
    head: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    weights: torch.Tensor,
    needs: Sequence[bool],
) -> _Made:
    losses = torch.empty(rows.shape[0], dtype=torch.float32, device=rows.device)
    correct = torch.empty_like(losses)
    needs_rows, needs_head, needs_bias = needs
    grad_rows = torch.empty_like(rows) if needs_rows else None
    grad_head = torch.zeros_like(head, dtype=torch.float32) if needs_head else None
    grad_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and needs_bias else None
    chunk = max(1, CHUNK_NUMBERS // head.shape[0])
    for start in range(0, rows.shape[0], chunk):
        part = slice(start, start + chunk)
        logits = torch.nn.functional.linear(rows[part], head, bias).float()  # [chunk, V]
        target, weight = targets[part, None], weights[part, None]
        correct[part] = (weight * (logits.argmax(-1, keepdim=True) == target))[:, 0]
        log_total = logits.logsumexp(-1, keepdim=True)
        losses[part] = (weight * (log_total - logits.gather(-1, target)))[:, 0]
        if grad_rows is None and grad_head is None:
            continue
        gradient = logits.sub_(log_total).exp_()
        gradient.scatter_add_(-1, target, torch.full_like(weight, -1.0))
        gradient = gradient.mul_(weight).to(head.dtype)
        if grad_rows is not None:
            grad_rows[part] = (gradient @ head).to(rows.dtype)
        if grad_head is not None:
            grad_head += gradient.T @ rows[part].to(head.dtype)
        if grad_bias is not None:
            grad_bias += gradient.float().sum(0)
    return _Made(losses, correct, (grad_rows, grad_head, grad_bias))


def label_cross_entropy(
    rows: torch.Tensor, head: torch.nn.Module, targets: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return for each row weight x cross-entropy, and the weight where the likeliest token is the target; [R] fp32.

    rows [R, D] are the hidden states that predict targets [R] int64, with weights [R] fp32; head is the model's
    output layer, D to V. The first result has gradients for rows and for the head's weights where they are trained.
    """
    weight: Any = head.weight
    bias: Any = getattr(head, "bias", None)
    autocasts = torch.is_autocast_enabled(rows.device.type)
    dtype = torch.get_autocast_dtype(rows.device.type) if autocasts else weight.dtype
    with torch.autocast(rows.device.type, enabled=False):
        return _ChunkedCrossEntropy.apply(  # pyright: ignore[reportReturnType]
            rows.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), targets, weights
        )


def label_logprobs(rows: torch.Tensor, head: torch.nn.Module, targets: torch.Tensor) -> torch.Tensor:
    """Return the log-probabilities [R] fp32 of targets [R], by the same arithmetic as `label_cross_entropy`."""
    weight: Any = head.weight
    chunk = max(1, CHUNK_NUMBERS // weight.shape[0])
    parts = zip(rows.split(chunk), targets.split(chunk), strict=True)
    return torch.cat([logits_logprobs(head(states.to(weight.dtype)), wanted) for states, wanted in parts])


def logits_logprobs(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the log-probabilities [R] fp32 of targets [R] from logits [R, V]."""
    return -torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")


def logits_cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the same as `label_cross_entropy` from logits [R, V] that the model made itself."""
    entropies = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
    return weights * entropies, weights * (logits.detach().argmax(-1) == targets)
