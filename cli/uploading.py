"""Sends a file: in one piece, or in parts side by side where it is too large for that."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from threading import Event
from typing import IO, TYPE_CHECKING, cast

from rose.errors import LimitReached, RoseError, TooLarge, Unavailable

if TYPE_CHECKING:
    from cli.client import Client
    from cli.output import Output
    from rose.api import schema

PART_BYTES = 64 << 20
"""As large as the API takes them."""
PARTS_AT_ONCE = 4
TRIES = 3
"""For a part whose connection breaks."""
_PIECE_BYTES = 1 << 20


def send(client: Client, path: Path, purpose: str, output: Output) -> schema.File:
    """Upload a file and return it; above the setting max_upload_bytes, here or on the server, in parts.

    What is broken off, by an error or by Ctrl-C, is cancelled on the server.
    """
    from rose import settings

    if path.stat().st_size <= settings.load().max_upload_bytes:
        try:
            return client.upload(path, purpose)
        except TooLarge:
            pass  # the server allows less than the settings here
    return _send_in_parts(client, path, purpose, output)


def _send_in_parts(client: Client, path: Path, purpose: str, output: Output) -> schema.File:
    size = path.stat().st_size
    upload_id = client.create_upload(path.name, purpose, size).id
    stop = Event()
    try:
        with (
            output.transfer(f"Uploading {path.name}", size) as advance,
            ThreadPoolExecutor(PARTS_AT_ONCE + 1) as threads,
        ):
            try:
                md5 = threads.submit(_md5, path, stop)
                parts = [
                    threads.submit(
                        _send_part, client, upload_id, path, start, min(PART_BYTES, size - start), advance, stop
                    )
                    for start in range(0, size, PART_BYTES)
                ]
                part_ids = _results(parts)
                done = client.complete_upload(upload_id, part_ids, md5.result())
            except BaseException:
                stop.set()
                threads.shutdown(wait=False, cancel_futures=True)
                raise
    except BaseException:
        with suppress(RoseError):
            client.cancel_upload(upload_id)
            output.talk("The upload was given up; nothing of it stays on the server.")
        raise
    assert done.file is not None
    return done.file


def _results(parts: list[Future[str]]) -> list[str]:
    """Return the parts' ids in order, or raise the first error as soon as there is one."""
    done, _ = wait(parts, return_when=FIRST_EXCEPTION)
    for part in done:
        part.result()
    return [part.result() for part in parts]


def _send_part(
    client: Client, upload_id: str, path: Path, start: int, size: int, advance: Callable[[int], object], stop: Event
) -> str:
    from cli.client import patiently

    def once() -> str:
        section = _Section(path, start, size, advance, stop)
        try:
            with section:
                return client.add_part(upload_id, cast("IO[bytes]", section)).id
        except (Unavailable, LimitReached):
            advance(-section.reported)
            raise

    for left in reversed(range(TRIES)):
        try:
            return patiently(once)
        except Unavailable:
            if not left:
                raise
    raise AssertionError("the last try returns or raises")


def _md5(path: Path, stop: Event) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as content:
        while (piece := content.read(_PIECE_BYTES)) and not stop.is_set():
            digest.update(piece)
    return digest.hexdigest()


class _Stopped(Exception):
    """The upload is given up."""


class _Section(io.RawIOBase):
    """Some bytes of a file as a file of its own; tells how far it was read."""

    def __init__(self, path: Path, start: int, size: int, advance: Callable[[int], object], stop: Event) -> None:
        super().__init__()
        self._file = path.open("rb")
        self._start = start
        self._size = size
        self._at = 0
        self._advance = advance
        self._stop = stop
        self.reported = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = min(max(base + offset, 0), self._size)
        return self._at

    def read(self, size: int = -1) -> bytes:
        if self._stop.is_set():
            raise _Stopped
        left = self._size - self._at
        self._file.seek(self._start + self._at)
        piece = self._file.read(left if size < 0 else min(size, left))
        self._at += len(piece)
        self.reported += len(piece)
        self._advance(len(piece))
        return piece

    def close(self) -> None:
        self._file.close()
        super().close()
