"""`/v1/uploads`: a large file in parts, in parallel and in any order."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator
from typing import Any

import anyio
import anyio.to_thread
import msgspec
from litestar import Response
from litestar.params import FromPath

from rose.api import schema, wire
from rose.api.asking import asked, stored_answer
from rose.api.decoding import read_body
from rose.api.errors import AnyRequest
from rose.api.multipart import read_upload
from rose.api.principal import ThePrincipal
from rose.api.receiving import (
    FORM_OVERHEAD_BYTES,
    clean_filename,
    drain,
    in_time,
)
from rose.api.routes import get, post
from rose.api.services import Services, TheServices
from rose.blobs import TemporaryBlob
from rose.decoding import check_values
from rose.domain.files import FileState
from rose.domain.uploads import MAX_PART_BYTES, CreateUpload, UploadState, check_open
from rose.errors import InvalidRequest, RoseError, TooLarge
from rose.ids import new_id
from rose.uploads import Uploads

_MD5 = re.compile(r"[0-9a-f]{32}", re.IGNORECASE)


@post("/v1/uploads", answer=schema.Upload, body=schema.CreateUpload)
async def create_upload(request: AnyRequest, services: TheServices, principal: ThePrincipal) -> Response[Any]:
    """Announce a file that will come in parts."""
    body = await read_body(request, schema.CreateUpload)
    filename = clean_filename(body.filename, body.purpose, "filename")
    most = services.settings.max_upload_in_parts_bytes
    if body.bytes > most:
        raise InvalidRequest(
            f"bytes is {body.bytes}; it must be from 0 to {most}.", code="invalid_value", param="bytes"
        )
    asking, answered = await asked(request, services, await request.body())
    if answered is not None:
        return stored_answer(answered)
    # While the file is made of its parts, both lie there.
    await anyio.to_thread.run_sync(services.blobs.require_space, 2 * body.bytes, services.settings.min_free_bytes)
    now = int(time.time())
    command = CreateUpload(
        project=principal.project,
        upload_id=new_id("upload_"),
        at=now,
        filename=filename,
        purpose=body.purpose,
        bytes=body.bytes,
        mime_type=body.mime_type,
        file_lifetime_seconds=body.expires_after.seconds if body.expires_after else None,
    )
    outcome = await _uploads(services).create(
        command, asking, lambda state: _encoded(state, now), most_bytes=services.settings.max_project_bytes
    )
    return stored_answer(outcome.response) if outcome.response and outcome.replayed else _ok(outcome.state, now)


@get("/v1/uploads/{upload_id:str}")
async def get_upload(services: TheServices, principal: ThePrincipal, upload_id: FromPath[str]) -> schema.Upload:
    """Describe an upload."""
    check_values({"upload_id": upload_id})
    state = await _uploads(services).get(principal.project, upload_id)
    return wire.upload(state, int(time.time()), await _uploads(services).file_of(state))


@post("/v1/uploads/{upload_id:str}/parts", answer=schema.UploadPart, form=schema.PartForm, request_max_body_size=None)
async def add_part(
    request: AnyRequest, services: TheServices, principal: ThePrincipal, upload_id: FromPath[str]
) -> Response[Any]:
    """Store a part. What is cut off or refused leaves nothing behind."""
    check_values({"upload_id": upload_id})
    chunks = in_time(request.stream())
    announced = request.content_length or 0
    try:
        check_open(await _uploads(services).get(principal.project, upload_id), int(time.time()))
        if announced > MAX_PART_BYTES + FORM_OVERHEAD_BYTES:
            raise _too_large()
        await anyio.to_thread.run_sync(services.blobs.require_space, announced, services.settings.min_free_bytes)
        blob = await anyio.to_thread.run_sync(services.blobs.open_temporary, "part")
        with blob:
            await _receive(chunks, request.headers.get("content-type", ""), blob)
            # The rename and the event belong together, as for a file that comes in one piece.
            with anyio.CancelScope(shield=True):
                return await _add(request, services, principal.project, upload_id, blob)
    except RoseError:
        await drain(chunks)
        raise
    raise AssertionError("a shielded scope swallows nothing")


@post("/v1/uploads/{upload_id:str}/complete", answer=schema.Upload, body=schema.CompleteUpload)
async def complete_upload(
    request: AnyRequest, services: TheServices, principal: ThePrincipal, upload_id: FromPath[str]
) -> Response[Any]:
    """Make a file of the parts, in the order of `part_ids`. The same again gives the same answer."""
    check_values({"upload_id": upload_id})
    body = await read_body(request, schema.CompleteUpload)
    part_ids, md5 = tuple(body.part_ids), _md5(body.md5)
    asking, answered = await asked(request, services, await request.body())
    if answered is not None:
        return stored_answer(answered)
    now = int(time.time())
    done = await _uploads(services).complete(
        principal.project,
        upload_id,
        part_ids,
        md5,
        now,
        asking,
        lambda state, file: _encoded(state, now, file),
    )
    return stored_answer(done.response) if done.response else _ok(done.state, now, done.file)


@post("/v1/uploads/{upload_id:str}/cancel", answer=schema.Upload)
async def cancel_upload(
    request: AnyRequest, services: TheServices, principal: ThePrincipal, upload_id: FromPath[str]
) -> Response[Any]:
    """Give an upload up; its parts are removed."""
    check_values({"upload_id": upload_id})
    asking, answered = await asked(request, services, b"")
    if answered is not None:
        return stored_answer(answered)
    now = int(time.time())
    outcome = await _uploads(services).cancel(
        principal.project, upload_id, now, asking, lambda state: _encoded(state, now)
    )
    return _ok(outcome.state, now)


async def _receive(chunks: AsyncIterator[bytes], content_type: str, blob: TemporaryBlob) -> None:
    try:
        form = await read_upload(chunks, content_type, blob.write, file_field="data", max_bytes=MAX_PART_BYTES)
    except TooLarge:
        raise _too_large() from None
    if form.filename is None:
        raise InvalidRequest("Missing required parameter: data.", code="missing_required_parameter", param="data")


async def _add(
    request: AnyRequest, services: Services, project: str, upload_id: str, blob: TemporaryBlob
) -> Response[Any]:
    part_id, now = new_id("part_"), int(time.time())
    part = schema.UploadPart(id=part_id, created_at=now, upload_id=upload_id)
    # Two parts may be equal, so only a key says that this one was sent before.
    content = blob.sha256 if request.headers.get("idempotency-key") else part_id
    asking, answered = await asked(request, services, content.encode())
    if answered is not None:
        return stored_answer(answered)
    outcome = await _uploads(services).add_part(
        project, upload_id, part_id, blob, now, asking, msgspec.json.encode(part)
    )
    if outcome.replayed and outcome.response:
        return stored_answer(outcome.response)
    return Response(part, status_code=200)


def _uploads(services: Services) -> Uploads:
    floor = services.settings.min_free_bytes
    return Uploads(services.pool, services.blobs, services.commands, min_free_bytes=floor)


def _encoded(state: UploadState, now: int, file: FileState | None = None) -> bytes:
    return msgspec.json.encode(wire.upload(state, now, file))


def _ok(state: UploadState, now: int, file: FileState | None = None) -> Response[Any]:
    return Response(wire.upload(state, now, file), status_code=200)


def _too_large() -> InvalidRequest:
    return InvalidRequest(
        f"data is larger than a part may be: {MAX_PART_BYTES} bytes.", code="part_too_large", param="data"
    )


def _md5(given: str | None) -> str | None:
    if given is not None and not _MD5.fullmatch(given):
        raise InvalidRequest(
            f"md5 is {given[:80]!r}; it must be 32 hexadecimal digits.", code="invalid_value", param="md5"
        )
    return given and given.lower()


HANDLERS = (create_upload, get_upload, add_part, complete_upload, cancel_upload)
