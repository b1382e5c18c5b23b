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

    def __init__(self, products: Sequence[Product], *, dtype: torch.dtype, most_rows: int) -> None:
        rows = -(-(most_rows + MOST_ADDED) // BLOCK_ROWS) * BLOCK_ROWS
        generator = torch.Generator().manual_seed(0)
        self._products = [
            (product, torch.randn(rows, product.inputs, generator=generator).to(dtype)) for product in products
        ]
        self._expected: list[list[Tensor]] = [[] for _ in products]
        """For each product what the blocks of its input give."""
        self._known: dict[int, int] = {}

    def at_least(self, rows: int) -> int:
        """Return the smallest good number that is not below `rows`; `rows` itself when none is near."""
        if rows not in self._known:
            candidates = range(rows, rows + MOST_ADDED + 1)
            self._known[rows] = next((number for number in candidates if self._is_good(number)), rows)
        return self._known[rows]

    def _is_good(self, rows: int) -> bool:
        for number, (product, x) in enumerate(self._products):
            blocks = self._expected[number]
            while len(blocks) * BLOCK_ROWS < rows:
                start = len(blocks) * BLOCK_ROWS
                blocks.append(product.apply(x[start : start + BLOCK_ROWS]))
            if not torch.equal(product.apply(x[:rows]), torch.cat(blocks)[:rows]):
                return False
        return True
