"""What passes between reading and mapping: a row with its place, a reason to leave it out, and notes about all rows."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One row of a source, or why it could not be read."""

    place: str
    """File and line or row, for example `talk.csv line 3`."""
    value: dict[str, Any] | None = None
    problem: str | None = None


class Drop(Exception):
    """This row is left out, and why."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Markers(msgspec.Struct, frozen=True):
    """What every prompt ends with, and every completion begins and ends with: marks of old completion models."""

    prompt_end: str = ""
    completion_start: str = ""
    completion_end: str = ""


MOST_NOTES = 40
"""Kinds of notes that are kept apart; a file may have more column names than anybody reads."""


@dataclass(kw_only=True)
class Context:
    """What a mapping knows beside its row."""

    prefer: bool = False
    """Take the preferred answer of a preference pair, where the person asked for chat."""
    columns: Mapping[str, str] = field(default_factory=dict[str, str])
    """Role -> column, as `--map` gave them."""
    markers: Markers = field(default_factory=Markers)
    notes: Counter[str] = field(default_factory=Counter[str])
    """What was done beside mapping, and to how many rows."""

    def note(self, text: str) -> None:
        """Count one more row to which this was done."""
        known = text in self.notes or len(self.notes) < MOST_NOTES
        self.notes[text if known else "more columns and keys left out"] += 1

    def note_left_out(self, what: str, name: str) -> None:
        """Count a column or key that chat has no place for."""
        self.note(f"{what} {shortened(name)!r} left out")


_MEDIA = re.compile(r"image|video|audio|file_data")


def kind(value: Any) -> str:
    """Name a value's type for a sentence."""
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a text", list: "a list", dict: "an object"}
    return names.get(type(value), f"a value of type {type(value).__name__}")


def shortened(text: str, most: int = 60) -> str:
    """Return a text that fits a sentence."""
    return text if len(text) <= most else text[: most - 1] + "…"


def text_of(value: Any, where: str) -> str:
    """Return a text. Raises: Drop when it is none."""
    if isinstance(value, str):
        return value
    raise Drop(f"{where} is {kind(value)}; expected a text")


def refuse_media(row: Mapping[str, Any]) -> None:
    """Raises: Drop when the row has pictures, sound or video: without them the answer would be about nothing."""
    for name in ("image", "images", "video", "videos", "audio", "audios"):
        if row.get(name):
            raise Drop(f"has {name}; only text can be trained on")


def is_media(part_kind: Any) -> bool:
    """Say whether a part's type names something that is no text."""
    return isinstance(part_kind, str) and _MEDIA.search(part_kind) is not None
