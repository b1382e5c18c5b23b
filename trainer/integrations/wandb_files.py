"""Which steps the files of a Weights & Biases run hold; after a kill they alone know what was really written.

A `.wandb` file is a log as LevelDB has it, behind seven bytes of its own: blocks of 32 KiB with records in up to one
piece a block, each piece behind checksum, length and kind. The last one of a killed run may be torn.
"""

from __future__ import annotations

import os
import shutil
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

MAGIC = b":W&B"
FILE_HEADER_BYTES = 7
BLOCK_BYTES = 1 << 15
PIECE_HEADER = struct.Struct("<IHB")
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4
QUIET_SECONDS = 4.0
"""The package's own service outlives a killed process by some two seconds, and may still write in that time."""
LONGEST_QUIET_SECONDS = 15.0


def files(folder: Path, run_id: str) -> list[Path]:
    """Return the files of a run below the job's folder, of every attempt, oldest first."""
    found = folder.glob(f"wandb/*run-*-{run_id}*/run-{run_id}.wandb")
    return sorted(found, key=lambda path: path.parent.name.removeprefix("offline-"))


def records(content: bytes) -> Iterator[bytes]:
    """Yield the records of a file up to its end or to where it is torn. Raises: ValueError when it is no such file."""
    return (record for record, _ in _records(content))


def _records(content: bytes) -> Iterator[tuple[bytes, int]]:
    """Yield each whole record and where it ends."""
    if len(content) < FILE_HEADER_BYTES:
        return  # killed before anything was written
    if not content.startswith(MAGIC):
        raise ValueError("It does not begin as a .wandb file does.")
    position, record = FILE_HEADER_BYTES, b""
    while True:
        left = BLOCK_BYTES - position % BLOCK_BYTES
        if left < PIECE_HEADER.size:
            position += left
        if position + PIECE_HEADER.size > len(content):
            return
        _checksum, length, kind = PIECE_HEADER.unpack_from(content, position)
        begin = position + PIECE_HEADER.size
        position = begin + length
        if position > len(content) or kind not in (FULL, FIRST, MIDDLE, LAST):
            return
        record = content[begin:position] if kind in (FULL, FIRST) else record + content[begin:position]
        if kind in (FULL, LAST):
            yield record, position


def mend(folder: Path, run_id: str) -> None:
    """Cut off the torn ends that killed attempts left, and delete what has nothing else: `wandb sync` stops at them."""
    for path in files(folder, run_id):
        content = path.read_bytes()
        whole = max((end for _, end in _records(content)), default=0)
        if whole == 0:
            shutil.rmtree(path.parent)
        elif whole < len(content):
            os.truncate(path, whole)


def last_step(folder: Path, run_id: str, step_of: Callable[[bytes], int | None]) -> int:
    """Return the newest step in the files of a run, 0 when there is none; `step_of` reads a record."""
    found = (step_of(record) for path in files(folder, run_id) for record in records(path.read_bytes()))
    return max((step for step in found if step is not None), default=0)


def wait_until_quiet(folder: Path, run_id: str) -> None:
    """Return once nobody has written to the files of a run for a while: a killed attempt's writer is gone."""
    deadline = time.monotonic() + LONGEST_QUIET_SECONDS
    while time.monotonic() < deadline:
        newest = max((path.stat().st_mtime for path in files(folder, run_id)), default=0.0)
        quiet = time.time() - newest
        if not 0 <= quiet < QUIET_SECONDS:
            return
        time.sleep(QUIET_SECONDS - quiet)
