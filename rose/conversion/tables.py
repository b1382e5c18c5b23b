"""CSV and TSV: the delimiter is found in the header, cells may hold quotes and line ends."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from typing import IO

from rose.conversion.rows import Row
from rose.domain.training_data import MAX_LINE_BYTES
from rose.errors import InvalidDataset

_DELIMITERS = ",;\t|"
_SEPARATOR = re.compile(rb"sep=([,;\t|])\s*")


def is_table(line: bytes) -> bool:
    """Say whether a first line can be the header of a table: names that a delimiter parts, or one single name."""
    try:
        text = line.decode()
    except UnicodeDecodeError:
        return any(one.encode() in line for one in _DELIMITERS)
    return not text.lstrip().startswith(("{", "[")) and len(line) <= 1 << 16


def rows_of_table(header: bytes, number: int, content: IO[bytes], name: str) -> Iterator[Row]:
    """Yield the rows by the names of the header, each with the line on which it begins.

    Raises: InvalidDataset when quotes do not match, or the header has no names that are told apart.
    """
    told = _SEPARATOR.fullmatch(header)
    if told:  # what Excel writes for itself
        header, number = content.readline(MAX_LINE_BYTES + 1), number + 1
    delimiter = told[1].decode() if told else _delimiter(header.decode(errors="replace"))
    reader = csv.reader(_lines(header, content, name), delimiter=delimiter, strict=True)
    begins = number
    try:
        names = _names(_next(reader) or [], name)
        while True:
            begins = number + reader.line_num
            cells = _next(reader)
            if cells is None:
                return
            if cells and cells != [""]:
                yield _row(names, cells, f"{name} line {begins}")
    except csv.Error as problem:
        raise InvalidDataset(
            f"{name} line {begins} is no row of a table: {problem}.",
            hint="A quote inside a cell is doubled, and a cell with line ends stands in quotes.",
        ) from None


def _next(reader: Iterator[list[str]]) -> list[str] | None:
    """Return the next row; the limit for cells is the process's, so it is raised for this moment only."""
    before = csv.field_size_limit(MAX_LINE_BYTES)
    try:
        return next(reader, None)
    finally:
        csv.field_size_limit(before)


def _row(names: list[str], cells: list[str], place: str) -> Row:
    if len(cells) != len(names):
        return Row(place=place, problem=f"has {len(cells)} cells where the header has {len(names)}")
    return Row(place=place, value=dict(zip(names, cells, strict=True)))


def _names(cells: list[str], name: str) -> list[str]:
    names = [cell.strip() for cell in cells]
    double = sorted({one for one in names if one and names.count(one) > 1})
    if double:
        raise InvalidDataset(f"{name}: the header names {double[0]!r} twice.")
    return names


def _delimiter(header: str) -> str:
    """Return the delimiter that parts the header, outside quotes; a comma when there is one column only."""
    outside = "".join(header.split('"')[::2])
    return max(_DELIMITERS, key=outside.count)


def _lines(header: bytes, content: IO[bytes], name: str) -> Iterator[str]:
    """Yield lines as text with their ends, no longer than a cell may be."""
    line = header
    number = 0
    while line:
        number += 1
        if len(line) > MAX_LINE_BYTES:
            raise InvalidDataset(f"{name}: a line has more than {MAX_LINE_BYTES >> 20} MB.")
        try:
            yield line.decode()
        except UnicodeDecodeError as problem:
            raise InvalidDataset(
                f"{name} is not valid UTF-8 (byte {problem.start + 1} of the table's line {number}).",
                hint="Save it as CSV UTF-8, or: iconv -f WINDOWS-1252 -t UTF-8 IN > OUT",
            ) from None
        line = content.readline(MAX_LINE_BYTES + 1)
