"""How often something may happen: the generic cell rate algorithm, by key and in memory. Pure: no clock of its own.

A whole minute's worth may come at once, and what was taken comes back evenly. So the time until the next one passes is
known exactly, it is short where much is allowed, and no two minutes' worth can meet at the edge of a window. Unlike the
libraries for this it can also take what is known only afterwards (the tokens of an answer): what was taken too much is
owed, and has to come back first.
"""

from __future__ import annotations

import math

import msgspec

MINUTE_SECONDS = 60.0
_ROUNDING = 1e-6
"""Of one unit; what is missing for a whole one only because times are floating point numbers."""


class Left(msgspec.Struct, frozen=True, kw_only=True):
    """What is left of a rate."""

    limit: int
    """Units per minute."""
    remaining: int
    """Units that may be taken at once."""
    reset_seconds: float
    """Until all of them may be taken again."""
    retry_seconds: float
    """Until one may be taken; 0 when it may now."""


class Rate:
    """So many units per minute for each key. Times are seconds of any clock that does not go back."""

    def __init__(self, per_minute: int) -> None:
        self._limit = per_minute
        self._interval = MINUTE_SECONDS / per_minute
        """Seconds in which one unit comes back."""
        self._full_at: dict[str, float] = {}
        """When everything that a key took will have come back."""

    def left(self, key: str, now: float) -> Left:
        """Return what a key may take."""
        reset = max(self._full_at.get(key, now) - now, 0.0)
        exact = self._limit - reset / self._interval
        remaining = max(math.floor(exact + _ROUNDING), 0)
        return Left(
            limit=self._limit,
            remaining=remaining,
            reset_seconds=reset,
            # Until a whole one is there, not one less the rounding: a sum that is rounded down then still has it.
            retry_seconds=0.0 if remaining >= 1 else (1 - exact) * self._interval,
        )

    def take(self, key: str, now: float) -> bool:
        """Take one unit if it is there, and say whether it was."""
        there = self.left(key, now).remaining >= 1
        if there:
            self.owe(key, now, 1)
        return there

    def owe(self, key: str, now: float, units: int) -> None:
        """Take units whether or not they are there."""
        self._full_at[key] = max(self._full_at.get(key, now), now) + units * self._interval
