"""Wait for a condition that nobody can signal: what another process wrote, or that it is gone."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

import anyio

Value = TypeVar("Value")
POLL_SECONDS = 0.02


async def eventually(condition: Callable[[], Value | Awaitable[Value]], seconds: float = 180.0) -> Value:
    """Return the first true value of `condition`, asked again and again.

    Raises: TimeoutError after `seconds`.
    """
    with anyio.fail_after(seconds):
        while True:
            value = condition()
            if isinstance(value, Awaitable):
                value = await value
            if value:
                return value
            await anyio.sleep(POLL_SECONDS)
