"""Logging of every process: plain lines with time, level and logger, on standard error."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

LINE = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"
LARGEST_BYTES = 16 << 20
"""A log file larger than this is put aside as `.1` when its process starts."""


def configure(level: str, path: Path | None = None) -> None:
    """Send the log of this process to standard error, or to the end of `path`; times are UTC."""
    formatter = logging.Formatter(LINE, "%Y-%m-%dT%H:%M:%SZ")
    formatter.converter = time.gmtime
    handler = logging.StreamHandler() if path is None else logging.StreamHandler(os.fdopen(open_log(path), "a"))
    handler.setFormatter(formatter)
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for name in ("httpx2", "httpx", "httpcore2", "httpcore"):  # a line per request, with our own ones beside it
        logging.getLogger(name).setLevel(logging.WARNING)


def open_log(path: Path) -> int:
    """Return a file descriptor that appends to `path` (mode 600); a large file is put aside first."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.exists() and path.stat().st_size > LARGEST_BYTES:
        path.replace(path.with_suffix(".log.1"))
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)


def last_lines(path: Path, count: int = 20) -> str:
    """Return the end of a log file, empty when there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 16384))
            return "\n".join(file.read().decode(errors="replace").splitlines()[-count:])
    except FileNotFoundError:
        return ""
