"""Reading the package's files: whole, in blocks, and torn wherever a kill may tear them."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import pytest

from trainer.integrations import wandb_files
from trainer.integrations.wandb_files import BLOCK_BYTES, FIRST, FULL, LAST, MIDDLE, last_step, records

HEADER = b":W&B\xe1\xbe\x00"
RECORDS = [b"a" * 10, b"b" * 40_000, b"", b"c" * (BLOCK_BYTES - 30), b"d" * 100_000, b"e"]


def written(contents: list[bytes]) -> bytes:
    """Return a file as LevelDB's log format has it: what does not fit into a block goes on in the next."""
    file = HEADER
    for content in contents:
        left, first = content, True
        while True:
            room = BLOCK_BYTES - len(file) % BLOCK_BYTES
            if room < 7:
                file += bytes(room)
                continue
            piece, left = left[: room - 7], left[room - 7 :]
            kind = (FULL if first else LAST) if not left else (FIRST if first else MIDDLE)
            file += struct.pack("<IHB", zlib.crc32(piece), len(piece), kind) + piece
            first = False
            if not left:
                break
    return file


def test_records_that_cross_blocks_come_back_whole() -> None:
    assert list(records(written(RECORDS))) == RECORDS


@pytest.mark.parametrize("cut", [1, 6, 7, 8, 20, 40_000, BLOCK_BYTES])
def test_a_torn_file_gives_every_record_before_the_tear(cut: int) -> None:
    torn = list(records(written(RECORDS)[:-cut]))
    assert torn == RECORDS[: len(torn)]
    assert len(torn) < len(RECORDS)
    assert list(records(written(RECORDS[:2])[:-1])) == RECORDS[:1]
    assert list(records(HEADER)) == list(records(HEADER[:3])) == list(records(b"")) == []


def test_the_newest_step_of_all_attempts_counts_and_other_runs_do_not(tmp_path: Path) -> None:
    for folder, run, steps in (
        ("offline-run-20260101_000000-ftjob_a", "ftjob_a", [1, 2, 3]),
        ("run-20260102_000000-ftjob_a", "ftjob_a", [4, 5]),
        ("offline-run-20260103_000000-ftjob_a-2", "ftjob_a-2", [9]),
    ):
        path = tmp_path / "wandb" / folder / f"run-{run}.wandb"
        path.parent.mkdir(parents=True)
        path.write_bytes(written([str(step).encode() for step in steps]))
    assert last_step(tmp_path, "ftjob_a", int) == 5
    assert last_step(tmp_path, "ftjob_a-2", int) == 9
    assert last_step(tmp_path, "ftjob_b", int) == 0


def test_torn_ends_are_cut_off_and_what_has_nothing_else_is_deleted(tmp_path: Path) -> None:
    torn = (b"", HEADER, written([b"1"])[:-1], written([b"1"]), written(RECORDS)[:-1], written(RECORDS[:5])[:-50_000])
    for number, content in enumerate(torn):
        path = tmp_path / "wandb" / f"offline-run-2026010{number}_000000-ftjob_a" / "run-ftjob_a.wandb"
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
    wandb_files.mend(tmp_path, "ftjob_a")
    left = [path.read_bytes() for path in wandb_files.files(tmp_path, "ftjob_a")]
    assert left == [written([b"1"]), written(RECORDS[:5]), written(RECORDS[:4])]
    assert len(list((tmp_path / "wandb").iterdir())) == 3


def test_another_file_is_refused() -> None:
    with pytest.raises(ValueError, match="begin"):
        list(wandb_files.records(b"something else"))
