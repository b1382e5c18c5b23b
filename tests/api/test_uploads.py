"""Uploads in parts through the official client: in any order, done once, nothing left behind."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path
from typing import Any

import anyio
import openai
import pytest
from openai.types import Upload

from projections.verify import repair, verify
from rose.commands import Request
from rose.domain.uploads import LIFE_SECONDS, CreateUpload
from rose.log.append import Actor
from rose.sweeper import sweep
from rose.uploads import Uploads
from tests.api.running import SEED, Running

pytestmark = pytest.mark.anyio


async def announced(api: Running, size: int, **more: Any) -> Upload:
    """Create an upload."""
    options: dict[str, Any] = {"filename": "data.jsonl", "purpose": "fine-tune", "mime_type": "text/jsonl", **more}
    return await api.openai.uploads.create(bytes=size, **options)


async def part(api: Running, upload: Upload, data: bytes) -> str:
    """Add a part and return its id."""
    return (await api.openai.uploads.parts.create(upload.id, data=data)).id


def stored(api: Running) -> list[str]:
    """Return the path of every file in the blob folder."""
    root = api.services.settings.blobs
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


async def test_a_file_goes_up_in_parts(api: Running) -> None:
    upload = await announced(api, len(SEED))
    assert upload.id.startswith("upload_")
    assert (upload.object, upload.status, upload.bytes, upload.file) == ("upload", "pending", len(SEED), None)
    assert upload.expires_at == upload.created_at + 3600
    later = await part(api, upload, SEED[100:])
    first = await part(api, upload, SEED[:100])
    assert first.startswith("part_")
    done = await api.openai.uploads.complete(upload.id, part_ids=[first, later], md5=hashlib.md5(SEED).hexdigest())
    assert done.status == "completed"
    assert done.file is not None
    assert done.file == await api.openai.files.retrieve(done.file.id)
    assert done.file.model_extra == {"sha256": hashlib.sha256(SEED).hexdigest()}
    assert (await api.openai.files.content(done.file.id)).content == SEED
    assert stored(api) == [f"files/{done.file.id}"]
    assert (await api.openai.fine_tuning.jobs.create(model="tiny", training_file=done.file.id)).id


CREATE = {"bytes": 10, "filename": "a.jsonl", "mime_type": "text/jsonl", "purpose": "fine-tune"}


async def test_parts_come_in_parallel(api: Running) -> None:
    pieces = [bytes([number]) * 1000 for number in range(80)]
    upload = await announced(api, 80_000, purpose="user_data", filename="a.bin")
    ids: dict[int, str] = {}

    async def send(number: int) -> None:
        ids[number] = await part(api, upload, pieces[number])

    async with anyio.create_task_group() as tasks:
        for number in range(80):
            tasks.start_soon(send, number)
    done = await api.openai.uploads.complete(upload.id, part_ids=[ids[number] for number in range(80)])
    assert done.file is not None
    assert (await api.openai.files.content(done.file.id)).content == b"".join(pieces)


async def test_completions_at_once_give_one_file_and_one_answer(api: Running) -> None:
    upload = await announced(api, len(SEED))
    ids = [await part(api, upload, SEED[:50]), await part(api, upload, SEED[50:])]
    answers: list[Upload] = []

    async def complete() -> None:
        answers.append(await api.openai.uploads.complete(upload.id, part_ids=ids))

    async with anyio.create_task_group() as tasks:
        for _ in range(6):
            tasks.start_soon(complete)
    assert len(answers) == 6
    assert all(answer == answers[0] for answer in answers)
    assert [file.id for file in (await api.openai.files.list()).data] == [answers[0].file and answers[0].file.id]
    assert len(stored(api)) == 1


async def test_a_cancelled_upload_leaves_nothing(api: Running) -> None:
    upload = await announced(api, 10)
    part_id = await part(api, upload, b"0123456789")
    assert len(stored(api)) == 1
    gone = await api.openai.uploads.cancel(upload.id)
    assert (gone.status, gone.file) == ("cancelled", None)
    assert stored(api) == []
    assert not (api.services.settings.blobs / "uploads" / upload.id).exists()
    assert await api.openai.uploads.cancel(upload.id) == gone
    for refused in (part(api, upload, b"x"), api.openai.uploads.complete(upload.id, part_ids=[part_id])):
        with pytest.raises(openai.BadRequestError, match="cancelled") as error:
            await refused
        assert (error.value.param, error.value.code) == ("upload_id", "invalid_upload_state")
    assert stored(api) == []


async def expired(api: Running, size: int) -> str:
    """Return the id of an upload whose hour is over."""
    command = CreateUpload(
        project="default",
        upload_id="upload_old",
        at=int(time.time()) - LIFE_SECONDS,
        filename="old.jsonl",
        purpose="fine-tune",
        bytes=size,
        mime_type="text/jsonl",
    )
    services = api.services
    uploads = Uploads(services.pool, services.blobs, services.commands, min_free_bytes=0)
    await uploads.create(command, Request(actor=Actor(kind="client")), lambda _: b"")
    return command.upload_id


async def test_the_file_may_expire(api: Running) -> None:
    upload = await announced(api, 10, expires_after={"anchor": "created_at", "seconds": 3600})
    done = await api.openai.uploads.complete(upload.id, part_ids=[await part(api, upload, b"0123456789")])
    assert done.file is not None
    assert done.file.expires_at == done.file.created_at + 3600


@pytest.mark.parametrize("purpose", ["assistants", "batch", "vision", "user_data", "evals"])
async def test_the_purpose_comes_back(api: Running, purpose: str) -> None:
    upload = await announced(api, 1, purpose=purpose, filename="a.txt", mime_type="txt")
    done = await api.openai.uploads.complete(upload.id, part_ids=[await part(api, upload, b"x")])
    assert done.file is not None
    assert (done.purpose, done.file.purpose) == (purpose, purpose)


async def test_a_request_with_a_key_is_done_once(api: Running) -> None:
    first = await api.http.post("/v1/uploads", json=CREATE, headers={"Idempotency-Key": "create"})
    again = await api.http.post("/v1/uploads", json=CREATE, headers={"Idempotency-Key": "create"})
    assert again.json() == first.json()
    path = f"/v1/uploads/{first.json()['id']}"
    ids: list[str] = []
    for key in ("a", "a", "b"):
        sent = await api.http.post(
            f"{path}/parts", files={"data": ("upload", b"01234")}, headers={"Idempotency-Key": f"part-{key}"}
        )
        ids.append(sent.json()["id"])
    assert ids[0] == ids[1] != ids[2]
    assert len(stored(api)) == 2
    body = {"part_ids": ids[1:]}
    done = [await api.http.post(f"{path}/complete", json=body, headers={"Idempotency-Key": "done"}) for _ in range(2)]
    assert done[0].json() == done[1].json()
    assert len(stored(api)) == 1


async def test_equal_parts_that_the_sdk_sends_again_stay_two(api: Running) -> None:
    """Its retries carry no key, and two parts of a file may well be equal."""
    upload = await announced(api, 10, purpose="user_data", filename="a.bin")
    path = f"/v1/uploads/{upload.id}/parts"
    ids = [
        (await api.http.post(path, files={"data": ("upload", b"00000")}, headers=headers)).json()["id"]
        for headers in ({}, {"x-stainless-retry-count": "1"})
    ]
    assert len(set(ids)) == 2
    assert (await api.openai.uploads.complete(upload.id, part_ids=ids)).status == "completed"


async def test_what_ended_is_swept_and_what_is_pending_stays(api: Running) -> None:
    pending = await announced(api, 10)
    kept = await part(api, pending, b"0123456789")
    gone = await announced(api, 10)
    await api.openai.uploads.complete(gone.id, part_ids=[await part(api, gone, b"0123456789")])
    old = await expired(api, 10)
    folders = api.services.settings.blobs / "uploads"
    for upload_id in (gone.id, old, "upload_without_events"):  # as a process leaves them that is killed
        (folders / upload_id).mkdir()
        (folders / upload_id / "part_x").write_bytes(b"x")
    services = api.services
    os.utime(folders / "upload_without_events", (time.time(), time.time()))
    assert await sweep(services.pool, services.blobs, keep_seconds=1800) == []
    swept = await sweep(services.pool, services.blobs, keep_seconds=-60)
    assert sorted(swept) == sorted(f"uploads/{upload_id}" for upload_id in (gone.id, old, "upload_without_events"))
    assert f"uploads/{pending.id}/{kept}" in stored(api)


async def test_the_view_is_what_the_log_says(api: Running) -> None:
    done = await announced(api, 10)
    await api.openai.uploads.complete(done.id, part_ids=[await part(api, done, b"0123456789")])
    await api.openai.uploads.cancel((await announced(api, 10)).id)
    await part(api, await announced(api, 10), b"x")
    assert await verify(api.services.pool) == []
    await api.services.pool.execute("""update rose.uploads set doc = doc || '{"bytes": 11}' where id = $1""", done.id)
    assert [difference.id for difference in await verify(api.services.pool, "uploads")] == [done.id]
    await repair(api.services.pool, "uploads")
    assert await verify(api.services.pool) == []


async def test_a_file_is_sent_in_chunks_by_the_sdk(api: Running, tmp_path: Path) -> None:
    """`upload_file_chunked` with its own part size, 64 MB."""
    line = b'{"messages": [{"role": "user", "content": "%s"}, {"role": "assistant", "content": "ok"}]}\n' % (
        b"x" * 4000
    )
    path = tmp_path / "large.jsonl"
    with path.open("wb") as file:
        while file.tell() <= 66 << 20:
            file.write(line * 256)
    digest = hashlib.md5(path.read_bytes()).hexdigest()
    done = await api.openai.uploads.upload_file_chunked(file=path, mime_type="txt", purpose="fine-tune", md5=digest)
    assert done.file is not None
    assert (done.status, done.file.filename, done.file.bytes) == ("completed", "large.jsonl", path.stat().st_size)
    content = (await api.openai.files.content(done.file.id)).content
    assert hashlib.md5(content).hexdigest() == digest
    assert stored(api) == [f"files/{done.file.id}"]
