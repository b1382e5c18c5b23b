"""Random requests made from the API's own OpenAPI document: never a 500, always what the document says.

Half of the ids that they ask for are those of real things, so that more than refusals is tried.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import anyio
import pytest

from rose.api import describe
from rose.log.pool import Pool
from rose.settings import Settings
from tests.api.conftest import serving
from tests.api.running import SEED, Running, Trainer, free_port

pytestmark = [pytest.mark.anyio, pytest.mark.slow, pytest.mark.timeout(1000)]

SECONDS = 900
EXAMPLES = 50
CHECKS = (
    *("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance"),
    *("response_headers_conformance", "unsupported_method", "allow_header_conformance", "missing_required_header"),
    *("use_after_free", "ensure_resource_availability", "negative_data_rejection", "ignored_auth"),
)
KEY = "sk-of-the-settings"
PUBLIC = ("/", "/health", "/ready")


class World:
    """Real things whose ids random requests may hold."""

    def __init__(self, api: Running, key: str | None) -> None:
        self._api = api
        self._headers = {"authorization": f"Bearer {key}"} if key else {}
        self.ids: dict[str, list[str]] = {}

    async def make(self) -> dict[str, list[str]]:
        await self._own()
        if self._headers:
            await self._of_projects()
        return self.ids

    async def _own(self) -> None:
        for _ in range(3):
            form: dict[str, Any] = {"files": {"file": ("a.jsonl", SEED)}, "data": {"purpose": "fine-tune"}}
            file_id = self._add("file_id", await self._post("/files", **form))
            job = {"model": "tiny", "training_file": file_id}
            self._add("job_id", await self._post("/fine_tuning/jobs", json=job))
            done = self._add("job_id", await self._post("/fine_tuning/jobs", json=job))
            await Trainer(self._api.services, done).run_to_success(2)
            answer = await self._api.http.get(f"/v1/fine_tuning/jobs/{done}", headers=self._headers)
            self.ids.setdefault("model", []).append(answer.json()["fine_tuned_model"])
            body: dict[str, Any] = {"filename": "a.txt", "purpose": "user_data", "bytes": 4, "mime_type": "text/plain"}
            self._add("upload_id", await self._post("/uploads", json=body))
            body = {"url": "https://8.8.8.8/hook", "event_types": ["fine_tuning.job.succeeded"], "name": "hook"}
            self._add("webhook_endpoint_id", await self._post("/webhook_endpoints", json=body))

    async def _of_projects(self) -> None:
        for name in ("first", "second"):
            project = self._add("project_id", await self._post("/organization/projects", json={"name": name}))
            accounts = f"/organization/projects/{project}/service_accounts"
            account = await self._post(accounts, json={"name": "bot", "scope": "admin"})
            self._add("account_id", account)
            self._add("key_id", account["api_key"])
            path = f"/fine_tuning/checkpoints/{self.ids['model'][0]}/permissions"
            permission = await self._post(path, json={"project_ids": [project]})
            self._add("permission_id", permission["data"][0])

    def _add(self, name: str, thing: Mapping[str, Any]) -> str:
        self.ids.setdefault(name, []).append(thing["id"])
        return thing["id"]

    async def _post(self, path: str, **options: Any) -> dict[str, Any]:
        answer = await self._api.http.post(f"/v1{path}", headers=self._headers, **options)
        assert answer.status_code == 200, answer.text
        return answer.json()


def configuration(ids: Mapping[str, Sequence[str]]) -> str:
    """Return what schemathesis reads: the ids that there are, how far a stream is read, and that no engine runs."""
    known = [f"[dictionaries.{name}]\nvalues = {list(values)!r}" for name, values in ids.items()]
    used = [f'"path.{name}" = {{ dictionary = "{name}", probability = 0.5 }}' for name in ids]
    unavailable = '[checks.not_a_server_error]\nexpected-statuses = ["2xx", "3xx", "4xx", 503]'
    streams = '[[operations]]\ninclude-path-regex = "/events$"\nmax-stream-events = 1'
    return "\n".join([*known, "[parameters]", *used, unavailable, streams]) + "\n"


async def fuzz(api: Running, folder: Path, *options: str, key: str | None = None) -> None:
    """Try every operation; fail when schemathesis found something, or tried too little to find anything."""
    (folder / "schemathesis.toml").write_text(configuration(await World(api, key).make()))
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "run", f"{api.services.settings.url}/openapi.json"),
        *("--checks", ",".join(CHECKS), "--phases", "examples,coverage,fuzzing,stateful", "--seed", "1"),
        *("--max-examples", str(EXAMPLES), "--generation-database", "none", "--continue-on-failure", "--no-shrink"),
        *("--no-color", "--request-timeout", "60", "--suppress-health-check", "all", *options),
    ]
    with anyio.fail_after(SECONDS):
        run = await anyio.run_process(command, check=False, cwd=folder, stderr=subprocess.STDOUT)
    said = run.stdout.decode()
    assert run.returncode == 0, said[-20000:]
    tried = re.search(r"Operations: +(\d+) selected", said)
    cases = re.search(r"(\d+) generated", said)
    assert tried is not None, said
    assert cases is not None, said
    assert int(cases[1]) > EXAMPLES * int(tried[1]), said


async def test_without_keys(settings: Callable[..., Settings], pool: Pool, tmp_path: Path) -> None:
    """Whatever makes the first key is left out: from then on each call would need one."""
    async with serving(settings(port=free_port()), pool) as api:
        await fuzz(api, tmp_path, "--exclude-path-regex", "^/v1/organization/")


async def test_with_keys(settings: Callable[..., Settings], pool: Pool, tmp_path: Path) -> None:
    async with serving(settings(port=free_port(), api_keys=[KEY]), pool) as api:
        await fuzz(api, tmp_path, "--header", f"Authorization: Bearer {KEY}", key=KEY)


async def test_each_operation_asks_for_a_key(settings: Callable[..., Settings], pool: Pool) -> None:
    async with serving(settings(port=free_port(), api_keys=[KEY]), pool) as api:
        for path, operations in describe.openapi()["paths"].items():
            for method in operations:
                answer = await api.http.request(method, re.sub(r"\{\w+\}", "any", path))
                assert (answer.status_code == 401) == (path not in PUBLIC), (method, path)
                if path not in PUBLIC and method != "head":
                    assert answer.json()["error"]["code"] == "invalid_api_key", (method, path)
