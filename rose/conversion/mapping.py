"""Which function maps which format, and what comes of one row: lines that the reader of training data accepts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from rose.conversion import batch
from rose.conversion.anthropic import from_anthropic
from rose.conversion.building import encoded
from rose.conversion.chat import from_chat, from_dpo
from rose.conversion.gemini import from_gemini
from rose.conversion.pairs import from_alpaca, from_columns, from_prompt_completion
from rose.conversion.preference import from_kto, from_preference
from rose.conversion.rows import Context, Drop, Row
from rose.conversion.sharegpt import from_sharegpt
from rose.domain.formats import FORMATS, recognise
from rose.domain.preferences import read_pairs
from rose.domain.training_data import Problem, read_examples
from rose.errors import InvalidDataset, InvalidRequest

Convert = Callable[[Mapping[str, Any], Context], list[dict[str, Any]]]

CONVERSIONS: dict[str, Convert] = {
    "chat": from_chat,
    "mistral": from_chat,
    "dpo": from_dpo,
    "sharegpt": from_sharegpt,
    "alpaca": from_alpaca,
    "prompt-completion": from_prompt_completion,
    "preference": from_preference,
    "kto": from_kto,
    "anthropic": from_anthropic,
    "gemini": from_gemini,
    "columns": from_columns,
}
"""Format -> what maps a row of it. Batches are joined first; what is refused is not here."""

PREFERENCES = ("dpo", "preference")
_REFUSED = {
    "rft": "There are questions and what a grader needs, but no answers, so there is nothing to learn from.",
    "text": "Marks of turns in it (such as <|im_start|>, [INST] or ### Response) belong to one model; inside a message "
    "they would be read as text. Without marks nobody can tell what is asked from what is answered.",
}


def title(name: str) -> str:
    """Return a format's name for a sentence."""
    return FORMATS[name].title if name in FORMATS else "the columns that were named"


def check_possible(name: str, *, to_chat: bool) -> None:
    """Raises: InvalidDataset when a format gives no conversations; InvalidRequest when they must be asked for."""
    if name in _REFUSED:
        raise InvalidDataset(
            f"This is {title(name)}. {_REFUSED[name]}",
            code="no_conversations",
            hint="Take the file that this one was made from."
            if name == "text"
            else "Let a model answer the questions first, or take a file with answers.",
        )
    if name == "kto" and not to_chat:
        raise InvalidRequest(
            f"This is {title(name)}: not pairs, and not only answers to learn from.",
            param="to",
            hint="To learn the answers that were judged good: --to chat --allow-drops",
        )


def mapped(rows: Iterable[Row], name: str, context: Context) -> Iterator[tuple[Row, list[bytes] | Drop]]:
    """Yield each row with the lines that are made of it, or why it is left out."""
    single = ((row, _converted(row, name, context)) for row in rows)
    for row, lines in batch.joined(rows, context) if name == "batch" else single:
        yield row, lines if isinstance(lines, Drop) else _checked(lines, context)


def _converted(row: Row, name: str, context: Context) -> list[dict[str, Any]] | Drop:
    try:
        if row.value is None:
            raise Drop(row.problem or "could not be read")
        if name in FORMATS and name not in recognise(row.value):
            raise Drop(f"is not {title(name)}")
        return CONVERSIONS[name](row.value, context)
    except Drop as drop:
        return drop
    except RecursionError:
        return Drop("is nested too deeply")


def _checked(lines: list[dict[str, Any]], context: Context) -> list[bytes] | Drop:
    """Return the lines as bytes, each accepted by the reader of training data."""
    written: list[bytes] = []
    try:
        for line in lines:
            raw = encoded(line).encode()
            for found in read_examples([raw]) if "messages" in line else read_pairs([raw]):
                if isinstance(found, Problem):
                    return Drop(found.text)
            if _has_null(line.get("tools")):
                context.note("null kept in tools (an absent key of a Parquet struct looks the same)")
            written.append(raw + b"\n")
    except Drop as drop:
        return drop
    except RecursionError:
        return Drop("is nested too deeply")
    return written


def _has_null(value: Any) -> bool:
    if isinstance(value, dict):
        return any(inner is None or _has_null(inner) for inner in value.values())
    return isinstance(value, list) and any(map(_has_null, value))
