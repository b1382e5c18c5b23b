"""What a save says when the system refuses the write, whoever writes."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import safetensors
import torch
from safetensors.torch import save_file

from rose.blobs import Blobs
from rose.errors import NoSpace
from trainer.saving import save_folder


def save(blobs: Blobs, error: Exception) -> None:
    def fill(folder: Path) -> None:
        raise error

    save_folder(blobs, "jobs/j/e1/recovery/step-1", fill, owner="e1-", needed_bytes=1, min_free_bytes=0)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_and_a_full_quota_are_known_by_their_number(tmp_path: Path, number: int) -> None:
    blobs = Blobs(tmp_path / "blobs")
    said = safetensors.SafetensorError(f"Error while serializing: I/O error: whatever (os error {number})")
    for error in (OSError(number, "whatever"), said):
        with pytest.raises(NoSpace, match="is full"):
            save(blobs, error)
    with pytest.raises(safetensors.SafetensorError):
        save(blobs, safetensors.SafetensorError("No space left in the header"))


def test_safetensors_still_says_the_number_of_the_system(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path / "blobs")

    def fill(folder: Path) -> None:
        save_file({"a": torch.zeros(1)}, folder / "nowhere" / "a.safetensors")

    with pytest.raises(FileNotFoundError):
        save_folder(blobs, "jobs/j/e1/model", fill, owner="e1-", needed_bytes=1, min_free_bytes=0)
    assert not list((tmp_path / "blobs").rglob("*.safetensors"))
