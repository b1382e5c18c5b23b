"""Tells a run that hangs from one that works: a renewal proves the host, step reports prove the run.

Pure but for the clock it is given: it reads no pipe and kills nothing; the owner of the child calls `check` often.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from statistics import median

import msgspec

STEP_FACTOR = 10.0
"""A step may take this many times the median step before the run counts as hung: docs/operations.md,
"A run hangs"."""
REMEMBERED_STEPS = 64
"""Median over so many newest steps: enough to be calm, few enough to follow a change of the examples' length."""


class Stall(msgspec.Struct, frozen=True, kw_only=True):
    """The run shows no sign of life within its limit."""

    phase: str
    silent_seconds: float
    limit_seconds: float

    def __str__(self) -> str:
        what = "no training step" if self.phase == "train" else f"no end of the phase {self.phase!r}"
        return f"{what} for {self.silent_seconds:.1f} s (limit {self.limit_seconds:.1f} s)"


class Watchdog:
    """Watches one run. `clock` is monotonic and counts seconds.

    While training, the limit is max(`stall_seconds`, 10 x the median step); before the first step of a run there is no
    median, and that step also pays for warming up, so it has `phase_seconds`, as have load, evaluate and save.
    `check` has to be called at least each `tick_seconds` on average: time in which the supervisor itself did not run
    (it was stopped, the host slept) is not held against the child.
    """

    def __init__(
        self, *, stall_seconds: float, phase_seconds: float, tick_seconds: float, clock: Callable[[], float]
    ) -> None:
        self._stall_seconds = stall_seconds
        self._phase_seconds = phase_seconds
        self._tick_seconds = tick_seconds
        self._clock = clock
        self._phase = "load"
        self._since = clock()
        self._checked = self._since
        self._last_step: float | None = None
        self._steps: deque[float] = deque(maxlen=REMEMBERED_STEPS)

    @property
    def limit_seconds(self) -> float:
        """Longest silence that is allowed right now."""
        if self._phase != "train" or not self._steps:
            return self._phase_seconds
        return max(self._stall_seconds, STEP_FACTOR * median(self._steps))

    def entered(self, phase: str) -> None:
        """Note that the run entered `phase`; its clock starts anew."""
        self._phase = phase
        self._since = self._clock()
        self._last_step = self._since if phase == "train" else None

    def stepped(self) -> None:
        """Note one finished step; only steps measured wholly within the training phase count for the median."""
        now = self._clock()
        if self._last_step is not None:
            self._steps.append(now - self._last_step)
        self._last_step = now if self._phase == "train" else None
        self._since = now

    def alive(self) -> None:
        """Start the present limit anew: the child did something else that counts, or could not be heard."""
        self._since = self._clock()

    def check(self) -> Stall | None:
        """Return what is wrong when the silence is longer than the limit."""
        now = self._clock()
        unwatched = now - self._checked - 2 * self._tick_seconds
        self._checked = now
        if unwatched > 0:
            self._since = min(now, self._since + unwatched)
        silent, limit = now - self._since, self.limit_seconds
        if silent <= limit:
            return None
        return Stall(phase=self._phase, silent_seconds=silent, limit_seconds=limit)
