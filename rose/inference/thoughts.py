"""Take what a model thinks apart from what it answers, in text that comes in pieces. Pure.

How a model writes a thought is asked of its template (`Frame`); where the prompt has opened one, the text begins in it.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from rose.inference.text import overlap
from rose.language_models.chat.answers import Frame


class Thought(NamedTuple):
    """A piece of what the model thinks."""

    text: str


class ThoughtFilter:
    """Tell thoughts and answer apart; blank lines around both belong to neither."""

    def __init__(self, frame: Frame, *, opened: bool) -> None:
        self._frame = frame
        self._state: Literal["start", "inside", "between", "outside"] = "inside" if opened else "start"
        self._held = ""
        self._begun = False
        """Something of the thought was shown."""

    def push(self, text: str) -> list[str | Thought]:
        """Return what is certain now."""
        self._held += text
        found: list[str | Thought] = []
        if self._state == "start":
            self._begin()
        if self._state == "inside":
            found += self._think()
        if self._state == "between":
            self._held = self._held.lstrip("\n")
            if self._held:
                self._state = "outside"
        if self._state == "outside" and self._held:
            found.append(self._held)
            self._held = ""
        return found

    def finish(self) -> list[str | Thought]:
        """Return what was held back."""
        held, self._held = self._held, ""
        if self._state == "inside":
            return [Thought(held.rstrip())] if held.strip() else []
        return [held] if held and self._state != "between" else []

    def _begin(self) -> None:
        """Find out whether the text begins with a thought, with what stands before an answer, or with the answer."""
        head = self._held.lstrip()
        opener, plain = self._frame.opener, self._frame.plain
        if opener and head.startswith(opener):
            self._held, self._state = head.removeprefix(opener), "inside"
        elif plain and head.startswith(plain):
            self._held, self._state = head.removeprefix(plain), "between"
        elif not any(opening.startswith(head) for opening in (opener, plain) if opening):
            self._state = "outside"

    def _think(self) -> list[str | Thought]:
        thought, closer, rest = self._held.partition(self._frame.closer)
        if closer:
            self._held, self._state = rest, "between"
            thought = thought.rstrip()
        else:
            certain = self._held[: len(self._held) - overlap(self._held, self._frame.closer)].rstrip()
            thought, self._held = certain, self._held[len(certain) :]
        if not self._begun:
            thought = thought.lstrip()
        self._begun = self._begun or bool(thought)
        return [Thought(thought)] if thought else []
