"""Asks an engine, and waits for one while none is there: one that starts again costs a request time, not its answer."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager
from typing import TypeVar

import anyio

from rose import leases
from rose.api.services import Services
from rose.inference.client import EngineGone

Value = TypeVar("Value")

FIRST_PAUSE_SECONDS = 0.1
LONGEST_PAUSE_SECONDS = 1.0
MAX_WAITING = 256
"""Requests of one API process that may wait at a time; more are told at once that there is no engine."""
MAX_LOST = 2
"""Engines that may go away with a request in their hands before it is taken for the cause and asked no more."""

logger = logging.getLogger(__name__)


async def ask_engine(services: Services, fingerprint: str, ask: Callable[[str], Awaitable[Value]]) -> Value:
    """Return what `ask` gets from the engine at the address that it is given; `fingerprint` is that of the base.

    While none is there, or when it goes away before `ask` has returned, wait for up to `engine_wait_seconds` and ask
    again. To be cancelled when whoever asks has left.

    Raises: what `ask` raises; EngineGone after the wait, when the API is being stopped, or at once when too many wait.
    """
    try:
        return await _ask_once(services, fingerprint, ask)
    except EngineGone as error:
        gone = error
    patience_seconds = services.settings.engine_wait_seconds
    with _place_in_line(services, gone):
        lost = int(gone.lost)
        until = anyio.current_time() + patience_seconds
        pause = FIRST_PAUSE_SECONDS
        while lost < MAX_LOST and not services.tailer.stopped and (left := until - anyio.current_time()) > 0:
            await anyio.sleep(min(pause, left))
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
            try:
                return await _ask_once(services, fingerprint, ask)
            except EngineGone as error:
                gone = error
            if gone.lost:  # it had come back, and may have worked for long: the wait begins anew
                lost += 1
                until = anyio.current_time() + patience_seconds
                pause = FIRST_PAUSE_SECONDS
    if lost >= MAX_LOST:
        logger.error("%d engines went away with the same request in their hands; it is not asked again", lost)
    raise gone


async def _ask_once(services: Services, fingerprint: str, ask: Callable[[str], Awaitable[Value]]) -> Value:
    engines = await leases.workers(services.pool, "inference")
    return await ask(services.engines.choose(engines, fingerprint))


@contextmanager
def _place_in_line(services: Services, gone: EngineGone) -> Generator[None]:
    """Count a request that waits. Raises: `gone` when there is no room for one more."""
    if services.engines.waiting >= MAX_WAITING:
        raise gone
    services.engines.waiting += 1
    try:
        yield
    finally:
        services.engines.waiting -= 1
