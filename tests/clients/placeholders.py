"""Stands between OpenAI's suites and a ROSE: their fixed ids become ids of real objects, made beforehand over the API.

The suites were written for a mock that answers to any id. Here nothing is answered: each call goes on to ROSE with the
ids of objects in the state that the call needs, and ROSE's answer goes back as it is.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Awaitable, Callable
from typing import Any

import httpx2
import msgspec
from litestar.types import Receive, Scope, Send

from tests.api.running import SEED, Running, Trainer

JOB = "ft-AF1WoRqd3aJAHsqc9NY7iL8F"
UPLOAD = "upload_abc123"
PERMISSION = "cp_zc4Q7MP6XxulcVzj4MZdwsAB"
CHECKPOINTS = ("ft:gpt-4o-mini-2024-07-18:org:weather:B7R9VjQd", JOB)
MODELS = ("ft:gpt-4o-mini:acemeco:suffix:abc123",)
ALIASES = ("gpt-4o-mini", "gpt-6-astra")
"""Models of the suites that ROSE's own aliases lead to a base."""
CONTENT = b"Example data"
LARGE = 1000
"""Bytes of an upload that any of the suites' parts fits into."""
HOOK = "/hook"
"""Where test events arrive here; the suites' `https://` is no address."""
EVENT_TYPE = "fine_tuning.job.succeeded"
HOP = (b"host", b"content-length", b"transfer-encoding", b"connection", b"accept-encoding")

Prepare = Callable[["Placeholders", re.Match[str], bytes], Awaitable[tuple[str, bytes]]]


class Placeholders:
    """An ASGI application."""

    def __init__(self, running: Running, url: str) -> None:
        self.receiver = url + HOOK
        self._running = running
        self._http = running.http
        self._model: str | None = None
        self._project: str | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")  # type: ignore[union-attr]
            if not message.get("more_body"):
                break
        path = scope["path"]
        if path == HOOK:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            return
        for method, pattern, prepare in RULES:
            found = re.fullmatch(pattern, path)
            if found and method == scope["method"]:
                path, body = await prepare(self, found, body)
                break
        headers = [(k.decode("latin-1"), v.decode("latin-1")) for k, v in scope["headers"] if k.lower() not in HOP]
        query = scope["query_string"].decode()
        answer = await self._http.request(
            scope["method"],
            httpx2.URL(path=path, query=query.encode()) if query else path,
            headers=headers,
            content=body,
        )
        passed = [
            (k.lower().encode(), v.encode("latin-1"))
            for k, v in answer.headers.items()
            if k.lower() != "content-length"
        ]
        await send({"type": "http.response.start", "status": answer.status_code, "headers": passed})
        await send({"type": "http.response.body", "body": answer.content, "more_body": False})

    # --- real objects

    async def post(self, path: str, **options: Any) -> dict[str, Any]:
        answer = await self._http.post(f"/v1{path}", **options)
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def file(self) -> str:
        form = {"files": {"file": ("a.jsonl", SEED)}, "data": {"purpose": "fine-tune"}}
        return (await self.post("/files", **form))["id"]

    async def job(self, *, queued: bool = False) -> str:
        body = {"model": "tiny", "training_file": await self.file()}
        job_id = (await self.post("/fine_tuning/jobs", json=body))["id"]
        if queued:
            await Trainer(self._running.services, job_id).validate()
        return job_id

    async def tuned(self) -> str:
        job_id = await self.job()
        await Trainer(self._running.services, job_id).run_to_success(2)
        return (await self._http.get(f"/v1/fine_tuning/jobs/{job_id}")).json()["fine_tuned_model"]

    async def model(self) -> str:
        made = self._model or await self.tuned()
        self._model = made
        return made

    async def project(self) -> str:
        made = self._project or str((await self.post("/organization/projects", json={"name": "other"}))["id"])
        self._project = made
        return made

    async def upload(self, size: int = len(CONTENT)) -> str:
        body = {"filename": "a.txt", "purpose": "user_data", "bytes": size, "mime_type": "text/plain"}
        return (await self.post("/uploads", json=body))["id"]

    async def end_paused_jobs(self) -> None:
        for job in (await self._http.get("/v1/fine_tuning/jobs?limit=100")).json()["data"]:
            if job["status"] == "paused":
                await self.post(f"/fine_tuning/jobs/{job['id']}/cancel")

    async def permission(self, model: str) -> str:
        body = {"project_ids": [await self.project()]}
        return (await self.post(f"/fine_tuning/checkpoints/{model}/permissions", json=body))["data"][0]["id"]


def changed(body: bytes, **values: Any) -> bytes:
    """Return a JSON body with other values under the keys that it has."""
    given = msgspec.json.decode(body)
    return msgspec.json.encode({**given, **{key: value for key, value in values.items() if key in given}})


async def _job(self: Placeholders, found: re.Match[str], body: bytes) -> tuple[str, bytes]:
    verb = found[1]
    job_id = await self.job(queued=verb in ("/pause", "/resume"))
    if verb == "/resume":
        await self.post(f"/fine_tuning/jobs/{job_id}/pause")
    return f"/v1/fine_tuning/jobs/{job_id}{verb}", body


async def _create_job(self: Placeholders, found: re.Match[str], body: bytes) -> tuple[str, bytes]:
    return found[0], changed(body, training_file=await self.file(), validation_file=await self.file())


async def _file(self: Placeholders, found: re.Match[str], body: bytes) -> tuple[str, bytes]:
    return f"/v1/files/{await self.file()}{found[1]}", body


async def _tuned(self: Placeholders, found: re.Match[str], body: bytes) -> tuple[str, bytes]:
    return f"/v1/models/{await self.tuned()}", body


async def _part(self: Placeholders, found: re.Match[str], body: bytes) -> tuple[str, bytes]:
    return f"/v1/uploads/{await self.upload(LARGE)}{found[1]}", body


async def _complete(self: Placeholders, _: re.Match[str], body: bytes) -> tuple[str, bytes]:
    upload_id = await self.upload()
    part = await self.post(f"/uploads/{upload_id}/parts", files={"data": ("upload", CONTENT)})
    md5 = hashlib.md5(CONTENT, usedforsecurity=False).hexdigest()
    return f"/v1/uploads/{upload_id}/complete", changed(body, part_ids=[part["id"]], md5=md5)


async def _permissions(self: Placeholders, found: re.Match[str], body: bytes) -> tuple[str, bytes]:
    model = await self.model()
    end = f"/{await self.permission(model)}" if found[2] else ""
    if body and not found[2]:
        body = changed(body, project_ids=[await self.project()])
    return f"/v1/fine_tuning/checkpoints/{model}/permissions{end}", body


async def _list_jobs(self: Placeholders, found: re.Match[str], body: bytes) -> tuple[str, bytes]:
    await self.end_paused_jobs()  # the suites' types have no word for them
    return found[0], body


async def _endpoint(self: Placeholders, found: re.Match[str], body: bytes) -> tuple[str, bytes]:
    made = await self.post("/webhook_endpoints", json={"name": "x", "url": self.receiver, "event_types": [EVENT_TYPE]})
    return f"/v1/webhook_endpoints/{made['id']}{found[1]}", changed(body, url=self.receiver) if body else body


async def _create_endpoint(self: Placeholders, found: re.Match[str], body: bytes) -> tuple[str, bytes]:
    return found[0], changed(body, url=self.receiver)


_ANY_CHECKPOINT = "|".join(map(re.escape, CHECKPOINTS))
_PERMISSIONS = rf"/v1/fine_tuning/checkpoints/({_ANY_CHECKPOINT})/permissions(/{PERMISSION})?"
_ENDPOINT = r"/v1/webhook_endpoints/whe_123(|/test|/rotate_secret)"
RULES: tuple[tuple[str, str, Prepare], ...] = (
    ("POST", r"/v1/fine_tuning/jobs", _create_job),
    ("GET", rf"/v1/fine_tuning/jobs/{JOB}(|/events|/checkpoints)", _job),
    ("POST", rf"/v1/fine_tuning/jobs/{JOB}(/cancel|/pause|/resume)", _job),
    ("GET", r"/v1/files/(?:file_id|string)(|/content)", _file),
    ("DELETE", r"/v1/files/(?:file_id|string)()", _file),
    ("DELETE", r"/v1/models/(" + "|".join(map(re.escape, MODELS)) + ")", _tuned),
    ("POST", rf"/v1/uploads/{UPLOAD}(/parts|/cancel)", _part),
    ("POST", rf"/v1/uploads/{UPLOAD}/complete", _complete),
    ("GET", r"/v1/fine_tuning/jobs", _list_jobs),
    ("POST", r"/v1/webhook_endpoints", _create_endpoint),
    *((method, _ENDPOINT, _endpoint) for method in ("GET", "POST", "DELETE")),
    ("GET", _PERMISSIONS, _permissions),
    ("POST", _PERMISSIONS, _permissions),
    ("DELETE", _PERMISSIONS, _permissions),
)
