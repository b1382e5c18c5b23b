"""Ask an inference engine, ours or another that speaks OpenAI's protocol. Never imports torch.

Leaving a call early, by cancellation or by leaving the context, closes its connection, which frees the engine.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Sequence
from contextlib import asynccontextmanager, contextmanager
from types import TracebackType
from typing import Any

import httpx2
import msgspec

from rose.errors import InvalidRequest, NotAuthorised, NotFound, RoseError, TooLarge, Unavailable
from rose.inference.generation import EngineBusy
from rose.inference.wire import COUNTED, Counted
from rose.leases import Worker

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 5.0
SILENCE_SECONDS = 600.0
"""Longest wait for the next byte: a first token may wait for a large model to be loaded."""

_ERRORS: dict[int, type[RoseError]] = {
    400: InvalidRequest,
    401: NotAuthorised,
    404: NotFound,
    413: TooLarge,
    503: Unavailable,
}


class EngineClient:
    """Calls engines; use it as an async context."""

    def __init__(self, *, token: str | None = None) -> None:
        """`token` is the secret that the engines know (setting `inference_token`)."""
        self._client = httpx2.AsyncClient(
            headers={"authorization": f"Bearer {token}"} if token else {},
            timeout=httpx2.Timeout(SILENCE_SECONDS, connect=CONNECT_SECONDS),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=32),
            trust_env=False,  # a proxy for the internet must not see what people ask their models
        )
        self._asking: Counter[str] = Counter()

    async def __aenter__(self) -> EngineClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.aclose()

    def choose(self, workers: Sequence[Worker], base_fingerprint: str = "") -> str:
        """Return the address of the least busy engine, with equals of one that has the base loaded.

        Announced numbers are seconds old, so this client's own calls count too. Raises: Unavailable when none is there.
        """
        engines = [(worker.url, worker.capabilities) for worker in workers if worker.kind == "inference" and worker.url]
        if not engines:
            raise Unavailable(
                "No inference engine is connected.",
                code="no_engine",
                hint="`rose up` starts one; so does `rose serve inference`.",
            )

        def burden(engine: tuple[str, dict[str, Any]]) -> tuple[int, bool]:
            url, capabilities = engine
            loaded = [base.get("fingerprint") for base in capabilities.get("bases", ())]
            busy = max(int(capabilities.get("active_requests", 0)), self._asking[url])
            return busy, base_fingerprint not in loaded

        return min(engines, key=burden)[0]

    async def complete(self, url: str, request: dict[str, Any]) -> dict[str, Any]:
        """Return the whole answer to a chat request (with its field `rose`) from the engine at `url`.

        Raises: what the engine refuses with, as its kind of RoseError; Unavailable when it does not answer.
        """
        return await self._post(url, _address(url), request)

    async def preview(self, url: str, request: dict[str, Any]) -> dict[str, Any]:
        """Return how the engine at `url` renders lines of data (preview.PreviewRequest). Raises: as `complete`."""
        return await self._post(url, url.rstrip("/") + "/preview", request)

    async def _post(self, url: str, address: str, request: dict[str, Any]) -> dict[str, Any]:
        with self._call(url):
            response = await self._client.post(address, content=msgspec.json.encode(request), headers=_JSON)
            if response.status_code != 200:
                raise _refusal(response.status_code, response.headers, response.content)
            answer: dict[str, Any] = _decoded(response.content)
            return answer

    @asynccontextmanager
    async def stream(
        self, url: str, request: dict[str, Any], on_counted: Callable[[Counted], object] = lambda _: None
    ) -> AsyncGenerator[AsyncIterator[str]]:
        """Give the `data:` lines of a streamed answer (their JSON, then `[DONE]`) as the engine sends them.

        `on_counted` is told the prompt's tokens before the first line, and all before the last one.

        Raises: as `complete`, before the first line; within the lines Unavailable when the connection breaks.
        """
        with self._call(url):
            asking = self._client.stream("POST", _address(url), content=msgspec.json.encode(request), headers=_JSON)
            async with asking as response:
                if response.status_code != 200:
                    raise _refusal(response.status_code, response.headers, await response.aread())
                yield _data_lines(url, response, on_counted)

    @contextmanager
    def _call(self, url: str) -> Generator[None]:
        """Count the call, and say in one sentence when the engine does not answer."""
        self._asking[url] += 1
        try:
            with _unavailable(url):
                yield
        finally:
            self._asking[url] -= 1


_COUNTED = COUNTED.decode()
_JSON = {"content-type": "application/json"}


def _address(url: str) -> str:
    return url.rstrip("/") + "/v1/chat/completions"


@contextmanager
def _unavailable(url: str) -> Generator[None]:
    try:
        yield
    except httpx2.TransportError as error:
        logger.warning("the inference engine at %s does not answer: %r", url, error)
        raise Unavailable(
            f"No inference engine answers at {url}.",
            code="no_engine",
            hint="See `rose status`; `rose serve inference` starts another one.",
        ) from error


async def _data_lines(
    url: str, response: httpx2.Response, on_counted: Callable[[Counted], object]
) -> AsyncGenerator[str]:
    with _unavailable(url):
        async for line in response.aiter_lines():
            if line.startswith("data:"):
                yield line.removeprefix("data:").removeprefix(" ")
            elif line.startswith(_COUNTED):
                on_counted(msgspec.json.decode(line.removeprefix(_COUNTED), type=Counted))


def _decoded(content: bytes) -> Any:
    try:
        return msgspec.json.decode(content)
    except msgspec.DecodeError as error:
        raise RoseError("The inference engine's answer is not valid JSON.", code="engine_error") from error


def _refusal(status: int, headers: httpx2.Headers, content: bytes) -> RoseError:
    """Make the error again that the engine answered with."""
    try:
        body: Any = msgspec.json.decode(content)
    except msgspec.DecodeError:
        body = None
    told: Any = body.get("error") if isinstance(body, dict) else None
    facts: dict[str, Any] = told if isinstance(told, dict) else {}
    message = str(facts.get("message") or f"The inference engine answered with status {status}.")
    code, param = facts.get("code"), facts.get("param")
    if status == 401:
        return Unavailable(
            "The inference engine refuses the API's token.",
            code="engine_token",
            hint="ROSE_INFERENCE_TOKEN must be the same for the API and the engines.",
        )
    wait = headers.get("retry-after", "")
    if status in (429, 503) and wait.isdecimal():
        return EngineBusy(message, code=code or "engine_busy", retry_after_seconds=float(wait))
    return _ERRORS.get(status, RoseError)(message, code=code or "engine_error", param=param)
