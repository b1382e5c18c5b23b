"""The command line as a person meets it: its own process against a real server."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

import anyio
import pytest

from tests.api.conftest import api, api_settings, seed_file
from tests.api.running import Running

__all__ = ["api", "api_settings", "seed_file"]

SECONDS = 60


@dataclass(frozen=True)
class Done:
    """How a call of `rose` ended."""

    status: int
    out: str
    err: str


Rose = Callable[..., Awaitable[Done]]


async def call(*arguments: str, environment: Mapping[str, str] | None = None, text: str = "") -> Done:
    """Run `rose` with arguments and standard input, without a terminal."""
    with anyio.fail_after(SECONDS):
        done = await anyio.run_process(
            [sys.executable, "-m", "cli.app", *arguments],
            input=text.encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            check=False,
            env={**os.environ, "COLUMNS": "100", **(environment or {})},
        )
    return Done(done.returncode, done.stdout.decode(), done.stderr.decode())


@pytest.fixture
def rose(api: Running) -> Rose:
    """`rose` with the address of a running API."""
    url = api.services.settings.url

    async def run(*arguments: str, text: str = "", **more: str) -> Done:
        return await call(*arguments, environment={"ROSE_URL": url, **more}, text=text)

    return run
