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
from rose.api import schema
from rose.api.chat import target_of
from rose.api.decoding import read_body
from rose.api.engines import ask_engine
from rose.api.errors import AnyRequest
from rose.api.model_names import find_model
from rose.api.principal import NEEDS, ThePrincipal
from rose.api.routes import post
from rose.api.services import Services, TheServices
from rose.decoding import check_values
from rose.domain.previews import Preview
from rose.domain.training_data import MAX_LINE_BYTES
from rose.errors import InvalidRequest
from rose.methods import thinks
from rose.missing import missing_file


@post("/v1/files/{file_id:str}/preview", body=schema.PreviewFile, opt={NEEDS: "read"})
async def preview_file(
    request: AnyRequest, services: TheServices, principal: ThePrincipal, file_id: FromPath[str]
) -> Preview:
    """Show lines of an uploaded file as a model sees them: its text, and which of it is learned."""
    asked = await read_body(request, schema.PreviewFile)
    check_values({"id": file_id})
    state = await files_view.get(services.pool, principal.project, file_id, now=int(time.time()))
    if state is None or state.artifact is None:
        raise missing_file(file_id)
    path = services.blobs.path(state.artifact.path)
    lines, thinking = await anyio.to_thread.run_sync(_from_file, path, asked)
    return await _shown(services, principal.project, asked, lines, thinking)


@post("/v1/files/preview", body=schema.PreviewContent, opt={NEEDS: "read"})
async def preview_content(request: AnyRequest, services: TheServices, principal: ThePrincipal) -> Preview:
    """Show lines of a text, JSONL that was not uploaded, as a model sees them."""
    asked = await read_body(request, schema.PreviewContent, nul_allowed=True)
    check_values({"model": asked.model})  # what is shown may hold a NUL; what is looked up may not
    given = asked.content.encode("utf-8", "replace").splitlines(keepends=True)
    lines, thinking = await anyio.to_thread.run_sync(_from_lines, given, asked)
    return await _shown(services, principal.project, asked, lines, thinking)


def _from_file(path: Path, asked: schema.PreviewFile) -> tuple[list[dict[str, Any]], bool]:
    with path.open("rb") as file:
        lines = _picked(file, asked)
    with path.open("rb") as file:
        return lines, _thinks(file, asked)


def _from_lines(lines: list[bytes], asked: schema.PreviewFile) -> tuple[list[dict[str, Any]], bool]:
    return _picked(lines, asked), _thinks(lines, asked)


def _picked(lines: Iterable[bytes], asked: schema.PreviewFile) -> list[dict[str, Any]]:
    """Return the lines that were asked for. Raises: InvalidRequest when the file has fewer, or a longer one."""
    first = (asked.line or 1) - 1
    found = list(islice(enumerate(lines, start=1), first, first + (asked.count or 1)))
    if not found:
        raise InvalidRequest(f"The file has no line {first + 1}.", code="invalid_value", param="line")
    if any(len(line) > MAX_LINE_BYTES for _, line in found):
        raise InvalidRequest(f"A line has more than {MAX_LINE_BYTES >> 20} MB.", code="invalid_value", param="line")
    return [{"number": number, "text": line.decode("utf-8", "replace")} for number, line in found]


def _thinks(lines: Iterable[bytes], asked: schema.PreviewFile) -> bool:
    """Say whether a job on the file would train with thinking on."""
    if asked.thinking not in (None, "auto"):
        return asked.thinking == "on"
    return thinks(lines)


async def _shown(
    services: Services, project: str, asked: schema.PreviewFile, lines: list[dict[str, Any]], thinking: bool
) -> Preview:
    target = target_of(await find_model(services, project, asked.model), project)
    wanted = {"rose": msgspec.to_builtins(target), "lines": lines, "thinking": thinking}
    given = await ask_engine(
        services, project, target.base.fingerprint, lambda place: services.engines.preview(place.url, wanted)
    )
    return msgspec.convert(given, Preview)


HANDLERS = (preview_file, preview_content)
