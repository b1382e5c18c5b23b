"""`/v1/uploads`: a large file in parts, in parallel and in any order."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator
from typing import Any, Literal

import anyio
import anyio.to_thread
import msgspec
from litestar import Response
from litestar.openapi.spec import OpenAPIType, Schema
from litestar.params import FromPath

from rose.api import wire
from rose.api.asking import asked, stored_answer
from rose.api.body import check_values, optional_object, read_object, require_text, wrong_type
from rose.api.errors import AnyRequest
from rose.api.multipart import read_upload
from rose.api.principal import ThePrincipal
from rose.api.receiving import (
    FORM_OVERHEAD_BYTES,
    PURPOSES,
    check_lifetime,
    check_purpose,
    clean_filename,
    drain,
    in_time,
)
from rose.api.routes import BINARY, TEXT, WHOLE, get, listing, optional, post, record
from rose.api.services import Services, TheServices
from rose.blobs import TemporaryBlob
from rose.domain.files import FileState
from rose.domain.uploads import MAX_PART_BYTES, MAX_PARTS, CreateUpload, Status, UploadState, check_open
from rose.errors import InvalidRequest, RoseError, TooLarge
from rose.ids import new_id
from rose.uploads import Uploads

CREATE = record(
    ("bytes", "filename", "mime_type", "purpose"),
    bytes=WHOLE,
    filename=TEXT,
    mime_type=TEXT,
    purpose=Schema(type=OpenAPIType.STRING, enum=list(PURPOSES)),
    expires_after=optional(record(("anchor", "seconds"), anchor=TEXT, seconds=WHOLE)),
)
COMPLETE = record(("part_ids",), part_ids=listing(TEXT), md5=optional(TEXT))
PART_FORM = record(("data",), data=BINARY)
_MD5 = re.compile(r"[0-9a-f]{32}")


class Upload(msgspec.Struct, frozen=True, kw_only=True):
    """A file that comes in parts."""

    id: str
    object: Literal["upload"] = "upload"
    bytes: int
    """Size of the whole file, as it was announced."""
    created_at: int
    expires_at: int
    """When it is too late for parts and completion."""
    filename: str
    purpose: str
    status: Status
    file: wire.File | None
    """The file, once the upload is completed."""


class UploadPart(msgspec.Struct, frozen=True, kw_only=True):
    """A part that arrived."""

    id: str
    object: Literal["upload.part"] = "upload.part"
    created_at: int
    upload_id: str


@post("/v1/uploads", answer=Upload, body=CREATE)
async def create_upload(request: AnyRequest, services: TheServices, principal: ThePrincipal) -> Response[Any]:
    """Announce a file that will come in parts."""
    body = await read_object(request)
    purpose = check_purpose(require_text(body, "purpose"))
    filename = clean_filename(require_text(body, "filename"), purpose, "filename")
    size = _size(body, services.settings.max_upload_in_parts_bytes)
    mime_type = require_text(body, "mime_type", maximum=255)
    lifetime = _lifetime(body)
    asking, answered = await asked(request, services, await request.body())
    if answered is not None:
        return stored_answer(answered)
    # While the file is made of its parts, both lie there.
    await anyio.to_thread.run_sync(services.blobs.require_space, 2 * size, services.settings.min_free_bytes)
    now = int(time.time())
    command = CreateUpload(
        project=principal.project,
        upload_id=new_id("upload_"),
        at=now,
        filename=filename,
        purpose=purpose,
        bytes=size,
        mime_type=mime_type,
        file_lifetime_seconds=lifetime,
    )
    outcome = await _uploads(services).create(command, asking, lambda state: _encoded(state, now))
    return stored_answer(outcome.response) if outcome.response and outcome.replayed else _ok(outcome.state, now)


@get("/v1/uploads/{upload_id:str}")
async def get_upload(services: TheServices, principal: ThePrincipal, upload_id: FromPath[str]) -> Upload:
    """Describe an upload."""
    check_values({"upload_id": upload_id})
    state = await _uploads(services).get(principal.project, upload_id)
    return _upload(state, int(time.time()), await _uploads(services).file_of(state))


@post("/v1/uploads/{upload_id:str}/parts", answer=UploadPart, form=PART_FORM, request_max_body_size=None)
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


@post("/v1/uploads/{upload_id:str}/complete", answer=Upload, body=COMPLETE)
async def complete_upload(
    request: AnyRequest, services: TheServices, principal: ThePrincipal, upload_id: FromPath[str]
) -> Response[Any]:
    """Make a file of the parts, in the order of `part_ids`. The same again gives the same answer."""
    check_values({"upload_id": upload_id})
    body = await read_object(request)
    part_ids, md5 = _part_ids(body), _md5(body)
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


@post("/v1/uploads/{upload_id:str}/cancel", answer=Upload)
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
    part = UploadPart(id=part_id, created_at=now, upload_id=upload_id)
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


def _upload(state: UploadState, now: int, file: FileState | None = None) -> Upload:
    return Upload(
        id=state.id,
        bytes=state.bytes,
        created_at=state.created_at,
        expires_at=state.expires_at,
        filename=state.filename,
        purpose=state.purpose,
        status=state.status(now),
        file=None if file is None else wire.file(file),
    )


def _encoded(state: UploadState, now: int, file: FileState | None = None) -> bytes:
    return msgspec.json.encode(_upload(state, now, file))


def _ok(state: UploadState, now: int, file: FileState | None = None) -> Response[Any]:
    return Response(_upload(state, now, file), status_code=200)


def _too_large() -> InvalidRequest:
    return InvalidRequest(
        f"data is larger than a part may be: {MAX_PART_BYTES} bytes.", code="part_too_large", param="data"
    )


def _size(body: dict[str, Any], most: int) -> int:
    size = body.get("bytes")
    if size is None:
        raise InvalidRequest("Missing required parameter: bytes.", code="missing_required_parameter", param="bytes")
    if not isinstance(size, int) or isinstance(size, bool):
        wrong_type("bytes", "a whole number", size)
    if not 0 <= size <= most:
        raise InvalidRequest(f"bytes is {size}; it must be from 0 to {most}.", code="invalid_value", param="bytes")
    return size


def _lifetime(body: dict[str, Any]) -> int | None:
    given = optional_object(body, "expires_after")
    if given is None:
        return None
    seconds = given.get("seconds")
    if seconds is not None and (not isinstance(seconds, int) or isinstance(seconds, bool)):
        wrong_type("expires_after.seconds", "a whole number", seconds)
    return check_lifetime(
        given.get("anchor"), seconds, anchor_param="expires_after.anchor", seconds_param="expires_after.seconds"
    )


def _part_ids(body: dict[str, Any]) -> tuple[str, ...]:
    given = body.get("part_ids")
    if given is None:
        raise InvalidRequest(
            "Missing required parameter: part_ids.", code="missing_required_parameter", param="part_ids"
        )
    if not isinstance(given, list):
        wrong_type("part_ids", "a list of part ids", given)
    if len(given) > MAX_PARTS:
        raise InvalidRequest(
            f"part_ids has {len(given)} entries; an upload has at most {MAX_PARTS} parts.",
            code="invalid_value",
            param="part_ids",
        )
    for index, part_id in enumerate(given):
        if not isinstance(part_id, str):
            wrong_type(f"part_ids[{index}]", "a string", part_id)
    return tuple(given)


def _md5(body: dict[str, Any]) -> str | None:
    given = body.get("md5")
    if given is None:
        return None
    if not isinstance(given, str):
        wrong_type("md5", "a string", given)
    if not _MD5.fullmatch(given.lower()):
        raise InvalidRequest(
            f"md5 is {given[:80]!r}; it must be 32 hexadecimal digits.", code="invalid_value", param="md5"
        )
    return given.lower()


HANDLERS = (create_upload, get_upload, add_part, complete_upload, cancel_upload)
