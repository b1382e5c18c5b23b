"""Write a folder into the blob store, whole or not at all, and say plainly when the disk is full."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable
from pathlib import Path

import safetensors
import torch

from rose.blobs import Blobs
from rose.domain.artifacts import Artifact
from rose.errors import NoSpace

_FULL = (errno.ENOSPC, errno.EDQUOT)
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
        fill(folder)
        return blobs.publish_folder(folder, relative)
    except (OSError, safetensors.SafetensorError) as error:
        # safetensors, unlike everybody else, has an error of its own for a failed write.
        if getattr(error, "errno", None) in _FULL or "No space left" in str(error):
            raise NoSpace(f"The disk that holds {blobs.root} is full.", hint=_HINT) from error
        raise
    finally:
        blobs.discard_folder(folder)


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """Return what tensors take in a file."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
