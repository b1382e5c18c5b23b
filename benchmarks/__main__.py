"""Runs every benchmark, or those that are named: `python -m benchmarks append relay`."""

from __future__ import annotations

import sys
from importlib import import_module

BENCHMARKS = ("append", "relay", "streams", "claim", "start", "inference", "train")


def main() -> None:
    """Run them one after the other."""
    for name in sys.argv[1:] or BENCHMARKS:
        import_module(f"benchmarks.{name}").main()
        print()


if __name__ == "__main__":
    main()
