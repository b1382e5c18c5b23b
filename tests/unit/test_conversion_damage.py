"""Broken and hostile files: refused with a sentence, in bounded memory, and nothing stays beside them."""

from __future__ import annotations

import gzip
import json
import sys
import tracemalloc
import zlib
from pathlib import Path

import pytest
import zstandard

from rose.conversion.converting import Request, convert
from rose.domain.training_data import MAX_LINE_BYTES
from rose.errors import InvalidDataset
from tests.unit.conversions import JSONL, ROWS, refused, written, zipped

ARRAY = json.dumps(ROWS, indent=2).encode()


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
    ids=lambda value: value if isinstance(value, str) else "",
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
    assert peak(8000) < peak(400) + (1 << 20), "the decoded rows have several times as much"


@pytest.mark.parametrize(
    ("package", "content"),
    [("pyarrow", b"PAR1" + b"\x00" * 40), ("zstandard", zstandard.compress(JSONL))],
    ids=["pyarrow", "zstandard"],
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
