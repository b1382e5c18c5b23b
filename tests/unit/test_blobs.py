"""The blob folder: what is committed is whole, synced, hashed by the rule, and never outside the folder."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest

from rose.blobs import BlobMismatch, Blobs
from rose.errors import InvalidRequest, NoSpace


@pytest.fixture
def blobs(tmp_path: Path) -> Blobs:
    return Blobs(tmp_path / "blobs")


def temporaries(blobs: Blobs) -> list[str]:
    return sorted(path.name for path in (blobs.root / "tmp").iterdir())


def test_a_committed_file_has_the_stated_size_and_hash(blobs: Blobs) -> None:
    blob = blobs.open_temporary()
    blob.write(b"one ")
    blob.write(b"two")
    artifact = blob.commit("files/file_a")
    assert (artifact.path, artifact.bytes) == ("files/file_a", 7)
    assert artifact.sha256 == hashlib.sha256(b"one two").hexdigest()
    assert blobs.path("files/file_a").read_bytes() == b"one two"
    blobs.verify(artifact)
    assert temporaries(blobs) == []


def test_a_discarded_file_leaves_nothing(blobs: Blobs) -> None:
    with blobs.open_temporary() as blob:
        blob.write(b"half")
    assert temporaries(blobs) == []


def test_a_folder_is_hashed_by_its_sorted_lines(blobs: Blobs) -> None:
    folder = blobs.temporary_folder()
    (folder / "b.txt").write_bytes(b"bb")
    (folder / "a").mkdir()
    (folder / "a" / "x").write_bytes(b"x")
    artifact = blobs.publish_folder(folder, "jobs/j/e1/model")
    lines = f"a/x 1 {hashlib.sha256(b'x').hexdigest()}\nb.txt 2 {hashlib.sha256(b'bb').hexdigest()}\n"
    assert artifact.bytes == 3
    assert artifact.sha256 == hashlib.sha256(lines.encode()).hexdigest()
    blobs.verify(artifact)
    assert not folder.exists()


def test_publishing_again_replaces_the_folder(blobs: Blobs) -> None:
    for text in ("first", "second"):
        folder = blobs.temporary_folder()
        (folder / "weights").write_text(text)
        artifact = blobs.publish_folder(folder, "jobs/j/e1/model")
    blobs.verify(artifact)
    assert blobs.path("jobs/j/e1/model/weights").read_text() == "second"
    assert temporaries(blobs) == []


@pytest.mark.parametrize("damage", ["truncated", "changed", "missing", "extra"])
def test_verify_names_what_differs(blobs: Blobs, damage: str) -> None:
    folder = blobs.temporary_folder()
    (folder / "weights").write_bytes(b"0123456789")
    artifact = blobs.publish_folder(folder, "jobs/j/e1/model")
    weights = blobs.path("jobs/j/e1/model/weights")
    match damage:
        case "truncated":
            os.truncate(weights, 5)
        case "changed":
            weights.write_bytes(b"012345678X")
        case "missing":
            blobs.delete("jobs/j/e1/model")
        case _:
            (weights.parent / "more").write_bytes(b"")
    expected = {"truncated": "5 bytes, not 10", "missing": "missing"}.get(damage, "other content")
    with pytest.raises(BlobMismatch, match=expected):
        blobs.verify(artifact)


@pytest.mark.parametrize("path", ["", ".", "..", "../x", "a/../../x", "/etc/passwd", "a//b", "a/./b", "a\0b", "a\\b"])
def test_paths_that_are_no_blob_are_refused(blobs: Blobs, path: str) -> None:
    with pytest.raises(InvalidRequest):
        blobs.path(path)


def test_a_link_out_of_the_folder_is_refused(blobs: Blobs, tmp_path: Path) -> None:
    blobs.root.mkdir()
    (blobs.root / "files").symlink_to(tmp_path)
    with pytest.raises(InvalidRequest, match="leads out"):
        blobs.path("files/x")


def test_a_folder_with_a_link_is_not_published(blobs: Blobs) -> None:
    folder = blobs.temporary_folder()
    (folder / "link").symlink_to("/etc/hostname")
    with pytest.raises(BlobMismatch, match="neither"):
        blobs.publish_folder(folder, "jobs/j/e1/model")


def test_delete_removes_files_and_folders_and_forgives_absence(blobs: Blobs) -> None:
    blob = blobs.open_temporary()
    blob.write(b"x")
    blob.commit("files/a")
    blobs.delete("files/a")
    blobs.delete("files/a")
    assert not blobs.path("files/a").exists()


def test_the_sweep_takes_only_old_entries_of_the_owner(blobs: Blobs) -> None:
    mine = blobs.temporary_folder("ftjob_a.e1")
    (mine / "weights").write_bytes(b"x")
    other = blobs.temporary_folder("ftjob_b.e1")
    assert blobs.sweep_temporary(owner="ftjob_a.", older_than_seconds=3600) == 0
    assert blobs.sweep_temporary(owner="ftjob_a.", older_than_seconds=0) == 1
    assert not mine.exists()
    assert other.exists()


def test_free_bytes_works_before_the_folder_exists(blobs: Blobs) -> None:
    assert not blobs.root.exists()
    assert blobs.free_bytes() > 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_full_disk_is_said_plainly_and_leaves_nothing(blobs: Blobs) -> None:
    blob = blobs.open_temporary()
    blob.write(b"x" * 100)
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, blob._file.fileno())  # pyright: ignore[reportPrivateUsage]  # the disk fills up now
    os.close(full)
    with pytest.raises(NoSpace, match="full") as caught:
        blob.commit("files/a")
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.ENOSPC
    assert temporaries(blobs) == []
    assert not blobs.path("files/a").exists()


@pytest.mark.parametrize("inside", ["shared or copied", "refused", "broken off", "unknown"])
def test_files_are_joined_whatever_the_system_can_do(
    blobs: Blobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: str
) -> None:
    """Within one file system content goes from file to file; elsewhere it is read and written."""
    copy = os.copy_file_range

    def refuse(*_: int) -> int:
        raise OSError(errno.EXDEV, "on another device")

    if inside == "unknown":
        monkeypatch.delattr(os, "copy_file_range")
    elif inside != "shared or copied":
        calls = iter([lambda *given: copy(given[0], given[1], 1000, *given[3:]), refuse, refuse])
        if inside == "refused":
            next(calls)
        monkeypatch.setattr(os, "copy_file_range", lambda *given: next(calls)(*given))
    contents = [b"head", os.urandom(3 << 20), os.urandom(5)]
    seen: list[bytes] = []
    blob = blobs.open_temporary()
    blob.write(contents[0])
    for content in contents[1:]:
        part = tmp_path / "part"
        part.write_bytes(content)
        found = blob.append(part, lambda piece: seen.append(bytes(piece)))
        assert found == (len(content), hashlib.sha256(content).hexdigest())
    blob.write(b"tail")
    artifact = blob.commit("files/file_a")
    whole = b"".join([*contents, b"tail"])
    assert blobs.path("files/file_a").read_bytes() == whole
    assert (artifact.bytes, artifact.sha256) == (len(whole), hashlib.sha256(whole).hexdigest())
    assert b"".join(seen) == b"".join(contents[1:])


def test_a_full_disk_is_told_when_files_are_joined(
    blobs: Blobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "copy_file_range", refuse)
    (tmp_path / "part").write_bytes(b"x")
    with blobs.open_temporary() as blob, pytest.raises(NoSpace):
        blob.append(tmp_path / "part", lambda _: None)
    assert temporaries(blobs) == []
