"""The command line as a person meets it, against a real server.

Most calls run in a thread of the tests' process: starting Python and importing takes longer than the command. What has
to do with a process (terminals, pipes, signals, imports) is tried with one, here and in tests/acceptance.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

import anyio
import pytest

from cli.app import main
from tests.api.conftest import api, api_settings, seed_file, shared_api
from tests.api.running import Running

__all__ = ["api", "api_settings", "seed_file", "shared_api"]

SECONDS = 180


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
        return await anyio.to_thread.run_sync(_main, arguments, environment or {}, text, abandon_on_cancel=True)


def _main(arguments: tuple[str, ...], environment: Mapping[str, str], text: str) -> Done:
    out, err = io.BytesIO(), io.BytesIO()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"COLUMNS": "100", **environment}.items():
            patch.setenv(name, value)
        patch.setattr(sys, "stdin", io.StringIO(text))
        patch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding="utf-8", write_through=True))
        patch.setattr(sys, "stderr", io.TextIOWrapper(err, encoding="utf-8", write_through=True))
        status = main(list(arguments))
        return Done(status, out.getvalue().decode(), err.getvalue().decode())


@pytest.fixture
def rose(api: Running) -> Rose:
    """`rose` with the address of a running API."""
    return _at(api)


@pytest.fixture
def shared_rose(shared_api: Running) -> Rose:
    """`rose` with the address of an API that a module's tests share: for what changes nothing."""
    return _at(shared_api)


def _at(api: Running) -> Rose:
    url = api.services.settings.url

    async def run(*arguments: str, text: str = "", **more: str) -> Done:
        return await call(*arguments, environment={"ROSE_URL": url, **more}, text=text)

    return run
