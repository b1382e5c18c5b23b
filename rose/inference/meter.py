"""How many tokens an engine makes per second."""

from __future__ import annotations

import threading
from collections import deque

WINDOW_SECONDS = 10.0


class Meter:
    """Counts over the last ten seconds. Callable from any thread; times are of any clock that does not go back."""

    def __init__(self) -> None:
        self._made: deque[tuple[float, int]] = deque()
        self._lock = threading.Lock()

    def add(self, now: float, count: int) -> None:
        """Note that `count` were made."""
        if count:
            with self._lock:
                self._made.append((now, count))
                self._forget(now)

    def per_second(self, now: float) -> float:
        """Return the mean of the last ten seconds."""
        with self._lock:
            self._forget(now)
            return sum(count for _, count in self._made) / WINDOW_SECONDS

    def _forget(self, now: float) -> None:
        while self._made and self._made[0][0] < now - WINDOW_SECONDS:
            self._made.popleft()
