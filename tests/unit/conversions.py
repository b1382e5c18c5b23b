"""What the tests of converting share: write a source, convert it, read what came out."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.ipc
import pytest

from rose.conversion.converting import Report, Request, TooManyDrops, convert
from rose.domain.training_data import ChatExample, read_examples
from rose.errors import RoseError

Line = dict[str, Any]


def said(role: str, content: str, **more: Any) -> Line:
    """Return a chat message."""
    return {"role": role, "content": content, **more}


CALL = {"id": "call_1", "type": "function", "function": {"name": "get", "arguments": '{"a":1}'}}
CALLING = said("assistant", "", tool_calls=[CALL])
RESULT = {"role": "tool", "tool_call_id": "call_1", "content": "42"}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
TOOL = {"type": "function", "function": {"name": "get", "description": "gets", "parameters": SCHEMA}}


def asked_and_answered(question: str, answer: str) -> Line:
    """Return a chat line of one question and its answer."""
    return {"messages": [said("user", question), said("assistant", answer)]}


ROWS = [{"instruction": f"ask {at} ü", "input": "", "output": f"say\n{at}"} for at in range(5)]
LINES = [asked_and_answered(f"ask {at} ü", f"say\n{at}") for at in range(5)]
JSONL = b"".join(msgspec.json.encode(row) + b"\n" for row in ROWS)
"""Five rows of Alpaca, what becomes of them, and the rows as JSON lines."""


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


def why_left_out(folder: Path, *rows: Any, **asked: Any) -> str:
    """Return why none of the rows could be converted; nothing has been written."""
    with pytest.raises(TooManyDrops) as caught:
        converted_rows(folder, *rows, **asked)
    assert not (folder / "converted.jsonl").exists()
    return "\n".join(caught.value.details)


def refused(path: Path, **asked: Any) -> RoseError:
    """Return the error; nothing stays beside the source."""
    before = sorted(path.parent.iterdir())
    with pytest.raises(RoseError) as caught:
        convert(Request(inputs=(path,), target=path.parent / "out.jsonl", **asked))
    assert sorted(path.parent.iterdir()) == before
    return caught.value


def stream_of(table: pa.Table) -> bytes:
    """Return a table as a stream of Arrow."""
    target = io.BytesIO()
    with pa.ipc.new_stream(target, table.schema) as writer:
        writer.write_table(table)
    return target.getvalue()


def zipped(content: bytes, *names: str) -> bytes:
    """Return an archive of files with the same content."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.writestr(name, content)
    return target.getvalue()
