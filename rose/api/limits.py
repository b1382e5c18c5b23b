"""How much a project may ask of this API process: requests and tokens per minute, and open event streams.

All of it is counted in memory, by each API process for itself. How many jobs a project may have and how much it may
store is decided where they are written down (rose/commands.py).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from typing import Literal
from weakref import WeakSet

from litestar.types import Scope

from rose.api.rates import Left, Rate
from rose.errors import LimitReached
from rose.settings import Settings

STREAM_SECONDS = 5.0
"""When to try again for an event stream: they end with their jobs, and with the pages that show them."""
Measure = Literal["requests", "tokens"]
_STATE = "rate_limits"


class Slot:
    """A place for an event stream; free again when nothing refers to it any more."""

    __slots__ = ("__weakref__",)


class Limits:
    """What projects have taken of their limits. Belongs to one event loop."""

    def __init__(self, settings: Settings) -> None:
        self._requests = _rate(settings.requests_per_minute)
        self._tokens = _rate(settings.tokens_per_minute)
        self._max_streams = settings.max_project_event_streams
        self._streams: dict[str, WeakSet[Slot]] = {}

    def take_request(self, project: str, scope: Scope) -> None:
        """Count a request. What is left goes into the answer's headers. Raises: LimitReached."""
        if self._requests is None:
            return
        now = time.monotonic()
        passes = self._requests.take(project, now)
        left = self._requests.left(project, now)
        _tell(scope, "requests", left)
        if not passes:
            raise _too_many("requests", project, left)

    def require_tokens(self, project: str, scope: Scope) -> None:
        """Let a request for an answer pass while any tokens are left. Raises: LimitReached."""
        if self._tokens is None:
            return
        left = self._tokens.left(project, time.monotonic())
        _tell(scope, "tokens", left)
        if left.remaining < 1:
            raise _too_many("tokens", project, left)

    def spend_tokens(self, project: str, count: int, scope: Scope) -> None:
        """Count the tokens of an answer; those that were not left any more are owed."""
        if self._tokens is None:
            return
        now = time.monotonic()
        self._tokens.owe(project, now, count)
        _tell(scope, "tokens", self._tokens.left(project, now))

    def take_stream(self, project: str) -> Slot:
        """Return a place for an event stream, to be kept as long as it is open. Raises: LimitReached."""
        slot = Slot()
        if self._max_streams is None:
            return slot
        open_now = self._streams.setdefault(project, WeakSet())
        if len(open_now) >= self._max_streams:
            raise LimitReached(
                f"The project {project} has {len(open_now)} of {self._max_streams} event streams open here.",
                code="project_event_streams_limit",
                hint="Close one; a job's events can also be listed, without stream=true.",
                retry_after_seconds=STREAM_SECONDS,
            )
        open_now.add(slot)
        return slot


def rate_limit_headers(scope: Scope) -> Iterable[tuple[bytes, bytes]]:
    """Return the headers of an answer that say what is left of the project's rates."""
    states: dict[Measure, Left] = scope["state"].get(_STATE, {})
    for measure, left in states.items():
        for name, value in (
            ("limit", str(left.limit)),
            ("remaining", str(left.remaining)),
            ("reset", duration(left.reset_seconds)),
        ):
            yield f"x-ratelimit-{name}-{measure}".encode(), value.encode()


def duration(seconds: float) -> str:
    """Return a time as these headers have it: `20ms`, `1.5s`, `6m0s`. Rounded up to a millisecond."""
    milliseconds = math.ceil(seconds * 1000)
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(milliseconds, 60_000)
    text = f"{rest / 1000:g}s"
    return f"{minutes}m{text}" if minutes else text


def _rate(per_minute: int | None) -> Rate | None:
    return None if per_minute is None else Rate(per_minute)


def _tell(scope: Scope, measure: Measure, left: Left) -> None:
    scope["state"].setdefault(_STATE, {})[measure] = left


def _too_many(measure: Measure, project: str, left: Left) -> LimitReached:
    return LimitReached(
        f"Rate limit reached for the project {project}: {left.limit} {measure} per minute.",
        hint=f"Please try again in {duration(left.retry_seconds)}.",
        retry_after_seconds=left.retry_seconds,
    )
