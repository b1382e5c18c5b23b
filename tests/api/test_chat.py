"""Chat completions through the official client, the API and a real engine on a real (small) model."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import msgspec
import openai
import pytest
from anyio.abc import SocketAttribute, SocketStream

from rose import leases
from rose.domain.artifacts import Artifact
from rose.domain.job_values import BaseModel
from rose.language_models.locate import locate
from rose.log.pool import Pool
from rose.settings import Settings
from tests.api.conftest import serving
from tests.api.running import Running, Trainer, free_port
from tests.eventually import eventually

pytestmark = pytest.mark.anyio

QUESTION: Any = [{"role": "user", "content": "What does a rose need to bloom?"}]


class Chat(msgspec.Struct, frozen=True, kw_only=True):
    """An API with an engine, a base and a model tuned on it."""

    api: Running
    strict: openai.AsyncOpenAI
    """A client that refuses what is not of OpenAI's types."""
    base: str
    tuned: str

    async def say(self, model: str, **more: Any) -> str:
        """Return the greedy answer of a model."""
        asked: dict[str, Any] = {"temperature": 0, "max_tokens": 12, **more}
        answer = await self.strict.chat.completions.create(model=model, messages=QUESTION, **asked)
        assert answer.model == model
        return answer.choices[0].message.content or ""


@pytest.fixture
async def chat(
    settings: Any,
    database_dsn: str,
    pool: Pool,
    fixture_base: Path,
    seed_file: Path,
    request: pytest.FixtureRequest,
) -> AsyncIterator[Chat]:
    from rose.app import PROCESSES
    from tests.inference.asking import make_adapter

    given: Settings = settings(
        port=free_port(),
        database_url=database_dsn,
        device="cpu",
        hub_offline=True,
        inference_threads=1,
        **getattr(request, "param", {}),
    )
    stop = anyio.Event()
    async with serving(given, pool) as api, anyio.create_task_group() as tasks:
        tasks.start_soon(PROCESSES["inference"], given, stop)
        located = locate(str(fixture_base), models_dir=fixture_base.parent).base_model()
        job = await api.job(seed_file, model=str(fixture_base), suffix="red")
        trainer = Trainer(api.services, job.id, located)
        await trainer.validate()
        await trainer.start()
        blobs = api.services.blobs
        red = await anyio.to_thread.run_sync(make_adapter, fixture_base, blobs, located, 1)
        white = await anyio.to_thread.run_sync(make_adapter, fixture_base, blobs, located, 2)
        await trainer.checkpoint(5, white)
        await trainer.succeed(50, red)
        tuned = (await api.openai.fine_tuning.jobs.retrieve(job.id)).fine_tuned_model
        assert tuned is not None
        await eventually(lambda: leases.workers(pool, "inference"))
        strict = api.openai.copy(_extra_kwargs={"_strict_response_validation": True})
        yield Chat(api=api, strict=strict, base=str(fixture_base), tuned=tuned)
        stop.set()


async def test_base_model_and_checkpoint_answer_each_in_its_own_way(chat: Chat) -> None:
    base, tuned = await chat.say(chat.base), await chat.say(chat.tuned)
    checkpoint = await chat.say(f"{chat.tuned}:ckpt-step-5")
    assert len({base, tuned, checkpoint}) == 3
    assert await chat.say(chat.tuned) == tuned
    usage = (await chat.api.openai.chat.completions.create(model=chat.tuned, messages=QUESTION, max_tokens=3)).usage
    assert usage is not None
    assert usage.completion_tokens <= 3
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


async def test_a_stream_says_the_same_piece_by_piece(chat: Chat) -> None:
    whole = await chat.say(chat.tuned)
    stream = await chat.strict.chat.completions.create(
        model=chat.tuned,
        messages=QUESTION,
        temperature=0,
        max_tokens=12,
        logprobs=True,
        top_logprobs=2,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] in ("length", "stop")
    assert {chunk.model for chunk in chunks} == {chat.tuned}
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == whole
    assert chunks[-1].usage is not None


async def test_leaving_a_stream_frees_the_engine(chat: Chat) -> None:
    body = {"model": chat.tuned, "messages": QUESTION, "stream": True, "max_tokens": 400, "logit_bias": {}}
    async with chat.api.http.stream("POST", "/v1/chat/completions", json=body) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: "):
                assert json.loads(line[6:])["object"] == "chat.completion.chunk"
                break
    await eventually(lambda: _idle(chat))


async def test_leaving_a_plain_call_frees_the_engine(chat: Chat) -> None:
    body = {"model": chat.tuned, "messages": QUESTION, "max_tokens": 400, "n": 8}
    async with anyio.create_task_group() as tasks:

        async def call() -> None:
            await chat.api.http.post("/v1/chat/completions", json=body)

        tasks.start_soon(call)
        await eventually(lambda: _busy(chat))
        tasks.cancel_scope.cancel()
    await eventually(lambda: _idle(chat))


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_a_call_on_receipt_of_the_success_event_works_200_times_of_200(chat: Chat, seed_file: Path) -> None:
    api = chat.api
    model = await api.openai.models.retrieve(chat.tuned)
    assert model.model_extra is not None
    weights = msgspec.convert(model.model_extra["artifact"], Artifact)
    training_file = await api.upload(seed_file)
    for _ in range(200):
        job = await api.openai.fine_tuning.jobs.create(model=chat.base, training_file=training_file)
        trainer = Trainer(api.services, job.id, msgspec.convert(model.model_extra["base_model"], BaseModel))
        await trainer.validate()
        await trainer.start()
        async with anyio.create_task_group() as tasks:
            answers: list[str] = []

            async def watch(job_id: str, answers: list[str]) -> None:
                path = f"/v1/fine_tuning/jobs/{job_id}/events?stream=true"
                async with api.http.stream("GET", path) as response:
                    async for line in response.aiter_lines():
                        if "New fine-tuned model created: " in line:
                            name = json.loads(line[6:])["data"]["fine_tuned_model"]
                            answers.append(await chat.say(name, max_tokens=1))

            tasks.start_soon(watch, job.id, answers)
            await trainer.succeed(50, weights)
        assert len(answers) == 1


async def test_an_unknown_model_is_not_found(chat: Chat) -> None:
    for name in ("no-such", f"{chat.tuned}:ckpt-step-7", f"{chat.tuned}-x"):
        with pytest.raises(openai.NotFoundError) as refused:
            await chat.say(name)
        assert (refused.value.code, refused.value.param) == ("model_not_found", "model")
        assert name in refused.value.message


async def test_a_deleted_model_answers_no_more(chat: Chat) -> None:
    await chat.api.openai.models.delete(chat.tuned)
    for name in (chat.tuned, f"{chat.tuned}:ckpt-step-5"):
        with pytest.raises(openai.NotFoundError):
            await chat.say(name)


async def test_a_prompt_that_is_too_long_is_refused_before_the_stream_starts(chat: Chat) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        await chat.api.openai.chat.completions.create(
            model=chat.base, messages=[{"role": "user", "content": "rose " * 20_000}], stream=True
        )
    assert refused.value.param == "messages"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content"),
        ({"model": None}, "model"),
        ({"model": "ti\0ny"}, "model"),
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": -1}, "top_p"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"seed": "x"}, "seed"),
        ({"stream": "yes"}, "stream"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
    ],
)
async def test_bad_requests_name_the_field(shared_api: Running, change: dict[str, Any], param: str) -> None:
    body = {"model": "tiny", "messages": QUESTION, **change}
    answer = await shared_api.http.post("/v1/chat/completions", content=json.dumps(body))
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


async def test_without_an_engine_the_client_may_try_again(shared_api: Running) -> None:
    answer = await shared_api.http.post("/v1/chat/completions", json={"model": "tiny", "messages": QUESTION})
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "2"
    assert answer.json()["error"]["code"] == "no_engine"


@asynccontextmanager
async def scripted_engine(
    api: Running, answer: Callable[[SocketStream], Coroutine[Any, Any, None]]
) -> AsyncGenerator[None]:
    """Announce an engine that has heard the request when it comes to `answer`, which does as it likes."""

    async def serve(connection: SocketStream) -> None:
        async with connection:
            while b'"messages"' not in await connection.receive():
                pass
            await answer(connection)

    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, serve)
        url = f"http://127.0.0.1:{listener.extra(SocketAttribute.local_port)}"
        engine = leases.Worker(id="inference_a", kind="inference", host="here", url=url, capabilities={}, pid=1)
        await leases.announce(api.services.pool, engine)
        yield
        tasks.cancel_scope.cancel()


@pytest.mark.parametrize("stream", [True, False])
async def test_leaving_before_the_engine_has_answered_frees_it(api: Running, stream: bool) -> None:
    asked, left = anyio.Event(), anyio.Event()

    async def never_answer(connection: SocketStream) -> None:
        asked.set()
        with suppress(anyio.EndOfStream, anyio.BrokenResourceError):
            while True:
                await connection.receive()
        left.set()

    body = json.dumps({"model": "tiny", "messages": QUESTION, "stream": stream}).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n\r\n" % len(body)
    with anyio.fail_after(30):
        async with (
            scripted_engine(api, never_answer),
            await anyio.connect_tcp("127.0.0.1", api.services.settings.port) as client,
        ):
            await client.send(head + body)
            await asked.wait()
            await client.aclose()
            await left.wait()


async def test_an_engine_that_dies_in_mid_stream_is_told_within_the_stream(api: Running) -> None:
    choice = {"index": 0, "delta": {"role": "assistant", "content": "a"}, "finish_reason": None}
    chunk = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "tiny", "choices": [choice]}
    frame = f"data: {json.dumps(chunk)}\n\n".encode()

    async def die(connection: SocketStream) -> None:
        head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        await connection.send(head + b"%x\r\n%b\r\n" % (len(frame), frame))

    heard: list[str | None] = []

    async def listen() -> None:
        answer = await api.openai.chat.completions.create(model="tiny", messages=QUESTION, stream=True)
        async for piece in answer:
            heard.append(piece.choices[0].delta.content)

    async with scripted_engine(api, die):
        with pytest.raises(openai.APIError, match="No inference engine answers"):
            await listen()
    assert heard == ["a"]


async def _active(chat: Chat) -> int:
    (engine,) = await leases.workers(chat.api.services.pool, "inference")
    return (await chat.api.http.get(f"{engine.url}/health")).json()["active_requests"]


async def _busy(chat: Chat) -> bool:
    return await _active(chat) > 0


async def _idle(chat: Chat) -> bool:
    return await _active(chat) == 0


async def _counted(chat: Chat) -> dict[str, int]:
    return (await chat.api.http.get("/v1/organization/projects/current/usage")).json()["completions"]


async def test_tokens_are_counted_whether_or_not_a_stream_tells_them(chat: Chat) -> None:
    asked: dict[str, Any] = {"messages": QUESTION, "temperature": 0, "max_tokens": 12}
    whole = await chat.api.openai.chat.completions.create(model=chat.tuned, **asked)
    assert whole.usage is not None
    for more in ({}, {"stream_options": {"include_usage": True}}):
        body = {"model": chat.base, **asked, "stream": True, **more}
        streamed = (await chat.api.http.post("/v1/chat/completions", json=body)).text
        assert streamed.endswith("data: [DONE]\n\n")
        assert ": usage" not in streamed.replace('"usage": ', ""), "what the engine tells the API stays between them"
        assert ('"usage"' in streamed) == bool(more)
    told = json.loads(streamed.split("data: ")[-2])["usage"]
    counted = await _counted(chat)
    assert counted == {
        "num_model_requests": 3,
        "input_tokens": whole.usage.prompt_tokens + 2 * told["prompt_tokens"],
        "output_tokens": whole.usage.completion_tokens + 2 * told["completion_tokens"],
    }
    admin = chat.api.openai.with_options(admin_api_key="any").admin.organization.usage
    page = await admin.completions(start_time=int(time.time()) - 3600, bucket_width="1h", group_by=["model"])
    by_model = [(one.model, one.num_model_requests) for bucket in page.data for one in bucket.results]
    assert sorted(by_model) == sorted([(chat.tuned, 1), (chat.base, 2)])


async def test_of_an_answer_that_broke_off_counts_what_the_client_got(chat: Chat) -> None:
    body = {"model": chat.tuned, "messages": QUESTION, "stream": True, "max_tokens": 400, "logit_bias": {}}
    got = 0
    async with chat.api.http.stream("POST", "/v1/chat/completions", json=body) as response:
        async for line in response.aiter_lines():
            got += line.startswith("data: ")
            if got == 5:
                break
    await eventually(lambda: _idle(chat))
    counted = await _counted(chat)
    assert counted["num_model_requests"] == 1
    assert counted["input_tokens"] > 0
    assert counted["output_tokens"] >= 5


@pytest.mark.parametrize("chat", [{"tokens_per_minute": 60}], indirect=True)
async def test_what_an_answer_had_too_much_has_to_come_back_first(chat: Chat) -> None:
    asked: dict[str, Any] = {"model": chat.tuned, "messages": QUESTION, "max_tokens": 100, "logit_bias": {}}
    create = chat.api.openai.chat.completions.with_raw_response.create
    first = await create(**asked)
    usage = first.parse().usage
    assert usage is not None
    assert first.headers["x-ratelimit-limit-tokens"] == "60"
    left = 60 - usage.total_tokens
    assert int(first.headers["x-ratelimit-remaining-tokens"]) == max(left, 0)
    assert first.headers["x-ratelimit-reset-tokens"]
    if left > 0:
        second = (await create(**asked)).parse().usage
        assert second is not None
        left -= second.total_tokens
    with pytest.raises(openai.RateLimitError, match="60 tokens per minute") as refused:
        await create(**asked)
    wait = int(refused.value.response.headers["retry-after"])
    assert -left - 10 <= wait <= 1 - left, "a token comes back each second"
    assert "x-ratelimit-limit-tokens" not in (await chat.api.http.get("/v1/models")).headers
