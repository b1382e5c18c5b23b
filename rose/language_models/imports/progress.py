"""Tells a person how far an import is: a bar a phase on a terminal, elsewhere a line a phase."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

WORDS = {
    "wait": "waiting for another import",
    "download": "downloading",
    "hash": "checking",
    "convert": "converting",
    "copy": "copying",
}


class Progress:
    """Hears of an import's phases (`WORDS`) and of the bytes done in each; this one keeps silent."""

    def phase(self, name: str, total: int = 0) -> None:
        """A phase begins, of so many bytes; 0 where they are not known."""

    def advance(self, count: int) -> None:
        """So many bytes more of the phase are done."""


class BarProgress(Progress):
    """Shows it on standard error."""

    def __init__(self, bar: Bar) -> None:
        self._bar = bar
        self._task: TaskID | None = None

    def phase(self, name: str, total: int = 0) -> None:
        """Begin a bar, or say in a line what begins."""
        if self._bar.console.is_terminal:
            self._task = self._bar.add_task(WORDS[name], total=total or None)
        else:
            size = f" ({total / 1e6:.0f} MB)" if total else ""
            print(f"{WORDS[name]}{size}", file=sys.stderr, flush=True)

    def advance(self, count: int) -> None:
        """Move the bar on."""
        if self._task is not None:
            self._bar.advance(self._task, count)


def bar() -> Bar:
    """Return the bar that BarProgress moves; it shows nothing where standard error is no terminal."""
    console = Console(stderr=True, highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    return Bar(*columns, console=console, disable=not console.is_terminal)
