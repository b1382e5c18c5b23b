"""Random requests made from the API's own OpenAPI document: never a 500, always what the document says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import anyio
import pytest

from tests.api.running import Running

pytestmark = pytest.mark.anyio

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


@pytest.mark.slow
@pytest.mark.timeout(400)
async def test_random_requests_meet_no_server_error(shared_api: Running, tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "run", f"{shared_api.services.settings.url}/openapi.json"),
        *("--checks", CHECKS, "--phases", "examples,coverage,fuzzing", "--max-examples", "15", "--seed", "1"),
        *("--no-color", "--request-timeout", "30", "--generation-database", "none", "--continue-on-failure"),
    ]
    with anyio.fail_after(380):
        run = await anyio.run_process(command, check=False, cwd=tmp_path, stderr=subprocess.STDOUT)
    assert run.returncode == 0, run.stdout.decode()[-20000:]
