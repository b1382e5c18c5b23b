"""Converts files into one of chat (or preference) lines: reads twice, once to recognise and once to map.

Memory is bounded by the longest row. The result is written under a temporary name and renamed when all is well, with
a sidecar that says what it was made from.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import IO

import msgspec

import rose
from rose.conversion import folders, mapping, sources
from rose.conversion.llama_factory import Layout
from rose.conversion.recognising import Survey
from rose.conversion.rows import Context, Drop, Row, shortened
from rose.errors import InvalidDataset, InvalidRequest, NotFound

SHOWN_DROPS = 1000
"""Rows left out that the report names; all are counted."""

MOST_DROPPED = 0.01
"""Part of the rows that may be left out without being allowed to."""

_CHUNK_BYTES = 1 << 20
_MOST_REASON = 300


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked for."""

    inputs: tuple[Path, ...]
    target: Path
    format: str | None = None
    """None: recognise it."""
    to_chat: bool = False
    """Take the preferred answers of preference pairs."""
    columns: dict[str, str] = {}
    """Role -> column; then no format is recognised."""
    allow_drops: bool = False
    dataset: str | None = None
    """Name of a data set, where a folder has several."""


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """One file that was read."""

    path: str
    what: str
    bytes: int
    sha256: str


class Left(msgspec.Struct, frozen=True, kw_only=True):
    """One row that was left out."""

    place: str
    reason: str


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What was made of what; the sidecar holds the same."""

    output: str
    kind: str
    """`chat` or `preference`."""
    bytes: int
    sha256: str
    format: str
    title: str
    rows: int
    written: int
    dropped: int
    drops: list[Left]
    """The first SHOWN_DROPS of them."""
    notes: dict[str, int]
    """What was done beside mapping -> to how many rows."""
    sources: list[Source]
    rose_version: str


class TooManyDrops(InvalidDataset):
    """More rows would be left out than goes without being allowed to."""

    default_code = "too_many_drops"

    def __init__(self, message: str, details: list[str], hint: str | None) -> None:
        super().__init__(message, hint=hint)
        self.details = details


class _File(msgspec.Struct):
    path: Path
    name: str
    layout: Layout | None
    version: tuple[int, int]
    what: str = ""


def convert(request: Request) -> Report:
    """Convert, and return what was done. On any error nothing is written.

    Raises: InvalidDataset when the rows have no known format or too many are left out; InvalidRequest when the
    person has to choose; NotFound when a file is missing.
    """
    _check_target(request.target)
    files = _files(request)
    survey = Survey()
    for file in files:
        survey.see(_rows(file))
    name = _format(request, files, survey)
    mapping.check_possible(name, to_chat=request.to_chat)
    context = Context(prefer=request.to_chat, columns=request.columns, markers=survey.markers)
    kind = "preference" if name in mapping.PREFERENCES and not request.to_chat else "chat"
    with _new_file(request.target) as target:
        tally = _Tally(target)
        tally.take(mapping.mapped((row for file in files for row in _rows(file)), name, context))
        _check_drops(tally, request)
        _check_unchanged(files)
        if name == "prompt-completion":
            _note_markers(context, tally.rows)
        report = Report(
            output=str(request.target),
            kind=kind,
            bytes=tally.bytes,
            sha256=tally.digest.hexdigest(),
            format=name,
            title=mapping.title(name),
            rows=tally.rows,
            written=tally.written,
            dropped=tally.dropped,
            drops=tally.drops,
            notes=dict(sorted(context.notes.items())),
            sources=[_source(file) for file in files],
            rose_version=rose.__version__,
        )
        _write_sidecar(request.target, report)
    return report


class _Tally:
    """Writes lines and counts rows."""

    def __init__(self, target: IO[bytes]) -> None:
        self._target = target
        self.rows = self.written = self.dropped = self.bytes = 0
        self.drops: list[Left] = []
        self.digest = hashlib.sha256()

    def take(self, rows: Iterator[tuple[Row, list[bytes] | Drop]]) -> None:
        """Write what was made of each row."""
        for row, lines in rows:
            self.rows += 1
            if isinstance(lines, Drop):
                self.dropped += 1
                if len(self.drops) < SHOWN_DROPS:
                    self.drops.append(Left(place=row.place, reason=shortened(lines.reason, _MOST_REASON)))
                continue
            for line in lines:
                self._target.write(line)
                self.digest.update(line)
                self.bytes += len(line)
                self.written += 1


def _format(request: Request, files: list[_File], survey: Survey) -> str:
    if request.columns:
        return "columns"
    layouts = {file.layout.format for file in files if file.layout is not None}
    if request.format is not None:
        return request.format
    return layouts.pop() if len(layouts) == 1 and all(file.layout for file in files) else survey.format()


def _files(request: Request) -> list[_File]:
    found: list[tuple[Path, Layout | None]] = []
    for path in request.inputs:
        if path.is_dir():
            inside = folders.look_into(path, request.dataset)
            found += [(one, inside.layout) for one in inside.paths]
        elif path.is_file():
            found.append((path, None))
        else:
            raise NotFound(f"There is no file {path}.", code="no_such_file")
    names = [path.name for path, _ in found]
    for path, _ in found:
        if path.resolve() in (request.target.resolve(), sidecar_of(request.target).resolve()):
            raise InvalidRequest(f"{path} would be written over.", param="output", hint="Name another file with -o.")
    return [
        _File(path, str(path) if names.count(path.name) > 1 else path.name, layout, _version(path))
        for path, layout in found
    ]


def _rows(file: _File) -> Iterator[Row]:
    def found(what: str) -> None:
        file.what = what

    for row in sources.rows(file.path, file.name, found):
        yield row if file.layout is None or row.value is None else _laid_out(row, file.layout)


def _laid_out(row: Row, layout: Layout) -> Row:
    try:
        return Row(place=row.place, value=layout.row(row.value or {}))
    except Drop as drop:
        return Row(place=row.place, problem=drop.reason)


def _check_drops(tally: _Tally, request: Request) -> None:
    if tally.written and (request.allow_drops or tally.dropped <= tally.rows * MOST_DROPPED):
        return
    shown = [f"{one.place}  {one.reason}" for one in tally.drops[:20]]
    if tally.dropped > len(shown):
        shown.append(f"… and {tally.dropped - len(shown)} more")
    raise TooManyDrops(
        f"{tally.dropped} of {tally.rows} rows cannot be converted; nothing was written.",
        shown,
        "Mend them, or leave them out with --allow-drops." if tally.written else None,
    )


def _version(path: Path) -> tuple[int, int]:
    now = path.stat()
    return now.st_size, now.st_mtime_ns


def _check_unchanged(files: list[_File]) -> None:
    for file in files:
        if _version(file.path) != file.version:
            raise InvalidDataset(f"{file.path} changed while it was read; nothing was written.", hint="Run it again.")


def _note_markers(context: Context, rows: int) -> None:
    marks = context.markers
    for what, mark in (
        ("end of every prompt", marks.prompt_end),
        ("start of every completion", marks.completion_start),
        ("end of every completion", marks.completion_end),
    ):
        if mark:
            context.notes[f"old marker {mark!r} taken off the {what}"] = rows


def _source(file: _File) -> Source:
    digest = hashlib.sha256()
    with file.path.open("rb") as content:
        while piece := content.read(_CHUNK_BYTES):
            digest.update(piece)
    return Source(path=str(file.path), what=file.what, bytes=file.version[0], sha256=digest.hexdigest())


def sidecar_of(target: Path) -> Path:
    """Return where it is said what a file was made from."""
    return target.with_name(target.name + ".source.json")


def _write_sidecar(target: Path, report: Report) -> None:
    path = sidecar_of(target)
    partial = path.with_name(path.name + ".part")
    try:
        partial.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _check_target(target: Path) -> None:
    if target.is_dir():
        raise InvalidRequest(f"{target} is a folder.", param="output", hint="Name a file in it with -o.")
    if not target.parent.is_dir():
        raise NotFound(f"There is no folder {target.parent}.", code="no_such_folder", hint=f"mkdir -p {target.parent}")


@contextlib.contextmanager
def _new_file(target: Path) -> Generator[IO[bytes]]:
    """Open a file under a temporary name; rename it at the end, or leave nothing."""
    partial = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with partial.open("wb") as file:
            yield file
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
