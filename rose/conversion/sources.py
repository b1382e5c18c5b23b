"""Turns one file into rows, whatever it is: JSON lines, a JSON array, CSV, Parquet, Arrow. Holds one row at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import msgspec

from rose.conversion.cells import with_decoded_cells
from rose.conversion.columns import rows_of_parquet, rows_of_stream
from rose.conversion.opening import Opened, opened
from rose.conversion.rows import Row, kind
from rose.conversion.tables import is_table, rows_of_table
from rose.domain.training_data import MAX_LINE_BYTES
from rose.errors import InvalidDataset

_SKIPPED_BYTES = 1 << 20
_FIRST_PIECE = 1 << 16
_BETWEEN = re.compile(r"[\s,]*")


def rows(path: Path, name: str, found: Callable[[str], None]) -> Iterator[Row]:
    """Yield the rows of a file, each with its place under `name`; tell `found` what the file is, in words.

    Raises: InvalidDataset when it is no file of rows.
    """
    with opened(path, name) as one:
        what, read = _reader(one, path, name)
        found(" in ".join((what, *reversed(one.wrappings))))
        yield from (with_decoded_cells(row) for row in read)


def _reader(one: Opened, path: Path, name: str) -> tuple[str, Iterator[Row]]:
    match one.inside:
        case "parquet":
            return "Parquet", rows_of_parquet(path, name)
        case "arrow file" | "arrow stream":
            return one.inside.title(), rows_of_stream(one.content, name, file=one.inside == "arrow file")
        case "text":
            return _text(one.content, name)


def _text(content: IO[bytes], name: str) -> tuple[str, Iterator[Row]]:
    """Tell JSON and tables apart by the first line that is not blank."""
    line = b"\n"
    number = 0
    while line and line.isspace():
        line = content.readline(MAX_LINE_BYTES + 1)
        number += 1
    start = line.lstrip()
    if not start:
        raise InvalidDataset(f"{name} is empty.")
    if start.startswith(b"["):
        return "a JSON array", _array(start, content, name)
    if start.strip() == b"{":
        return "JSON objects", _array(start, content, name)
    if start.startswith(b"{") or not is_table(line):
        return "JSON lines", _lines(line, number, content, name)
    return "a table", rows_of_table(line, number, content, name)


def _lines(line: bytes, number: int, content: IO[bytes], name: str) -> Iterator[Row]:
    while line:
        place = f"{name} line {number}"
        too_long = len(line) > MAX_LINE_BYTES
        while too_long and line and not line.endswith(b"\n"):
            line = content.readline(_SKIPPED_BYTES)
        if too_long:
            yield Row(place=place, problem=f"the line has more than {MAX_LINE_BYTES >> 20} MB")
        elif not line.isspace():
            yield _decoded(line, place)
        line = content.readline(MAX_LINE_BYTES + 1)
        number += 1


def _decoded(raw: bytes | str, place: str) -> Row:
    try:
        value = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError) as problem:
        return Row(place=place, problem=f"not valid JSON: {problem}")
    except RecursionError:
        return Row(place=place, problem="not usable JSON: nested too deeply")
    if not isinstance(value, dict):
        return Row(place=place, problem=f"is {kind(value)}; expected an object")
    return Row(place=place, value=value)


def _array(start: bytes, content: IO[bytes], name: str) -> Iterator[Row]:
    """Yield the items of one JSON array, or objects that stand one behind the other over several lines."""
    text = _TextWindow(start, content, name)
    scan = json.JSONDecoder().raw_decode
    array = text.ahead("[")
    number = 0
    while True:
        text.skip(_BETWEEN)
        if array and text.ahead("]"):
            text.skip(_BETWEEN)
            if not text.at_end():
                raise InvalidDataset(f"{name} goes on behind the end of its JSON array.")
            return
        if text.at_end():
            if array:
                raise InvalidDataset(f"{name} is cut off: its JSON array has no end.", hint="Fetch or write it again.")
            return
        number += 1
        yield _decoded(text.item(scan, f"{name} row {number}"), f"{name} row {number}")


class _TextWindow:
    """A part of a text that grows until one item is whole in it, and drops what was read."""

    def __init__(self, start: bytes, content: IO[bytes], name: str) -> None:
        import codecs

        self._content = content
        self._name = name
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._ended = False
        self._text = ""
        self._at = 0
        self._take(start)

    def skip(self, pattern: re.Pattern[str]) -> None:
        """Go behind what the pattern matches."""
        while True:
            found = pattern.match(self._text, self._at)
            self._at = found.end() if found else self._at
            if self._at < len(self._text) or not self._grow(_FIRST_PIECE):
                return

    def ahead(self, mark: str) -> bool:
        """Go behind a character if it comes next."""
        if self._text.startswith(mark, self._at):
            self._at += len(mark)
            return True
        return False

    def at_end(self) -> bool:
        """Say whether nothing comes any more."""
        return self._at >= len(self._text) and not self._grow(_FIRST_PIECE)

    def item(self, scan: Any, place: str) -> str:
        """Return the text of the next item. Raises: InvalidDataset when there is no whole one."""
        size = _FIRST_PIECE
        while True:
            try:
                end = scan(self._text, self._at)[1]
                break
            except RecursionError:
                raise InvalidDataset(f"{place} is nested too deeply.") from None
            except ValueError as problem:  # not valid, a number too long, or not whole yet
                if len(self._text) - self._at > MAX_LINE_BYTES:
                    raise InvalidDataset(f"{place} is no JSON, or has more than {MAX_LINE_BYTES >> 20} MB.") from None
                if not self._grow(size):
                    raise InvalidDataset(f"{place} is not valid JSON: {problem}.") from None
                size *= 2
        found = self._text[self._at : end]
        self._at = end
        return found

    def _grow(self, size: int) -> bool:
        """Read on; False at the end."""
        if self._ended:
            return False
        self._text = self._text[self._at :]
        self._at = 0
        self._take(self._content.read(size))
        return True

    def _take(self, piece: bytes) -> None:
        self._ended = not piece
        try:
            self._text += self._decoder.decode(piece, self._ended)
        except UnicodeDecodeError as problem:
            raise InvalidDataset(
                f"{self._name} is not valid UTF-8: {problem.reason}.", hint="Save it as UTF-8."
            ) from None
