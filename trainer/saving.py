"""Write a folder into the blob store, whole or not at all, and say plainly when the disk is full."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from pathlib import Path

import safetensors
import torch

from rose.blobs import Blobs, no_space_as_error
from rose.domain.artifacts import Artifact
from rose.errors import NoSpace

_HINT = "Delete files or models that are no longer needed."


def save_folder(
    blobs: Blobs,
    relative: str,
    fill: Callable[[Path], None],
    *,
    owner: str,
    needed_bytes: int,
    min_free_bytes: int,
) -> Artifact:
    """Let `fill` write into a temporary folder and publish it at `relative`; synced when this returns.

    `owner` begins the temporary folder's name. Raises: NoSpace when the disk is full or would fall below
    `min_free_bytes`; nothing is left then.
    """
    free = blobs.free_bytes()
    if free - needed_bytes < min_free_bytes:
        raise NoSpace(
            f"The disk that holds {blobs.root} has {free >> 20} MiB free; {needed_bytes / (1 << 20):.1f} MiB are "
            f"needed and {min_free_bytes >> 20} MiB must stay free.",
            hint=_HINT,
        )
    folder = blobs.temporary_folder(owner)
    try:
        with no_space_as_error(blobs.root), _as_system_errors():
            fill(folder)
            return blobs.publish_folder(folder, relative)
    finally:
        blobs.discard_folder(folder)


@contextmanager
def _as_system_errors() -> Generator[None]:
    """Give a failed write of safetensors the system's number, which it has nowhere but in its text."""
    try:
        yield
    except safetensors.SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), str(error)) from error


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """Return what tensors take in a file."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
