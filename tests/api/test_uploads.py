"""Uploads in parts through the official client: in any order, refused in every wrong way, nothing left behind."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import anyio
import openai
import pytest
from openai.types import Upload

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
