"""Run a coroutine from a test or fixture that is not async itself."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

Value = TypeVar("Value")


def in_own_loop(work: Coroutine[Any, Any, Value]) -> Value:
    """Return what `work` returns, run to its end in an event loop of its own.

    Not anyio.run: that refuses as long as the session's loop exists, although it stands still meanwhile.
    """
    return asyncio.run(work)
