"""`/v1/chat/completions`: finds the weights that a name stands for and passes the request on to an engine.

The engine speaks OpenAI's protocol, so answers pass through as they come; nothing here makes or changes a token.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, TypeVar

import anyio
import msgspec
from litestar import Response
from litestar.response import Stream

from rose.api.accounts import Account
from rose.api.decoding import read_body
from rose.api.engines import ask_engine
from rose.api.errors import AnyRequest, error_json, path_of
from rose.api.line import Place
from rose.api.model_names import Base, Named, find_model
from rose.api.principal import NEEDS, ThePrincipal
from rose.api.routes import post
from rose.api.services import Services, TheServices
from rose.decoding import check_values
from rose.domain.job_values import BaseModel
from rose.errors import NotFound, RoseError
from rose.inference.client import says_something
from rose.inference.request import ChatRequest, EngineRequest, Target, checked
from rose.inference.wire import ADAPTER_HEADER, Counted

Value = TypeVar("Value")

CLIENT_LEFT = 499
"""Status of an answer that nobody is there to read."""

logger = logging.getLogger(__name__)


@post("/v1/chat/completions", body=ChatRequest, other="text/event-stream", opt={NEEDS: "read"})
async def create_chat_completion(
    request: AnyRequest, services: TheServices, principal: ThePrincipal
) -> Response[Any] | Stream:
    """Answer a conversation, in one piece or as the tokens are made."""
    body = await read_body(request, ChatRequest, nul_allowed=True)
    check_values({"model": body.model})  # what is asked may hold a NUL; what is looked up may not
    named = await find_model(services, principal.project, body.model)
    services.limits.require_tokens(principal.project, request.scope)
    account = Account(services, principal.project, named.name, request.scope)
    target = target_of(named, principal.project)
    asking = {**msgspec.to_builtins(body), "rose": msgspec.to_builtins(target)}
    checked(msgspec.convert(asking, EngineRequest))
    headers: dict[str, str] = {}

    def note(adapter: str | None) -> None:
        headers.clear()  # what another engine said that went away
        if adapter is not None:
            headers[ADAPTER_HEADER] = adapter

    if not body.stream:
        asked = ask_engine(
            services,
            principal.project,
            target.base.fingerprint,
            lambda place: services.engines.complete(place.url, asking, note),
        )
        answer = await unless_client_leaves(request, asked)
        if answer is not None:
            account.count_answer(answer)
        return Response(answer, status_code=200 if answer is not None else CLIENT_LEFT, headers=headers)
    # Before the answer begins, so that a refusal is a status and not a broken stream.
    begun = ask_engine(
        services,
        principal.project,
        target.base.fingerprint,
        lambda place: _begun(services, place, asking, account, note),
    )
    frames = await unless_client_leaves(request, begun)
    if frames is None:
        return Response(None, status_code=CLIENT_LEFT)
    return Stream(
        frames,
        media_type="text/event-stream",
        headers={"cache-control": "no-cache", "x-accel-buffering": "no", **headers},
    )


@post(["/v1/completions", "/v1/embeddings", "/v1/responses"])
async def refuse_other_kinds(request: AnyRequest) -> None:
    """Say clearly that ROSE does not do this yet. Raises: NotFound."""
    raise NotFound(
        f"{path_of(request)} is not offered by ROSE.",
        code="unsupported_endpoint",
        hint="Use /v1/chat/completions.",
    )


async def _begun(
    services: Services,
    place: Place,
    asking: dict[str, Any],
    account: Account,
    on_adapter: Callable[[str | None], object],
) -> AsyncGenerator[bytes, None]:
    """Return the frames of an answer once its first token is there. Raises: as EngineClient.stream."""
    frames = _passed_on(services, place, asking, account, on_adapter)
    await anext(frames)
    return frames


async def _passed_on(
    services: Services,
    place: Place,
    asking: dict[str, Any],
    account: Account,
    on_adapter: Callable[[str | None], object],
) -> AsyncGenerator[bytes, None]:
    """Yield nothing once the engine has made its first token, then its data lines as frames.

    The place is kept until the last frame. Leaving early closes the connection to the engine, which frees it.
    Raises: EngineGone before the first token only.
    """
    counted, sent = Counted(prompt_tokens=0, completion_tokens=None), 0

    def note(news: Counted) -> None:
        nonlocal counted
        counted = news

    async with services.engines.stream(place.url, asking, note, on_adapter) as lines:
        head: list[str] = []  # what comes before the first token may come again from another engine
        async for line in lines:
            head.append(line)
            if says_something(line):
                break
        place.keep()
        try:
            yield b""
            for line in head:
                yield f"data: {line}\n\n".encode()
                sent += 1
            async for line in lines:
                yield f"data: {line}\n\n".encode()
                sent += 1
        except RoseError as error:
            logger.warning("a completion broke off: %s", error)
            yield b"data: " + error_json(error) + b"\n\n"
        finally:  # of an answer that broke off it is known only how many pieces the client got
            made = sent if counted.completion_tokens is None else counted.completion_tokens
            account.count(counted.prompt_tokens, made)
            place.leave()


async def unless_client_leaves(request: AnyRequest, work: Awaitable[Value]) -> Value | None:
    """Return what `work` returns, or None when the client closes its connection first: then the work is cancelled."""
    failure: RoseError | None = None
    value: Value | None = None

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        tasks.cancel_scope.cancel()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(watch)
        try:
            value = await work
        except RoseError as error:  # kept out of the task group, which would wrap it
            failure = error
        tasks.cancel_scope.cancel()
    if failure is not None:
        raise failure
    return value


def target_of(named: Named, project: str) -> Target:
    """Return the weights that a model name stands for, and for whom, as an engine is told."""
    if isinstance(named, Base):
        base = BaseModel(source=named.source, revision=None, fingerprint="")
        return Target(model=named.name, base=base, project=project)
    return Target(
        model=named.name,
        base=named.base,
        adapter=named.artifact,
        kind=named.kind,
        thinking=named.thinking,
        project=project,
    )


HANDLERS = (create_chat_completion, refuse_other_kinds)
