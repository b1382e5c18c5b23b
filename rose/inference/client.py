"""Ask an inference engine, ours or another that speaks OpenAI's protocol. Never imports torch.

Leaving a call early, by cancellation or by leaving the context, closes its connection, which frees the engine.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Sequence
from contextlib import asynccontextmanager, contextmanager
from types import TracebackType
from typing import Any

import httpx2
import msgspec

from rose.errors import RETRY_SECONDS, NotAuthorised, RoseError, Unavailable, error_of
from rose.inference.generation import STOPPING, EngineBusy, ScoringAnswer, ScoringRequest
from rose.inference.wire import ADAPTER_HEADER, COUNTED, NO_ADAPTER, Counted
from rose.leases import LIVE_SECONDS, Worker

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 5.0
TOO_MANY_REQUESTS = 429
"""What other engines say where ours says 503."""
SILENCE_SECONDS = 600.0
"""Longest wait for the next byte: a first token may wait for a large model to be loaded."""


class EngineGone(Unavailable):
    """No inference engine is there, or it went away before its answer; another may do what this one did not."""

    default_code = "no_engine"

    def __init__(self, message: str, *, hint: str | None = None, lost: bool = False) -> None:
        super().__init__(message, hint=hint)
        self.lost = lost
        """True when it went away with the request in its hands: the request itself may be why."""


class _Choice(msgspec.Struct, frozen=True):
    delta: dict[str, Any] = {}
    finish_reason: str | None = None


class _Failure(msgspec.Struct, frozen=True):
    message: str
    code: str | None = None


class _Line(msgspec.Struct, frozen=True):
    """What matters of a line at the beginning of a streamed answer."""

    choices: list[_Choice] = []
    error: _Failure | None = None


_LINE = msgspec.json.Decoder(_Line)


def says_something(line: str) -> bool:
    """Tell whether a line of a streamed answer holds more than who speaks.

    Raises: EngineGone when it says that the engine stops.
    """
    try:
        told = _LINE.decode(line)
    except msgspec.DecodeError:
        return True
    if told.error is not None and told.error.code == STOPPING:
        raise EngineGone(told.error.message)
    return not told.choices or any(
        choice.finish_reason or any(value for name, value in choice.delta.items() if name != "role")
        for choice in told.choices
    )


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
        self._gone_at: dict[str, float] = {}
        """When an engine was last found to be away, by address (monotonic seconds)."""

    async def __aenter__(self) -> EngineClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.aclose()

    def choose(
        self, workers: Sequence[Worker], base_fingerprint: str = "", taken: Callable[[str], int] = lambda _: 0
    ) -> str:
        """Return the address of the least busy engine, with equals of one that has the base loaded.

        Announced numbers are seconds old, so this client's own calls count too, and `taken`: the places that the
        caller has already given to requests at an address. The entry of an engine that was killed
        stands for LIVE_SECONDS: one that did not answer in that time is taken only when there is no other.

        Raises: EngineGone when none is there.
        """
        engines = [(worker.url, worker.capabilities) for worker in workers if worker.kind == "inference" and worker.url]
        if not engines:
            raise EngineGone(
                "No inference engine is connected.", hint="`rose up` starts one; so does `rose serve inference`."
            )
        now = time.monotonic()

        def burden(engine: tuple[str, dict[str, Any]]) -> tuple[bool, int, bool]:
            url, capabilities = engine
            loaded = [base.get("fingerprint") for base in capabilities.get("bases", ())]
            busy = max(int(capabilities.get("active_requests", 0)), self._asking[url], taken(url))
            return self._is_gone(url, now), busy, base_fingerprint not in loaded

        return min(engines, key=burden)[0]

    async def complete(
        self, url: str, request: dict[str, Any], on_adapter: Callable[[str | None], object] = lambda _: None
    ) -> dict[str, Any]:
        """Return the whole answer to a chat request (with its field `rose`) from the engine at `url`.

        `on_adapter` is told the weights that wrote it (ADAPTER_HEADER); None by an engine that does not say.

        Raises: what the engine refuses with, as its kind of RoseError; EngineGone when it is not there or goes away;
        Unavailable when it is silent; RoseError (engine_error) when other weights answered than those asked for.
        """
        response = await self._post(url, _address(url), msgspec.json.encode(request))
        _tell_adapter(response.headers, request, on_adapter)
        answer: dict[str, Any] = _decoded(response.content)
        return answer

    async def preview(self, url: str, request: dict[str, Any]) -> dict[str, Any]:
        """Return how the engine at `url` renders lines of data (preview.PreviewRequest). Raises: as `complete`."""
        return _decoded((await self._post(url, url.rstrip("/") + "/preview", msgspec.json.encode(request))).content)

    async def score(self, url: str, request: ScoringRequest) -> ScoringAnswer:
        """Return what the engine at `url` makes of given tokens, by whatever weights it says. Raises: as `complete`."""
        response = await self._post(url, url.rstrip("/") + "/score", msgspec.json.encode(request))
        try:
            return msgspec.json.decode(response.content, type=ScoringAnswer)
        except msgspec.DecodeError as error:
            raise RoseError(f"The inference engine's answer is not usable: {error}.", code="engine_error") from error

    async def _post(self, url: str, address: str, content: bytes) -> httpx2.Response:
        with self._call(url):
            response = await self._client.post(address, content=content, headers=_JSON)
            if response.status_code != 200:
                raise _refusal(response.status_code, response.headers, response.content)
            self._gone_at.pop(url, None)
            return response

    @asynccontextmanager
    async def stream(
        self,
        url: str,
        request: dict[str, Any],
        on_counted: Callable[[Counted], object] = lambda _: None,
        on_adapter: Callable[[str | None], object] = lambda _: None,
    ) -> AsyncGenerator[AsyncIterator[str]]:
        """Give the `data:` lines of a streamed answer (their JSON, then `[DONE]`) as the engine sends them.

        `on_counted` is told the prompt's tokens before the first line, and all before the last one; `on_adapter` as by
        `complete`, before the first line.

        Raises: as `complete`, before the first line; within the lines EngineGone when the connection breaks.
        """
        with self._call(url):
            asking = self._client.stream("POST", _address(url), content=msgspec.json.encode(request), headers=_JSON)
            async with asking as response:
                if response.status_code != 200:
                    raise _refusal(response.status_code, response.headers, await response.aread())
                self._gone_at.pop(url, None)
                _tell_adapter(response.headers, request, on_adapter)
                yield self._data_lines(url, response, on_counted)

    @contextmanager
    def _call(self, url: str) -> Generator[None]:
        """Count the call, and say in one sentence when the engine does not answer."""
        self._asking[url] += 1
        try:
            with self._answering(url):
                yield
        finally:
            self._asking[url] -= 1

    async def _data_lines(
        self, url: str, response: httpx2.Response, on_counted: Callable[[Counted], object]
    ) -> AsyncGenerator[str]:
        with self._answering(url):
            async for line in response.aiter_lines():
                if line.startswith("data:"):
                    yield line.removeprefix("data:").removeprefix(" ")
                elif line.startswith(_COUNTED):
                    on_counted(msgspec.json.decode(line.removeprefix(_COUNTED), type=Counted))

    @contextmanager
    def _answering(self, url: str) -> Generator[None]:
        """Say of a connection that cannot be made, breaks or is silent, what that means."""
        try:
            yield
        except httpx2.TransportError as error:
            now = time.monotonic()
            if not self._is_gone(url, now):  # once, not with each try of each request that waits
                logger.warning("the inference engine at %s does not answer: %r", url, error)
            message = f"No inference engine answers at {url}."
            hint = "See `rose status`; `rose serve inference` starts another one."
            if isinstance(error, (httpx2.ReadTimeout, httpx2.WriteTimeout)):  # there, but stuck
                raise Unavailable(message, code=EngineGone.default_code, hint=hint) from error
            self._gone_at[url] = now
            never_reached = isinstance(error, (httpx2.ConnectError, httpx2.ConnectTimeout))
            raise EngineGone(message, hint=hint, lost=not never_reached) from error

    def _is_gone(self, url: str, now: float) -> bool:
        since = self._gone_at.get(url)
        if since is not None and now - since > LIVE_SECONDS:
            del self._gone_at[url]
            return False
        return since is not None


_COUNTED = COUNTED.decode()
_JSON = {"content-type": "application/json"}


def _address(url: str) -> str:
    return url.rstrip("/") + "/v1/chat/completions"


def _tell_adapter(headers: httpx2.Headers, request: dict[str, Any], on_adapter: Callable[[str | None], object]) -> None:
    """Tell which weights answered; None of an engine that is not ours.

    Raises: RoseError when others than those asked for did.
    """
    used = headers.get(ADAPTER_HEADER)
    adapter: dict[str, Any] | None = request["rose"].get("adapter")
    wanted = NO_ADAPTER if adapter is None else adapter["sha256"]
    if used is not None and used != wanted:
        logger.error("an engine answered with the weights %s instead of %s", used, wanted)
        raise RoseError("The inference engine answered with other weights than the model's.", code="engine_error")
    on_adapter(used)


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
    if status == NotAuthorised.status:
        return Unavailable(
            "The inference engine refuses the token.",
            code="engine_token",
            hint="ROSE_INFERENCE_TOKEN must be the same for the API, the trainers and the engines.",
        )
    if code == STOPPING:
        return EngineGone(message)
    wait = headers.get("retry-after", "")
    if status in (TOO_MANY_REQUESTS, Unavailable.status):
        seconds = float(wait) if wait.isdecimal() else RETRY_SECONDS
        return EngineBusy(message, code=code or "engine_busy", retry_after_seconds=seconds)
    return error_of(status, code)(message, code=code or "engine_error", param=param)
