"""Memory that is taken where something is written, not where room for it is set aside."""

from __future__ import annotations

import math
import mmap
import sys
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def is_lazy(device: torch.device) -> bool:
    """Tell whether memory of zeros is taken only where something is written."""
    return device.type == "cpu"


def lazy_zeros(shape: Sequence[int], like: Tensor) -> Tensor:
    """Return zeros of the dtype and on the device of `like`; a CPU's memory is taken page by page."""
    if not is_lazy(like.device):
        return torch.zeros(*shape, dtype=like.dtype, device=like.device)
    raw = np.zeros(math.prod(shape) * like.dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(raw).view(like.dtype).view(*shape)


class Slots:
    """Rows of zeros of one length, each of which can be made zeros again; Linux takes back what it held."""

    def __init__(self, count: int, numbers: int, like: Tensor) -> None:
        """`numbers` per slot: whole pages (see `whole_pages`)."""
        self._bytes = numbers * like.dtype.itemsize
        self._map: mmap.mmap | None = None
        if like.device.type == "cpu" and sys.platform == "linux":
            # Private: what a shared mapping held would stay after MADV_DONTNEED.
            self._map = mmap.mmap(-1, count * self._bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self.numbers = torch.frombuffer(self._map, dtype=like.dtype).view(count, numbers)
        else:
            self.numbers = lazy_zeros((count, numbers), like)

    def clear(self, slot: int) -> None:
        """Make a slot zeros."""
        if self._map is not None:
            self._map.madvise(mmap.MADV_DONTNEED, slot * self._bytes, self._bytes)
        else:
            self.numbers[slot] = 0


def whole_pages(numbers: int, dtype: torch.dtype) -> int:
    """Round a number of numbers up so that they fill pages of the system."""
    page = mmap.PAGESIZE // dtype.itemsize
    return -(-numbers // page) * page
