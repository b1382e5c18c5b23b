"""Which numbers of rows give a row of a product the same bits: kernels take another path for a remainder of one or two.

Found on the machine, when a number is first wanted, by one product of each kind of layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK_ROWS = 16
"""The number whose bits all others must have."""
MOST_ADDED = 16


@dataclass(frozen=True)
class Product:
    """One kind of linear layer."""

    inputs: int
    apply: Callable[[Tensor], Tensor]
    """[M, in] -> [M, out]"""


class GoodSizes:
    """Rounds a number of rows up to the next good one."""

    def __init__(self, products: Sequence[Product], *, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        self._products = [
            (product, torch.randn(BLOCK_ROWS, product.inputs, generator=generator).to(dtype)) for product in products
        ]
        self._expected: list[Tensor] = []
        """For each product what the block gives."""
        self._known: dict[int, int] = {}

    def at_least(self, rows: int) -> int:
        """Return the smallest good number that is not below `rows`; `rows` itself when none is near."""
        if rows not in self._known:
            candidates = range(rows, rows + MOST_ADDED + 1)
            self._known[rows] = next((number for number in candidates if self._is_good(number)), rows)
        return self._known[rows]

    def _is_good(self, rows: int) -> bool:
        """Tell whether the block's rows, repeated to so many, give what the block gives."""
        if not self._expected:
            self._expected = [product.apply(x) for product, x in self._products]
        blocks = -(-rows // BLOCK_ROWS)
        return all(
            torch.equal(product.apply(x.repeat(blocks, 1)[:rows]), expected.repeat(blocks, 1)[:rows])
            for (product, x), expected in zip(self._products, self._expected, strict=True)
        )
