"""Folders that hold data sets, and what is written beside the result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.ipc
import pytest

from rose.conversion.converting import Request, TooManyDrops, convert, sidecar_of
from rose.errors import InvalidRequest, NotFound
from tests.unit.conversions import JSONL, LINES, ROWS, asked_and_answered, converted, refused, said, stream_of, written


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
