"""The blob folder: uploaded files, recovery points, checkpoints and models, each named by size and SHA-256.

A blob is written under `tmp/`, synced, renamed and its folder synced; only then may an event name it. Blocking and
torch-free: async code calls this in threads. It knows nothing of jobs and never decides what may be deleted.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import BinaryIO

from rose.domain.artifacts import Artifact
from rose.errors import InvalidRequest, NoSpace, RoseError

TEMPORARY = "tmp"
_FULL = (errno.ENOSPC, errno.EDQUOT)
_PIECE_BYTES = 1 << 20


class BlobMismatch(RoseError):
    """A blob is missing or is not what its event says."""

    default_code = "blob_mismatch"


@contextmanager
def no_space_as_error(root: Path) -> Generator[None, None, None]:
    """Turn the system's "disk full" within the block into NoSpace, which says where and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise NoSpace(
            f"The disk that holds {root} is full.", hint="Delete files or models that are no longer needed."
        ) from error


class TemporaryBlob:
    """A file being written; it becomes a blob by `commit` and disappears by `discard` or when left by an error."""

    def __init__(self, blobs: Blobs, path: Path) -> None:
        self._blobs = blobs
        self._path = path
        self._file: BinaryIO = path.open("xb")
        self._hash = hashlib.sha256()
        self.bytes = 0
        """Bytes written so far."""

    @property
    def sha256(self) -> str:
        """Hash of what was written so far."""
        return self._hash.hexdigest()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append `data`, hashing on the way. Raises: NoSpace when the disk is full."""
        with no_space_as_error(self._blobs.root):
            self._file.write(data)
        self._hash.update(data)
        self.bytes += len(data)

    def append(self, path: Path, see: Callable[[memoryview], object]) -> tuple[int, str]:
        """Append another file's content, which `see` gets piece by piece; return its size and SHA-256.

        The content goes from file to file inside the system, which shares it instead of copying where it can.

        Raises: NoSpace; FileNotFoundError.
        """
        with path.open("rb", buffering=0) as source, no_space_as_error(self._blobs.root):
            self._file.flush()
            copied = _copy_inside(source.fileno(), self._file.fileno(), self.bytes)
            self._file.seek(self.bytes + copied)
            piece = memoryview(bytearray(_PIECE_BYTES))
            digest = hashlib.sha256()
            done = 0
            while size := source.readinto(piece):
                if done >= copied:
                    self._file.write(piece[:size])
                self._hash.update(piece[:size])
                digest.update(piece[:size])
                see(piece[:size])
                done += size
            self.bytes += done
        return done, digest.hexdigest()

    def commit(self, relative: str) -> Artifact:
        """Sync the file, put it at `relative` (replacing what is there) and sync the folder.

        Raises: NoSpace, after which the file is gone.
        """
        target = self._blobs.path(relative)
        try:
            with no_space_as_error(self._blobs.root):
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
                target.parent.mkdir(parents=True, exist_ok=True)
                self._path.replace(target)
                self._blobs.sync_folders(target.parent)
        except BaseException:
            self.discard()
            raise
        return Artifact(path=relative, bytes=self.bytes, sha256=self._hash.hexdigest())

    def discard(self) -> None:
        """Close and remove the file; calling it again, or after `commit`, does nothing."""
        try:
            self._file.close()
        except OSError as error:  # what was buffered does not fit: it is thrown away here anyway
            if error.errno not in _FULL:
                raise
        finally:
            self._path.unlink(missing_ok=True)

    def __enter__(self) -> TemporaryBlob:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()


class Blobs:
    """The blob folder at `root`, which is created on the first write."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, relative: str) -> Path:
        """Return the absolute path of a blob.

        Raises: InvalidRequest when `relative` is empty, absolute, not in plain form, or would leave the folder.
        """
        pure = PurePosixPath(relative)
        plain = bool(relative) and str(pure) == relative and "\0" not in relative and "\\" not in relative
        if not plain or pure.is_absolute() or ".." in pure.parts or pure == PurePosixPath("."):
            raise InvalidRequest(f"{relative!r} is not the path of a blob.", code="invalid_path")
        path = self.root.joinpath(*pure.parts)
        if not path.resolve().is_relative_to(self.root.resolve()):
            raise InvalidRequest(f"{relative!r} leads out of the blob folder.", code="invalid_path")
        return path

    def open_temporary(self, owner: str = "blob") -> TemporaryBlob:
        """Start a new file below `tmp/`; `owner` begins its name, for `sweep_temporary`."""
        with no_space_as_error(self.root):
            return TemporaryBlob(self, self._new_temporary(owner))

    def temporary_folder(self, owner: str = "folder") -> Path:
        """Make an empty folder below `tmp/`, on the file system of the blobs, for `publish_folder`."""
        with no_space_as_error(self.root):
            folder = self._new_temporary(owner)
            folder.mkdir()
        return folder

    def publish_folder(self, temporary: Path, relative: str) -> Artifact:
        """Sync every file of `temporary`, put the folder at `relative` (replacing what is there), sync the parents.

        Raises: NoSpace; BlobMismatch when the folder holds something that is neither file nor folder.
        """
        target = self.path(relative)
        with no_space_as_error(self.root):
            for file in _files(temporary):
                _sync(file)
            for folder in [path for path in temporary.rglob("*") if path.is_dir()]:
                _sync(folder)
            _sync(temporary)
            size, digest = _describe(temporary)
            target.parent.mkdir(parents=True, exist_ok=True)
            former: Path | None = None
            if target.exists():
                former = self._new_temporary("former")
                target.rename(former)
            temporary.rename(target)
            self.sync_folders(target.parent)
        if former is not None:
            _remove(former)
        return Artifact(path=relative, bytes=size, sha256=digest)

    def discard_folder(self, temporary: Path) -> None:
        """Remove a temporary folder; nothing happens when it was published."""
        if temporary.exists():
            _remove(temporary)

    def verify(self, artifact: Artifact) -> None:
        """Check that the blob is there with the size and hash that `artifact` states; reads all of it.

        Raises: BlobMismatch saying what differs.
        """
        path = self.path(artifact.path)
        if not path.exists():
            raise BlobMismatch(f"{artifact.path} is missing from the blob folder {self.root}.")
        size, digest = _describe(path)
        if size != artifact.bytes:
            raise BlobMismatch(f"{artifact.path} has {size} bytes, not {artifact.bytes}.")
        if digest != artifact.sha256:
            raise BlobMismatch(f"{artifact.path} has other content than when it was written (SHA-256 differs).")

    def delete(self, relative: str) -> None:
        """Remove a file or folder; nothing happens when it is not there."""
        path = self.path(relative)
        if not path.exists():
            return
        # Renamed first, so that a reader finds all of it or nothing.
        gone = self._new_temporary("deleted")
        path.rename(gone)
        _remove(gone)

    def free_bytes(self) -> int:
        """Return the free space of the disk that holds the blobs."""
        existing = self.root
        while not existing.exists():
            existing = existing.parent
        return shutil.disk_usage(existing).free

    def require_space(self, wanted_bytes: int, floor_bytes: int) -> None:
        """Raises: NoSpace unless `floor_bytes` stay free when `wanted_bytes` are written."""
        free = self.free_bytes()
        if free - wanted_bytes < floor_bytes:
            raise NoSpace(
                f"Only {free >> 20} MB are free for an upload of {wanted_bytes >> 20} MB.",
                hint="Make room on that disk; `rose models delete` and `rose files delete` free theirs a day later.",
            )

    def sweep_temporary(self, *, owner: str = "", older_than_seconds: float = 86400.0) -> int:
        """Remove what killed writers left below `tmp/` and return how many entries that were.

        Only names beginning with `owner`, last written more than `older_than_seconds` ago.
        """
        folder = self.root / TEMPORARY
        if not folder.is_dir():
            return 0
        horizon = time.time() - older_than_seconds
        swept = 0
        for entry in sorted(folder.iterdir()):
            if not entry.name.startswith(owner):
                continue
            try:
                last_written = max(path.lstat().st_mtime for path in (entry, *entry.rglob("*")))
            except FileNotFoundError:  # its writer published or removed it just now
                continue
            if last_written <= horizon:
                _remove(entry)
                swept += 1
        return swept

    def sync_folders(self, folder: Path) -> None:
        """Sync `folder` and every folder above it up to the root, so that a new entry survives a power cut."""
        while True:
            _sync(folder)
            if folder == self.root or folder.parent == folder:
                return
            folder = folder.parent

    def _new_temporary(self, owner: str) -> Path:
        folder = self.root / TEMPORARY
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{owner}.{secrets.token_hex(8)}"


def _files(folder: Path) -> list[Path]:
    """Return every file below `folder`, sorted. Raises: BlobMismatch for a link, socket or the like."""
    found: list[Path] = []
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise BlobMismatch(f"{path} is neither a file nor a folder; a blob holds nothing else.")
        if path.is_file():
            found.append(path)
    return found


def _describe(path: Path) -> tuple[int, str]:
    """Return size and hash of a file or folder by the rule in rose/domain/artifacts.py."""
    if path.is_file():
        return path.stat().st_size, _digest(path)
    total = 0
    lines: list[str] = []
    for file in _files(path):
        size = file.stat().st_size
        total += size
        lines.append(f"{file.relative_to(path).as_posix()} {size} {_digest(file)}\n")
    return total, hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _copy_inside(source: int, target: int, offset: int) -> int:
    """Copy a file's content to `offset` of another without reading it; return the size, 0 where that cannot be done."""
    size = os.fstat(source).st_size
    done = 0
    while done < size:
        try:
            copied = os.copy_file_range(source, target, size - done, done, offset + done)
        except AttributeError:  # macOS has no such call
            return 0
        except OSError as error:
            if error.errno in _FULL:
                raise
            return 0
        if not copied:
            return 0
        done += copied
    return size


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
