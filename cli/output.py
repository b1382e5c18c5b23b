"""The only module that prints: data on stdout, talk on stderr; tables on a terminal, plain lines elsewhere.

`--json` prints the API's object unchanged, `--quiet` only what a script needs (an id, a name).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO

import msgspec

if TYPE_CHECKING:
    from rich.console import Console

    from rose.errors import RoseError


@dataclass(frozen=True)
class Output:
    """How this call shows its results."""

    json: bool = False
    quiet: bool = False

    def line(self, text: str = "") -> None:
        """Print a line of data, unless only the object or the id was asked for."""
        if not self.json and not self.quiet:
            _write(sys.stdout, text)

    def marked(self, text: str) -> str:
        """Return a text that stands out: coloured on a terminal, in brackets elsewhere."""
        return f"\x1b[1;32m{text}\x1b[0m" if _colour(sys.stdout) else f"⟦{text}⟧"

    def piece(self, text: str) -> None:
        """Print part of a line at once, for text that streams."""
        sys.stdout.write(text)
        sys.stdout.flush()

    def talk(self, text: str) -> None:
        """Say something to the person on stderr; never data."""
        if not self.quiet:
            _write(sys.stderr, text)

    def thought(self, text: str) -> None:
        """Print part of what a model thinks before it answers, on stderr."""
        if not self.quiet:
            sys.stderr.write(f"\x1b[2m{text}\x1b[0m" if _colour(sys.stderr) else text)
            sys.stderr.flush()

    @contextmanager
    def transfer(self, what: str, total_bytes: int) -> Generator[Callable[[int], object]]:
        """Show on a terminal how far a transfer is; what is yielded takes the bytes that are done since."""
        if self.quiet or not sys.stderr.isatty():
            yield lambda _: None
            return
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        shown = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*shown, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task(what, total=total_bytes)
            yield lambda size: progress.advance(task, size)

    def warn(self, text: str) -> None:
        """Warn on stderr."""
        _write(sys.stderr, f"warning: {text}")

    def show(self, thing: Any, *, identity: str | None = None, lines: Iterable[str] = ()) -> None:
        """Print one API object: as JSON, only its identity, or as `lines`."""
        if self.json:
            self.raw(thing)
        elif self.quiet:
            if identity is not None:
                _write(sys.stdout, identity)
        else:
            for text in lines:
                _write(sys.stdout, text)

    def raw(self, thing: Any) -> None:
        """Print JSON on one line, or indented on a terminal."""
        data = msgspec.json.encode(thing)
        if sys.stdout.isatty():
            data = msgspec.json.format(data, indent=2)
        _write(sys.stdout, data.decode())

    def table(self, headings: Sequence[str], rows: Sequence[Sequence[str]], *, things: Any, empty: str) -> None:
        """Print a list: a table on a terminal, tab-separated lines elsewhere, first column only when quiet."""
        if self.json:
            self.raw(things)
        elif self.quiet:
            for row in rows:
                _write(sys.stdout, row[0])
        elif not rows:
            self.talk(empty)
        elif sys.stdout.isatty():
            heading, *lines = _aligned([headings, *rows])
            _write(sys.stdout, f"\x1b[1m{heading}\x1b[0m" if _colour(sys.stdout) else heading)
            for text in lines:
                _write(sys.stdout, text)
        else:
            for row in rows:
                _write(sys.stdout, "\t".join(row))


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows as lines with straight columns. Nothing is cut to the terminal's width: ids and names are copied."""
    from rich.cells import cell_len

    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(text + " " * (width - cell_len(text)) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def console() -> Console:
    """Return a rich console on stdout; colour follows NO_COLOR and the terminal."""
    from rich.console import Console

    return Console(highlight=False, markup=False)


def error(problem: RoseError, details: Iterable[str] = ()) -> None:
    """Print an error: code, what is wrong and where, and what to do."""
    label = f"error[{problem.code}]" if problem.code else "error"
    if _colour(sys.stderr):
        label = f"\x1b[1;31m{label}\x1b[0m"
    _write(sys.stderr, f"{label}: {problem.message}")
    for detail in details:
        _write(sys.stderr, f"  {detail}")
    if problem.hint:
        _write(sys.stderr, f"  {problem.hint}")


def size(count: int) -> str:
    """Return a number of bytes as a person reads it, for example `1.4 MB`."""
    amount = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} TB"


def moment(seconds: int | None) -> str:
    """Return Unix seconds as local time, or an empty text."""
    if seconds is None:
        return ""
    from datetime import datetime

    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S")


def duration(seconds: float) -> str:
    """Return a time span as `1:02:03` or `2:03`."""
    hours, rest = divmod(max(0, round(seconds)), 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{left:02}" if hours else f"{minutes}:{left:02}"


def _colour(stream: TextIO) -> bool:
    return stream.isatty() and not os.environ.get("NO_COLOR")


def _write(stream: TextIO, text: str) -> None:
    stream.write(text + "\n")
    stream.flush()
