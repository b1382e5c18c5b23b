"""Asks an engine, and waits for a place at one while all are full or none is there: time, not the answer, is lost."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

import anyio

from rose import leases
from rose.api.line import FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS, Place, Waiting
from rose.api.services import Services
from rose.inference.client import EngineGone
from rose.inference.generation import FULL, EngineBusy

Value = TypeVar("Value")

MAX_LOST = 2
"""Engines that may go away with a request in their hands before it is taken for the cause and asked no more."""

logger = logging.getLogger(__name__)


async def ask_engine(
    services: Services, project: str, fingerprint: str, ask: Callable[[Place], Awaitable[Value]]
) -> Value:
    """Return what `ask` gets from the engine at its place's address; `fingerprint` is that of the base.

    While none has a place for the project, or when it goes away or is full before `ask` has returned, wait in line for
    up to `engine_wait_seconds` and ask again. The place is given back when `ask` returns, unless `ask` keeps it.
    To be cancelled when whoever asks has left.

    Raises: what `ask` raises; after the wait, when the API is being stopped, or at once when too many wait: EngineBusy
    or EngineGone, and LimitReached when they are the project's own.
    """
    patience_seconds = services.settings.engine_wait_seconds
    waiting = Waiting(project, fingerprint, patience_seconds)
    lost = 0
    while True:
        place = await _place(services, waiting)
        try:
            value = await ask(place)
            services.line.answered(place.url)
            return value
        except (EngineBusy, EngineGone) as error:
            if isinstance(error, EngineBusy) and error.code != FULL:
                raise
            waiting.refusal = error
            place.leave(error)
            if isinstance(error, EngineGone) and error.lost:
                lost += 1  # it had come back, and may have worked for long: the wait begins anew
                waiting.patience_seconds = patience_seconds
            if lost >= MAX_LOST:
                logger.error("%d engines went away with the same request in their hands; it is not asked again", lost)
                raise
        finally:
            if not place.kept:
                place.leave()


async def _place(services: Services, waiting: Waiting) -> Place:
    """Return a place at an engine, having stood in line for it. Raises: as ask_engine; Unavailable without Postgres."""
    if waiting.refusal is not None and waiting.patience_seconds <= 0:
        raise waiting.refusal
    line = services.line
    await _look(services)
    line.join(waiting)
    began = anyio.current_time()
    try:
        pause = FIRST_PAUSE_SECONDS
        while (place := waiting.taken()) is None:
            left = waiting.patience_seconds - (anyio.current_time() - began)
            if left <= 0 or services.tailer.stopped:
                raise line.why_wait()
            with anyio.move_on_after(min(pause, left)):
                await waiting.called.wait()
                continue
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
            if line.is_out_of_date():
                await _look(services)
            else:
                line.give_out()
        return place
    finally:
        waiting.patience_seconds -= anyio.current_time() - began
        line.drop(waiting)


async def _look(services: Services) -> None:
    """See which engines are there. Raises: Unavailable."""
    services.line.looks()
    services.line.know(await leases.workers(services.pool, "inference"))
