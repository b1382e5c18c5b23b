"""A client of streamed chat completions that costs little itself: one connection per request, the time of every token.

It asks over a plain socket, since a full HTTP client would take a part of the cores that the servers are measured on.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import msgspec

PATH = "/v1/chat/completions"
LIMIT_BYTES = 4 << 20
ANSWER_SECONDS = 900.0
"""Longest wait for a whole answer."""


class Token(msgspec.Struct, frozen=True, kw_only=True):
    """A token with its log-probability, nats."""

    token: str
    logprob: float
    top_logprobs: list[Token] = []


class Reply(msgspec.Struct, kw_only=True):
    """What came back for one request; times are seconds of `time.perf_counter`."""

    sent: float = 0.0
    arrivals: list[float] = []
    """When each frame with text came, or with the log-probabilities of a token whose text is not complete."""
    ended: float = 0.0
    text: str = ""
    tokens: list[Token] = []
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish_reason: str | None = None
    headers: dict[str, str] = {}
    error: str | None = None
    """Code of the error that it ended with; `broken` when the connection ended first, `refused` when there was none."""
    left: bool = False
    """The client went away before the end, as it was told to."""
    complete: bool = False
    """The server said that the answer is complete."""

    @property
    def first_seconds(self) -> float:
        """Time to the first text. Raises: IndexError when none came."""
        return self.arrivals[0] - self.sent

    @property
    def gaps(self) -> list[float]:
        """Seconds between one text and the next."""
        return [later - earlier for earlier, later in itertools.pairwise(self.arrivals)]


class _Delta(msgspec.Struct, frozen=True):
    content: str | None = None


class _Logprobs(msgspec.Struct, frozen=True):
    content: list[Token] | None = None


class _Choice(msgspec.Struct, frozen=True):
    delta: _Delta = _Delta()
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None


class _Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int = 0
    completion_tokens: int | None = 0


class _Frame(msgspec.Struct, frozen=True):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: dict[str, Any] | None = None


_FRAME = msgspec.json.Decoder(_Frame)


async def ask(port: int, body: dict[str, Any], *, leave_after: int | None = None, into: Reply | None = None) -> Reply:
    """Send a chat request as a stream and return its answer; what goes wrong stands in the reply's `error`.

    `leave_after`: close the connection once so many texts have come. `into`: a reply to fill, for who looks meanwhile.
    """
    content = msgspec.json.encode({**body, "stream": True, "stream_options": {"include_usage": True}})
    reply = Reply() if into is None else into
    reply.sent = time.perf_counter()
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            await _exchange(port, content, reply, leave_after)
    except TimeoutError:
        reply.error = "silent"
    except ConnectionRefusedError:
        reply.error = "refused"
    except (OSError, asyncio.IncompleteReadError):
        reply.error = "broken"
    reply.ended = time.perf_counter()
    if not (reply.complete or reply.left or reply.error):
        reply.error = "lost"
    return reply


async def _exchange(port: int, content: bytes, reply: Reply, leave_after: int | None) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=LIMIT_BYTES)
    try:
        writer.write(_head(PATH, content) + content)
        status, reply.headers = await _read_head(reader)
        if status != 200:
            reply.error = _code(status, await _read_body(reader, reply.headers))
            return
        async for line in _lines(reader):
            if line.startswith(b"data: "):
                _take(line[6:], reply)
            if leave_after is not None and len(reply.arrivals) >= leave_after:
                reply.left = True
                return
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


def _take(data: bytes, reply: Reply) -> None:
    """Add one frame to the reply."""
    if data == b"[DONE]":
        reply.complete = reply.error is None
        return
    frame = _FRAME.decode(data)
    if frame.error is not None:
        reply.error = str(frame.error.get("code") or "unknown")
    if frame.usage is not None:
        reply.prompt_tokens = frame.usage.prompt_tokens
        reply.completion_tokens = frame.usage.completion_tokens or 0
    for choice in frame.choices:
        tokens = choice.logprobs.content if choice.logprobs is not None else None
        if choice.delta.content or tokens:
            reply.arrivals.append(time.perf_counter())
            reply.text += choice.delta.content or ""
            reply.tokens += tokens or []
        reply.finish_reason = choice.finish_reason or reply.finish_reason


async def call(port: int, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
    """Make a plain request and return status and body. Raises: OSError when nobody answers."""
    content = b"" if body is None else msgspec.json.encode(body)
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=LIMIT_BYTES)
    try:
        writer.write(_head(path, content, method) + content)
        async with asyncio.timeout(ANSWER_SECONDS):
            status, headers = await _read_head(reader)
            return status, await _read_body(reader, headers)
    except asyncio.IncompleteReadError as error:
        raise ConnectionResetError("the server closed the connection") from error
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


def _head(path: str, content: bytes, method: str = "POST") -> bytes:
    lines = (f"{method} {path} HTTP/1.1", "Host: localhost", "Connection: close", "Content-Type: application/json")
    return "\r\n".join((*lines, f"Content-Length: {len(content)}", "", "")).encode()


async def _read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    first, *lines = head.rstrip("\r\n").split("\r\n")
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return int(first.split()[1]), headers


async def _read_body(reader: asyncio.StreamReader, headers: dict[str, str]) -> bytes:
    if "content-length" in headers:
        return await reader.readexactly(int(headers["content-length"]))
    return b"\n".join([line async for line in _lines(reader)])


async def _lines(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """Give the lines of a body that comes in chunks. Raises: IncompleteReadError when it breaks off."""
    rest = b""
    while size := int(await reader.readuntil(b"\r\n"), 16):
        chunk = await reader.readexactly(size + 2)
        *lines, rest = (rest + chunk[:-2]).split(b"\n")
        for line in lines:
            yield line
    if rest:
        yield rest


def _code(status: int, content: bytes) -> str:
    with suppress(msgspec.DecodeError, msgspec.ValidationError):
        error = msgspec.json.decode(content, type=_Frame).error or {}
        return str(error.get("code") or status)
    return str(status)
