"""More chats than the engines take: who is answered when, and what the others are told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anyio
import msgspec
import openai
import pytest
from anyio.abc import SocketAttribute, SocketStream

from rose import leases
from rose.api import line as line_module
from rose.log.pool import Pool
from rose.settings import Settings
from tests.api.conftest import serving
from tests.api.played_engine import CHAT, WELL, answer, engine
from tests.api.running import Running, free_port
from tests.api.teams import House
from tests.eventually import eventually

pytestmark = pytest.mark.anyio

BUSY = {"error": {"message": "The engine answers 64 requests already.", "code": "engine_busy"}}
MESSAGES: Any = CHAT["messages"]


class SlowEngine:
    """Answers one request for each time that it is told to."""

    def __init__(self) -> None:
        self.heard: list[str] = []
        """The project of each request, in the order in which they came."""
        self._may = anyio.Semaphore(0)

    def release(self, count: int = 1) -> None:
        for _ in range(count):
            self._may.release()

    async def serve(self, connection: SocketStream) -> None:
        async with connection:
            head, body = b"", b""
            while b"\r\n\r\n" not in head:
                head += await connection.receive()
            head, body = head.split(b"\r\n\r\n", 1)
            length = next(int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if b"content-length" in line)
            while len(body) < length:
                body += await connection.receive()
            self.heard.append(msgspec.json.decode(body)["rose"]["project"])
            await self._may.acquire()
            await answer("200 OK", {"choices": []}, "connection: close")(connection)


async def announce(api: Running, listener: Any, places: int) -> None:
    url = f"http://127.0.0.1:{listener.extra(SocketAttribute.local_port)}"
    facts = {"max_requests": places}
    worker = leases.Worker(id="inference_slow", kind="inference", host="here", url=url, capabilities=facts, pid=1)
    await leases.announce(api.services.pool, worker)


async def ask(client: openai.AsyncOpenAI, answered: list[str], name: str) -> None:
    await client.chat.completions.create(model="tiny", messages=MESSAGES)
    answered.append(name)


@pytest.mark.parametrize("places", [1, 8])
async def test_many_requests_of_a_team_do_not_keep_anothers_one_waiting(
    settings: Callable[..., Settings], pool: Pool, places: int
) -> None:
    slow, answered = SlowEngine(), list[str]()
    async with (
        serving(settings(port=free_port(), engine_wait_seconds=120.0), pool) as api,
        await anyio.create_tcp_listener(local_host="127.0.0.1") as listener,
        anyio.create_task_group() as tasks,
    ):
        house = House(api)
        admin = await house.administrator()
        _, red = await house.team(admin, "red")
        blue_id, blue = await house.team(admin, "blue")
        tasks.start_soon(listener.serve, slow.serve)
        await announce(api, listener, places)
        for _ in range(100):
            tasks.start_soon(ask, red, answered, "red")
        at_work = max(1, places - 1)
        await eventually(lambda: (len(slow.heard), len(api.services.line)) == (at_work, 100 - at_work))
        tasks.start_soon(ask, blue, answered, "blue")
        if places == 1:  # the next place is blue's
            await eventually(lambda: len(api.services.line) == 100)
            slow.release(2)
        else:  # a place is kept for blue
            await eventually(lambda: slow.heard[-1] == blue_id)
            slow.release(places)
        await eventually(lambda: "blue" in answered)
        assert slow.heard.index(blue_id) == at_work
        assert len(answered) <= max(2, places)
        slow.release(110)
        await eventually(lambda: len(answered) == 101)
        await house.close()
        tasks.cancel_scope.cancel()
    assert len(api.services.line) == 0


async def test_a_full_engine_is_asked_again_until_it_has_room(settings: Callable[..., Settings], pool: Pool) -> None:
    refused = 0

    async def full_at_first(connection: SocketStream) -> None:
        nonlocal refused
        refused += 1
        play = answer("503 Service Unavailable", BUSY, "retry-after: 2", "connection: close") if refused < 4 else WELL
        await play(connection)

    async with serving(settings(port=free_port(), engine_wait_seconds=60.0), pool) as api, engine(api, full_at_first):
        answered = await api.http.post("/v1/chat/completions", json=CHAT)
    assert (answered.status_code, refused) == (200, 4)


@pytest.mark.parametrize("streams", [False, True])
async def test_who_has_waited_long_enough_is_told_when_to_come_back(
    settings: Callable[..., Settings], pool: Pool, streams: bool
) -> None:
    async with serving(settings(port=free_port(), engine_wait_seconds=0.3), pool) as api:
        async with engine(api, answer("503 Service Unavailable", BUSY, "retry-after: 2", "connection: close")):
            refused = await api.http.post("/v1/chat/completions", json={**CHAT, "stream": streams})
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "2")
        assert refused.json()["error"]["code"] == "engine_busy", refused.text


async def test_a_model_that_is_being_loaded_is_not_a_full_engine(settings: Callable[..., Settings], pool: Pool) -> None:
    loading = {"error": {"message": "The base is still being loaded.", "code": "model_loading"}}
    async with serving(settings(port=free_port(), engine_wait_seconds=60.0), pool) as api:
        async with engine(api, answer("503 Service Unavailable", loading, "retry-after: 15")):
            with anyio.fail_after(30):
                refused = await api.http.post("/v1/chat/completions", json=CHAT)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "15")
        assert refused.json()["error"]["code"] == "model_loading"


async def test_what_a_project_asks_too_much_is_its_own_rate_limit(
    settings: Callable[..., Settings], pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(line_module, "MAX_WAITING_OF_PROJECT", 1)
    async with (
        serving(settings(port=free_port(), engine_wait_seconds=60.0), pool) as api,
        engine(api, WELL, max_requests=0),
        anyio.create_task_group() as tasks,
    ):
        tasks.start_soon(lambda: api.http.post("/v1/chat/completions", json=CHAT))
        await eventually(lambda: len(api.services.line) == 1)
        with pytest.raises(openai.RateLimitError) as refused:
            await api.openai.chat.completions.create(model="tiny", messages=MESSAGES)
        tasks.cancel_scope.cancel()
    assert (refused.value.status_code, refused.value.code) == (429, "project_waiting_limit")
    assert refused.value.type == "rate_limit_error"
    assert int(refused.value.response.headers["retry-after"]) >= 1
