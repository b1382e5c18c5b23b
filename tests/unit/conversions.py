"""What the tests of converting share: write a source, convert it, read what came out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from rose.conversion.converting import Report, Request, convert
from rose.domain.training_data import ChatExample, read_examples

Line = dict[str, Any]


def said(role: str, content: str, **more: Any) -> Line:
    """Return a chat message."""
    return {"role": role, "content": content, **more}


def asked_and_answered(question: str, answer: str) -> Line:
    """Return a chat line of one question and its answer."""
    return {"messages": [said("user", question), said("assistant", answer)]}


def written(path: Path, rows: Sequence[Any]) -> Path:
    """Write rows as JSON lines."""
    path.write_bytes(b"".join(msgspec.json.encode(row) + b"\n" for row in rows))
    return path


def converted(*inputs: Path, **asked: Any) -> tuple[Report, list[Line]]:
    """Convert files; return the report and the lines. Every chat line has passed the reader of training data."""
    target = inputs[0].parent / "converted.jsonl"
    report = convert(Request(inputs=inputs, target=target, **asked))
    if report.kind == "chat":
        with target.open("rb") as file:
            assert all(isinstance(one, ChatExample) for one in read_examples(file))
    lines = [msgspec.json.decode(line) for line in target.read_bytes().splitlines()]
    assert len(lines) == report.written
    return report, lines


def converted_rows(folder: Path, *rows: Any, **asked: Any) -> tuple[Report, list[Line]]:
    """Convert rows that are written as JSON lines."""
    return converted(written(folder / "rows.jsonl", rows), **asked)


def messages(folder: Path, row: Any, **asked: Any) -> list[Line]:
    """Return the messages that one row becomes."""
    [line] = converted_rows(folder, row, **asked)[1]
    return line["messages"]
