"""One question, one answer: Alpaca, prompt/completion (texts and message lists), and columns that `--map` names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rose.conversion.building import Message, chat, message, system_text, tools_of
from rose.conversion.chat import messages_of
from rose.conversion.dialogue import is_dialogue, messages_of_dialogue
from rose.conversion.rows import Context, Drop, Markers, kind, refuse_media, text_of
from rose.domain.formats import HARMLESS, pair_of

_ALPACA = ("instruction", "input", "context", "output", "response", "system", "history", "tools", "text")
_PROMPT_ENDS = ("\n\n###\n\n", "\n\n###", "\n###\n", "###", "\n\n->\n\n", " ->", "->", "\n\n===\n\n", " =>", "\n\n")
_COMPLETION_ENDS = ("\n\n###", " ###", "###", " END", "<|endoftext|>", "\n")


def from_alpaca(row: Mapping[str, Any], context: Context) -> list[dict[str, Any]]:
    """Return an instruction with its input as the question; earlier rounds of `history` come before."""
    refuse_media(row)
    note_others(row, _ALPACA, context)
    asked = text_of(row.get("instruction"), "instruction")
    more = _first(row, "input", "context")
    if more is not None and not isinstance(more, str):
        raise Drop(f"input is {kind(more)}; expected a text")
    if more:
        asked = f"{asked}\n{more}" if asked else more
    answer = text_of(_first(row, "output", "response"), "output")
    if not asked or not answer:
        raise Drop("the question is empty" if not asked else "the answer is empty")
    return [
        chat(
            [*system_text(row), *_history(row, context), message("user", asked), message("assistant", answer)],
            tools_of(row.get("tools")),
        )
    ]


def _first(row: Mapping[str, Any], *names: str) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), None)


def _history(row: Mapping[str, Any], context: Context) -> list[Message]:
    rounds = row.get("history") or []
    if not isinstance(rounds, list):
        raise Drop(f"history is {kind(rounds)}; expected a list of questions and answers")
    if rounds:
        context.note("conversation with a history, whose answers are learned, too")
    messages: list[Message] = []
    for one in rounds:
        if not isinstance(one, list) or len(one) != 2:
            raise Drop("history holds something else than pairs of a question and an answer")
        messages += [message("user", text_of(one[0], "history")), message("assistant", text_of(one[1], "history"))]
    return messages


def from_prompt_completion(row: Mapping[str, Any], context: Context) -> list[dict[str, Any]]:
    """Return a prompt as the question and a completion as the answer."""
    refuse_media(row)
    names = pair_of(row)
    if names is None:
        raise Drop("has no prompt and completion")
    note_others(row, (*names, "system", "tools"), context)
    prompt, completion = (row[name] for name in names)
    asked, answered = sides(prompt, completion, names, context)
    if not answered:
        raise Drop(f"{names[1]} is empty")
    return [chat([*system_text(row), *asked, *answered], tools_of(row.get("tools")))]


def sides(
    prompt: Any, completion: Any, names: tuple[str, str], context: Context
) -> tuple[list[Message], list[Message]]:
    """Return what is asked and what is answered, from two texts or two lists of messages."""
    if isinstance(prompt, list) and isinstance(completion, list):
        return messages_of(prompt, names[0], context), messages_of(completion, names[1], context)
    if isinstance(prompt, list) or isinstance(completion, list):
        raise Drop(f"{names[0]} is {kind(prompt)} and {names[1]} is {kind(completion)}; expected two of a kind")
    marks = context.markers
    asked = text_of(prompt, names[0]).removesuffix(marks.prompt_end)
    answer = text_of(completion, names[1]).removeprefix(marks.completion_start).removesuffix(marks.completion_end)
    if not asked or not answer:
        raise Drop(f"{names[0] if not asked else names[1]} is empty")
    if is_dialogue(asked):
        context.note("prompt with Human: and Assistant: turns, taken as messages")
        return messages_of_dialogue(asked, ends_with_answer=False), [message("assistant", answer.strip())]
    return [message("user", asked)], [message("assistant", answer)]


class MarkerSurvey:
    """Finds out over all rows which marks every prompt and every completion bears."""

    def __init__(self) -> None:
        self._prompt_ends = list(_PROMPT_ENDS)
        self._completion_ends = list(_COMPLETION_ENDS)
        self._space = True
        self._rows = 0

    def see(self, row: Mapping[str, Any]) -> None:
        """Take one row into account; rows whose two sides are no texts bear no marks and count for nothing."""
        names = pair_of(row)
        if names is None or not isinstance(row[names[0]], str) or not isinstance(row[names[1]], str):
            return
        prompt, completion = row[names[0]], row[names[1]]
        self._rows += 1
        self._prompt_ends = [mark for mark in self._prompt_ends if prompt.endswith(mark)]
        self._completion_ends = [mark for mark in self._completion_ends if completion.endswith(mark)]
        self._space = self._space and completion.startswith(" ")

    @property
    def markers(self) -> Markers:
        """The marks that every row bears, the longest of each kind. One row alone proves no habit."""
        if self._rows < 2:
            return Markers()
        return Markers(
            prompt_end=max(self._prompt_ends, key=len, default=""),
            completion_start=" " if self._space else "",
            completion_end=max(self._completion_ends, key=len, default=""),
        )


def from_columns(row: Mapping[str, Any], context: Context) -> list[dict[str, Any]]:
    """Return the columns that the person named as messages, in the order system, user, assistant."""
    names = context.columns
    absent = [name for name in names.values() if name not in row]
    if absent:
        raise Drop(f"has no column {absent[0]!r}; it has {', '.join(map(repr, sorted(row)))}")
    asked = text_of(row[names["user"]], names["user"])
    answer = text_of(row[names["assistant"]], names["assistant"])
    if not asked or not answer:
        raise Drop(f"{names['user'] if not asked else names['assistant']} is empty")
    system = system_text(row, names["system"]) if "system" in names else []
    note_others(row, tuple(names.values()), context)
    return [chat([*system, message("user", asked), message("assistant", answer)])]


def note_others(row: Mapping[str, Any], used: tuple[str, ...], context: Context) -> None:
    """Note the columns that are left out."""
    for name in set(row) - set(used):
        if row[name] not in (None, "", [], {}) and name not in HARMLESS:
            context.note_left_out("column", name)
