"""`/v1/files`: upload straight into the blob folder, list, read, delete."""

from __future__ import annotations

import time
from typing import Any

import anyio
import anyio.to_thread
import msgspec
from litestar import Response
from litestar.params import FromPath
from msgspec import UNSET

from projections import files as files_view
from projections.damage import DamagedRow
from rose.api import schema, wire
from rose.api.asking import asked, stored_answer
from rose.api.decoding import read_query
from rose.api.errors import AnyRequest
from rose.api.multipart import Upload, read_upload
from rose.api.principal import ThePrincipal
from rose.api.receiving import (
    FORM_OVERHEAD_BYTES,
    clean_filename,
    drain,
    in_time,
)
from rose.api.routes import delete, get, post
from rose.api.services import Services, TheServices
from rose.blobs import TemporaryBlob
from rose.decoding import check_values, convert
from rose.domain.files import AddFile, FileState
from rose.errors import InvalidRequest, LimitReached, TooLarge
from rose.ids import new_id
from rose.missing import missing_file
from rose.quotas import require_bytes


@post("/v1/files", answer=schema.File, form=schema.FileForm, request_max_body_size=None)
async def create_file(request: AnyRequest, services: TheServices, principal: ThePrincipal) -> Response[Any]:
    """Store an upload. What is cut off or refused leaves nothing behind."""
    settings = services.settings
    announced = request.content_length or 0
    if announced > settings.max_upload_bytes + FORM_OVERHEAD_BYTES:
        raise TooLarge(
            f"The upload has {announced} bytes; a file may have {settings.max_upload_bytes}.",
            param="file",
            hint="Send it in parts (POST /v1/uploads), or let the server's setting max_upload_bytes allow more.",
        )
    await anyio.to_thread.run_sync(services.blobs.require_space, announced, settings.min_free_bytes)
    at_least = max(announced - FORM_OVERHEAD_BYTES, 0)
    try:
        await require_bytes(services.pool, principal.project, at_least, settings.max_project_bytes)
    except LimitReached:
        await drain(request.stream())
        raise
    blob = await anyio.to_thread.run_sync(services.blobs.open_temporary, "upload")
    try:
        filename, purpose, lifetime = await _receive(request, settings.max_upload_bytes, blob)
        return await _store(request, services, principal.project, blob, filename, purpose, lifetime)
    finally:
        blob.discard()


async def _receive(request: AnyRequest, max_bytes: int, blob: TemporaryBlob) -> tuple[str, str, int | None]:
    """Read the upload into `blob` and return file name, purpose and lifetime in seconds."""
    chunks = in_time(request.stream())
    content_type = request.headers.get("content-type", "")
    try:
        upload = await read_upload(chunks, content_type, blob.write, file_field="file", max_bytes=max_bytes)
        return _check(upload)
    except (InvalidRequest, TooLarge):
        await drain(chunks)
        raise


async def _store(
    request: AnyRequest,
    services: Services,
    project: str,
    blob: TemporaryBlob,
    filename: str,
    purpose: str,
    lifetime: int | None,
) -> Response[Any]:
    # The rename and the event belong together: a client that leaves now must not leave a blob without its event.
    with anyio.CancelScope(shield=True):
        return await _publish(request, services, project, blob, filename, purpose, lifetime)
    raise AssertionError("a shielded scope swallows nothing")


async def _publish(
    request: AnyRequest,
    services: Services,
    project: str,
    blob: TemporaryBlob,
    filename: str,
    purpose: str,
    lifetime: int | None,
) -> Response[Any]:
    file_id = new_id("file_")
    path = f"files/{file_id}"
    artifact = await anyio.to_thread.run_sync(blob.commit, path)
    content = msgspec.json.encode([filename, purpose, lifetime, artifact.sha256])
    now = int(time.time())
    command = AddFile(
        project=project,
        file_id=file_id,
        at=now,
        filename=filename,
        purpose=purpose,
        artifact=artifact,
        expires_at=None if lifetime is None else now + lifetime,
    )
    try:
        asking, answered = await asked(request, services, content)
        if answered is None:
            most = services.settings.max_project_bytes
            outcome = await services.commands.add_file(command, asking, respond=_encoded, most_bytes=most)
            if not outcome.replayed:
                return Response(wire.file(outcome.state), status_code=200)
            answered = outcome.response or _encoded(outcome.state)
    except (InvalidRequest, LimitReached):
        await anyio.to_thread.run_sync(services.blobs.delete, path)
        raise
    # Only here and above is it certain that no event names the blob; after an unknown outcome the sweeper decides.
    await anyio.to_thread.run_sync(services.blobs.delete, path)
    return stored_answer(answered)


@get("/v1/files", query=schema.FilesQuery)
async def list_files(
    request: AnyRequest, services: TheServices, principal: ThePrincipal
) -> schema.Listing[schema.File]:
    """List the files that can be used, newest first unless `order=asc`."""
    query = read_query(request, schema.FilesQuery)
    found = await files_view.page(
        services.pool,
        principal.project,
        limit=query.limit,
        now=int(time.time()),
        after=query.after or None,
        purpose=query.purpose or None,
        order=query.order,
    )
    data = [wire.file(state) for state in found.entries]
    return wire.listing(data, has_more=found.has_more, none="")


@get("/v1/files/{file_id:str}")
async def get_file(services: TheServices, principal: ThePrincipal, file_id: FromPath[str]) -> schema.File:
    """Describe one file."""
    try:
        return wire.file(await usable(services, principal.project, file_id))
    except DamagedRow as error:
        return wire.file(error.remains)


@delete("/v1/files/{file_id:str}", answer=schema.Deleted)
async def delete_file(
    request: AnyRequest, services: TheServices, principal: ThePrincipal, file_id: FromPath[str]
) -> Response[Any]:
    """End a file's use for new requests; unfinished jobs that name it keep its content."""
    asking, answered = await asked(request, services, b"")
    if answered is not None:
        return stored_answer(answered)
    await usable(services, principal.project, file_id)
    gone = schema.Deleted(id=file_id, object="file")
    await services.commands.delete_file(file_id, int(time.time()), asking, respond=lambda _: msgspec.json.encode(gone))
    return Response(gone, status_code=200)


async def usable(services: Services, project: str, file_id: str) -> FileState:
    """Return the project's file. Raises: NotFound, DamagedRow."""
    check_values({"id": file_id})
    state = await files_view.get(services.pool, project, file_id, now=int(time.time()))
    if state is None:
        raise missing_file(file_id)
    return state


def _encoded(state: FileState) -> bytes:
    return msgspec.json.encode(wire.file(state))


def _check(upload: Upload) -> tuple[str, str, int | None]:
    """Return file name, purpose and lifetime in seconds. Raises: InvalidRequest naming the field."""
    check_values(upload.fields)
    if "expires_after" in upload.fields:
        raise InvalidRequest(
            "expires_after is two fields of a form: expires_after[anchor] and expires_after[seconds].",
            code="invalid_type",
            param="expires_after",
        )
    given = upload.fields if upload.filename is None else {**upload.fields, "file": upload.filename}
    form = convert(given, schema.FileForm, texts=True)
    filename = clean_filename(form.file, form.purpose, "file")
    if upload.bytes == 0:
        raise InvalidRequest(f"The file {filename!r} is empty.", code="empty_file", param="file")
    if (form.anchor is UNSET) != (form.seconds is UNSET):
        lacking = "expires_after[anchor]" if form.anchor is UNSET else "expires_after[seconds]"
        raise InvalidRequest(
            f"Missing required parameter: {lacking}.", code="missing_required_parameter", param=lacking
        )
    return filename, form.purpose, None if form.seconds is UNSET else form.seconds


HANDLERS = (create_file, list_files, get_file, delete_file)
