"""Recognises by the keys of decoded rows in which format of training data they are written. Pure; reads no content.

A single row can be what several formats write, so each format says of a row that it cannot be one of its own, could
be, or bears its mark. A file is of a format when no row speaks against it and at least one bears the mark.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import IntEnum
from typing import Any

import msgspec

COMMAND = "rose files convert FILE -o OUT.jsonl"
"""What makes chat data of a foreign format."""

Row = Mapping[str, Any]


class Fit(IntEnum):
    """What one row says about one format."""

    NO = 0
    COULD = 1
    MARKED = 2


class Format(msgspec.Struct, frozen=True, kw_only=True):
    """A way to write conversations."""

    name: str
    """As `--from` takes it."""
    title: str
    """As a sentence names it."""
    fit: Callable[[Row], Fit]


PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("query", "response"),
    ("user", "assistant"),
    ("input", "output"),
)
"""Columns that ask and answer. All but the first are taken only if no other column could belong to the question."""

HARMLESS = frozenset(
    {"id", "idx", "index", "uuid", "source", "dataset", "category", "categories", "tags", "lang", "language", "split"}
    | {"prompt_id", "row_id", "score", "created_at", "timestamp", "date", "license", "model", "metadata", "system"}
    | {"tools", "__index_level_0__", ""}
)
"""Columns that say something about a row, and are no part of what is asked; without a name: a data frame's index."""

_TURNS = ("conversations", "conversation")
_ANTHROPIC_BLOCKS = frozenset({"tool_use", "tool_result", "thinking", "redacted_thinking"})
_DPO = ("input", "preferred_output", "non_preferred_output")
_SUFFIXES = (".csv", ".tsv", ".parquet", ".arrow", ".json", ".gz", ".zst", ".zstd", ".zip")


def convertible_suffix(name: str) -> bool:
    """Say whether a file of this name is of a kind that `rose files convert` reads and an upload does not take."""
    return name.lower().endswith(_SUFFIXES)


def has_foreign_messages(row: Row) -> bool:
    """Say whether the list `messages` itself is of another format, by its first message; quick, for every line."""
    messages = row.get("messages")
    first = messages[0] if isinstance(messages, list) and messages else None
    return isinstance(first, dict) and "from" in first


def recognise(row: Row) -> dict[str, Fit]:
    """Return the formats that this row fits, by name."""
    fits = ((one.name, one.fit(row)) for one in FORMATS.values())
    return {name: fit for name, fit in fits if fit is not Fit.NO}


def foreign_format(row: Row) -> Format | None:
    """Return the format of a row that is no chat line, or None when it bears the mark of none or of several."""
    marked = [FORMATS[name] for name, fit in recognise(row).items() if fit is Fit.MARKED and name != "chat"]
    return marked[0] if len(marked) == 1 else None


def pair_of(row: Row) -> tuple[str, str] | None:
    """Return the names of the columns that ask and answer, if the row has such a pair and nothing beside it."""
    for question, answer in PAIRS:
        if question not in row or answer not in row:
            continue
        beside = set(row) - {question, answer} - HARMLESS
        if (question, answer) == PAIRS[0] or not any(isinstance(row[name], str) for name in beside):
            return question, answer
    return None


def _given(row: Row, *names: str) -> bool:
    return all(row.get(name) is not None for name in names)


def _messages(row: Row) -> list[Row]:
    """Return those messages of the row that are objects."""
    messages = row.get("messages")
    if not isinstance(messages, list):
        return []
    return [one for one in messages if isinstance(one, dict)]


def _only_question(row: Row, messages: list[Row]) -> bool:
    roles = [message.get("role") for message in messages]
    return bool(roles) and roles[-1] == "user" and "assistant" not in roles


def _chat(row: Row) -> Fit:
    if "messages" not in row or _anthropic(row) is Fit.MARKED or _mistral(row) is Fit.MARKED:
        return Fit.NO
    messages = _messages(row)
    if not messages:
        return Fit.COULD
    if "role" not in messages[0]:
        return Fit.NO
    return Fit.COULD if _rft(row) is Fit.MARKED else Fit.MARKED


def _rft(row: Row) -> Fit:
    beside = set(row) - {"messages", "tools", "parallel_tool_calls", "functions"} - HARMLESS
    return Fit.MARKED if beside and _only_question(row, _messages(row)) else Fit.NO


def _anthropic(row: Row) -> Fit:
    messages = _messages(row)
    if not messages or not all(message.get("role") in ("user", "assistant") for message in messages):
        return Fit.NO
    kinds = {
        block.get("type")
        for message in messages
        if isinstance(message.get("content"), list)
        for block in message["content"]
        if isinstance(block, dict) and isinstance(block.get("type"), str)
    }
    tools = row.get("tools")
    schemas = isinstance(tools, list) and any(isinstance(one, dict) and _given(one, "input_schema") for one in tools)
    return Fit.MARKED if kinds & _ANTHROPIC_BLOCKS or schemas or _given(row, "system") else Fit.COULD


def _mistral(row: Row) -> Fit:
    messages = _messages(row)
    if not messages or "role" not in messages[0]:
        return Fit.NO
    return Fit.MARKED if any(_given(message, "prefix") for message in messages) else Fit.COULD


def _sharegpt(row: Row) -> Fit:
    for name in _TURNS:
        if name in row:
            return Fit.MARKED if isinstance(row[name], list | str) else Fit.COULD
    messages = _messages(row)
    return Fit.MARKED if messages and "from" in messages[0] else Fit.NO


def _alpaca(row: Row) -> Fit:
    answered = "output" in row or "response" in row
    return Fit.MARKED if "instruction" in row and answered and "chosen" not in row else Fit.NO


def _prompt_completion(row: Row) -> Fit:
    if _kto(row) or "messages" in row or "chosen" in row or "custom_id" in row:
        return Fit.NO
    return Fit.MARKED if pair_of(row) else Fit.NO


def _kto(row: Row) -> Fit:
    unpaired = {"prompt", "completion"} <= set(row) and isinstance(row.get("label"), bool)
    return Fit.MARKED if unpaired else Fit.NO


def _dpo(row: Row) -> Fit:
    old = {"input", "preferred_completion"} <= set(row)
    return Fit.MARKED if old or set(_DPO[:2]) <= set(row) else Fit.NO


def _preference(row: Row) -> Fit:
    return Fit.MARKED if {"chosen", "rejected"} <= set(row) else Fit.NO


def _gemini(row: Row) -> Fit:
    contents = row.get("contents")
    return Fit.MARKED if isinstance(contents, list) else Fit.NO


def _batch(row: Row) -> Fit:
    return Fit.MARKED if "custom_id" in row and {"body", "response", "error"} & set(row) else Fit.NO


def _text(row: Row) -> Fit:
    others = {"messages", "instruction", "prompt", "completion", "chosen", *_TURNS}
    return Fit.MARKED if isinstance(row.get("text"), str) and not others & set(row) else Fit.NO


FORMATS = {
    one.name: one
    for one in (
        Format(name="chat", title="OpenAI chat", fit=_chat),
        Format(name="dpo", title="OpenAI's preference format (DPO)", fit=_dpo),
        Format(name="rft", title="OpenAI's reinforcement format", fit=_rft),
        Format(name="batch", title="OpenAI batch requests and output", fit=_batch),
        Format(name="sharegpt", title="ShareGPT", fit=_sharegpt),
        Format(name="alpaca", title="Alpaca", fit=_alpaca),
        Format(name="prompt-completion", title="prompt/completion pairs", fit=_prompt_completion),
        Format(name="preference", title="preference pairs (chosen and rejected)", fit=_preference),
        Format(name="kto", title="single answers with a verdict (KTO)", fit=_kto),
        Format(name="anthropic", title="Anthropic messages", fit=_anthropic),
        Format(name="gemini", title="Gemini contents", fit=_gemini),
        Format(name="mistral", title="Mistral chat", fit=_mistral),
        Format(name="text", title="one text per row, questions and answers in it", fit=_text),
    )
}
"""Every format that is told apart by the keys of its rows."""
