"""Cross-entropy of label rows, without ever holding the logits of more than a chunk of them.

Prompt tokens never meet the output head: with a vocabulary of 150,000 its logits would be the largest tensor of a run.
"""

from __future__ import annotations

from typing import Any

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
        loss = torch.zeros((), dtype=torch.float32, device=rows.device)
        correct = torch.zeros((), dtype=torch.float32, device=rows.device)
        needs_rows, needs_head, needs_bias = ctx.needs_input_grad[:3]
        grad_rows = torch.empty_like(rows) if needs_rows else None
        grad_head = torch.zeros_like(head, dtype=torch.float32) if needs_head else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and needs_bias else None
        chunk = max(1, CHUNK_NUMBERS // head.shape[0])
        for start in range(0, rows.shape[0], chunk):
            part = slice(start, start + chunk)
            logits = torch.nn.functional.linear(rows[part], head, bias).float()  # [chunk, V]
            target, weight = targets[part, None], weights[part, None]
            correct += (weight * (logits.argmax(-1, keepdim=True) == target)).sum()
            log_total = logits.logsumexp(-1, keepdim=True)
            loss += (weight * (log_total - logits.gather(-1, target))).sum()
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
        ctx.gradients = (grad_rows, grad_head, grad_bias)
        ctx.dtypes = (rows.dtype, head.dtype, None if bias is None else bias.dtype)
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        scale = upstream[0]
        scaled = (
            None if gradient is None else (gradient * scale).to(dtype)
            for gradient, dtype in zip(ctx.gradients, ctx.dtypes, strict=True)
        )
        ctx.gradients = ()
        return (*scaled, None, None)


def label_cross_entropy(
    rows: torch.Tensor, head: torch.nn.Module, targets: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (sum of weight x cross-entropy, sum of weight where the likeliest token is the target), fp32 scalars.

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
    correct = (weights * (logits.detach().argmax(-1) == targets)).sum()
    return (weights * entropies).sum(), correct
