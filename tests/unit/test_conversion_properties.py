"""Whatever a row holds, it becomes lines or is left out with a reason; and a conversation survives other formats."""

from __future__ import annotations

import csv
import gzip
import io
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from rose.conversion.mapping import CONVERSIONS, mapped
from rose.conversion.rows import Context, Drop, Row
from rose.domain.formats import FORMATS, recognise
from rose.domain.training_data import ChatExample, read_examples
from rose.errors import InvalidDataset
from tests.unit.conversions import Line, converted, said

TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), min_size=1, max_size=30)
KEYS = st.sampled_from(
    [
        "role",
        "content",
        "from",
        "value",
        "type",
        "text",
        "thinking",
        "thought",
        "parts",
        "tool_calls",
        "function",
        "function_call",
        "name",
        "arguments",
        "id",
        "tool_call_id",
        "tool_use_id",
        "input",
        "weight",
        "prefix",
        "functionCall",
        "functionResponse",
        "args",
        "response",
        "messages",
        "status_code",
        "body",
        "choices",
        "message",
        "finish_reason",
        "custom_id",
        "output",
        "call_id",
    ]
)
WORDS = st.sampled_from(
    [
        "user",
        "assistant",
        "model",
        "system",
        "tool",
        "gpt",
        "human",
        "function_call",
        "observation",
        "text",
        "tool_use",
        "tool_result",
        "thinking",
        "{}",
        "[]",
    ]
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | WORDS | TEXTS
OBJECTS = st.dictionaries(KEYS, SCALARS, max_size=4)
VALUES = st.recursive(
    SCALARS | OBJECTS | st.lists(OBJECTS, max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)
COLUMNS = {
    "chat": "messages tools",
    "mistral": "messages tools",
    "dpo": "input preferred_output non_preferred_output",
    "sharegpt": "conversations tools system",
    "alpaca": "instruction input output history system",
    "prompt-completion": "prompt completion system",
    "preference": "prompt chosen rejected",
    "kto": "prompt completion label",
    "anthropic": "messages system tools",
    "gemini": "contents systemInstruction tools",
    "columns": "prompt completion",
    "batch": "custom_id body response error",
}
"""The columns of each format."""


@st.composite
def rows_of(draw: st.DrawFn, name: str) -> list[Line]:
    """Rows with the columns of a format, holding anything."""
    row = st.fixed_dictionaries({}, optional=dict.fromkeys(COLUMNS[name].split(), VALUES))
    return draw(st.lists(row, min_size=1, max_size=3))


def test_every_format_is_tried() -> None:
    assert set(COLUMNS) == {*CONVERSIONS, "batch"}


@pytest.mark.parametrize("name", COLUMNS)
@given(data=st.data(), prefer=st.booleans())
def test_whatever_columns_hold_a_row_becomes_lines_or_is_left_out(name: str, data: st.DataObject, prefer: bool) -> None:
    rows = [Row(place=f"row {at}", value=row) for at, row in enumerate(data.draw(rows_of(name)))]
    context = Context(prefer=prefer, columns={"user": "prompt", "assistant": "completion"})
    with suppress(InvalidDataset) if name == "batch" else nullcontext():  # half a batch only
        for _, lines in mapped(rows, name, context):
            assert lines.reason if isinstance(lines, Drop) else all(map(is_training_data, lines))


def is_training_data(raw: bytes) -> bool:
    """Say whether a line is accepted by the reader, or has what a line of preferences has."""
    if "messages" not in msgspec.json.decode(raw):
        return set(msgspec.json.decode(raw)) == {"input", "preferred_output", "non_preferred_output"}
    return all(isinstance(one, ChatExample) for one in read_examples([raw]))


@given(st.dictionaries(st.sampled_from(" ".join(COLUMNS.values()).split()) | KEYS, VALUES, max_size=5))
def test_recognising_any_row_names_known_formats(row: Line) -> None:
    assert set(recognise(row)) <= set(FORMATS)


@st.composite
def conversations(draw: st.DrawFn, *, longest: int = 3, system: bool = True, tools: bool = True) -> Line:
    """A conversation of questions and answers, some of them by way of a tool."""
    messages = [said("system", draw(TEXTS))] if system and draw(st.booleans()) else []
    for at in range(draw(st.integers(1, longest))):
        messages.append(said("user", draw(TEXTS)))
        if tools and draw(st.booleans()):
            arguments = msgspec.json.encode(draw(st.dictionaries(TEXTS, st.integers() | TEXTS, max_size=2))).decode()
            function = {"name": draw(TEXTS), "arguments": arguments}
            messages.append(
                said("assistant", "", tool_calls=[{"id": f"id {at}", "type": "function", "function": function}])
            )
            messages.append({"role": "tool", "tool_call_id": f"id {at}", "content": draw(TEXTS)})
        messages.append(said("assistant", draw(TEXTS)))
    return {"messages": messages}


def through(rows: list[Any] | bytes, **asked: Any) -> list[Line]:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "data"
        source.write_bytes(rows if isinstance(rows, bytes) else b"\n".join(map(msgspec.json.encode, rows)))
        return converted(source, **asked)[1]


def as_sharegpt(line: Line) -> Line:
    names = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation"}
    turns: list[Line] = []
    for message in line["messages"]:
        if "tool_calls" in message:
            [call] = message["tool_calls"]
            function = {**call["function"], "arguments": msgspec.Raw(call["function"]["arguments"].encode())}
            turns.append({"from": "function_call", "value": msgspec.json.encode(function).decode()})
        else:
            turns.append({"from": names[message["role"]], "value": message["content"]})
    return {"conversations": turns}


def as_anthropic(line: Line) -> Line:
    messages: list[Line] = []
    row: Line = {"messages": messages, "max_tokens": 5}
    for message in line["messages"]:
        if message["role"] == "system":
            row["system"] = message["content"]
        elif message["role"] == "tool":
            block = {"type": "tool_result", "tool_use_id": message["tool_call_id"], "content": message["content"]}
            messages.append({"role": "user", "content": [block]})
        elif "tool_calls" in message:
            [call] = message["tool_calls"]
            arguments = msgspec.json.decode(call["function"]["arguments"])
            block = {"type": "tool_use", "id": call["id"], "name": call["function"]["name"], "input": arguments}
            messages.append({"role": "assistant", "content": [block]})
        else:
            messages.append({"role": message["role"], "content": [{"type": "text", "text": message["content"]}]})
    row.setdefault("system", None)
    return row


def without_ids(line: Line) -> Line:
    """Return a conversation with its calls numbered, as formats without ids give them."""
    text = msgspec.json.encode(line).decode()
    for at, message in enumerate(one for one in line["messages"] if "tool_calls" in one):
        text = text.replace(f'"{message["tool_calls"][0]["id"]}"', f'"call_{at + 1}"')
    return msgspec.json.decode(text)


@given(st.lists(conversations(), min_size=1, max_size=3))
def test_chat_comes_back_from_sharegpt(lines: list[Line]) -> None:
    assert through([as_sharegpt(line) for line in lines]) == [without_ids(line) for line in lines]


@given(st.lists(conversations(), min_size=1, max_size=3))
def test_chat_comes_back_from_anthropic(lines: list[Line]) -> None:
    assert through([as_anthropic(line) for line in lines], format="anthropic") == lines


@given(st.lists(conversations(), min_size=1, max_size=3))
def test_chat_comes_back_from_itself(lines: list[Line]) -> None:
    assert through(lines) == lines
    assert through(msgspec.json.format(msgspec.json.encode(lines))) == lines


def pair_of(line: Line) -> tuple[str, str]:
    [asked, answered] = line["messages"]
    return asked["content"], answered["content"]


def as_alpaca(line: Line) -> Line:
    *before, asked, answered = [one for one in line["messages"] if one["role"] != "system"]
    system = [one["content"] for one in line["messages"] if one["role"] == "system"]
    history = [[one["content"], other["content"]] for one, other in zip(before[::2], before[1::2], strict=True)]
    row: Line = {"instruction": asked["content"], "input": "", "output": answered["content"], "history": history}
    return {**row, "system": system[0]} if system else row


@given(st.lists(conversations(tools=False), min_size=1, max_size=3))
def test_chat_comes_back_from_alpaca(lines: list[Line]) -> None:
    assert through([as_alpaca(line) for line in lines]) == lines


ONE_ROUND = conversations(longest=1, system=False, tools=False)


@given(ONE_ROUND)
def test_a_pair_comes_back_from_prompt_and_completion(line: Line) -> None:
    prompt, completion = pair_of(line)
    assert through([{"prompt": prompt, "completion": completion}]) == [line]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("encoded", [str.encode, lambda text: text.encode("utf-16")])
@given(lines=st.lists(ONE_ROUND, min_size=1, max_size=3))
def test_pairs_come_back_from_a_table(delimiter: str, encoded: Callable[[str], bytes], lines: list[Line]) -> None:
    target = io.StringIO()
    writer = csv.writer(target, delimiter=delimiter, quoting=csv.QUOTE_ALL)
    writer.writerows([("frage", "antwort"), *map(pair_of, lines)])
    columns = {"user": "frage", "assistant": "antwort"}
    assert through(encoded(target.getvalue()), columns=columns) == lines


def packed(rows: list[Line]) -> dict[str, bytes]:
    """Return the same rows in every kind of file whose bytes are not plain text."""
    table = pa.Table.from_pylist(rows)
    jsonl = b"\n".join(map(msgspec.json.encode, rows))
    columns, stream, file, archive = (io.BytesIO() for _ in range(4))
    pq.write_table(table, columns)
    for target, kind in ((stream, pa.ipc.new_stream), (file, pa.ipc.new_file)):
        with kind(target, table.schema) as writer:
            writer.write_table(table)
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as writer:
        writer.writestr("rows.jsonl", jsonl)
    whole = {"parquet": columns, "stream": stream, "file": file, "zip": archive}
    texts = {
        "gzip": gzip.compress(jsonl, mtime=0),
        "zstd": zstandard.compress(jsonl),
        "utf-16": jsonl.decode().encode("utf-16"),
    }
    return {**{name: target.getvalue() for name, target in whole.items()}, **texts}


PACKED = packed([{"messages": [said("user", f"q{at}"), said("assistant", f"a{at}")]} for at in range(20)])


@pytest.mark.parametrize("name", PACKED)
@given(data=st.data())
def test_damaged_bytes_are_refused_or_lose_rows_but_break_nothing(name: str, data: st.DataObject) -> None:
    content = bytearray(PACKED[name])
    places = st.integers(0, len(content) - 1)
    for at, byte in data.draw(st.lists(st.tuples(places, st.integers(0, 255)), min_size=1, max_size=4)):
        content[at] = byte
    content = content[: data.draw(st.just(len(content)) | places)]
    with suppress(InvalidDataset):
        assert len(through(bytes(content), allow_drops=True)) <= 20
