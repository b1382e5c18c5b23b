"""Find tool calls in what a model writes: `<tool_call>{"name": …, "arguments": …}</tool_call>`, as Qwen and Hermes do.

Pure. Used only for requests that offer tools; without them the same text is just text.
"""

from __future__ import annotations

from typing import Any

import msgspec

from rose.ids import new_id
from rose.inference.generation import ToolCall
from rose.inference.text import StopFilter

OPENING, CLOSING = "<tool_call>", "</tool_call>"


class ToolCallFilter:
    """Take the tool calls out of a text that comes in pieces; what is no valid call stays text.

    `most` calls are taken (None: all); what follows stays text.
    """

    def __init__(self, most: int | None = None) -> None:
        self._most = most
        self._outside = StopFilter([OPENING])
        self._inside: str | None = None
        self.calls = 0
        """Tool calls found so far."""

    def push(self, text: str) -> list[str | ToolCall]:
        """Return the text and the calls that are certain now, in order."""
        found: list[str | ToolCall] = []
        while text:
            if self._inside is None:
                shown, text = self._read_text(text)
                found += [shown] if shown else []
            else:
                self._inside += text
                body, closing, text = self._inside.partition(CLOSING)
                if not closing:
                    break
                found.append(self._call(body))
                self._inside = None
        return found

    def finish(self) -> list[str | ToolCall]:
        """Return what was held back; an unfinished call is text."""
        rest = self._outside.finish() if self._inside is None else OPENING + self._inside
        self._inside = None
        return [rest] if rest else []

    def _read_text(self, text: str) -> tuple[str, str]:
        """Return the text before a call, and what follows its opening."""
        held = self._outside.held
        shown = self._outside.push(text)
        if not self._outside.stopped:
            return shown, ""
        self._outside, self._inside = StopFilter([OPENING]), ""
        return shown, (held + text)[len(shown) + len(OPENING) :]

    def _call(self, body: str) -> str | ToolCall:
        try:
            content: Any = msgspec.json.decode(body.strip().encode())
        except msgspec.DecodeError:
            content = None
        enough = self._most is not None and self.calls >= self._most
        if enough or not isinstance(content, dict) or not isinstance(content.get("name"), str):
            return OPENING + body + CLOSING
        self.calls += 1
        arguments: Any = content.get("arguments", {})
        encoded = arguments if isinstance(arguments, str) else msgspec.json.encode(arguments).decode()
        return ToolCall(id=new_id("call_"), name=content["name"], arguments=encoded)
