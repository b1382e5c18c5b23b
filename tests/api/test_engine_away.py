"""Chats while no engine is there, or while it goes away: they wait for the next one, within bounds.

The engines here play their part down to the byte; tests/local/test_engine_killed.py kills a real one.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable

import anyio
import pytest
from anyio.abc import SocketStream

from rose import leases
from rose.api import engines, line
from rose.log.pool import Pool
from rose.settings import Settings
from tests.api.conftest import serving
from tests.api.played_engine import CHAT, ROLE, SPEAK, WELL, Play, answer, die, engine, stream
from tests.api.running import Running, free_port
from tests.eventually import eventually

pytestmark = pytest.mark.anyio


@pytest.fixture
async def api(settings: Callable[..., Settings], pool: Pool) -> AsyncIterator[Running]:
    """An API whose chats wait for an engine."""
    async with serving(settings(port=free_port(), engine_wait_seconds=30.0), pool) as running:
        yield running


async def waits(api: Running, number: int = 1) -> None:
    async def so_many() -> bool:
        return len(api.services.line) == number

    await eventually(so_many)


async def test_a_chat_waits_for_the_first_engine(api: Running) -> None:
    codes: list[int] = []

    async def ask() -> None:
        codes.append((await api.http.post("/v1/chat/completions", json=CHAT)).status_code)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(ask)
        await waits(api)
        async with engine(api, WELL):
            await eventually(lambda: codes)
    assert codes == [200]


@pytest.mark.parametrize("streams", [False, True])
async def test_an_engine_that_dies_before_the_first_token_is_not_noticed(api: Running, streams: bool) -> None:
    heard: list[str] = []

    async def ask() -> None:
        answered = await api.http.post("/v1/chat/completions", json={**CHAT, "stream": streams})
        heard.append(answered.text)

    async with anyio.create_task_group() as tasks, engine(api, stream(ROLE) if streams else die):
        tasks.start_soon(ask)
        await waits(api)
        async with engine(api, SPEAK if streams else WELL, "inference_b"):
            await eventually(lambda: heard)
    assert heard[0].count("assistant") == int(streams), "what the first engine had begun is not heard"
    assert "error" not in heard[0]
    assert heard[0].endswith("[DONE]\n\n" if streams else '{"choices":[]}')


STOPS = {"error": {"message": "The inference engine is stopping.", "code": "engine_stopping"}}


@pytest.mark.parametrize(
    "stops",
    [
        answer("503 Service Unavailable", STOPS, "retry-after: 5"),
        stream(ROLE, end=f"data: {json.dumps(STOPS)}\n\n"),
    ],
)
async def test_an_engine_that_is_stopped_hands_on_what_it_has_not_begun(api: Running, stops: Play) -> None:
    async with anyio.create_task_group() as tasks, engine(api, stops):
        heard: list[str] = []

        async def ask() -> None:
            heard.append((await api.http.post("/v1/chat/completions", json={**CHAT, "stream": True})).text)

        tasks.start_soon(ask)
        await waits(api)
        await leases.withdraw(api.services.pool, "inference_a")
        async with engine(api, SPEAK, "inference_b"):
            await eventually(lambda: heard)
    assert heard[0].endswith("data: [DONE]\n\n")


async def test_one_that_was_killed_is_passed_over_while_its_entry_stands(api: Running) -> None:
    killed = leases.Worker(
        id="inference_a", kind="inference", host="here", url=f"http://127.0.0.1:{free_port()}", capabilities={}, pid=1
    )
    await leases.announce(api.services.pool, killed)
    with anyio.fail_after(10):
        async with engine(api, WELL, "inference_b"):
            for _ in range(3):
                assert (await api.http.post("/v1/chat/completions", json=CHAT)).status_code == 200


async def test_the_wait_ends(settings: Callable[..., Settings], pool: Pool) -> None:
    async with serving(settings(port=free_port(), engine_wait_seconds=0.3), pool) as api:
        started = anyio.current_time()
        refused = await api.http.post("/v1/chat/completions", json=CHAT)
        assert anyio.current_time() - started >= 0.3
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "2")
    assert refused.json()["error"]["code"] == "no_engine"


async def test_a_request_that_two_engines_died_of_is_not_given_to_a_third(api: Running) -> None:
    heard = 0

    async def hear_and_die(connection: SocketStream) -> None:
        nonlocal heard
        heard += 1

    async with engine(api, hear_and_die):
        refused = await api.http.post("/v1/chat/completions", json=CHAT)
    assert refused.status_code == 503
    assert heard == engines.MAX_LOST


async def test_who_leaves_while_waiting_is_let_go(api: Running) -> None:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: api.http.post("/v1/chat/completions", json={**CHAT, "stream": True}))
        await waits(api)
        tasks.cancel_scope.cancel()
    await waits(api, 0)


async def test_only_so_many_wait(api: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(line, "MAX_WAITING", 1)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: api.http.post("/v1/chat/completions", json=CHAT))
        await waits(api)
        with anyio.fail_after(10):
            refused = await api.http.post("/v1/chat/completions", json=CHAT)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "no_engine")
        tasks.cancel_scope.cancel()


async def test_an_api_that_is_being_stopped_keeps_nobody_waiting(api: Running) -> None:
    codes: list[int] = []

    async def ask() -> None:
        codes.append((await api.http.post("/v1/chat/completions", json=CHAT)).status_code)

    with anyio.fail_after(10):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask)
            await waits(api)
            api.services.tailer.stop()
    assert codes == [503]
