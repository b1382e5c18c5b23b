"""The engine of `rose up` is killed; the chats that are asked meanwhile are answered, only later."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest

from rose import leases
from rose.local import state
from rose.log.pool import open_pool
from tests import services
from tests.eventually import eventually
from tests.in_own_loop import in_own_loop
from tests.local.rose_up import RoseUp, rose_up

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

WAIT_SECONDS = 120


@pytest.fixture(scope="module")
def up(fixture_base: Path) -> Iterator[RoseUp]:
    given = {
        "ROSE_MODEL_ALIASES": f"small={fixture_base}",
        "ROSE_DEVICE": "cpu",
        "ROSE_ENGINE_WAIT_SECONDS": str(WAIT_SECONDS),
    }
    with services.private_folder() as folder, rose_up(folder, given) as started:
        yield started


def say(up: RoseUp, **more: Any) -> httpx2.Response:
    body = {"model": "small", "messages": [{"role": "user", "content": "What is recursion?"}], "temperature": 0, **more}
    return httpx2.post(f"{up.settings.url}/v1/chat/completions", json=body, timeout=WAIT_SECONDS + 60, trust_env=False)


async def engine_works(up: RoseUp) -> bool:
    """Tell whether an engine has a request in its hands."""
    pool = await open_pool(state.connection(up.settings), min_size=1, max_size=1)
    try:
        url = (await leases.workers(pool, "inference"))[-1].url
    finally:
        await pool.close()
    async with httpx2.AsyncClient(trust_env=False) as http:
        return (await http.get(f"{url}/health")).json()["active_requests"] > 0


def kill_engine(up: RoseUp) -> int:
    pid = up.pid_of("inference")
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    return pid


def test_chats_asked_after_the_kill_are_answered(up: RoseUp) -> None:
    before = say(up, max_tokens=5).json()
    killed = kill_engine(up)
    with ThreadPoolExecutor(2) as threads:
        streamed = threads.submit(say, up, max_tokens=5, stream=True)
        after = say(up, max_tokens=5)
    assert after.status_code == 200, after.text
    assert after.json()["choices"] == before["choices"]
    assert streamed.result().text.endswith("data: [DONE]\n\n")
    assert up.pid_of("inference") not in (None, killed)


def test_a_chat_that_the_engine_works_on_begins_anew(up: RoseUp) -> None:
    say(up, max_tokens=1)  # loads the base
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(say, up, max_tokens=400, logit_bias={}, n=8, temperature=1)
        in_own_loop(eventually(lambda: engine_works(up)))
        kill_engine(up)
        told = answer.result()
    assert told.status_code == 200, told.text
    assert len(told.json()["choices"]) == 8


def test_a_stream_that_has_begun_ends_with_an_error(up: RoseUp) -> None:
    body = {
        "model": "small",
        "messages": [{"role": "user", "content": "Count."}],
        "stream": True,
        "max_tokens": 2000,
        "n": 8,
    }
    address = f"{up.settings.url}/v1/chat/completions"
    with httpx2.stream("POST", address, json=body, timeout=WAIT_SECONDS, trust_env=False) as answer:
        lines = (line for line in answer.iter_lines() if line.startswith("data: "))
        next(lines)
        kill_engine(up)
        rest = list(lines)
    assert '"no_engine"' in rest[-1]
