"""Uploads in parts that are refused: what is wrong is named, and nothing is left behind."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import anyio
import msgspec
import openai
import pytest
from openai.types import Upload

from rose.log.pool import Pool
from rose.settings import Settings
from tests.api.conftest import serving
from tests.api.running import Running, free_port
from tests.api.teams import House
from tests.api.test_uploads import CREATE, announced, expired, part, stored
from tests.eventually import eventually

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"bytes": None}, "bytes"),
        ({"bytes": "10"}, "bytes"),
        ({"bytes": True}, "bytes"),
        ({"bytes": 1.5}, "bytes"),
        ({"bytes": -1}, "bytes"),
        ({"bytes": (8 << 30) + 1}, "bytes"),
        ({"filename": None}, "filename"),
        ({"filename": 3}, "filename"),
        ({"filename": ""}, "filename"),
        ({"filename": "a.csv"}, "filename"),
        ({"filename": "a\0.jsonl"}, "filename"),
        ({"filename": "x" * 300 + ".jsonl"}, "filename"),
        ({"mime_type": None}, "mime_type"),
        ({"purpose": None}, "purpose"),
        ({"purpose": "training"}, "purpose"),
        ({"expires_after": 5}, "expires_after"),
        ({"expires_after": {"anchor": "now", "seconds": 3600}}, "expires_after.anchor"),
        ({"expires_after": {"anchor": "created_at"}}, "expires_after.seconds"),
        ({"expires_after": {"anchor": "created_at", "seconds": 60}}, "expires_after.seconds"),
        ({"expires_after": {"anchor": "created_at", "seconds": "3600"}}, "expires_after.seconds"),
    ],
)
async def test_a_bad_announcement_names_the_field(shared_api: Running, change: dict[str, Any], param: str) -> None:
    answer = await shared_api.http.post("/v1/uploads", json={**CREATE, **change})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
    assert answer.json()["error"]["type"] == "invalid_request_error"


async def test_an_announcement_of_no_bytes_is_taken_and_makes_no_file(api: Running) -> None:
    upload = await announced(api, 0, purpose="assistants", filename="filename", mime_type="mime_type")
    with pytest.raises(openai.BadRequestError) as refused:
        await part(api, upload, b"x")
    assert refused.value.param == "data"
    with pytest.raises(openai.BadRequestError) as refused:
        await api.openai.uploads.complete(upload.id, part_ids=[])
    assert (refused.value.param, refused.value.code) == ("part_ids", "empty_file")


@pytest.mark.parametrize(
    ("form", "code"),
    [
        ({"files": {"data": ("upload", b"")}}, "empty_file"),
        ({"files": {"data": ("upload", b"x" * 11)}}, "part_too_large"),
        ({"files": {"file": ("upload", b"x")}}, "missing_required_parameter"),
        ({"json": {"data": "x"}}, "invalid_content_type"),
        ({"content": b"--x\r\n", "headers": {"content-type": "multipart/form-data; boundary=x"}}, "invalid_multipart"),
    ],
)
async def test_a_bad_part_is_refused_and_leaves_nothing(api: Running, form: dict[str, Any], code: str) -> None:
    upload = await announced(api, 10)
    answer = await api.http.post(f"/v1/uploads/{upload.id}/parts", **form)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, "data", code), answer.text
    assert stored(api) == []


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({}, "part_ids", "missing_required_parameter"),
        ({"part_ids": "PART"}, "part_ids", "invalid_type"),
        ({"part_ids": ["PART", 3]}, "part_ids[1]", "invalid_type"),
        ({"part_ids": ["part_x"] * 3000}, "part_ids", "invalid_value"),
        ({"part_ids": ["PART", "part_x"]}, "part_ids", "invalid_value"),
        ({"part_ids": ["PART", "PART"]}, "part_ids", "invalid_value"),
        ({"part_ids": []}, "part_ids", "invalid_value"),
        ({"part_ids": ["PART"], "md5": 3}, "md5", "invalid_type"),
        ({"part_ids": ["PART"], "md5": "xyz"}, "md5", "invalid_value"),
        ({"part_ids": ["PART"], "md5": "0" * 32}, "md5", "md5_mismatch"),
    ],
)
async def test_a_bad_completion_is_refused_and_can_be_mended(
    api: Running, body: dict[str, Any], param: str, code: str
) -> None:
    upload = await announced(api, 10)
    part_id = await part(api, upload, b"0123456789")
    path = f"/v1/uploads/{upload.id}/complete"

    def named(value: Any) -> Any:
        return [named(entry) for entry in value] if isinstance(value, list) else part_id if value == "PART" else value

    answer = await api.http.post(path, json={key: named(value) for key, value in body.items()})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, param, code), answer.text
    assert stored(api) == [f"uploads/{upload.id}/{part_id}"]
    mended = await api.http.post(
        path, json={"part_ids": [part_id], "md5": hashlib.md5(b"0123456789").hexdigest().upper()}
    )
    assert mended.status_code == 200, mended.text


async def test_a_part_has_at_most_64_mb(api: Running) -> None:
    upload = await announced(api, 1 << 30)

    head = b'--x\r\nContent-Disposition: form-data; name="data"; filename="upload"\r\n\r\n'
    tail = b"\r\n--x--\r\n"

    async def form(size: int) -> AsyncIterator[bytes]:
        yield head
        while size > 0:
            yield bytes(min(size, 1 << 20))
            size -= 1 << 20
        yield tail

    headers = {"content-type": "multipart/form-data; boundary=x"}
    path = f"/v1/uploads/{upload.id}/parts"
    for size, more in ((64 << 20) + 1, {}), (66 << 20, {"content-length": str((66 << 20) + len(head + tail))}):
        answer = await api.http.post(path, content=form(size), headers={**headers, **more})
        error = answer.json()["error"]
        assert (answer.status_code, error["param"], error["code"]) == (400, "data", "part_too_large")
        assert str(64 << 20) in error["message"]
    assert stored(api) == []
    assert (await api.http.post(path, content=form(64 << 20), headers=headers)).status_code == 200


async def test_a_completed_upload_takes_no_more(api: Running) -> None:
    upload = await announced(api, 10)
    ids = [await part(api, upload, b"01234"), await part(api, upload, b"56789")]
    done = await api.openai.uploads.complete(upload.id, part_ids=ids)
    assert await api.openai.uploads.complete(upload.id, part_ids=ids) == done
    for refused in (
        part(api, upload, b"x"),
        api.openai.uploads.complete(upload.id, part_ids=ids[::-1]),
        api.openai.uploads.cancel(upload.id),
    ):
        with pytest.raises(openai.BadRequestError, match="completed") as error:
            await refused
        assert (error.value.param, error.value.code) == ("upload_id", "invalid_upload_state")
    assert done.file is not None
    assert stored(api) == [f"files/{done.file.id}"]


async def test_an_expired_upload_is_refused(api: Running) -> None:
    upload_id = await expired(api, 10)
    assert (await api.http.get(f"/v1/uploads/{upload_id}")).json()["status"] == "expired"
    client = api.openai.uploads
    for refused in (client.parts.create(upload_id, data=b"x"), client.complete(upload_id, part_ids=["part_x"])):
        with pytest.raises(openai.BadRequestError, match="expired") as error:
            await refused
        assert (error.value.param, error.value.code) == ("upload_id", "invalid_upload_state")
    assert stored(api) == []


async def test_an_unknown_upload_is_a_404(shared_api: Running) -> None:
    client = shared_api.openai.uploads
    for refused in (
        client.parts.create("upload_x", data=b"x"),
        client.complete("upload_x", part_ids=["part_x"]),
        client.cancel("upload_x"),
    ):
        with pytest.raises(openai.NotFoundError) as error:
            await refused
        assert (error.value.param, error.value.code) == ("upload_id", "upload_not_found")


async def test_a_part_that_changed_on_the_disk_is_named(api: Running) -> None:
    upload = await announced(api, 10)
    ids = [await part(api, upload, b"01234"), await part(api, upload, b"56789")]
    folder = anyio.Path(api.services.settings.blobs / "uploads" / upload.id)
    for harm in (
        (folder / ids[1]).write_bytes(b"56780"),
        (folder / ids[1]).write_bytes(b"5"),
        (folder / ids[1]).unlink(),
    ):
        await harm
        with pytest.raises(openai.BadRequestError) as error:
            await api.openai.uploads.complete(upload.id, part_ids=ids)
        assert (error.value.param, error.value.code) == ("part_ids", "part_damaged")
        assert f"part_ids[1] ({ids[1]})" in error.value.message
    again = await part(api, upload, b"56789")
    done = await api.openai.uploads.complete(upload.id, part_ids=[ids[0], again])
    assert done.file is not None
    assert stored(api) == [f"files/{done.file.id}"]


async def test_where_too_little_space_is_left_nothing_is_taken(settings: Callable[..., Settings], pool: Pool) -> None:
    given = settings(port=free_port())
    async with serving(given, pool) as api:
        upload = await announced(api, 10)
        part_id = await part(api, upload, b"0123456789")
    tight = msgspec.structs.replace(given, port=free_port(), min_free_bytes=1 << 60)
    async with serving(tight, pool) as api:
        for path, request in {
            "/v1/uploads": {"json": CREATE},
            f"/v1/uploads/{upload.id}/parts": {"files": {"data": ("upload", b"x")}},
            f"/v1/uploads/{upload.id}/complete": {"json": {"part_ids": [part_id]}},
        }.items():
            answer = await api.http.post(path, **request)
            assert (answer.status_code, answer.json()["error"]["code"]) == (507, "no_space"), path
            assert answer.headers["x-should-retry"] == "false"
        assert stored(api) == [f"uploads/{upload.id}/{part_id}"]


async def test_another_project_has_no_such_upload(api: Running) -> None:
    house = House(api)
    try:
        admin = await house.administrator()
        _, ours = await house.team(admin, "ours")
        _, theirs = await house.team(admin, "theirs")
        upload = await ours.uploads.create(bytes=10, filename="a.jsonl", mime_type="jsonl", purpose="fine-tune")
        part_id = (await ours.uploads.parts.create(upload.id, data=b"0123456789")).id
        before = stored(api)
        for ask in (
            lambda name: theirs.uploads.parts.create(name, data=b"x"),
            lambda name: theirs.uploads.complete(name, part_ids=[part_id]),
            lambda name: theirs.uploads.cancel(name),
            lambda name: theirs.get(f"/uploads/{name}", cast_to=Upload),
        ):
            texts: list[str] = []
            for name in (upload.id, "upload_none"):
                with pytest.raises(openai.NotFoundError) as refused:
                    await ask(name)
                texts.append(refused.value.response.text.replace(name, ""))
            assert texts[0] == texts[1]
        assert stored(api) == before
        done = await ours.uploads.complete(upload.id, part_ids=[part_id])
        assert done.file is not None
        assert (await ours.files.retrieve(done.file.id)).id == done.file.id
        with pytest.raises(openai.NotFoundError):
            await theirs.files.content(done.file.id)
    finally:
        await house.close()


async def test_a_part_that_is_cut_off_leaves_nothing(api: Running) -> None:
    upload = await announced(api, 100_000_000)
    request = (
        f"POST /v1/uploads/{upload.id}/parts HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 50000000\r\n"
        "Content-Type: multipart/form-data; boundary=x\r\n\r\n"
        '--x\r\nContent-Disposition: form-data; name="data"; filename="upload"\r\n\r\n'
    ).encode()
    async with await anyio.connect_tcp("127.0.0.1", api.services.settings.port) as stream:
        await stream.send(request + bytes(3 << 20))
        await eventually(lambda: stored(api) != [])
    await eventually(lambda: stored(api) == [])
