"""Files of every kind that hold rows: packed, in tables, in columns, and JSON inside."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest
import zstandard

from rose.domain.training_data import MAX_LINE_BYTES
from tests.unit.conversions import JSONL, LINES, ROWS, asked_and_answered, converted, said, stream_of, zipped

ARRAY = json.dumps(ROWS, indent=2).encode()
CSV = ("instruction,output\n" + "".join(f'ask {at} ü,"say\n{at}"\n' for at in range(5))).encode()


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (JSONL, "JSON lines"),
        (b"\n\n" + JSONL.replace(b"\n", b"\r\n").rstrip(), "JSON lines"),
        (b"\xef\xbb\xbf" + JSONL, "JSON lines in UTF-8 with a mark"),
        (JSONL.decode().encode("utf-16"), "JSON lines in UTF-16"),
        (JSONL.decode().encode("utf-16-be").join([b"\xfe\xff", b""]), "JSON lines in UTF-16"),
        (ARRAY, "a JSON array"),
        (json.dumps(ROWS).encode(), "a JSON array"),
        (b"\n".join(json.dumps(row, indent=1).encode() for row in ROWS), "JSON objects"),
        (CSV, "a table"),
        (CSV.replace(b",", b";"), "a table"),
        (CSV.replace(b",", b"\t"), "a table"),
        (b"sep=;\r\n" + CSV.replace(b",", b";"), "a table"),
        (CSV.replace(b",", b"\t").decode().encode("utf-16"), "a table in UTF-16"),
        (gzip.compress(JSONL), "JSON lines in gzip"),
        (gzip.compress(JSONL[:60]) + gzip.compress(JSONL[60:]), "JSON lines in gzip"),
        (gzip.compress(ARRAY), "a JSON array in gzip"),
        (zstandard.compress(JSONL), "JSON lines in zstd"),
        (zstandard.compress(JSONL[:60]) + zstandard.compress(JSONL[60:]), "JSON lines in zstd"),
        (zipped(JSONL, "data/rows.jsonl"), "JSON lines in zip"),
        (zipped(gzip.compress(CSV.decode().encode("utf-16")), "rows.csv.gz"), "a table in UTF-16 in gzip in zip"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_file_is_shows_in_its_first_bytes_whatever_its_name(tmp_path: Path, content: bytes, what: str) -> None:
    source = tmp_path / "data"
    source.write_bytes(content)
    report, lines = converted(source)
    assert lines == LINES
    assert [one.what for one in report.sources] == [what]
    assert (report.rows, report.written, report.dropped) == (5, 5, 0)


def file_of(table: pa.Table) -> bytes:
    target = io.BytesIO()
    with pa.ipc.new_file(target, table.schema) as writer:
        writer.write_table(table)
    return target.getvalue()


def parquet_of(table: pa.Table) -> bytes:
    target = io.BytesIO()
    pq.write_table(table, target)
    return target.getvalue()


COLUMNAR: dict[str, Callable[[pa.Table], bytes]] = {
    "Parquet": parquet_of,
    "Arrow File": file_of,
    "Arrow Stream": stream_of,
    "Arrow Stream in gzip": lambda table: gzip.compress(stream_of(table)),
}


@pytest.mark.parametrize("what", COLUMNAR)
def test_columns_are_read_in_rows(tmp_path: Path, what: str) -> None:
    source = tmp_path / "data"
    source.write_bytes(COLUMNAR[what](pa.Table.from_pylist(ROWS)))
    report, lines = converted(source)
    assert (lines, report.sources[0].what) == (LINES, what)


@pytest.mark.parametrize("what", COLUMNAR)
def test_fillers_of_structs_go_and_other_nulls_in_tools_are_reported(tmp_path: Path, what: str) -> None:
    def tool(name: str, properties: Any, **more: Any) -> dict[str, Any]:
        parameters = {"type": "object", "properties": properties}
        return {"type": "function", "function": {"name": name, "parameters": parameters, **more}}

    call = {"id": "c1", "type": "function", "function": {"name": "get", "arguments": "{}"}}
    tools = [tool("get", {"a": {"type": "string"}}), tool("put", {"b": {"type": "integer"}}, description="puts")]
    rows = [
        {
            "messages": [
                said("user", "2020-01-01"),
                said("assistant", "", tool_calls=[call]),
                {"role": "tool", "tool_call_id": "c1", "content": "1"},
                said("assistant", "a"),
            ],
            "tools": [tools[0]],
        },
        {**asked_and_answered("q", "a"), "tools": [tools[1]]},
    ]
    messages = pa.list_(
        pa.struct(
            {
                "role": pa.string(),
                "content": pa.string(),
                "tool_call_id": pa.string(),
                "tool_calls": pa.list_(
                    pa.struct(
                        {
                            "id": pa.string(),
                            "type": pa.string(),
                            "function": pa.struct({"name": pa.string(), "arguments": pa.string()}),
                        }
                    )
                ),
            }
        )
    )
    described = pa.array([[*tools]])
    schema = pa.schema({"messages": messages, "tools": described.type})
    source = tmp_path / "data"
    source.write_bytes(COLUMNAR[what](pa.Table.from_pylist(rows, schema=schema)))
    report, lines = converted(source)
    assert lines[0]["messages"] == rows[0]["messages"]
    assert lines[1]["messages"] == rows[1]["messages"]
    kept = tool("get", {"a": {"type": "string"}}, description=None)
    assert [line["tools"] for line in lines] == [[kept], [tools[1]]]
    assert list(report.notes.values()) == [1]


@pytest.mark.parametrize("what", COLUMNAR)
def test_columns_of_json_texts_are_decoded(tmp_path: Path, what: str) -> None:
    """The datasets library marks them as arrow.json; other tools write plain texts."""
    texts = [json.dumps(one) for line in LINES for one in line["messages"]]
    marked = pa.ExtensionArray.from_storage(pa.json_(), pa.array(texts))
    lists = pa.ListArray.from_arrays(pa.array(range(0, len(texts) + 1, 2), pa.int32()), marked)
    plain = pa.array([json.dumps(line["messages"]) for line in LINES])
    for column in (lists, plain):
        source = tmp_path / "data"
        source.write_bytes(COLUMNAR[what](pa.table({"messages": column})))
        assert converted(source)[1] == LINES


def test_a_message_list_in_a_cell_is_json_or_what_python_prints(tmp_path: Path) -> None:
    for shown in (json.dumps(LINES[0]["messages"]), repr(LINES[0]["messages"])):
        quoted = '"' + shown.replace('"', '""') + '"'
        source = tmp_path / "cells.csv"
        source.write_text(f"id,messages\n1,{quoted}\n")
        assert converted(source)[1] == LINES[:1]


def test_places_are_physical_lines_of_tables_and_rows_of_arrays(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text('instruction,output\n"two\nlines",a\nshort\nq,\n')
    report, _ = converted(table, allow_drops=True)
    assert [(one.place, one.reason) for one in report.drops] == [
        ("t.csv line 4", "has 1 cells where the header has 2"),
        ("t.csv line 5", "the answer is empty"),
    ]
    array = tmp_path / "a.json"
    array.write_text(json.dumps([ROWS[0], 5, {"instruction": "q", "output": None}]))
    report, _ = converted(array, allow_drops=True)
    assert [(one.place, one.reason) for one in report.drops] == [
        ("a.json row 2", "is a number; expected an object"),
        ("a.json row 3", "output is null; expected a text"),
    ]


def test_a_broken_line_is_left_out_and_the_next_ones_are_read(tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    long = b'{"instruction": "' + b"x" * MAX_LINE_BYTES + b'"}\n'
    deep = b'{"a":' * 5000 + b"1" + b"}" * 5000 + b"\n"
    source.write_bytes(b"{broken\n" + b'{"a": "\xff"}\n' + b'{"a": "\\ud800"}\n' + long + deep + JSONL + JSONL[:20])
    report, lines = converted(source, allow_drops=True)
    assert lines == LINES
    assert [one.place.split()[-1] for one in report.drops] == ["1", "2", "3", "4", "5", "11"]
    assert "more than 16 MB" in report.drops[3].reason
