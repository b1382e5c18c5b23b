"""The answers of a chat completion in OpenAI's shape, plain and streamed. Pure: pieces in, bytes out."""

from __future__ import annotations

from typing import Any

import msgspec

from rose.errors import RoseError
from rose.inference.generation import (
    Accepted,
    Done,
    Failed,
    Finished,
    FinishReason,
    Piece,
    Text,
    TokenLogprob,
    ToolCall,
)

DONE = b"data: [DONE]\n\n"
COUNTED = b": usage "
"""Begins the comment in which a stream tells the API its tokens, whether or not the client wants to know."""


ADAPTER_HEADER = "x-rose-adapter"
"""Names the weights that wrote an answer: SHA-256 of the adapter, or of the full model; NO_ADAPTER for a base."""
NO_ADAPTER = "none"


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """What is the same in all chunks of an answer."""

    id: str
    created: int
    """Unix seconds."""
    model: str
    fingerprint: str | None
    """`system_fingerprint`: changes when the weights do."""


def error_body(error: RoseError) -> dict[str, Any]:
    """Return `error` as OpenAI's clients expect it."""
    return {
        "error": {
            "message": str(error),
            "type": error.kind,
            "param": error.param,
            "code": error.code,
            "hint": error.hint,
        }
    }


def frame(body: Any) -> bytes:
    """Return `body` as one frame of an event stream."""
    return b"data: " + msgspec.json.encode(body) + b"\n\n"


class Counted(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens of a streamed answer."""

    prompt_tokens: int
    completion_tokens: int | None
    """None until the answer is complete."""


def _counted(prompt_tokens: int, completion_tokens: int | None) -> bytes:
    counted = Counted(prompt_tokens=prompt_tokens, completion_tokens=completion_tokens)
    return COUNTED + msgspec.json.encode(counted) + b"\n\n"


class Chunks:
    """Turn pieces into the frames of a streamed answer."""

    def __init__(
        self, header: Header, *, choices: int, include_usage: bool, logprobs: bool, functions: bool = False
    ) -> None:
        self._header = header
        self._functions = functions
        self._choices = choices
        self._include_usage = include_usage
        self._logprobs = logprobs
        self._tool_calls: dict[int, int] = {}

    def frames(self, piece: Piece) -> bytes:
        """Return the frames that `piece` makes; empty when it makes none."""
        match piece:
            case Accepted():
                role = {"role": "assistant", "content": "", "refusal": None}
                return _counted(piece.prompt_tokens, None) + b"".join(
                    self._choice(index, role) for index in range(self._choices)
                )
            case Text():
                silent = bool(piece.tool_call or piece.reasoning)
                delta: dict[str, Any] = {"content": piece.text} if piece.text or not silent else {}
                if piece.reasoning:
                    delta["reasoning_content"] = piece.reasoning
                if piece.tool_call is not None and self._functions:
                    delta["function_call"] = function_call(piece.tool_call)
                elif piece.tool_call is not None:
                    number = self._tool_calls.get(piece.index, 0)
                    self._tool_calls[piece.index] = number + 1
                    delta["tool_calls"] = [{"index": number, **tool_call(piece.tool_call)}]
                return self._choice(piece.index, delta, logprobs=piece.logprobs)
            case Finished():
                return self._choice(piece.index, {}, finish_reason=piece.reason)
            case Done():
                told = frame(self._chunk([], usage(piece))) if self._include_usage else b""
                return _counted(piece.prompt_tokens, piece.completion_tokens) + told + DONE
            case Failed():
                return frame(error_body(piece.error))

    def _choice(
        self,
        index: int,
        delta: dict[str, Any],
        *,
        logprobs: tuple[TokenLogprob, ...] = (),
        finish_reason: FinishReason | None = None,
    ) -> bytes:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": logprob_content(logprobs) if self._logprobs and logprobs else None,
            "finish_reason": finish_reason,
        }
        return frame(self._chunk([choice], None))

    def _chunk(self, choices: list[dict[str, Any]], counted: dict[str, int] | None) -> dict[str, Any]:
        body: dict[str, Any] = {
            "id": self._header.id,
            "object": "chat.completion.chunk",
            "created": self._header.created,
            "model": self._header.model,
            "system_fingerprint": self._header.fingerprint,
            "choices": choices,
        }
        if self._include_usage:
            body["usage"] = counted
        return body


class Answer:
    """Gather pieces into one plain answer."""

    def __init__(self, header: Header, *, choices: int, logprobs: bool, functions: bool = False) -> None:
        self._header = header
        self._functions = functions
        self._texts: list[list[Text]] = [[] for _ in range(choices)]
        self._reasons: dict[int, FinishReason] = {}
        self._logprobs = logprobs

    def add(self, piece: Text | Finished) -> None:
        """Take one piece in."""
        if isinstance(piece, Finished):
            self._reasons[piece.index] = piece.reason
        else:
            self._texts[piece.index].append(piece)

    def body(self, done: Done) -> dict[str, Any]:
        """Return the whole answer."""
        return {
            "id": self._header.id,
            "object": "chat.completion",
            "created": self._header.created,
            "model": self._header.model,
            "system_fingerprint": self._header.fingerprint,
            "choices": [self._choice(index) for index in range(len(self._texts))],
            "usage": usage(done),
        }

    def _choice(self, index: int) -> dict[str, Any]:
        texts = self._texts[index]
        content = "".join(piece.text for piece in texts)
        calls = [piece.tool_call for piece in texts if piece.tool_call is not None]
        message: dict[str, Any] = {"role": "assistant", "content": content or (None if calls else ""), "refusal": None}
        if reasoning := "".join(piece.reasoning for piece in texts):
            message["reasoning_content"] = reasoning
        if calls and self._functions:
            message["function_call"] = function_call(calls[0])
        elif calls:
            message["tool_calls"] = [tool_call(call) for call in calls]
        entries = tuple(entry for piece in texts for entry in piece.logprobs)
        return {
            "index": index,
            "message": message,
            "logprobs": logprob_content(entries) if self._logprobs else None,
            "finish_reason": self._reasons[index],
        }


def usage(done: Done) -> dict[str, Any]:
    """Return the token counts of an answer."""
    return {
        "prompt_tokens": done.prompt_tokens,
        "completion_tokens": done.completion_tokens,
        "total_tokens": done.prompt_tokens + done.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": done.cached_tokens},
    }


def tool_call(call: ToolCall) -> dict[str, Any]:
    """Return a tool call of a message."""
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def function_call(call: ToolCall) -> dict[str, Any]:
    """Return a call as clients of the old `functions` read it."""
    return {"name": call.name, "arguments": call.arguments}


def logprob_content(entries: tuple[TokenLogprob, ...]) -> dict[str, Any]:
    """Return the `logprobs` of a choice."""

    def shape(entry: TokenLogprob) -> dict[str, Any]:
        return {"token": entry.token, "logprob": entry.logprob, "bytes": entry.bytes}

    return {
        "content": [{**shape(entry), "top_logprobs": [shape(top) for top in entry.top]} for entry in entries],
        "refusal": None,
    }
