"""A range of a file's content, its entity tag, and HEAD (RFC 9110)."""

from __future__ import annotations

import hashlib

import anyio
import httpx2
import pytest

from rose.api.content import ByteRange, requested_range
from rose.errors import RangeNotSatisfiable
from tests.api.running import Running

pytestmark = pytest.mark.anyio

CONTENT = bytes(range(256)) * 2048
"""More than one piece of a download."""
SIZE = len(CONTENT)
TAG = f'"{hashlib.sha256(CONTENT).hexdigest()}"'


@pytest.fixture(scope="module")
async def path(shared_api: Running) -> str:
    """Where the content is."""
    made = await shared_api.openai.files.create(file=("data.bin", CONTENT), purpose="user_data")
    return f"/v1/files/{made.id}/content"


async def ask(api: Running, path: str, **headers: str) -> httpx2.Response:
    """Ask for the content with headers, whose names have underscores here."""
    return await api.http.get(path, headers={name.replace("_", "-"): value for name, value in headers.items()})


@pytest.mark.parametrize(
    ("asked", "first", "last"),
    [
        ("bytes=0-0", 0, 0),
        ("bytes=10-19", 10, 19),
        ("Bytes = 10-19", 10, 19),
        ("bytes=300000-", 300000, SIZE - 1),
        (f"bytes={SIZE - 1}-{SIZE + 5}", SIZE - 1, SIZE - 1),
        ("bytes=-1", SIZE - 1, SIZE - 1),
        ("bytes=-300000", SIZE - 300000, SIZE - 1),
        (f"bytes=-{SIZE * 2}", 0, SIZE - 1),
    ],
)
async def test_one_range(shared_api: Running, path: str, asked: str, first: int, last: int) -> None:
    answer = await ask(shared_api, path, Range=asked)
    assert answer.status_code == 206
    assert answer.headers["content-range"] == f"bytes {first}-{last}/{SIZE}"
    assert answer.headers["content-length"] == str(last - first + 1)
    assert (answer.headers["etag"], answer.headers["accept-ranges"]) == (TAG, "bytes")
    assert answer.content == CONTENT[first : last + 1]


@pytest.mark.parametrize("asked", [f"bytes={SIZE}-", f"bytes={SIZE + 1}-{SIZE + 2}", "bytes=-0"])
async def test_no_byte_in_the_range(shared_api: Running, path: str, asked: str) -> None:
    answer = await ask(shared_api, path, Range=asked)
    assert answer.status_code == 416
    assert answer.headers["content-range"] == f"bytes */{SIZE}"
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == ("Range", "range_not_satisfiable")
    assert str(SIZE - 1) in error["message"]


@pytest.mark.parametrize(
    "asked",
    [
        "bytes=5-3",
        "bytes=0-1,4-5",
        "lines=0-3",
        "bytes=-",
        "bytes=a-b",
        "bytes=",
        "0-5",
        "bytes=١-٢",
        "bytes=0-" + "9" * 30,
    ],
)
async def test_what_is_no_single_range_gets_everything(shared_api: Running, path: str, asked: str) -> None:
    request = shared_api.http.build_request("GET", path, headers={"range": asked.encode()})
    answer = await shared_api.http.send(request)
    assert (answer.status_code, answer.content) == (200, CONTENT)
    assert (answer.headers["etag"], answer.headers["accept-ranges"]) == (TAG, "bytes")
    assert "content-range" not in answer.headers


@pytest.mark.parametrize(
    ("condition", "status"),
    [(TAG, 206), (f"W/{TAG}", 200), ('"other"', 200), ("Wed, 21 Oct 2026 07:28:00 GMT", 200)],
)
async def test_if_range(shared_api: Running, path: str, condition: str, status: int) -> None:
    answer = await ask(shared_api, path, Range="bytes=0-9", If_Range=condition)
    assert answer.status_code == status
    assert answer.content == (CONTENT[:10] if status == 206 else CONTENT)
    beyond = await ask(shared_api, path, Range=f"bytes={SIZE}-", If_Range='"other"')
    assert beyond.status_code == 200


@pytest.mark.parametrize(
    ("name", "value", "status"),
    [
        ("if-none-match", TAG, 304),
        ("if-none-match", f'"a", W/{TAG}', 304),
        ("if-none-match", "*", 304),
        ("if-none-match", '"a"', 200),
        ("if-match", f'"a", {TAG}', 200),
        ("if-match", "*", 200),
        ("if-match", '"a"', 412),
        ("if-match", f"W/{TAG}", 412),
    ],
)
async def test_conditions(shared_api: Running, path: str, name: str, value: str, status: int) -> None:
    answer = await shared_api.http.get(path, headers={name: value})
    assert answer.status_code == status
    if status == 304:
        assert (answer.content, answer.headers["etag"]) == (b"", TAG)
    if status == 412:
        assert answer.json()["error"]["code"] == "precondition_failed"


async def test_head_says_what_get_would_send(shared_api: Running, path: str) -> None:
    whole = await shared_api.http.get(path)
    head = await shared_api.http.head(path, headers={"range": "bytes=0-9"})
    assert (head.status_code, head.content) == (200, b"")
    for name in ("content-length", "content-type", "content-disposition", "etag", "accept-ranges"):
        assert head.headers[name] == whole.headers[name], name
    assert head.headers["content-length"] == str(SIZE)
    assert (await shared_api.http.head("/v1/files/file_none/content")).status_code == 404


async def test_ranges_joined_are_the_content(shared_api: Running, path: str) -> None:
    pieces: list[bytes] = []
    while sum(map(len, pieces)) < SIZE:
        at = sum(map(len, pieces))
        pieces.append((await ask(shared_api, path, Range=f"bytes={at}-{at + 99_999}", If_Range=TAG)).content)
    assert b"".join(pieces) == CONTENT


async def test_the_sdk_takes_a_range(shared_api: Running, path: str) -> None:
    file_id = path.split("/")[3]
    found = await shared_api.openai.files.content(file_id, extra_headers={"Range": "bytes=1-3"})
    assert found.content == CONTENT[1:4]


async def test_of_a_damaged_file_no_range_is_given_out(api: Running) -> None:
    made = await api.openai.files.create(file=("data.bin", CONTENT), purpose="user_data")
    blob = anyio.Path(api.services.blobs.path(f"files/{made.id}"))
    await blob.write_bytes(CONTENT[:-1])
    cut = await ask(api, f"/v1/files/{made.id}/content", Range="bytes=0-9")
    assert (cut.status_code, cut.json()["error"]["code"]) == (500, "blob_mismatch")


def test_a_content_of_one_byte() -> None:
    assert requested_range("bytes=0-", 1) == ByteRange(0, 0)
    assert requested_range("bytes=-5", 1) == ByteRange(0, 0)
    with pytest.raises(RangeNotSatisfiable):
        requested_range("bytes=1-", 1)
