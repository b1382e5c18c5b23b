"""What NATS says, in ROSE's words: errors, and the facts about streams and messages."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Generator
from datetime import datetime

import msgspec
import nats.errors
import nats.js.errors

from rose.errors import RoseError, Unavailable

WRONG_LAST_SEQUENCE = 10071
NAME_IN_USE = 10058
"""A stream exists with another configuration."""
NOT_FOUND = frozenset({10037, 10059, 10014})
CONTENT_REFUSED = frozenset({10054, 10097})
"""Message or header larger than allowed: no later attempt will do better."""


class BusUnavailable(Unavailable):
    """NATS does not answer."""

    default_code = "nats_unavailable"


class BusRefused(RoseError):
    """NATS refused a request."""

    default_code = "nats_refused"

    def __init__(self, message: str, *, error_code: int = 0, content: bool = False) -> None:
        super().__init__(message)
        self.error_code = error_code
        self.content = content
        """True when the message itself is at fault: sending it again is of no use."""


class StreamSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How a stream is kept."""

    name: str
    subjects: tuple[str, ...]
    replicas: int = 1
    max_bytes: int = 1 << 30
    max_age_seconds: float = 30 * 86400.0


class StreamFacts(msgspec.Struct, frozen=True, kw_only=True):
    """A stream as the server sees it."""

    first_sequence: int
    last_sequence: int
    messages: int
    bytes: int
    metadata: dict[str, str]
    settings: StreamSettings


class StoredMessage(msgspec.Struct, frozen=True, kw_only=True):
    """A message as it lies in the stream."""

    sequence: int
    subject: str
    body: bytes
    headers: dict[str, str]
    stored_at: datetime | None = None


class Received(msgspec.Struct, frozen=True, kw_only=True):
    """A message that a durable consumer was given; acknowledge it once its effect is stored."""

    sequence: int
    subject: str
    body: bytes
    headers: dict[str, str]
    deliveries: int
    """1 at the first delivery."""
    ack: Callable[[], Awaitable[None]]


@contextlib.contextmanager
def translated() -> Generator[None, None, None]:
    """Turn what nats-py raises into BusUnavailable and BusRefused."""
    try:
        yield
    except (nats.errors.MaxPayloadError, nats.errors.BadSubjectError, nats.errors.BadHeaderError) as error:
        raise BusRefused(f"NATS refuses the message: {text_of(error)}.", content=True) from None
    except nats.js.errors.NoStreamResponseError:
        raise BusUnavailable("No JetStream stream takes the message.", code="no_stream") from None
    except nats.js.errors.ServiceUnavailableError as error:
        raise BusUnavailable(f"JetStream does not answer: {text_of(error)}.") from None
    except nats.js.errors.APIError as error:
        raise refused(error) from None
    except (nats.errors.Error, OSError, TimeoutError) as error:
        raise BusUnavailable(f"NATS does not answer: {text_of(error)}.") from None


def refused(error: nats.js.errors.APIError) -> BusRefused:
    """Return the refusal that JetStream's error is."""
    code = error.err_code or 0
    return BusRefused(
        f"NATS refused the request: {error.description} (error {code}).",
        error_code=code,
        content=code in CONTENT_REFUSED,
    )


def text_of(error: Exception) -> str:
    """Return an error's words, or its name when it has none."""
    return str(error) or type(error).__name__
