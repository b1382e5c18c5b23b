"""Time to the first answer: `rose --help` beside a bare interpreter, and `rose up` until everything answers.

Medians of several starts; `rose up` on a fresh data folder (initdb included) and on one that has been used.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable

from benchmarks.record import record
from tests.local.rose_up import RoseUp
from tests.services import private_folder, running_nats, running_postgres

STARTS = 10
UPS = 3


def seconds(work: Callable[[], object]) -> float:
    """Return how long `work` takes."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def program(*arguments: str) -> float:
    """Return the seconds of one run of Python with arguments."""
    command = [sys.executable, *arguments]
    return seconds(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL))


def up_twice() -> tuple[float, float]:
    """Return the seconds of `rose up` to ready on a fresh and on a used data folder."""
    with private_folder() as folder:
        first, second = RoseUp(folder), RoseUp(folder)
        fresh = seconds(first.start)
        first.end()
        used = seconds(second.start)
        second.end()
    return fresh, used


def servers_alone() -> float:
    """Return the seconds of Postgres (initdb included) and NATS to their first answer, without ROSE."""

    def start() -> None:
        with running_postgres(), running_nats():
            begun.append(time.perf_counter())

    begun: list[float] = []
    begin = time.perf_counter()
    start()
    return begun[0] - begin


def main() -> None:
    """Alternate the contestants, so that a busy neighbour meets them all."""
    bare: list[float] = []
    helped: list[float] = []
    for _ in range(STARTS):
        bare.append(program("-c", "pass"))
        helped.append(program("-m", "cli.app", "--help"))
    fresh: list[float] = []
    used: list[float] = []
    alone: list[float] = []
    for _ in range(UPS):
        alone.append(servers_alone())
        one, two = up_twice()
        fresh.append(one)
        used.append(two)
    peers = (
        ("rose --help", helped, "python -c pass", bare),
        ("rose up, fresh data folder", fresh, "Postgres and NATS alone", alone),
        ("rose up, used data folder", used, "Postgres and NATS alone", alone),
    )
    rows = [
        [what, middle(own), f"{min(own):.2f}-{max(own):.2f}", peer, middle(other), f"{ratio(own, other):.1f}"]
        for what, own, peer, other in peers
    ]
    columns = ("what", "median s", "range s", "peer", "peer median s", "ratio")
    print("written to", record("start", __doc__.splitlines()[0], columns, rows))


def middle(times: list[float]) -> str:
    """Return the median as text."""
    return f"{statistics.median(times):.2f}"


def ratio(own: list[float], other: list[float]) -> float:
    """Return the ratio of the medians."""
    return statistics.median(own) / statistics.median(other)


if __name__ == "__main__":
    main()
