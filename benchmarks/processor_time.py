"""Who used the cores during a run: the contestants, this process, or somebody else on the machine. Linux only."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec
import psutil

TICKS_PER_SECOND = 100.0
"""Of /proc/stat on every Linux that Python runs on."""
IDLE_COLUMNS = (3, 4)
"""Idle and waiting for a disk, in the line `cpu` of /proc/stat."""
GUEST_COLUMNS = 8
"""From here on the line counts a second time what the first columns hold. Stolen time (7) stays: others have it."""


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of processor time until a moment."""

    at: float
    """Seconds of a monotonic clock."""
    busy_seconds: float
    """Of all cores, whoever used them."""
    own_seconds: float
    """Of this process and all below it."""
    seconds: dict[int, float]
    """By process: each root that is watched with all processes below it; a part of `own_seconds`."""


class Shares(msgspec.Struct, frozen=True, kw_only=True):
    """Cores in use between two samples."""

    others: float
    """By strangers on this machine, and by other machines on the same hardware."""
    each: dict[int, float]
    """By each watched root with its children."""


def busy_seconds(line: str) -> float:
    """Return the busy time of all cores from the line `cpu` of /proc/stat."""
    counts = [int(count) for count in line.split()[1:]][:GUEST_COLUMNS]
    return sum(count for column, count in enumerate(counts) if column not in IDLE_COLUMNS) / TICKS_PER_SECOND


def shares(before: Sample, after: Sample) -> Shares:
    """Return the cores that were in use; a process of ours that ended in between counts among the others."""
    wall = after.at - before.at
    if wall <= 0:
        raise ValueError("the second sample is not later than the first")
    busy = after.busy_seconds - before.busy_seconds
    own = after.own_seconds - before.own_seconds
    each = {root: max(0.0, after.seconds[root] - seconds) / wall for root, seconds in before.seconds.items()}
    return Shares(others=max(0.0, busy - own) / wall, each=each)


def sample(roots: Iterable[int] = ()) -> Sample:
    """Take the processor time of the machine, of this process with all below it, and of each root below it."""
    line = Path("/proc/stat").read_text().partition("\n")[0]
    return Sample(
        at=time.monotonic(),
        busy_seconds=busy_seconds(line),
        own_seconds=_family_seconds(os.getpid()),
        seconds={root: _family_seconds(root) for root in roots},
    )


@contextmanager
def halted(roots: Iterable[int]) -> Generator[None]:
    """Stop the clock of processes and of all below them as long as the context lasts."""
    processes = [process for root in roots for process in _family(root)]
    _signal(processes, signal.SIGSTOP)
    try:
        yield
    finally:
        _signal(processes, signal.SIGCONT)


def _signal(processes: Iterable[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with suppress(psutil.Error):
            process.send_signal(number)


def resident_bytes(root: int) -> int:
    """Return the memory that a process and all below it hold."""
    total = 0
    for process in _family(root):
        with suppress(psutil.Error):
            total += process.memory_info().rss
    return total


def _family_seconds(root: int) -> float:
    total = 0.0
    for process in _family(root):
        with suppress(psutil.Error):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def _family(root: int) -> Iterator[psutil.Process]:
    with suppress(psutil.Error):
        process = psutil.Process(root)
        yield process
        yield from process.children(recursive=True)
