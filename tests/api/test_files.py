"""Files through the official client: upload, list, read, delete, and every way to get it wrong."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Any

import anyio
import httpx2
import openai
import pytest

from rose.api import receiving
from rose.commands import Request
from rose.domain.files import AddFile
from rose.log.append import Actor
from tests.api.running import SEED, Running
from tests.eventually import eventually

pytestmark = pytest.mark.anyio


async def test_a_file_goes_up_and_comes_back(api: Running, seed_file: Path) -> None:
    made = await api.openai.files.create(file=seed_file, purpose="fine-tune")
    assert made.id.startswith("file_")
    assert made.filename == "training_data.jsonl"
    assert made.bytes == len(SEED)
    assert made.status == "processed"
    assert "expires_at" not in made.model_fields_set
    assert made.model_extra == {"sha256": hashlib.sha256(SEED).hexdigest()}
    assert await api.openai.files.retrieve(made.id) == made
    assert (await api.openai.files.content(made.id)).content == SEED
    listed = await api.openai.files.list()
    assert [file.id for file in listed.data] == [made.id]


async def test_content_says_its_name(api: Running) -> None:
    made = await api.openai.files.create(file=('dátá "1".jsonl', SEED), purpose="fine-tune")
    answer = await api.http.get(f"/v1/files/{made.id}/content", headers={"accept": "application/binary"})
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.headers["content-length"] == str(made.bytes)
    assert answer.headers["content-disposition"].startswith('attachment; filename="data')
    assert "filename*=UTF-8''d%C3%A1t%C3%A1" in answer.headers["content-disposition"]


async def test_a_deleted_file_is_gone(api: Running, seed_file: Path) -> None:
    made = await api.openai.files.create(file=seed_file, purpose="fine-tune")
    gone = await api.openai.files.delete(made.id)
    assert (gone.id, gone.object, gone.deleted) == (made.id, "file", True)
    with pytest.raises(openai.NotFoundError) as refused:
        await api.openai.files.retrieve(made.id)
    assert refused.value.param == "id"
    with pytest.raises(openai.NotFoundError):
        await api.openai.files.delete(made.id)
    assert (await api.openai.files.list()).data == []


async def test_paging_is_complete_while_files_arrive_and_go(api: Running, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    ids: list[str] = []
    for number in range(7):
        path.write_text(f"{number}\n")
        ids.append(await api.upload(path))
    seen: list[str] = []
    async for file in api.openai.files.list(limit=2):
        if len(seen) == 2:
            await api.openai.files.delete(seen[-1])
            await api.upload(path)
        seen.append(file.id)
    assert seen == ids[::-1]
    oldest = await api.openai.files.list(limit=3, order="asc")
    assert oldest.has_more
    assert [file.id for file in oldest.data] == ids[:3]


@pytest.mark.parametrize("query", ["limit=0", "after=after", "purpose=batch"])
async def test_lists_may_be_empty(api: Running, seed_file: Path, query: str) -> None:
    await api.upload(seed_file)
    answer = await api.http.get(f"/v1/files?{query}")
    assert answer.status_code == 200
    assert answer.json() == {"object": "list", "data": [], "first_id": "", "last_id": "", "has_more": False}


async def test_a_file_may_expire(api: Running, seed_file: Path) -> None:
    made = await api.openai.files.create(
        file=seed_file, purpose="fine-tune", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert made.expires_at == made.created_at + 3600


async def test_an_expired_file_is_as_a_deleted_one(api: Running) -> None:
    with api.services.blobs.open_temporary() as blob:
        blob.write(SEED)
        content = blob.commit("files/file_old")
    now = int(time.time())
    old = AddFile(
        project="default",
        file_id="file_old",
        at=now - 3601,
        filename="old.jsonl",
        purpose="fine-tune",
        artifact=content,
        expires_at=now - 1,
    )
    await api.services.commands.add_file(old, Request(actor=Actor(kind="client")))
    assert (await api.openai.files.list()).data == []
    for call in (api.openai.files.retrieve, api.openai.files.content, api.openai.files.delete):
        with pytest.raises(openai.NotFoundError):
            await call("file_old")
    with pytest.raises(openai.BadRequestError) as refused:
        await api.openai.fine_tuning.jobs.create(model="tiny", training_file="file_old")
    assert (refused.value.param, refused.value.code) == ("training_file", "file_not_found")


@pytest.mark.parametrize("name", ["data.json", "data.csv.gz", "data"])
async def test_a_name_that_training_does_not_take_gets_one_answer(api: Running, name: str) -> None:
    """At the upload, and from a job for a file that is there from before."""
    with pytest.raises(openai.BadRequestError) as at_upload:
        await api.openai.files.create(file=(name, SEED), purpose="fine-tune")
    assert (at_upload.value.param, at_upload.value.code) == ("file", "invalid_file_format")
    with api.services.blobs.open_temporary() as blob:
        blob.write(SEED)
        content = blob.commit("files/file_old")
    old = AddFile(
        project="default", file_id="file_old", at=int(time.time()), filename=name, purpose="fine-tune", artifact=content
    )
    await api.services.commands.add_file(old, Request(actor=Actor(kind="client")))
    with pytest.raises(openai.BadRequestError) as at_creation:
        await api.openai.fine_tuning.jobs.create(model="tiny", training_file="file_old")
    assert (at_creation.value.param, at_creation.value.code) == ("training_file", "invalid_file_format")
    assert at_upload.value.response.json()["error"]["message"] == at_creation.value.response.json()["error"]["message"]
    assert f"this file is named '{name}'" in at_upload.value.message
    assert (await api.openai.files.create(file=(name, SEED), purpose="user_data")).filename == name


def _form(name: str = "a.jsonl", content: bytes = b"{}\n", **fields: str) -> dict[str, Any]:
    return {"files": {"file": (name, content)}, "data": {"purpose": "fine-tune", **fields}}


@pytest.mark.parametrize(
    ("form", "param"),
    [
        ({"data": {"purpose": "fine-tune"}, "files": {"other": ("a.jsonl", b"{}")}}, "file"),
        ({"files": {"file": ("a.jsonl", b"{}")}, "data": {}}, "purpose"),
        (_form(purpose="training"), "purpose"),
        (_form(purpose="fine\0tune"), "purpose"),
        (_form("a.csv"), "file"),
        (_form("..\\.."), "file"),
        (_form(content=b""), "file"),
        (_form("x" * 300 + ".jsonl"), "file"),
        (_form(**{"expires_after[anchor]": "now", "expires_after[seconds]": "3600"}), "expires_after[anchor]"),
        (_form(**{"expires_after[anchor]": "created_at"}), "expires_after[seconds]"),
        (_form(**{"expires_after[anchor]": "created_at", "expires_after[seconds]": "60"}), "expires_after[seconds]"),
        (_form(**{"expires_after[anchor]": "created_at", "expires_after[seconds]": "soon"}), "expires_after[seconds]"),
        (_form(expires_after='{"anchor": "created_at", "seconds": 3600}'), "expires_after"),
        ({"json": {"purpose": "fine-tune"}}, "file"),
    ],
)
async def test_bad_uploads_name_the_field_and_leave_nothing(api: Running, form: dict[str, Any], param: str) -> None:
    answer = await api.http.post("/v1/files", **form)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert _stored(api) == []


async def test_a_damaged_file_is_never_given_out_whole(api: Running, seed_file: Path) -> None:
    made = await api.openai.files.create(file=seed_file, purpose="fine-tune")
    path = anyio.Path(api.services.blobs.path(f"files/{made.id}"))
    await path.write_bytes(SEED.replace(b"factorial", b"factoriel"))
    with pytest.raises(httpx2.RemoteProtocolError):
        await api.http.get(f"/v1/files/{made.id}/content")
    await path.write_bytes(SEED[:-1])
    cut = await api.http.get(f"/v1/files/{made.id}/content")
    assert (cut.status_code, cut.json()["error"]["code"]) == (500, "blob_mismatch")
    await path.unlink()
    missing = await api.http.get(f"/v1/files/{made.id}/content")
    assert (missing.status_code, missing.json()["error"]["code"]) == (500, "blob_mismatch")


async def test_a_path_in_the_name_is_cut_off(api: Running) -> None:
    answer = await api.http.post("/v1/files", **_form("../../etc/a.jsonl"))
    assert answer.status_code == 200
    assert answer.json()["filename"] == "a.jsonl"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"--x\r\nno colon\r\n\r\n", "file"),
        (b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n', "file"),
        (b"nothing of that kind", "file"),
        (b'--x\r\nContent-Disposition: form-data; name="file"; filename="\xe4.jsonl"\r\n\r\n{}\r\n--x--\r\n', "file"),
        (b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\n\xff\xfe\r\n--x--\r\n', "purpose"),
    ],
)
async def test_broken_multipart_is_refused(api: Running, body: bytes, param: str) -> None:
    headers = {"content-type": "multipart/form-data; boundary=x"}
    answer = await api.http.post("/v1/files", content=body, headers=headers)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code", "hint"}
    assert error["param"] == param
    assert "Error(" not in error["message"]


async def test_a_cut_off_upload_leaves_nothing(api: Running) -> None:
    head = (
        b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
        b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n'
    )
    request = (
        b"POST /v1/files HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: multipart/form-data; boundary=x\r\n"
        b"Content-Length: 100000000\r\n\r\n"
    )
    stream = await anyio.connect_tcp("127.0.0.1", api.services.settings.port)
    async with stream:
        await stream.send(request + head + bytes(3 << 20))
        await eventually(lambda: any(size > 1 << 20 for _, size in _stored(api)))
    await eventually(lambda: _stored(api) == [])
    assert (await api.http.get("/v1/files")).json()["data"] == []


async def test_an_upload_that_stands_still_is_given_up(api: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receiving, "SILENCE_SECONDS", 0.2)
    request = (
        b"POST /v1/files HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: multipart/form-data; boundary=x\r\n"
        b"Content-Length: 1000\r\n\r\n--x\r\n"
    )
    async with await anyio.connect_tcp("127.0.0.1", api.services.settings.port) as stream:
        await stream.send(request)
        with anyio.fail_after(30):
            answer = await stream.receive()
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"The upload was silent" in answer
    assert _stored(api) == []


def _stored(api: Running) -> list[tuple[str, int]]:
    root = api.services.settings.blobs
    return [(str(path), path.stat().st_size) for path in root.rglob("*") if path.is_file()]
