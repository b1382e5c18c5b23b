"""A few figures of many measurements. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that at least this share (0 to 1) of the values do not exceed. Raises: ValueError."""
    if not values:
        raise ValueError("no values")
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Return the range of values for a table."""
    return f"{min(values):.{digits}f}-{max(values):.{digits}f}" if values else "-"


def median(values: Sequence[float]) -> float:
    """Return the median; NaN of nothing, so that a table can be written all the same."""
    return statistics.median(values) if values else math.nan


def slope_ratio(values: Sequence[float]) -> float:
    """Return the median of the last quarter over that of the second: 1 when nothing grows after a warm-up."""
    quarter = len(values) // 4
    if not quarter:
        return math.nan
    return statistics.median(values[-quarter:]) / statistics.median(values[quarter : 2 * quarter])
