"""A file or folder in the blob store, as events name it."""

from __future__ import annotations

import msgspec


class Artifact(msgspec.Struct, frozen=True, kw_only=True):
    """A blob: where it lies, how large it is and what is in it."""

    path: str
    """Path relative to the blob folder, with forward slashes."""
    bytes: int
    """Size of all its files together."""
    sha256: str
    """Of a file: its SHA-256. Of a folder: the SHA-256 of its sorted lines `path size sha256`."""
