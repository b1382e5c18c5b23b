"""NATS: connect in the background, publish, wake-ups, the stream, durable consumers. Nothing else imports nats.

Nothing here is needed for ROSE to work: without NATS every call fails at once and nobody waits. Each connection has a
number (`generation`), and nothing that was meant for one is sent on the next.
"""

from __future__ import annotations

from rose.bus.answers import (
    NAME_IN_USE,
    WRONG_LAST_SEQUENCE,
    BusRefused,
    BusUnavailable,
    Received,
    StoredMessage,
    StreamFacts,
    StreamSettings,
)
from rose.bus.bus import Bus, Wake
from rose.bus.consumer import Consumer

__all__ = [
    "NAME_IN_USE",
    "WRONG_LAST_SEQUENCE",
    "Bus",
    "BusRefused",
    "BusUnavailable",
    "Consumer",
    "Received",
    "StoredMessage",
    "StreamFacts",
    "StreamSettings",
    "Wake",
]
