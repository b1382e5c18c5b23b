"""Files of every kind that hold rows: packed, in tables, in columns, in folders; broken and hostile files."""

from __future__ import annotations

import gzip
import io
import json
import sys
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest
import zstandard

from rose.conversion.converting import Request, TooManyDrops, convert, sidecar_of
from rose.domain.training_data import MAX_LINE_BYTES
from rose.errors import InvalidDataset, InvalidRequest, NotFound, RoseError
from tests.unit.conversions import asked_and_answered, converted, said, written

ROWS = [{"instruction": f"ask {at} ü", "input": "", "output": f"say\n{at}"} for at in range(5)]
LINES = [asked_and_answered(f"ask {at} ü", f"say\n{at}") for at in range(5)]
JSONL = b"".join(msgspec.json.encode(row) + b"\n" for row in ROWS)
ARRAY = json.dumps(ROWS, indent=2).encode()
CSV = ("instruction,output\n" + "".join(f'ask {at} ü,"say\n{at}"\n' for at in range(5))).encode()


def zipped(content: bytes, *names: str) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.writestr(name, content)
    return target.getvalue()


def refused(path: Path, **asked: Any) -> RoseError:
    """Return the error; nothing stays beside the source."""
    before = sorted(path.parent.iterdir())
    with pytest.raises(RoseError) as caught:
        convert(Request(inputs=(path,), target=path.parent / "out.jsonl", **asked))
    assert sorted(path.parent.iterdir()) == before
    return caught.value


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
)
def test_what_a_file_is_shows_in_its_first_bytes_whatever_its_name(tmp_path: Path, content: bytes, what: str) -> None:
    source = tmp_path / "data"
    source.write_bytes(content)
    report, lines = converted(source)
    assert lines == LINES
    assert [one.what for one in report.sources] == [what]
    assert (report.rows, report.written, report.dropped) == (5, 5, 0)


def stream_of(table: pa.Table) -> bytes:
    target = io.BytesIO()
    with pa.ipc.new_stream(target, table.schema) as writer:
        writer.write_table(table)
    return target.getvalue()


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


# Folders


def test_a_folder_of_the_datasets_library(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    folder.mkdir()
    table = pa.Table.from_pylist(ROWS)
    names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    for name, part in zip(names, (table.slice(0, 3), table.slice(3)), strict=True):
        (folder / name).write_bytes(stream_of(part))
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")
    assert converted(folder)[1] == LINES
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["saved"]}')
    target = tmp_path / "from_splits.jsonl"
    assert convert(Request(inputs=(tmp_path,), target=target)).written == 5
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["saved", "test"]}')
    with pytest.raises(InvalidRequest, match="2 parts: saved, test"):
        convert(Request(inputs=(tmp_path,), target=target))


def llama_factory(folder: Path, rows: Any, **entry: Any) -> Path:
    folder.mkdir(exist_ok=True)
    written(folder / "mine.jsonl", rows)
    (folder / "dataset_info.json").write_text(json.dumps({"mine": {"file_name": "mine.jsonl", **entry}}))
    return folder


def test_llama_factory_columns(tmp_path: Path) -> None:
    rows = [{"ask": "q", "more": "", "say": "a", "rules": "s", "past": [["h", "i"]]}]
    columns = {"prompt": "ask", "query": "more", "response": "say", "system": "rules", "history": "past"}
    _, [line] = converted(llama_factory(tmp_path / "lf", rows, columns=columns))
    expected = [
        said("system", "s"),
        said("user", "h"),
        said("assistant", "i"),
        *asked_and_answered("q", "a")["messages"],
    ]
    assert line == {"messages": expected}


def test_llama_factory_tags(tmp_path: Path) -> None:
    rows = [{"talk": [{"who": "Person", "what": "q"}, {"who": "Machine", "what": "a"}], "functions": "[]"}]
    tags = {"role_tag": "who", "content_tag": "what", "user_tag": "Person", "assistant_tag": "Machine"}
    columns = {"messages": "talk", "tools": "functions"}
    folder = llama_factory(tmp_path / "lf", rows, formatting="sharegpt", columns=columns, tags=tags)
    assert converted(folder)[1] == [asked_and_answered("q", "a")]
    folder = llama_factory(folder, rows, formatting="sharegpt", columns=columns, tags={**tags, "user_tag": "User"})
    with pytest.raises(TooManyDrops) as caught:
        converted(folder)
    assert "none of the tags of dataset_info.json" in caught.value.details[0]


def test_llama_factory_rankings_and_verdicts(tmp_path: Path) -> None:
    pair = [{"instruction": "q", "input": "", "good": "a", "bad": "b"}]
    columns = {"chosen": "good", "rejected": "bad"}
    report, lines = converted(llama_factory(tmp_path / "lf", pair, ranking=True, columns=columns), to_chat=True)
    assert (report.format, lines) == ("preference", [asked_and_answered("q", "a")])
    judged = [{"instruction": "q", "output": "a", "ok": True}, {"instruction": "q", "output": "b", "ok": False}]
    report, lines = converted(llama_factory(tmp_path / "lf", judged, columns={"kto_tag": "ok"}), allow_drops=True)
    assert lines == [asked_and_answered("q", "a")]
    assert report.drops[0].reason == "was judged as a bad answer"


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ({"a": {"file_name": "../secret.jsonl"}}, "lies outside of it"),
        ({"a": {"file_name": "/etc/passwd"}}, "lies outside of it"),
        ({"a": {"file_name": "a.jsonl", "script_url": "x"}}, "names no files"),
        ({"a": {"hf_hub_url": "a/b"}}, "names no files"),
        ({"a": {"file_name": "gone.jsonl"}}, "There is no file"),
        ({"a": {"file_name": "a.jsonl"}, "b": {"file_name": "b.jsonl"}}, "2 data sets: a, b"),
        ({"a": {"file_name": "a.jsonl", "formatting": "own"}}, "formatting is 'own'"),
        ({"a": {"file_name": "a.jsonl", "columns": [1]}}, "columns is no object of texts"),
        ([], "holds no JSON object"),
    ],
)
def test_llama_factory_folders_that_are_refused(tmp_path: Path, entries: Any, says: str) -> None:
    folder = tmp_path / "lf"
    folder.mkdir()
    written(tmp_path / "secret.jsonl", ROWS)
    written(folder / "a.jsonl", ROWS)
    (folder / "dataset_info.json").write_text(json.dumps(entries))
    assert says in str(refused(folder))


# Broken and hostile files


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"\x89PNG\r\n\x1a\n\x00\x00", "is no text"),
        (b"%PDF-1.7", "a PDF document"),
        (b"h\x00e\x00l\x00l\x00o\x00!\x00", "UTF-16 without its mark"),
        ("ä,b\n".encode("latin-1"), "not valid UTF-8"),
        (b'instruction,output\n"open,a\n', "is no row of a table"),
        (b"a,a\n1,2\n", "names 'a' twice"),
        (gzip.compress(JSONL)[:-20], "damaged or cut off"),
        (gzip.compress(JSONL)[:-8] + b"\x00" * 8, "damaged or cut off"),
        (zstandard.compress(JSONL)[:-9], "damaged or cut off"),
        (zstandard.compress(JSONL)[:20] + b"\x00" * 40, "damaged or cut off"),
        (zipped(JSONL, "a.jsonl", "b.jsonl"), "holds 2 files (a.jsonl, b.jsonl)"),
        (zipped(JSONL, "[Content_Types].xml"), "an Office document"),
        (zipped(JSONL, "a.jsonl")[:-30], "damaged or cut off"),
        (b"PAR1" + b"\x00" * 40, "damaged or cut off"),
        (b"ARROW1\x00\x00" + b"\x00" * 40, "damaged or cut off"),
        (b"\xff\xff\xff\xff" + b"\x7f" * 40, "damaged or cut off"),
        (gzip.compress(b"PAR1" + b"\x00" * 40), "Unpack it first"),
        (gzip.compress(gzip.compress(gzip.compress(gzip.compress(JSONL)))), "packed more than 3 times"),
        (ARRAY[:-1], "its JSON array has no end"),
        (ARRAY[:-40], "is not valid JSON"),
        (ARRAY + b"[]", "goes on behind the end"),
        (b"[" * 100_000, "nested too deeply"),
        (b'[{"a": ' + b"[" * 100_000, "nested too deeply"),
        (b'[{"a": ' + b"9" * 5000 + b"}]", "is not valid JSON"),
        (b'[{"a": "\xff"}]', "is not valid UTF-8"),
        (b'[{"a": "' + b"x" * (MAX_LINE_BYTES + 100), "has more than 16 MB"),
        (b"{\n" + b'"a": [1,\n', "is not valid JSON"),
        (b'{"data": [\n1\n]}\n', "There are no rows that can be read"),
        (b"\xff\xfe\x00", "damaged or cut off"),
    ],
)
def test_a_file_that_is_broken_is_refused_with_a_sentence(tmp_path: Path, content: bytes, says: str) -> None:
    source = tmp_path / "data.bin"
    source.write_bytes(content)
    problem = refused(source)
    assert says in str(problem)
    assert "data.bin" in str(problem)


def test_a_bomb_costs_time_and_no_memory(tmp_path: Path) -> None:
    """200 MB of blank and of one endless line, in a few hundred kB, twice packed."""
    size = 200 << 20
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    piece = b" " * (1 << 20)
    packed = b"".join(packer.compress(piece) for _ in range(size >> 20)) + packer.flush()
    for content in (packed, gzip.compress(packed), zstandard.compress(packed)):
        source = tmp_path / "bomb"
        source.write_bytes(content)
        tracemalloc.start()
        problem = refused(source)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert isinstance(problem, InvalidDataset)
        assert peak < 4 * MAX_LINE_BYTES


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    def peak(count: int) -> int:
        source = written(tmp_path / "rows.jsonl", [ROWS[0]])
        source.write_bytes(source.read_bytes() * count)
        tracemalloc.start()
        converted_report = convert(Request(inputs=(source,), target=tmp_path / "out.jsonl"))
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert converted_report.written == count
        return found

    peak(10)
    assert peak(4000) < peak(400) + (256 << 10)


@pytest.mark.parametrize(
    ("package", "content"), [("pyarrow", b"PAR1" + b"\x00" * 40), ("zstandard", zstandard.compress(JSONL))]
)
def test_a_package_that_is_missing_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, content: bytes
) -> None:
    if package == "zstandard" and sys.version_info >= (3, 14):
        pytest.skip("Python itself reads zstd from 3.14 on")
    monkeypatch.setitem(sys.modules, package, None)
    source = tmp_path / "data"
    source.write_bytes(content)
    problem = refused(source)
    assert problem.code == "missing_package"
    assert package in problem.message
    assert problem.hint == "pip install 'rose[convert]'"


# What is written


def test_the_sidecar_says_what_was_made_of_what(tmp_path: Path) -> None:
    import hashlib

    source = written(tmp_path / "rows.jsonl", ROWS)
    report, _ = converted(source)
    target = tmp_path / "converted.jsonl"
    found = json.loads(sidecar_of(target).read_bytes())
    assert found == msgspec.to_builtins(report)
    assert found["sources"] == [
        {"path": str(source), "what": "JSON lines", "bytes": len(JSONL), "sha256": hashlib.sha256(JSONL).hexdigest()}
    ]
    assert found["sha256"] == hashlib.sha256(target.read_bytes()).hexdigest()
    assert sorted(one.name for one in tmp_path.iterdir()) == [
        "converted.jsonl",
        "converted.jsonl.source.json",
        "rows.jsonl",
    ]


def test_an_earlier_result_stays_when_the_next_one_fails(tmp_path: Path) -> None:
    converted(written(tmp_path / "rows.jsonl", ROWS))
    before = (tmp_path / "converted.jsonl").read_bytes()
    with pytest.raises(TooManyDrops):
        converted(written(tmp_path / "rows.jsonl", [*ROWS, {"instruction": "q", "output": ""}]))
    assert (tmp_path / "converted.jsonl").read_bytes() == before
    assert json.loads((tmp_path / "converted.jsonl.source.json").read_bytes())["written"] == 5


def test_a_source_is_never_written_over(tmp_path: Path) -> None:
    source = written(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(InvalidRequest, match="would be written over"):
        convert(Request(inputs=(source,), target=tmp_path / "." / "rows.jsonl"))
    with pytest.raises(NotFound, match="no folder"):
        convert(Request(inputs=(source,), target=tmp_path / "no" / "out.jsonl"))
    with pytest.raises(InvalidRequest, match="is a folder"):
        convert(Request(inputs=(source,), target=tmp_path))
    with pytest.raises(NotFound, match="no file"):
        convert(Request(inputs=(tmp_path / "gone",), target=tmp_path / "out.jsonl"))


def test_files_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        written(tmp_path / name / "rows.jsonl", [*ROWS, {"instruction": name, "output": ""}])
    inputs = (tmp_path / "a" / "rows.jsonl", tmp_path / "b" / "rows.jsonl")
    report = convert(Request(inputs=inputs, target=tmp_path / "out.jsonl", allow_drops=True))
    assert (report.written, [one.place for one in report.drops]) == (10, [f"{path} line 6" for path in inputs])


def test_a_file_with_a_thousand_columns_gets_no_endless_report(tmp_path: Path) -> None:
    rows = [{**row, f"column {at}": "x" * at} for at, row in enumerate(ROWS * 20)]
    report, lines = converted(written(tmp_path / "rows.jsonl", rows))
    assert len(lines) == 100
    assert len(report.notes) <= 41
    assert sum(report.notes.values()) == 99
