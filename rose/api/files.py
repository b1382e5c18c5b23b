"""`/v1/files`: upload straight into the blob folder, list, read, delete."""

from __future__ import annotations

import hashlib
import time
import unicodedata
from collections.abc import AsyncIterator
from typing import Any, cast
from urllib.parse import quote

import anyio
import anyio.to_thread
import msgspec
from litestar import Response
from litestar.openapi.spec import OpenAPIType, Schema
from litestar.params import FromPath
from litestar.response import Stream

from projections import files as files_view
from rose.api import wire
from rose.api.asking import asked, stored_answer
from rose.api.body import check_values, query_choice, query_page
from rose.api.errors import AnyRequest, SlowRequest
from rose.api.multipart import Upload, read_upload
from rose.api.principal import ThePrincipal
from rose.api.routes import AFTER, BINARY, TEXT, choice, delete, get, limit, post, record, text
from rose.api.services import Services, TheServices
from rose.blobs import BlobMismatch, TemporaryBlob
from rose.domain.artifacts import Artifact
from rose.domain.files import AddFile, FileState
from rose.domain.training_data import check_name
from rose.errors import InvalidRequest, NoSpace, NotFound, TooLarge
from rose.ids import new_id

PURPOSES = ("assistants", "batch", "fine-tune", "vision", "user_data", "evals")
MAX_FILENAME_CHARACTERS = 255
MAX_LISTED = 10_000
SHORTEST_LIFE_SECONDS = 3600
LONGEST_LIFE_SECONDS = 2_592_000
FORM_OVERHEAD_BYTES = 1 << 20
READ_BYTES = 1 << 18
SILENCE_SECONDS = 60.0
"""How long an upload may stand still."""
UPLOAD_FORM = record(
    ("file", "purpose"),
    file=BINARY,
    purpose=Schema(type=OpenAPIType.STRING, enum=list(PURPOSES)),
    **{"expires_after[anchor]": TEXT, "expires_after[seconds]": TEXT},
)
DRAIN_SECONDS = 20.0
"""How long the rest of a refused upload is read and thrown away, so that the client gets to see the refusal."""


@post("/v1/files", answer=wire.File, form=UPLOAD_FORM, request_max_body_size=None)
async def create_file(request: AnyRequest, services: TheServices, principal: ThePrincipal) -> Response[Any]:
    """Store an upload. What is cut off or refused leaves nothing behind."""
    settings = services.settings
    free = await anyio.to_thread.run_sync(services.blobs.free_bytes)
    announced = request.content_length or 0
    if announced > settings.max_upload_bytes + FORM_OVERHEAD_BYTES:
        raise TooLarge(
            f"The upload has {announced} bytes; a file may have {settings.max_upload_bytes}.",
            param="file",
            hint="The server's setting max_upload_bytes allows more.",
        )
    if free - announced < settings.min_free_bytes:
        raise NoSpace(
            f"Only {free >> 20} MB are free for an upload of {announced >> 20} MB.",
            hint="Make room on that disk; `rose models delete` and `rose files delete` free theirs a day later.",
        )
    blob = await anyio.to_thread.run_sync(services.blobs.open_temporary, "upload")
    try:
        filename, purpose, lifetime = await _receive(request, settings.max_upload_bytes, blob)
        return await _store(request, services, principal.project, blob, filename, purpose, lifetime)
    finally:
        blob.discard()


async def _receive(request: AnyRequest, max_bytes: int, blob: TemporaryBlob) -> tuple[str, str, int | None]:
    """Read the upload into `blob` and return file name, purpose and lifetime in seconds."""
    chunks = _in_time(request.stream())
    content_type = request.headers.get("content-type", "")
    try:
        upload = await read_upload(chunks, content_type, blob.write, file_field="file", max_bytes=max_bytes)
        return _check(upload)
    except (InvalidRequest, TooLarge):
        await _drain(chunks)
        raise


async def _in_time(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yield what comes. Raises: SlowRequest when nothing more comes for a while."""
    while True:
        try:
            with anyio.fail_after(SILENCE_SECONDS):
                chunk = await anext(chunks)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise SlowRequest(f"The upload was silent for {SILENCE_SECONDS:.0f} seconds.") from None
        yield chunk


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
            outcome = await services.commands.add_file(command, asking, respond=_encoded)
            if not outcome.replayed:
                return Response(wire.file(outcome.state), status_code=200)
            answered = outcome.response or _encoded(outcome.state)
    except InvalidRequest:
        await anyio.to_thread.run_sync(services.blobs.delete, path)
        raise
    # Only here and above is it certain that no event names the blob; after an unknown outcome the sweeper decides.
    await anyio.to_thread.run_sync(services.blobs.delete, path)
    return stored_answer(answered)


@get(
    "/v1/files",
    queries=(
        limit(MAX_LISTED, MAX_LISTED),
        AFTER,
        choice("order", ("asc", "desc"), "By creation; newest first is the default."),
        text("purpose", "Only files of this purpose."),
    ),
)
async def list_files(request: AnyRequest, services: TheServices, principal: ThePrincipal) -> wire.Listing[wire.File]:
    """List the files that can be used, newest first unless `order=asc`."""
    page = query_page(request, default=MAX_LISTED, maximum=MAX_LISTED)
    order = query_choice(request, "order", ("asc", "desc"), "desc")
    purpose = request.query_params.get("purpose") or None
    check_values({"after": page.after, "purpose": purpose})
    found = await files_view.page(
        services.pool,
        principal.project,
        limit=page.limit,
        now=int(time.time()),
        after=page.after,
        purpose=purpose,
        order=cast(files_view.Order, order),
    )
    data = [wire.file(state) for state in found.entries]
    return wire.listing(data, has_more=found.has_more, none="")


@get("/v1/files/{file_id:str}")
async def get_file(services: TheServices, principal: ThePrincipal, file_id: FromPath[str]) -> wire.File:
    """Describe one file."""
    return wire.file(await _usable(services, principal.project, file_id))


@delete("/v1/files/{file_id:str}", answer=wire.Deleted)
async def delete_file(
    request: AnyRequest, services: TheServices, principal: ThePrincipal, file_id: FromPath[str]
) -> Response[Any]:
    """End a file's use for new requests; unfinished jobs that name it keep its content."""
    asking, answered = await asked(request, services, b"")
    if answered is not None:
        return stored_answer(answered)
    await _usable(services, principal.project, file_id)
    gone = wire.Deleted(id=file_id, object="file")
    await services.commands.delete_file(file_id, int(time.time()), asking, respond=lambda _: msgspec.json.encode(gone))
    return Response(gone, status_code=200)


@get("/v1/files/{file_id:str}/content", other="application/octet-stream")
async def get_file_content(services: TheServices, principal: ThePrincipal, file_id: FromPath[str]) -> Stream:
    """Send the bytes of a file."""
    state = await _usable(services, principal.project, file_id)
    assert state.artifact is not None
    path = anyio.Path(services.blobs.path(state.artifact.path))
    size = (await path.stat()).st_size if await path.is_file() else None
    if size != state.artifact.bytes:
        what = "is missing" if size is None else f"has {size} bytes, not {state.artifact.bytes}"
        raise BlobMismatch(f"The content of {file_id} {what} in the blob folder.")
    return Stream(
        _verified(path, state.artifact),
        media_type="application/octet-stream",
        headers={
            "content-length": str(state.artifact.bytes),
            "content-disposition": attachment(state.filename),
        },
    )


@post("/v1/uploads")
async def refuse_upload_in_parts() -> None:
    """Say how a large file goes up here. Raises: NotFound."""
    raise NotFound(
        "ROSE takes a file in one piece, not in parts.",
        code="unsupported_endpoint",
        hint="Use POST /v1/files; the server's setting max_upload_bytes says how large a file may be.",
    )


async def read_blob(path: anyio.Path) -> AsyncIterator[bytes]:
    """Yield a file in pieces; it stays readable when it is deleted meanwhile."""
    async with await path.open("rb") as file:
        while piece := await file.read(READ_BYTES):
            yield piece


async def _verified(path: anyio.Path, artifact: Artifact) -> AsyncIterator[bytes]:
    """Yield a file; its last piece only once the hash of all of it is right, so that damage breaks the download off."""
    digest = hashlib.sha256()
    held_back = b""
    async for piece in read_blob(path):
        if held_back:
            yield held_back
        held_back = piece
        await anyio.to_thread.run_sync(digest.update, piece)
    if digest.hexdigest() != artifact.sha256:
        raise BlobMismatch(f"{path} has other content than when it was written (SHA-256 differs).")
    yield held_back


def attachment(filename: str) -> str:
    """Return a content-disposition that carries any file name, by RFC 6266."""
    plain = unicodedata.normalize("NFKD", filename).encode("ascii", "ignore").decode()
    plain = "".join(c if c.isprintable() and c not in '"\\' else "_" for c in plain) or "file"
    extended = "" if plain == filename else f"; filename*=UTF-8''{quote(filename, safe='')}"
    return f'attachment; filename="{plain}"{extended}'


async def _usable(services: Services, project: str, file_id: str) -> FileState:
    check_values({"id": file_id})
    state = await files_view.get(services.pool, project, file_id, now=int(time.time()))
    if state is None:
        error = NotFound(f"No such File object: {file_id}", param="id")
        error.code = None
        raise error
    return state


def _encoded(state: FileState) -> bytes:
    return msgspec.json.encode(wire.file(state))


async def _drain(chunks: AsyncIterator[bytes]) -> None:
    with anyio.move_on_after(DRAIN_SECONDS):
        async for _ in chunks:
            pass


def _check(upload: Upload) -> tuple[str, str, int | None]:
    """Return file name, purpose and lifetime in seconds. Raises: InvalidRequest naming the field."""
    check_values(upload.fields)
    purpose = upload.fields.get("purpose", "")
    if not purpose:
        raise InvalidRequest(
            f"Missing required parameter: purpose (one of {', '.join(PURPOSES)}).",
            code="missing_required_parameter",
            param="purpose",
        )
    if purpose not in PURPOSES:
        raise InvalidRequest(
            f"purpose is {purpose[:80]!r}; it must be one of {', '.join(PURPOSES)}.",
            code="invalid_value",
            param="purpose",
        )
    if upload.filename is None:
        raise InvalidRequest("Missing required parameter: file.", code="missing_required_parameter", param="file")
    filename = _clean_filename(upload.filename)
    if upload.bytes == 0:
        raise InvalidRequest(f"The file {filename!r} is empty.", code="empty_file", param="file")
    if purpose == "fine-tune":
        check_name(filename, "file")
    return filename, purpose, _lifetime(upload.fields)


def _clean_filename(given: str) -> str:
    """Return the last part of a file name. Raises: InvalidRequest when nothing usable is left."""
    check_values({"file.filename": given})
    name = given.replace("\\", "/").rpartition("/")[2].strip()
    if not name or name in (".", "..") or len(name) > MAX_FILENAME_CHARACTERS or not name.isprintable():
        raise InvalidRequest(
            f"The file needs a name of 1 to {MAX_FILENAME_CHARACTERS} printable characters.",
            code="invalid_value",
            param="file",
        )
    return name


def _lifetime(fields: dict[str, str]) -> int | None:
    if "expires_after" in fields:
        raise InvalidRequest(
            "expires_after is two fields of a form: expires_after[anchor] and expires_after[seconds].",
            code="invalid_type",
            param="expires_after",
        )
    anchor = fields.get("expires_after[anchor]")
    seconds = fields.get("expires_after[seconds]")
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at":
        raise InvalidRequest(
            "expires_after[anchor] must be created_at.", code="invalid_value", param="expires_after[anchor]"
        )
    usable = seconds is not None and seconds.isascii() and seconds.isdigit() and len(seconds) < 10
    if not usable or not SHORTEST_LIFE_SECONDS <= int(seconds or 0) <= LONGEST_LIFE_SECONDS:
        raise InvalidRequest(
            f"expires_after[seconds] must be a whole number from {SHORTEST_LIFE_SECONDS} to {LONGEST_LIFE_SECONDS}.",
            code="invalid_value",
            param="expires_after[seconds]",
        )
    return int(seconds or 0)


HANDLERS = (create_file, list_files, get_file, delete_file, get_file_content, refuse_upload_in_parts)
