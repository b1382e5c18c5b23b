"""The engine over HTTP: OpenAI's shapes by its own client, streams as tokens are made, closed connections."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import anyio
import httpx2
import msgspec
import openai
import pytest
from anyio.abc import SocketAttribute, SocketStream

from rose.errors import InvalidRequest, NotFound, Unavailable
from rose.http_server import http_server
from rose.inference.client import EngineClient
from rose.inference.engine import TorchEngine
from rose.inference.generation import EngineBusy, ScoringRequest
from rose.inference.request import Target
from rose.inference.server import EngineApp
from rose.leases import Worker
from tests.eventually import eventually
from tests.inference.asking import QUESTION, World, ask, reply

pytestmark = pytest.mark.anyio

Serve = Callable[..., Any]


@pytest.fixture
async def serving() -> AsyncIterator[Callable[..., Any]]:
    """Factory: serve an engine and return its address."""
    async with AsyncExitStack() as stack:

        async def start(engine: TorchEngine, token: str | None = None) -> str:
            listener = socket.create_server(("127.0.0.1", 0))
            stack.callback(listener.close)
            await stack.enter_async_context(http_server(EngineApp(engine, token), listener))
            return f"http://127.0.0.1:{listener.getsockname()[1]}"

        yield start


@pytest.fixture
async def url(serving: Serve, engine: TorchEngine) -> str:
    return await serving(engine)


@pytest.fixture
async def client() -> AsyncIterator[EngineClient]:
    async with EngineClient() as opened:
        yield opened


def body(target: Target, **more: Any) -> dict[str, Any]:
    return {
        "model": target.model,
        "messages": QUESTION,
        "temperature": 0,
        "max_tokens": 24,
        "rose": msgspec.to_builtins(target),
        **more,
    }


async def test_the_official_client_reads_a_plain_answer(url: str, world: World, engine: TorchEngine) -> None:
    expected = reply(engine, ask(world.target(world.red)))
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as official:
        answer = await official.chat.completions.create(
            model="rose-test",
            messages=QUESTION,  # pyright: ignore[reportArgumentType]
            temperature=0,
            max_tokens=24,
            logprobs=True,
            top_logprobs=2,
            extra_body={"rose": msgspec.to_builtins(world.target(world.red))},
        )
    (choice,) = answer.choices
    assert choice.message.content == expected.text()
    assert (choice.message.role, choice.message.refusal, choice.finish_reason) == ("assistant", None, "length")
    assert (answer.object, answer.model) == ("chat.completion", "rose-test")
    assert re.fullmatch(r"chatcmpl-[a-z2-7]{20}", answer.id)
    assert answer.usage is not None
    assert answer.usage.model_dump(exclude_none=True) == {
        "prompt_tokens": expected.prompt_tokens,
        "completion_tokens": 24,
        "total_tokens": expected.prompt_tokens + 24,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert [len(entry.top_logprobs) for entry in choice.logprobs.content] == [2] * 24


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1, "seed": 3, "n": 3}, {"stop": ["e"]}, {"max_tokens": 0}])
async def test_streamed_and_plain_answers_are_equal(
    url: str, client: EngineClient, world: World, sampling: dict[str, Any]
) -> None:
    asked = body(world.target(world.white), **sampling)
    plain = await client.complete(url, asked)
    streamed, usage = await gather(client, url, {**asked, "stream": True, "stream_options": {"include_usage": True}})
    assert streamed == {
        choice["index"]: (choice["message"]["content"], choice["finish_reason"]) for choice in plain["choices"]
    }
    assert usage == plain["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


async def gather(client: EngineClient, url: str, asked: dict[str, Any]) -> tuple[dict[int, Any], dict[str, int]]:
    """Return each choice's text and finish reason, and the usage, having checked the order of the chunks."""
    chunks: list[dict[str, Any]] = []
    async with client.stream(url, asked) as lines:
        async for line in lines:
            if line == "[DONE]":
                break
            chunks.append(msgspec.json.decode(line))
    assert len({(chunk["id"], chunk["created"], chunk["model"], chunk["object"]) for chunk in chunks}) == 1
    last = chunks.pop()
    assert last["choices"] == []
    texts: dict[int, str] = {}
    reasons: dict[int, str] = {}
    for chunk in chunks:
        assert chunk["usage"] is None
        (choice,) = chunk["choices"]
        index, delta = choice["index"], choice["delta"]
        assert index not in reasons, "nothing comes after the finish reason"
        if index not in texts:
            assert delta == {"role": "assistant", "content": "", "refusal": None}
        if choice["finish_reason"]:
            assert delta == {}
            reasons[index] = choice["finish_reason"]
        texts[index] = texts.get(index, "") + delta.get("content", "")
    return {index: (texts[index], reasons[index]) for index in texts}, last["usage"]


async def test_the_first_token_arrives_before_the_last_is_made(
    serving: Serve, start_engine: Callable[..., TorchEngine], client: EngineClient, world: World
) -> None:
    arrived = threading.Event()
    made = 0

    def hold_the_second_half() -> None:
        nonlocal made
        made += 1
        if made > 10:
            assert arrived.wait(60)

    url = await serving(start_engine(before_step=hold_the_second_half))
    text = ""
    async with client.stream(url, body(world.target(), stream=True, max_tokens=20)) as lines:
        async for line in lines:
            if line == "[DONE]":
                break
            text += msgspec.json.decode(line)["choices"][0]["delta"].get("content", "")
            if text and not arrived.is_set():
                assert made <= 11, "the engine made more than it may"
                arrived.set()
    assert arrived.is_set()
    assert made == 20


async def test_closing_the_stream_frees_the_engine(
    url: str, client: EngineClient, world: World, engine: TorchEngine
) -> None:
    async with client.stream(url, body(world.target(), stream=True, max_tokens=2000)) as lines:
        async for line in lines:
            if '"content":""' not in line:
                break
        assert engine.status().active_requests == 1
    await eventually(lambda: engine.status().active_requests == 0)


async def test_cancelling_a_plain_call_frees_the_engine(
    url: str, client: EngineClient, world: World, engine: TorchEngine
) -> None:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(client.complete, url, body(world.target(), max_tokens=2000))
        await eventually(lambda: engine.status().active_requests == 1)
        tasks.cancel_scope.cancel()
    await eventually(lambda: engine.status().active_requests == 0)


async def test_stopping_the_engine_ends_a_stream_with_an_error_that_the_official_client_raises(
    serving: Serve, start_engine: Callable[..., TorchEngine], world: World
) -> None:
    engine = start_engine()
    url = await serving(engine)
    messages: Any = QUESTION

    async def read() -> None:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as official:
            stream = await official.chat.completions.create(
                model="rose-test",
                messages=messages,
                max_tokens=2000,
                stream=True,
                extra_body={"rose": msgspec.to_builtins(world.target())},
            )
            async for _ in stream:
                engine.stop()

    with pytest.raises(openai.APIError, match="stopping"), anyio.fail_after(30):
        await read()


async def test_refusals_are_errors_of_their_kind(url: str, client: EngineClient, world: World) -> None:
    missing = world.target(base=msgspec.structs.replace(world.base, source="/nowhere", fingerprint="0" * 64))
    for stream in (False, True):
        asked = body(missing, stream=stream)
        with pytest.raises(NotFound, match="/nowhere") as refused:
            async with client.stream(url, asked) if stream else contextlib.AsyncExitStack():
                await client.complete(url, asked)
        assert (refused.value.code, refused.value.param) == ("model_not_available", "model")
    with pytest.raises(InvalidRequest, match="temperature") as invalid:
        await client.complete(url, body(world.target(), temperature=3))
    assert invalid.value.param == "temperature"


async def test_a_busy_engine_says_when_to_ask_again(
    serving: Serve, start_engine: Callable[..., TorchEngine], client: EngineClient, world: World
) -> None:
    url = await serving(start_engine(max_requests=0))
    with pytest.raises(EngineBusy) as refused:
        await client.complete(url, body(world.target()))
    assert (refused.value.retry_after_seconds or 0) > 0
    async with httpx2.AsyncClient() as plain:
        answer = await plain.post(f"{url}/v1/chat/completions", json=body(world.target()))
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) > 0
    assert answer.json()["error"].keys() == {"message", "type", "param", "code", "hint"}


async def test_every_other_request_has_an_error_in_openais_shape(url: str) -> None:
    async with httpx2.AsyncClient(base_url=url) as plain:
        answers = {
            404: await plain.get("/v1/models"),
            405: await plain.get("/v1/chat/completions"),
            400: await plain.post("/v1/chat/completions", content=b"{"),
            413: await plain.post("/v1/chat/completions", content=b" " * (33 << 20)),
        }
        for status, answer in answers.items():
            assert answer.status_code == status
            assert answer.json()["error"]["type"] == "invalid_request_error"
        health = (await plain.get("/health")).json()
        assert health["status"] == "ok"
        assert health["device"] == "cpu"


async def test_without_the_token_nothing_is_answered(
    serving: Serve, engine: TorchEngine, client: EngineClient, world: World
) -> None:
    url = await serving(engine, "secret")
    with pytest.raises(Unavailable, match="token"):
        await client.complete(url, body(world.target()))
    async with httpx2.AsyncClient() as plain:
        assert (await plain.get(f"{url}/health")).status_code == 401
    async with EngineClient(token="secret") as knowing:
        assert await knowing.complete(url, body(world.target()))


async def test_an_engine_that_is_gone_is_unavailable(client: EngineClient, world: World) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    with pytest.raises(Unavailable, match="No inference engine answers") as refused:
        await client.complete(url, body(world.target()))
    assert refused.value.hint
    with pytest.raises(Unavailable):
        async with client.stream(url, body(world.target(), stream=True)):
            raise AssertionError("there is nobody")


async def test_an_engine_that_dies_in_mid_stream_is_unavailable(client: EngineClient, world: World) -> None:
    async def die(stream: SocketStream) -> None:
        async with stream:
            await stream.receive()
            head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
            await stream.send(head + b"b\r\ndata: {}\n\n\n\r\n")

    received: list[str] = []

    async def read(url: str) -> None:
        async with client.stream(url, body(world.target(), stream=True)) as lines:
            async for line in lines:
                received.append(line)

    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, die)
        port = listener.extra(SocketAttribute.local_port)
        with pytest.raises(Unavailable, match="No inference engine answers"), anyio.fail_after(30):
            await read(f"http://127.0.0.1:{port}")
        tasks.cancel_scope.cancel()
    assert received == ["{}"]


async def test_the_least_busy_engine_is_chosen_then_the_one_that_has_the_base(client: EngineClient) -> None:
    def worker(name: str, active: int, *fingerprints: str) -> Worker:
        bases = [{"fingerprint": fingerprint} for fingerprint in fingerprints]
        facts = {"active_requests": active, "bases": bases}
        return Worker(id=name, kind="inference", host="here", url=name, capabilities=facts, pid=1)

    workers = [worker("busy", 3, "b"), worker("free", 0), worker("loaded", 0, "b")]
    assert client.choose(workers, "b") == "loaded"
    assert client.choose(workers[:2], "b") == "free"
    assert client.choose(workers[:1], "x") == "busy"
    with pytest.raises(Unavailable, match="No inference engine"):
        client.choose([msgspec.structs.replace(workers[0], kind="trainer")])


async def test_tools_reach_the_prompt_unless_their_choice_is_none(url: str, client: EngineClient, world: World) -> None:
    tools = [{"type": "function", "function": {"name": "water", "parameters": {"type": "object"}}}]
    plain = await client.complete(url, body(world.target()))
    with_tools = await client.complete(url, body(world.target(), tools=tools))
    none_chosen = await client.complete(url, body(world.target(), tools=tools, tool_choice="none"))
    assert with_tools["usage"]["prompt_tokens"] > plain["usage"]["prompt_tokens"]
    assert none_chosen["choices"] == plain["choices"]
    assert none_chosen["usage"] == plain["usage"]


async def test_given_tokens_are_scored_and_the_weights_are_named(url: str, client: EngineClient, world: World) -> None:
    rows = [[5, 6, 7, 8], [9, 10]]
    answers = {
        target.kind + str(target.adapter is not None): await client.score(url, ScoringRequest(target=target, rows=rows))
        for target in (world.target(world.red), world.target(), world.target(world.full, kind="full"))
    }
    assert [len(row) for row in answers["adapterTrue"].logprobs] == [3, 1]
    assert answers["adapterTrue"].logprobs != answers["adapterFalse"].logprobs
    assert answers["adapterFalse"].logprobs == answers["fullTrue"].logprobs, "its weights are the base's"
    assert [answer.adapter for answer in answers.values()] == [world.red.sha256, None, world.full.sha256]
    assert {(answer.weights, answer.dtype) for answer in answers.values()} == {("fp32", "float32")}


async def test_tokens_that_cannot_be_scored_are_refused(url: str, client: EngineClient, world: World) -> None:
    with pytest.raises(InvalidRequest, match="Row 0"):
        await client.score(url, ScoringRequest(target=world.target(), rows=[[5]]))
    async with httpx2.AsyncClient() as plain:
        assert (await plain.post(f"{url}/score", content=b'{"rows": 3}')).status_code == 400
