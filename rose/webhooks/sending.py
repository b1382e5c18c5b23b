"""Sends one delivery: to a checked address, in bounded time, following nothing."""

from __future__ import annotations

import ssl
from functools import cache
from importlib.metadata import version
from types import TracebackType

import anyio
import httpx2
import msgspec

from rose.webhooks import targets

TIMEOUT_SECONDS = 15.0
"""From the look-up of the name to the answer's status."""
CONNECT_SECONDS = 5.0
MAX_ERROR = 300


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What came of it."""

    status: int | None
    """None when there was no answer."""
    error: str | None
    """Why the receiver has not taken it, for people; None when it has."""
    retry_after_seconds: float = 0.0
    """How long the receiver asks to be left alone."""


class Sender:
    """Sends deliveries; use it as an async context."""

    def __init__(
        self, *, private: bool, timeout_seconds: float = TIMEOUT_SECONDS, trust: ssl.SSLContext | None = None
    ) -> None:
        """`private`: the setting webhook_private_targets. `trust`: other certificates than the system's."""
        self._private = private
        self._timeout_seconds = timeout_seconds
        self._client = httpx2.AsyncClient(
            verify=trust or _system_trust(),
            headers={"user-agent": f"ROSE/{version('rose')} webhooks"},
            timeout=httpx2.Timeout(timeout_seconds, connect=CONNECT_SECONDS),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=0),  # each goes where the name is now
            follow_redirects=False,
            trust_env=False,
        )

    async def __aenter__(self) -> Sender:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.aclose()

    async def send(self, target: str, headers: dict[str, str], body: bytes) -> Answer:
        """Send `body` to `target`. Never raises for what the receiver or the network does."""
        try:
            with anyio.fail_after(self._timeout_seconds):
                url = targets.parse(target, private=self._private)
                return await self._send(url, await targets.addresses(url, private=self._private), headers, body)
        except targets.BadTarget as error:
            return _failed(error.message)
        except TimeoutError:
            return _failed(f"there was no answer within {self._timeout_seconds:g} s")
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError) as error:
            return _failed(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)

    async def _send(self, url: httpx2.URL, addresses: list[str], headers: dict[str, str], body: bytes) -> Answer:
        """Try the addresses until one takes the connection; past that nothing is sent twice."""
        for place, address in enumerate(addresses, 1):
            asking = self._client.stream(
                "POST",
                url.copy_with(host=address),
                content=body,
                headers={**headers, "host": url.netloc.decode("ascii")},
                extensions={"sni_hostname": url.raw_host.decode("ascii")},
            )
            try:
                async with asking as response:
                    return _answer(response)
            except (httpx2.ConnectError, httpx2.ConnectTimeout):
                if place == len(addresses):
                    raise
        raise OSError("the host has no address")


@cache
def _system_trust() -> ssl.SSLContext:
    return httpx2.create_ssl_context()


def _answer(response: httpx2.Response) -> Answer:
    if response.is_success:
        return Answer(status=response.status_code, error=None)
    wait = response.headers.get("retry-after", "")
    return Answer(
        status=response.status_code,
        error=f"the receiver answered {response.status_code}",
        retry_after_seconds=float(wait) if wait.isascii() and wait.isdigit() and len(wait) < 9 else 0.0,
    )


def _failed(text: str) -> Answer:
    return Answer(status=None, error=text[:MAX_ERROR])
