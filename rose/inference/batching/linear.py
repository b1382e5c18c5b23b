"""Linear layers of a model that answers: weights in the form that the machine multiplies fastest, adapters beside.

On a CPU without matrix units, fp16 weights with fp32 arithmetic (FBGEMM) take half the memory of fp32 and are several
times as fast: one row is bound by reading the weights. M rows (tokens) of input.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rose.inference.batching.adapters import Stack
from rose.inference.batching.attention import current

LARGEST_FP16 = 65504.0
TIMED_ROWS = (1, 8)
TIMED_SECONDS = 0.2
"""For all candidates on all shapes."""
TIMED_RUNS = 7
"""Of each product at least: on a busy machine single ones take many times as long."""
CLEARLY = 0.8
"""bf16, which rounds most, has to take less than this share of the others' time: else noise would choose it at one
start and not at the next, and the same request would give other tokens."""


class BatchLinear(nn.Module):
    """y = x Wᵀ + b, and for each token its adapter's part."""

    def __init__(self, linear: nn.Linear, form: str) -> None:
        super().__init__()
        self.outputs, self.inputs = linear.weight.shape
        self.in_features, self.out_features = self.inputs, self.outputs
        self.stacks: dict[int, Stack] = {}
        self.packed: Any = None
        self.bias: nn.Parameter | None = None
        if form == "fp16":
            own: Any = linear.bias
            self.packed = torch.ops.quantized.linear_prepack_fp16(
                linear.weight.detach().contiguous(), None if own is None else own.detach()
            )
            # Models ask a weight for its shape and dtype; the numbers are in the packed one.
            self.weight = nn.Parameter(torch.empty_like(linear.weight, device="meta"), requires_grad=False)
        else:
            self.weight, self.bias = linear.weight, linear.bias
        self.example = torch.empty(0, dtype=linear.weight.dtype, device=linear.weight.device)

    def product(self, x: Tensor) -> Tensor:
        """Return the base's part."""
        if self.packed is None:
            return functional.linear(x, self.weight, self.bias)
        return torch.ops.quantized.linear_dynamic_fp16(x, self.packed)

    def forward(self, x: Tensor) -> Tensor:
        """Return [1, T, out] for [1, T, in]."""
        y = self.product(x)
        step = current.step
        if self.stacks and step is not None and step.adapters is not None:
            step.adapters.add(self.stacks, x, y)
        return y


def fits_fp16(model: nn.Module) -> bool:
    """Tell whether no weight of a linear layer is too large for fp16."""
    return all(
        bool(module.weight.abs().max() <= LARGEST_FP16) for module in model.modules() if isinstance(module, nn.Linear)
    )


def has_fp16() -> bool:
    """Tell whether this torch has fp16 weights for CPUs (x86 with FBGEMM)."""
    try:
        packed = torch.ops.quantized.linear_prepack_fp16(torch.zeros(4, 4), None)
        torch.ops.quantized.linear_dynamic_fp16(torch.zeros(1, 4), packed)
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    return True


def fastest_form(shapes: Iterable[tuple[int, int]], candidates: Iterable[str]) -> str:
    """Return the form with the least time for layers of these (outputs, inputs), over M = 1 and 8.

    Each kind of shape is timed once and counts as often as it comes.
    """
    counts: dict[tuple[int, int], int] = {}
    for shape in shapes:
        counts[shape] = counts.get(shape, 0) + 1
    forms = list(candidates)
    if len(forms) < 2 or not counts:
        return forms[0]
    share = TIMED_SECONDS / (len(forms) * len(counts) * len(TIMED_ROWS))
    seconds = dict.fromkeys(forms, 0.0)
    for (outputs, inputs), count in counts.items():
        weight = torch.randn(outputs, inputs)
        for form in forms:
            product = _product(weight, form)
            for rows in TIMED_ROWS:
                seconds[form] += count * _time(product, torch.randn(rows, inputs), share)
    return min(forms, key=lambda form: seconds[form] / (CLEARLY if form == "bf16" else 1))


def _product(weight: Tensor, form: str) -> Callable[[Tensor], Tensor]:
    if form == "fp16":
        packed = torch.ops.quantized.linear_prepack_fp16(weight, None)
        return lambda x: torch.ops.quantized.linear_dynamic_fp16(x, packed)
    if form == "bf16":
        small = weight.bfloat16()
        return lambda x: functional.linear(x.bfloat16(), small)
    return lambda x: functional.linear(x, weight)


def _time(product: Callable[[Tensor], Tensor], x: Tensor, seconds: float) -> float:
    """Return the shortest time of some runs; a busy neighbour lengthens single ones."""
    product(x)
    best, until, runs = float("inf"), time.perf_counter() + seconds, 0
    while True:
        begin = time.perf_counter()
        product(x)
        now = time.perf_counter()
        best, runs = min(best, now - begin), runs + 1
        if now > until and runs >= TIMED_RUNS:
            return best
