"""`/v1/files/…/preview`: lines of training data as a model sees them. An engine renders them; nothing is stored."""

from __future__ import annotations

import time
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import anyio.to_thread
import msgspec
from litestar.params import FromPath

from projections import files as files_view
from rose.api.body import check_values, read_object, require_text, wrong_type
from rose.api.chat import target_of
from rose.api.engines import ask_engine
from rose.api.errors import AnyRequest
from rose.api.model_names import find_model
from rose.api.principal import NEEDS, ThePrincipal
from rose.api.routes import TEXT, WHOLE, optional, post, record
from rose.api.services import Services, TheServices
from rose.domain.training_data import MAX_LINE_BYTES, ChatExample, has_thought, read_examples
from rose.errors import InvalidRequest
from rose.missing import missing_file

MAX_COUNT = 50
THINKING = ("auto", "on", "off")
_OPTIONS = {"model": TEXT, "line": optional(WHOLE), "count": optional(WHOLE), "thinking": optional(TEXT)}


class _Asked(msgspec.Struct, frozen=True, kw_only=True):
    model: str
    line: int
    count: int
    thinking: str


@post("/v1/files/{file_id:str}/preview", body=record(("model",), **_OPTIONS), opt={NEEDS: "read"})
async def preview_file(
    request: AnyRequest, services: TheServices, principal: ThePrincipal, file_id: FromPath[str]
) -> dict[str, Any]:
    """Show lines of an uploaded file as a model sees them: its text, and which of it is learned."""
    body = await read_object(request)
    asked = _asked(body)
    check_values({"id": file_id})
    state = await files_view.get(services.pool, principal.project, file_id, now=int(time.time()))
    if state is None or state.artifact is None:
        raise missing_file(file_id)
    path = services.blobs.path(state.artifact.path)
    lines, thinking = await anyio.to_thread.run_sync(_from_file, path, asked)
    return await _shown(services, principal.project, asked, lines, thinking)


@post("/v1/files/preview", body=record(("model", "content"), content=TEXT, **_OPTIONS), opt={NEEDS: "read"})
async def preview_content(request: AnyRequest, services: TheServices, principal: ThePrincipal) -> dict[str, Any]:
    """Show lines of a text, JSONL that was not uploaded, as a model sees them."""
    body = await read_object(request, nul_allowed=True)
    asked = _asked(body)
    content = body.get("content")
    if not isinstance(content, str):
        wrong_type("content", "a string of JSONL", content)
    given = content.encode("utf-8", "replace").splitlines(keepends=True)
    lines, thinking = await anyio.to_thread.run_sync(_from_lines, given, asked)
    return await _shown(services, principal.project, asked, lines, thinking)


def _asked(body: dict[str, Any]) -> _Asked:
    model = require_text(body, "model")
    check_values({"model": model})
    thinking = body.get("thinking") or "auto"
    if thinking not in THINKING:
        raise InvalidRequest(f"thinking must be one of {', '.join(THINKING)}.", code="invalid_value", param="thinking")
    return _Asked(
        model=model, line=_whole(body, "line", 1, 1 << 40), count=_whole(body, "count", 1, MAX_COUNT), thinking=thinking
    )


def _whole(body: dict[str, Any], name: str, default: int, most: int) -> int:
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool):
        wrong_type(name, "a whole number", value)
    if not 1 <= value <= most:
        raise InvalidRequest(f"{name} is {value}; it must be from 1 to {most}.", code="invalid_value", param=name)
    return value


def _from_file(path: Path, asked: _Asked) -> tuple[list[dict[str, Any]], bool]:
    with path.open("rb") as file:
        lines = _picked(file, asked)
    with path.open("rb") as file:
        return lines, _thinks(file, asked)


def _from_lines(lines: list[bytes], asked: _Asked) -> tuple[list[dict[str, Any]], bool]:
    return _picked(lines, asked), _thinks(lines, asked)


def _picked(lines: Iterable[bytes], asked: _Asked) -> list[dict[str, Any]]:
    """Return the lines that were asked for. Raises: InvalidRequest when the file has fewer, or a longer one."""
    found = list(islice(enumerate(lines, start=1), asked.line - 1, asked.line - 1 + asked.count))
    if not found:
        raise InvalidRequest(f"The file has no line {asked.line}.", code="invalid_value", param="line")
    if any(len(line) > MAX_LINE_BYTES for _, line in found):
        raise InvalidRequest(f"A line has more than {MAX_LINE_BYTES >> 20} MB.", code="invalid_value", param="line")
    return [{"number": number, "text": line.decode("utf-8", "replace")} for number, line in found]


def _thinks(lines: Iterable[bytes], asked: _Asked) -> bool:
    """Say whether a job on the file would train with thinking on."""
    if asked.thinking != "auto":
        return asked.thinking == "on"
    return any(isinstance(item, ChatExample) and has_thought(item) for item in read_examples(lines))


async def _shown(
    services: Services, project: str, asked: _Asked, lines: list[dict[str, Any]], thinking: bool
) -> dict[str, Any]:
    target = target_of(await find_model(services, project, asked.model))
    wanted = {"rose": msgspec.to_builtins(target), "lines": lines, "thinking": thinking}
    return await ask_engine(services, target.base.fingerprint, lambda url: services.engines.preview(url, wanted))


HANDLERS = (preview_file, preview_content)
