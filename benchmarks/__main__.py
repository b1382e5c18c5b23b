"""Runs every benchmark, or those that are named, and writes docs/benchmarks.md: `python -m benchmarks append relay`."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import msgspec

from benchmarks.record import RESULTS

BENCHMARKS = (
    "append",
    "relay",
    "streams",
    "streams_under_training",
    "lists",
    "claim",
    "start",
    "inference",
    "train",
    "render",
    "quality",
)
PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"
HEAD = """# Benchmarks

Written by `make bench`, which runs each contestant beside its peer on the same machine. Read the ratios: the machine is
small and shared, and the absolute figures are good to a factor, not to a digit. One benchmark alone:
`python -m benchmarks append`. Under each table stand the machine, the load before it, and the commit.
"""


def main() -> None:
    """Run them one after the other, then write the page from all results there are."""
    for name in [name for name in sys.argv[1:] if not name.startswith("-")] or BENCHMARKS:
        import_module(f"benchmarks.{name}").main()
        print()
    PAGE.write_text(page())
    print(f"written to {PAGE}")


def page() -> str:
    """Return the page of all results in benchmarks/results."""
    parts = [HEAD]
    for name in BENCHMARKS:
        path = RESULTS / f"{name}.json"
        if path.is_file():
            parts.append(section(msgspec.json.decode(path.read_bytes())))
    return "\n".join(parts)


def section(result: dict[str, object]) -> str:
    """Return one benchmark as a heading, its provenance and a table."""
    rows = msgspec.convert(result["rows"], list[dict[str, object]])
    columns = list(rows[0])
    lines = [
        f"## {result['name']}\n",
        f"{result['what']}\n",
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
        *("| " + " | ".join(str(row[column]) for column in columns) + " |" for row in rows),
        f"\n{result['machine']}; commit {result['commit']}; {result['measured_at']}\n",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
