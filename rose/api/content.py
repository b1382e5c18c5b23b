"""`/v1/files/{id}/content`: the bytes of a file, all of them or one range (RFC 9110, sections 13 and 14).

A content never changes, so its SHA-256 is its strong entity tag. A whole download is checked against it on the way; of
a range only the size of the file is known to be right.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import quote

import anyio
import anyio.to_thread
import litestar
import msgspec
from litestar import Response
from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.spec import Parameter
from litestar.params import FromPath
from litestar.response import Stream

from rose.api.errors import AnyRequest, answer
from rose.api.files import usable
from rose.api.principal import ThePrincipal
from rose.api.routes import TEXT, get
from rose.api.schema import ErrorAnswer
from rose.api.services import Services, TheServices
from rose.blobs import BlobMismatch
from rose.domain.artifacts import Artifact
from rose.errors import PreconditionFailed, RangeNotSatisfiable

READ_BYTES = 1 << 18
BINARY = "application/octet-stream"
_RANGE = re.compile(r"(?P<first>\d{0,18})-(?P<last>\d{0,18})", re.ASCII)
"""One range; a longer number than any file has bytes makes it another syntax."""
_TAG = re.compile(r'(?:W/)?"[^"]*"')


class ByteRange(msgspec.Struct, frozen=True):
    """A part of a content: the bytes `first` to `last`, counted from 0, both included."""

    first: int
    last: int

    @property
    def bytes(self) -> int:
        """How many bytes that are."""
        return self.last - self.first + 1


RANGE = Parameter(
    "Range", "header", schema=TEXT, description="One range of bytes, for example `bytes=0-99`; several get everything."
)
IF_RANGE = Parameter(
    "If-Range", "header", schema=TEXT, description="An entity tag: the range is sent only while the content has it."
)
ANSWERS = {
    206: ResponseSpec(str, generate_examples=False, description="The range that was asked for.", media_type=BINARY),
    304: ResponseSpec(None, generate_examples=False, description="The content is one of `If-None-Match`."),
    412: ResponseSpec(ErrorAnswer, generate_examples=False, description="The content is none of `If-Match`."),
    416: ResponseSpec(ErrorAnswer, generate_examples=False, description="The file has no byte in the range."),
}


@get("/v1/files/{file_id:str}/content", other=BINARY, queries=(RANGE, IF_RANGE), responses=ANSWERS)
async def get_file_content(
    request: AnyRequest, services: TheServices, principal: ThePrincipal, file_id: FromPath[str]
) -> Response[Any]:
    """Send the bytes of a file, or the range of them that the header `Range` asks for."""
    artifact, headers = await _described(services, principal, file_id)
    tag = headers["etag"]
    wanted = request.headers.get("if-match")
    if wanted is not None and not _names(wanted, tag, weak=False):
        return answer(PreconditionFailed(f"The content of {file_id} has the entity tag {tag}.", param="If-Match"))
    known = request.headers.get("if-none-match")
    if known is not None and _names(known, tag, weak=True):
        return Response(None, status_code=304, headers={"etag": tag})
    path = anyio.Path(services.blobs.path(artifact.path))
    if request.headers.get("if-range", tag) == tag:
        try:
            found = requested_range(request.headers.get("range"), artifact.bytes)
        except RangeNotSatisfiable as error:
            refusal = answer(error)
            refusal.set_header("content-range", f"bytes */{artifact.bytes}")
            refusal.set_header("accept-ranges", "bytes")
            return refusal
        if found is not None:
            headers["content-range"] = f"bytes {found.first}-{found.last}/{artifact.bytes}"
            headers["content-length"] = str(found.bytes)
            return Stream(read_blob(path, found), media_type=BINARY, headers=headers, status_code=206)
    return Stream(_verified(path, artifact), media_type=BINARY, headers=headers)


@litestar.head("/v1/files/{file_id:str}/content", include_in_schema=False)
async def head_file_content(services: TheServices, principal: ThePrincipal, file_id: FromPath[str]) -> Response[None]:
    """Say what `GET` would send."""
    _, headers = await _described(services, principal, file_id)
    return Response(None, headers={**headers, "content-type": BINARY})


def requested_range(header: str | None, size: int) -> ByteRange | None:
    """Return the range that a `Range` header asks of a content of `size` bytes; None for all of it.

    All of it is also the answer to several ranges, another unit and what is no range at all.

    Raises: RangeNotSatisfiable when the content has no byte in the range.
    """
    unit, _, ranges = (header or "").partition("=")
    parsed = _RANGE.fullmatch(ranges.strip())
    if unit.strip().lower() != "bytes" or parsed is None:
        return None
    first, last = parsed["first"], parsed["last"]
    if not first and not last:
        return None
    if not first:
        found = ByteRange(max(size - int(last), 0), size - 1)
    else:
        found = ByteRange(int(first), min(int(last or size), size - 1))
        if last and int(last) < int(first):
            return None
    if found.first >= size:
        raise RangeNotSatisfiable(
            f"Range is {ranges.strip()!r}; the content has the bytes 0 to {size - 1}.", param="Range"
        )
    return found


async def read_blob(path: anyio.Path, part: ByteRange | None = None) -> AsyncIterator[bytes]:
    """Yield a file, or a part of it, in pieces; it stays readable when it is deleted meanwhile."""
    async with await path.open("rb") as file:
        if part is not None:
            await file.seek(part.first)
        left = part.bytes if part is not None else None
        while piece := await file.read(READ_BYTES if left is None else min(left, READ_BYTES)):
            yield piece
            if left is not None:
                left -= len(piece)


def attachment(filename: str) -> str:
    """Return a content-disposition that carries any file name, by RFC 6266."""
    plain = unicodedata.normalize("NFKD", filename).encode("ascii", "ignore").decode()
    plain = "".join(c if c.isprintable() and c not in '"\\' else "_" for c in plain) or "file"
    extended = "" if plain == filename else f"; filename*=UTF-8''{quote(filename, safe='')}"
    return f'attachment; filename="{plain}"{extended}'


async def _described(services: Services, principal: ThePrincipal, file_id: str) -> tuple[Artifact, dict[str, str]]:
    """Return the content and the headers of all of it. Raises: NotFound; BlobMismatch when it is not there whole."""
    state = await usable(services, principal.project, file_id)
    assert state.artifact is not None
    path = anyio.Path(services.blobs.path(state.artifact.path))
    size = (await path.stat()).st_size if await path.is_file() else None
    if size != state.artifact.bytes:
        what = "is missing" if size is None else f"has {size} bytes, not {state.artifact.bytes}"
        raise BlobMismatch(f"The content of {file_id} {what} in the blob folder.")
    return state.artifact, {
        "content-length": str(state.artifact.bytes),
        "content-disposition": attachment(state.filename),
        "accept-ranges": "bytes",
        "etag": f'"{state.artifact.sha256}"',
    }


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


def _names(header: str, tag: str, *, weak: bool) -> bool:
    """Tell whether a list of entity tags names this one; `weak` lets `W/` count as the same."""
    tags = _TAG.findall(header)
    return header.strip() == "*" or tag in tags or (weak and f"W/{tag}" in tags)


HANDLERS = (get_file_content, head_file_content)
