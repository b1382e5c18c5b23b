"""`rose files convert` as a person meets it: no server, what it took for what, what it left out, and its exits."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cli.commands.convert import Format
from cli.output import size
from rose.domain.formats import FORMATS
from tests.cli.conftest import Done, call

pytestmark = pytest.mark.anyio

ROWS = [
    {"conversations": [{"from": "human", "value": f"q{at}"}, {"from": "gpt", "value": f"a{at}"}]} for at in range(200)
]


def written(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


async def convert(*arguments: str | Path, to: Path) -> Done:
    return await call("files", "convert", *map(str, arguments), "-o", str(to))


async def test_it_says_what_it_took_for_what_and_the_result_passes_the_check(tmp_path: Path) -> None:
    target = tmp_path / "chat.jsonl"
    rows = [*ROWS, {"conversations": [{"from": "human", "value": "q"}, {"from": "narrator", "value": "a"}]}]
    source = written(tmp_path / "talk.jsonl", rows)
    done = await convert(source, to=target)
    assert (done.status, done.err) == (0, "")
    assert done.out.splitlines() == [
        f"{source}: JSON lines, {size(source.stat().st_size)}",
        "read as ShareGPT: 201 rows",
        f"{target}: 200 conversations, {size(target.stat().st_size)}",
        "left out: 1 row",
        "  talk.jsonl line 201  conversations[1].from is 'narrator'; "
        "expected human, gpt, system, tool, observation or function_call",
    ]
    checked = await call("files", "check", str(target))
    assert (checked.status, checked.out) == (0, "chat.jsonl: 200 examples, no problems\n")


async def test_json_is_the_sidecar_and_quiet_only_the_path(tmp_path: Path) -> None:
    source, target = written(tmp_path / "talk.jsonl", ROWS), tmp_path / "chat.jsonl"
    shown = json.loads((await convert(source, "--json", to=target)).out)
    assert shown == json.loads((tmp_path / "chat.jsonl.source.json").read_bytes())
    assert (shown["format"], shown["written"]) == ("sharegpt", 200)
    assert (await convert(source, "--quiet", to=target)).out == f"{target}\n"


async def test_parquet_and_packed_files_and_several_at_once(tmp_path: Path) -> None:
    columns = tmp_path / "talk.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), columns)
    packed = tmp_path / "talk.jsonl.gz"
    packed.write_bytes(gzip.compress(written(tmp_path / "talk.jsonl", ROWS).read_bytes()))
    target = tmp_path / "chat.jsonl"
    done = await convert(columns, packed, to=target)
    assert (done.status, done.err) == (0, "")
    assert f"{columns}: Parquet" in done.out
    assert f"{packed}: JSON lines in gzip" in done.out
    lines = target.read_text().splitlines()
    assert lines[:200] == lines[200:]


async def test_too_many_rows_left_out_ends_with_6_and_writes_nothing(tmp_path: Path) -> None:
    source, target = written(tmp_path / "talk.jsonl", [*ROWS[:20], {"conversations": []}]), tmp_path / "chat.jsonl"
    done = await convert(source, to=target)
    assert done.status == 6
    assert done.err.splitlines() == [
        "error[too_many_drops]: 1 of 21 rows cannot be converted; nothing was written.",
        "  talk.jsonl line 21  messages must be a list of at least one message",
        "  Mend them, or leave them out with --allow-drops.",
    ]
    assert list(tmp_path.iterdir()) == [source]
    assert (await convert(source, "--allow-drops", to=target)).status == 0


@pytest.mark.parametrize(
    ("content", "arguments", "status", "says"),
    [
        ("{}\n", [], 6, "error[unknown_format]: No format that is known has rows like data line 1: it has no columns."),
        ('{"instruction": "a", "output": "b", "prompt": "c", "completion": "d"}\n', [], 2, "--from alpaca or --from"),
        ('{"text": "[INST] a [/INST] b"}\n', [], 6, "error[no_conversations]"),
        ("a,b\n1,2\n", ["--map", "user=a"], 2, "expected user=COLUMN,assistant=COLUMN"),
        ("a,b\n1,2\n", ["--map", "user=a,assistant=b,tool=c"], 2, "expected user=COLUMN,assistant=COLUMN"),
        ("a,b\n1,2\n", ["--from", "nonsense"], 2, "nonsense"),
        ("", [], 6, "data is empty"),
    ],
)
async def test_what_cannot_be_converted_ends_with_the_reason(
    tmp_path: Path, content: str, arguments: list[str], status: int, says: str
) -> None:
    source = tmp_path / "data"
    source.write_text(content)
    done = await convert(source, *arguments, to=tmp_path / "out.jsonl")
    assert (done.status, says in done.err + done.out) == (status, True), done
    assert list(tmp_path.iterdir()) == [source]


async def test_named_columns_of_a_table(tmp_path: Path) -> None:
    source, target = tmp_path / "faq.csv", tmp_path / "chat.jsonl"
    source.write_text('Frage;Antwort\n"Wie geht ""es""?";Gut\n', encoding="utf-16")
    done = await convert(source, "--map", "user=Frage,assistant=Antwort", to=target)
    assert done.status == 0
    assert json.loads(target.read_text())["messages"][0]["content"] == 'Wie geht "es"?'


async def test_preferences_stay_pairs_unless_chat_is_asked_for(tmp_path: Path) -> None:
    source = written(tmp_path / "pairs.jsonl", [{"prompt": "q", "chosen": "good", "rejected": "bad"}])
    target = tmp_path / "out.jsonl"
    done = await convert(source, to=target)
    assert "1 pair" in done.out
    assert "--to chat" in done.err
    assert "preferred_output" in json.loads(target.read_text())
    done = await convert(source, "--to", "chat", to=target)
    assert (done.err, json.loads(target.read_text())["messages"][1]["content"]) == ("", "good")


async def test_a_file_that_is_missing_and_no_file_at_all(tmp_path: Path) -> None:
    assert (await convert(tmp_path / "gone.csv", to=tmp_path / "out.jsonl")).status == 3
    done = await call("files", "convert", "-o", str(tmp_path / "out.jsonl"))
    assert (done.status, "No file is named" in done.err) == (2, True)
    assert (await call("files", "convert", "x.csv")).status == 2


async def test_checking_or_uploading_another_format_names_the_command(tmp_path: Path) -> None:
    source = written(tmp_path / "talk.jsonl", ROWS[:1])
    for command in (("files", "check"), ("upload",)):
        done = await call(*command, str(source))
        assert done.status == 6
        assert "this is ShareGPT; convert the file first: rose files convert FILE -o OUT.jsonl" in done.err
        assert f"rose files convert {source} -o {tmp_path / 'talk.chat.jsonl'}" in done.err


@pytest.mark.parametrize("name", ["faq.csv", "talk.parquet", "talk.json", "talk.jsonl.gz", "talk.jsonl.zst"])
async def test_uploading_a_file_of_another_kind_names_the_command(tmp_path: Path, name: str) -> None:
    source = written(tmp_path / name, ROWS[:1])
    done = await call("upload", str(source))
    assert (done.status, "rose files convert" in done.err) == (6, True), done.err


async def test_reading_json_lines_needs_neither_pyarrow_nor_zstandard_nor_torch(tmp_path: Path) -> None:
    source = written(tmp_path / "talk.jsonl", ROWS[:1])
    code = (
        "import sys; from cli.app import main; "
        f"status = main(['files', 'convert', {str(source)!r}, '-o', {str(tmp_path / 'out.jsonl')!r}, '-q']); "
        "print(status, sorted({'pyarrow', 'zstandard', 'torch', 'litestar', 'httpx2'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "0 []"


def test_every_format_can_be_named() -> None:
    assert get_args(Format) == tuple(FORMATS)
