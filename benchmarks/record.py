"""Prints a benchmark's table and writes it down with the machine and the commit it was made on."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

RESULTS = Path(__file__).parent / "results"


def record(name: str, what: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Path:
    """Print the rows as a table and write benchmarks/results/<name>.json; return its path."""
    table = [[str(cell) for cell in row] for row in (columns, *rows)]
    widths = [max(len(row[index]) for row in table) for index in range(len(columns))]
    print(what)
    for row in table:
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    content = {
        "name": name,
        "what": what,
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "machine": machine(),
        "rows": [dict(zip(columns, row, strict=True)) for row in rows],
    }
    path.write_bytes(msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n")
    return path


def machine() -> str:
    """Say what this ran on, in words."""
    features = "+".join(_features()) or "unknown features"
    load = f", load {os.getloadavg()[0]:.1f} before" if hasattr(os, "getloadavg") else ""
    cores = f"{os.cpu_count()} cores with {features}"
    return f"{platform.system()} {platform.machine()}, {cores}, Python {platform.python_version()}{load}"


def _features() -> list[str]:
    """Return the processor features that decide a model's speed."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return []
    return [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    return done.stdout.strip() or "unknown"
