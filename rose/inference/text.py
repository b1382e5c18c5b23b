"""From token ids to the text that a client may see: whole characters only, nothing of a stop string.

Pure: no torch, no I/O. Streamed and plain answers go through the same two steps, so they cannot differ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
MAX_PENDING = 3
"""A UTF-8 character has at most four bytes, so at most three can wait for the next token."""
MAX_WINDOW = 48
"""Tokens decoded together at most, so that endless undecodable bytes cost no more than text."""


class Detokeniser:
    """Turn one token after another into text, holding back bytes that may still become a character.

    `decode` turns ids into text. The window always begins some tokens before the new ones, because several tokenizers
    decode a token by its left neighbour (a leading space, bytes of one character).
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._settled = 0
        """Tokens of the window whose text was given out whole."""
        self._given = 0
        """Characters of the window's text given out."""

    def push(self, token_id: int) -> str:
        """Return the text that has become certain with this token; may be empty."""
        self._window.append(token_id)
        text = self._decode(self._window)
        certain = len(text) - _pending(text)
        piece = text[self._given : certain]
        self._given = max(self._given, certain)
        if certain == len(text):
            self._shift(self._settled)
        elif len(self._window) > MAX_WINDOW:
            self._shift(-2 * MAX_PENDING)
        return piece

    def finish(self) -> str:
        """Return what was held back: an unfinished character shows as U+FFFD, as in a decode of the whole."""
        return self._decode(self._window)[self._given :] if self._window else ""

    def _shift(self, start: int) -> None:
        """Start the window at the tokens of the last piece; they are the left neighbours of the next one."""
        self._window = self._window[start:]
        self._settled = len(self._window)
        text = self._decode(self._window)
        self._given = len(text) - _pending(text)


def _pending(text: str) -> int:
    """Return how many characters at the end may be an unfinished one."""
    tail = text[-MAX_PENDING:]
    return len(tail) - len(tail.rstrip(REPLACEMENT))


class StopFilter:
    """Pass text on until a stop string is complete; hold back what may be the beginning of one.

    The stop string that is complete first ends the text, wherever the borders between pieces are.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self.held = ""
        """Text that may be the beginning of a stop string."""
        self.stopped = False

    def push(self, text: str) -> str:
        """Return what may be shown now; after `stopped` is true nothing more comes."""
        if not self._stops or self.stopped:
            return "" if self.stopped else text
        self.held += text
        found = [(at + len(stop), at) for stop in self._stops if (at := self.held.find(stop)) >= 0]
        if found:
            self.stopped = True
            shown, self.held = self.held[: min(found)[1]], ""
            return shown
        keep = max(overlap(self.held, stop) for stop in self._stops)
        shown, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return shown

    def finish(self) -> str:
        """Return what was held back, now that no stop string can be completed any more."""
        shown, self.held = self.held, ""
        return shown


def overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that is a beginning of `stop`, shorter than it."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-size:]):
            return size
    return 0
