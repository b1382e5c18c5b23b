"""Reads a multipart upload as it arrives: fields into memory (bounded), the one file straight to its destination.

Memory is bounded by one network chunk; nothing is buffered, spooled or parsed twice.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from email.message import Message

import anyio.to_thread
import msgspec
from multipart import MultipartError, MultipartSegment, PushMultipartParser

from rose.errors import InvalidRequest, TooLarge

MAX_FIELD_BYTES = 64 << 10
MAX_PARTS = 20
WRITE_BYTES = 1 << 20
"""File content is handed to a thread in pieces of about this size."""


class Upload(msgspec.Struct, frozen=True, kw_only=True):
    """A multipart body: its text fields, and what is known of its file part."""

    fields: dict[str, str]
    filename: str | None
    """None when there was no file part."""
    bytes: int


def boundary_of(content_type: str, file_field: str = "file") -> bytes:
    """Return the boundary of a multipart content type. Raises: InvalidRequest when it is another type."""
    message = Message()
    message["content-type"] = content_type
    try:
        boundary = message.get_param("boundary")
    except TypeError:  # the standard library trips over `boundary*0=a; boundary*`
        boundary = None
    if message.get_content_type() != "multipart/form-data" or not isinstance(boundary, str) or not boundary:
        raise InvalidRequest(
            f"The body must be multipart/form-data with a boundary and a part {file_field!r}.",
            code="invalid_content_type",
            param=file_field,
        )
    return boundary.encode("latin-1", "replace")


async def read_upload(
    chunks: AsyncIterator[bytes],
    content_type: str,
    write: Callable[[bytes], object],
    *,
    file_field: str,
    max_bytes: int,
) -> Upload:
    """Parse a body; the content of part `file_field` goes to `write` (blocking, called in a thread) in order.

    Raises: InvalidRequest for a broken or cut-off body, TooLarge when the file is over `max_bytes`.
    """
    form = _Form(file_field, max_bytes)
    try:
        with PushMultipartParser(boundary_of(content_type, file_field), max_segment_count=MAX_PARTS) as parser:
            async for chunk in chunks:
                if not chunk or parser.closed:
                    continue
                for event in parser.parse(chunk):
                    form.take(event)
                if len(form.pending) >= WRITE_BYTES:
                    await anyio.to_thread.run_sync(write, bytes(form.pending))
                    form.pending.clear()
    except MultipartError as error:
        why = error.args[0] if error.args else type(error).__name__
        raise InvalidRequest(
            f"The multipart body is broken: {why}.", code="invalid_multipart", param=file_field
        ) from None
    if form.pending:
        await anyio.to_thread.run_sync(write, bytes(form.pending))
    return Upload(fields=form.fields, filename=form.filename, bytes=form.size)


class _Form:
    """What was read so far: complete fields, the field being read, and file content that is not yet written."""

    def __init__(self, file_field: str, max_bytes: int) -> None:
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        self.size = 0
        self.pending = bytearray()
        self._file_field = file_field
        self._max_bytes = max_bytes
        self._name = ""
        self._text = bytearray()

    def take(self, event: MultipartSegment | bytes | bytearray | None) -> None:
        """Take one event of the parser: a part begins, some of its content, or (None) its end."""
        if isinstance(event, MultipartSegment):
            self._begin(event)
        elif event is None:
            if self._name != self._file_field:
                self.fields[self._name] = _decoded(self._name, self._text)
        elif self._name == self._file_field:
            self._take_content(event)
        else:
            self._text += event
            if len(self._text) > MAX_FIELD_BYTES:
                name = self._name[:80]
                raise TooLarge(f"The field {name!r} is larger than {MAX_FIELD_BYTES} bytes.", param=name)

    def _begin(self, part: MultipartSegment) -> None:
        self._name = part.name or ""
        self._text.clear()
        if self._name == self._file_field:
            if self.filename is not None:
                raise InvalidRequest(f"There is more than one part {self._file_field}.", param=self._file_field)
            self.filename = part.filename or ""

    def _take_content(self, content: bytes | bytearray) -> None:
        self.size += len(content)
        self.pending += content
        if self.size > self._max_bytes:
            raise TooLarge(
                f"The file is larger than {self._max_bytes} bytes.",
                param=self._file_field,
                hint="The server's setting max_upload_bytes allows more.",
            )


def _decoded(name: str, text: bytearray) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError:
        raise InvalidRequest(f"The field {name[:80]!r} is not valid UTF-8.", param=name[:80]) from None
