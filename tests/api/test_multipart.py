"""However the network cuts a body into pieces, the same file arrives."""

from __future__ import annotations

from collections.abc import AsyncIterator
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rose.api import multipart
from rose.api.multipart import Upload, boundary_of, read_upload
from rose.errors import InvalidRequest, TooLarge

pytestmark = pytest.mark.anyio

BOUNDARIES = [b"\r\n--rose", b"\r\n--rose-\r\n", b"--rose--", b"\r\n"]
CONTENTS = st.one_of(st.binary(max_size=300), st.sampled_from(BOUNDARIES))


def body(content: bytes, purpose: str) -> bytes:
    """Make a multipart body."""
    return (
        b'--rose\r\nContent-Disposition: form-data; name="purpose"\r\n\r\n%b\r\n'
        b'--rose\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n'
        b"Content-Type: application/octet-stream\r\n\r\n%b\r\n--rose--\r\n"
    ) % (purpose.encode(), content)


async def read(pieces: list[bytes], *, max_bytes: int = 1 << 20) -> tuple[Upload, bytes]:
    """Parse a body that comes in `pieces` and return what was found and what was written."""
    written = bytearray()

    async def chunks() -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece

    upload = await read_upload(
        chunks(), "multipart/form-data; boundary=rose", written.extend, file_field="file", max_bytes=max_bytes
    )
    return upload, bytes(written)


@settings(deadline=None, max_examples=60)
@given(content=CONTENTS, cuts=st.lists(st.integers(0, 500), max_size=12))
async def test_any_cut_gives_the_same_file(content: bytes, cuts: list[int]) -> None:
    if b"\r\n--rose" in content:
        content = content.replace(b"--rose", b"--lily")  # no client puts its own boundary into a part
    whole = body(content, "fine-tune")
    ends = [0, *sorted(min(cut, len(whole)) for cut in cuts), len(whole)]
    pieces = [whole[start:end] for start, end in pairwise(ends)]
    upload, written = await read(pieces)
    assert written == content
    assert (upload.bytes, upload.filename, upload.fields) == (len(content), "a.jsonl", {"purpose": "fine-tune"})


async def test_content_goes_on_before_the_body_is_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multipart, "WRITE_BYTES", 10)
    sizes: list[int] = []

    async def chunks() -> AsyncIterator[bytes]:
        whole = body(b"x" * 1000, "fine-tune")
        for start in range(0, len(whole), 100):
            yield whole[start : start + 100]

    await read_upload(
        chunks(),
        "multipart/form-data; boundary=rose",
        lambda piece: sizes.append(len(piece)),
        file_field="file",
        max_bytes=1000,
    )
    assert sum(sizes) == 1000
    assert max(sizes) <= 100


@pytest.mark.parametrize("size", [11, 5000])
async def test_a_file_over_the_limit_is_refused(size: int) -> None:
    with pytest.raises(TooLarge):
        await read([body(b"x" * size, "fine-tune")], max_bytes=10)


async def test_a_field_without_end_is_refused() -> None:
    with pytest.raises(TooLarge) as refused:
        await read([body(b"x", "y" * (65 << 10))])
    assert refused.value.param == "purpose"


@pytest.mark.parametrize("cut", [1, 30, 60, 120, -3, -5, -9])
async def test_a_cut_off_body_is_refused(cut: int) -> None:
    with pytest.raises(InvalidRequest):
        await read([body(b"some content", "fine-tune")[:cut]])


@pytest.mark.parametrize(
    "kind",
    [
        "",
        "application/json",
        "multipart/form-data",
        "multipart/form-data; boundary=",
        "multipart/form-data; boundary*0=a; boundary*",
        "multipart/mixed; boundary=x",
    ],
)
def test_another_content_type_is_named(kind: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        boundary_of(kind)
    assert refused.value.code == "invalid_content_type"
