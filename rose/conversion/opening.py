"""Opens a file by its first bytes: unpacks, decodes UTF-16, and says what is inside. Reads no rows.

What is unpacked passes through in pieces and is never held as a whole, so a small file that unpacks to a huge one
costs time and no memory.
"""

from __future__ import annotations

import codecs
import contextlib
import gzip
import io
import lzma
import sys
import zipfile
import zlib
from collections.abc import Generator
from pathlib import Path
from typing import IO, Any, Literal, cast

import msgspec

from rose.errors import InvalidDataset, RoseError

Inside = Literal["parquet", "arrow file", "arrow stream", "text"]

UNPACKING_ERRORS = (EOFError, gzip.BadGzipFile, zlib.error, zipfile.BadZipFile, lzma.LZMAError, NotImplementedError)
_ZIP_ERRORS = (RuntimeError, OSError, UnicodeDecodeError)
"""What an archive's directory raises: it wants a password, points outside the file, has names that are no text."""

_PIECE_BYTES = 1 << 18
_MOST_WRAPPINGS = 3
_ZSTD_PIECE_BYTES = 1 << 10
"""Packed bytes taken at once: zstd can make 128 kB of four bytes, and gives all of it back in one piece."""
_NO_DATA = {
    b"%PDF": "a PDF document",
    b"\x89HDF": "an HDF5 file",
    b"SQLite format 3": "an SQLite database",
    b"BZh": "packed with bzip2",
    b"\xfd7zXZ": "packed with xz",
    b"7z\xbc\xaf": "a 7-Zip archive",
    b"GGUF": "a model (GGUF)",
}


class Opened(msgspec.Struct, frozen=True):
    """A file's content behind all wrappings, and how it was wrapped."""

    content: IO[bytes]
    inside: Inside
    wrappings: tuple[str, ...]


@contextlib.contextmanager
def opened(path: Path, label: str) -> Generator[Opened]:
    """Open a file and what is packed in it.

    Raises: InvalidDataset when it is of a kind that holds no rows or is packed too often; RoseError when a package
    for it is missing.
    """
    with contextlib.ExitStack() as stack:
        content: IO[bytes] = stack.enter_context(path.open("rb"))
        wrappings: list[str] = []
        while True:
            head, content = _peeked(content)
            unpacked = _unpacked(head, content, label)
            if unpacked is None:
                yield Opened(content, _inside(head, label, wrappings), tuple(wrappings))
                return
            name, content = unpacked
            wrappings.append(name)
            if len(wrappings) > _MOST_WRAPPINGS:
                raise InvalidDataset(f"{label} is packed more than {_MOST_WRAPPINGS} times.", hint="Unpack it first.")
            content = io.BufferedReader(_Unpacked(content, label), _PIECE_BYTES)


def _peeked(content: IO[bytes]) -> tuple[bytes, IO[bytes]]:
    """Return the first bytes, and the content as if they had not been read."""
    head = content.read(64)
    if content.seekable():
        content.seek(0)
        return head, content
    return head, io.BufferedReader(_Joined(head, content), _PIECE_BYTES)


def _unpacked(head: bytes, content: IO[bytes], label: str) -> tuple[str, IO[bytes]] | None:
    if head.startswith(b"\x1f\x8b"):
        return "gzip", cast(IO[bytes], gzip.GzipFile(fileobj=content))
    if head.startswith(b"\x28\xb5\x2f\xfd"):
        return "zstd", _zstd(content, label)
    if head.startswith(b"PK\x03\x04"):
        return "zip", _zip(content, label)
    if head.startswith(codecs.BOM_UTF8):
        content.read(len(codecs.BOM_UTF8))
        return "UTF-8 with a mark", io.BufferedReader(_Joined(b"", content))
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "UTF-16", io.BufferedReader(_Recoded(content, "utf-16"), _PIECE_BYTES)
    return None


def _inside(head: bytes, label: str, wrappings: list[str]) -> Inside:
    if head.startswith(b"PAR1"):
        inside: Inside = "parquet"
    elif head.startswith(b"ARROW1"):
        inside = "arrow file"
    elif head.startswith(b"\xff\xff\xff\xff"):
        inside = "arrow stream"
    else:
        _refuse_no_data(head, label)
        return "text"
    if wrappings and inside != "arrow stream":
        raise InvalidDataset(
            f"{label} is a {inside.title()} packed with {wrappings[-1]}; such a file cannot be read from its start.",
            hint="Unpack it first.",
        )
    return inside


def _refuse_no_data(head: bytes, label: str) -> None:
    for start, what in _NO_DATA.items():
        if head.startswith(start):
            raise InvalidDataset(f"{label} is {what}; it has no rows that can be read.")
    if b"\x00" in head:
        utf16 = head[1:8:2] == b"\x00" * 4 or head[0:8:2] == b"\x00" * 4
        what = "looks like UTF-16 without its mark" if utf16 else "is no text"
        raise InvalidDataset(f"{label} {what}.", hint="Save it as UTF-8." if utf16 else None)


def _zstd(content: IO[bytes], label: str) -> IO[bytes]:
    if sys.version_info >= (3, 14):
        from compression import zstd

        return io.BufferedReader(_Unpacked(zstd.ZstdFile(content), label, (zstd.ZstdError,)), _PIECE_BYTES)
    try:
        import zstandard
    except ImportError:
        raise missing_package("zstandard", "read zstd") from None
    return io.BufferedReader(_Zstandard(content, zstandard), _PIECE_BYTES)


def _zip(content: IO[bytes], label: str) -> IO[bytes]:
    """Open the one file of an archive."""
    try:
        archive = zipfile.ZipFile(content)
    except (*_ZIP_ERRORS, *UNPACKING_ERRORS) as problem:
        raise damaged(label, problem) from None
    names = [
        one.filename for one in archive.infolist() if not one.is_dir() and not one.filename.startswith("__MACOSX/")
    ]
    if "[Content_Types].xml" in names:
        raise InvalidDataset(f"{label} is an Office document.", hint="Save the sheet as CSV UTF-8.")
    if len(names) != 1:
        shown = ", ".join(names[:5]) or "none"
        raise InvalidDataset(
            f"{label} holds {len(names)} files ({shown}{', …' if len(names) > 5 else ''}); expected one.",
            hint="Unpack it and name the files.",
        )
    try:
        return archive.open(names[0])
    except (*_ZIP_ERRORS, *UNPACKING_ERRORS) as problem:
        raise damaged(label, problem) from None


def missing_package(package: str, what: str) -> RoseError:
    """Return the error that names the extra."""
    return RoseError(
        f"To {what}, {package} is needed, and it is not installed.",
        code="missing_package",
        hint="pip install 'rose[convert]'",
    )


def damaged(name: str, problem: Exception) -> InvalidDataset:
    """Return the error about a file that cannot be unpacked to its end."""
    return InvalidDataset(f"{name} is damaged or cut off: {problem}.", hint="Fetch or write it again.")


class _Joined(io.RawIOBase):
    """A head that was read already, and the rest behind it."""

    def __init__(self, head: bytes, rest: IO[bytes]) -> None:
        self._head = head
        self._rest = rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        piece = self._head[: len(buffer)] if self._head else self._rest.read(len(buffer))
        self._head = self._head[len(piece) :] if self._head else b""
        buffer[: len(piece)] = piece
        return len(piece)


class _Unpacked(io.RawIOBase):
    """What an unpacker gives, with its errors as ROSE's."""

    def __init__(self, content: Any, name: str, errors: tuple[type[Exception], ...] = UNPACKING_ERRORS) -> None:
        self._content = content
        self._name = name
        self._errors = (*errors, EOFError)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            piece = self._content.read(len(buffer))
        except self._errors as problem:
            raise damaged(self._name, problem) from None
        buffer[: len(piece)] = piece
        return len(piece)


class _Pieces(io.RawIOBase):
    """Bytes that are made piece by piece from packed ones."""

    def __init__(self) -> None:
        self._ready = memoryview(b"")
        self._ended = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready and not self._ended:
            self._ready = memoryview(self._more())
        piece = self._ready[: len(buffer)]
        self._ready = self._ready[len(piece) :]
        buffer[: len(piece)] = piece
        return len(piece)

    def _more(self) -> bytes:
        """Return the next bytes; sets `_ended` at the end."""
        raise NotImplementedError


class _Zstandard(_Pieces):
    """The `zstandard` package's own reader takes a file that is cut off for a whole one; this one does not."""

    def __init__(self, content: IO[bytes], zstandard: Any) -> None:
        super().__init__()
        self._content = content
        self._zstandard = zstandard
        self._frame: Any = None
        self._packed = b""

    def _more(self) -> bytes:
        self._packed = self._packed or self._content.read(_ZSTD_PIECE_BYTES)
        if not self._packed:
            self._ended = True
            if self._frame is not None:
                raise EOFError("the last zstd frame has no end")
            return b""
        self._frame = self._frame or self._zstandard.ZstdDecompressor().decompressobj()
        try:
            made = self._frame.decompress(self._packed)
        except self._zstandard.ZstdError as problem:
            raise EOFError(str(problem)) from None
        self._packed = self._frame.unused_data if self._frame.eof else b""
        if self._frame.eof:
            self._frame = None
        return made


class _Recoded(_Pieces):
    """Text of another encoding as UTF-8."""

    def __init__(self, content: IO[bytes], encoding: str) -> None:
        super().__init__()
        self._content = content
        self._decoder = codecs.getincrementaldecoder(encoding)()

    def _more(self) -> bytes:
        piece = self._content.read(_PIECE_BYTES)
        self._ended = not piece
        try:
            return self._decoder.decode(piece, self._ended).encode()
        except UnicodeError as problem:
            raise EOFError(str(problem)) from None
