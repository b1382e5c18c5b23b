"""LLaMA-Factory's dataset_info.json: which columns and tags a file uses, and its rows under the usual names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from rose.conversion.rows import Drop
from rose.errors import InvalidDataset

_ALPACA = {"prompt": "instruction", "query": "input", "response": "output"}
_TAGS = {
    "user_tag": ("human", "human"),
    "assistant_tag": ("gpt", "gpt"),
    "observation_tag": ("observation", "observation"),
    "function_tag": ("function_call", "function_call"),
    "system_tag": ("system", "system"),
}
_SAME = ("system", "tools", "history", "images", "videos", "audios", "chosen", "rejected")


class Layout(msgspec.Struct, frozen=True, kw_only=True):
    """How one data set is written."""

    format: str
    """The format that its rows have under the usual names."""
    columns: dict[str, str]
    """Usual name -> the file's name."""
    role_tag: str = "from"
    content_tag: str = "value"
    speakers: dict[str, str] = {}
    """What the file calls a speaker -> ShareGPT's name."""
    verdict: str | None = None
    """Column that says whether an answer was good."""

    def row(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return a row under the usual names. Raises: Drop when a column that is declared is not there."""
        known = {name: given[column] for name, column in self.columns.items() if column in given}
        for name in ("conversations", "instruction"):
            if name in self.columns and name not in known:
                raise Drop(f"has no column {self.columns[name]!r}, which dataset_info.json names")
        used = {*self.columns.values(), self.verdict}
        row = {**{name: value for name, value in given.items() if name not in used}, **known}
        if self.verdict is not None:
            if not given.get(self.verdict):
                raise Drop("was judged as a bad answer")
            row.pop(self.verdict, None)
        for name in ("conversations", "chosen", "rejected"):
            if name in row:
                row[name] = self._turns(row[name])
        return row

    def _turns(self, value: Any) -> Any:
        if isinstance(value, dict):
            return self._turn(value)
        return [self._turn(one) for one in value] if isinstance(value, list) else value

    def _turn(self, turn: Any) -> Any:
        if not isinstance(turn, dict) or self.role_tag not in turn:
            return turn
        who = turn[self.role_tag]
        if not isinstance(who, str) or who not in self.speakers:
            raise Drop(f"has a turn of {who!r}, which is none of the tags of dataset_info.json")
        return {"from": self.speakers[who], "value": turn.get(self.content_tag)}


def layout_of(entry: Mapping[str, Any], name: str) -> Layout:
    """Read an entry of dataset_info.json. Raises: InvalidDataset when it says what is not understood."""
    kind = entry.get("formatting", "alpaca")
    if kind not in ("alpaca", "sharegpt"):
        raise InvalidDataset(f"dataset_info.json: {name}.formatting is {kind!r}; expected alpaca or sharegpt.")
    columns, tags = _texts(entry, "columns", name), _texts(entry, "tags", name)
    own = ("conversations",) if kind == "sharegpt" else ("instruction", "input", "output")
    usual: dict[str, str] = {column: column for column in own}
    for declared, column in columns.items():
        if declared == "messages":
            usual["conversations"] = column
        elif declared in _ALPACA:
            usual[_ALPACA[declared]] = column
        elif declared in _SAME:
            usual[declared] = column
    ranking = entry.get("ranking") is True
    if ranking:
        usual = {"chosen": "chosen", "rejected": "rejected", **usual}
        usual.pop("output", None)
    return Layout(
        format="preference" if ranking else kind,
        columns=usual,
        role_tag=tags.get("role_tag", "from"),
        content_tag=tags.get("content_tag", "value"),
        speakers={tags.get(tag, usually): name for tag, (usually, name) in _TAGS.items()},
        verdict=columns.get("kto_tag"),
    )


def _texts(entry: Mapping[str, Any], key: str, name: str) -> dict[str, str]:
    given = entry.get(key) or {}
    if not isinstance(given, dict) or not all(isinstance(one, str | None) for one in given.values()):
        raise InvalidDataset(f"dataset_info.json: {name}.{key} is no object of texts.")
    return {inner: one for inner, one in given.items() if one is not None}
