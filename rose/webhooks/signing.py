"""What a delivery says and how it is signed: Standard Webhooks (https://www.standardwebhooks.com), version 1."""

from __future__ import annotations

import base64
import hashlib
import secrets
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec
from standardwebhooks import Webhook

from rose.ids import LENGTH

SECRET_PREFIX = "whsec_"
SECRET_BYTES = 32
HINT_CHARACTERS = 4


class Payload(msgspec.Struct, frozen=True, kw_only=True):
    """The body of a delivery, as OpenAI's."""

    id: str
    object: str = "event"
    created_at: int
    type: str
    data: dict[str, Any]


def new_secret() -> str:
    """Return a fresh secret: `whsec_` and 256 random bits in base 64."""
    return SECRET_PREFIX + base64.b64encode(secrets.token_bytes(SECRET_BYTES)).decode()


def hint(secret: str) -> str:
    """Return a secret, masked."""
    return f"{SECRET_PREFIX}…{secret[-HINT_CHARACTERS:]}"


def event_id(webhook_id: str, position: int) -> str:
    """Return the id under which an endpoint gets the event at a position of the log: the same however often."""
    digest = hashlib.sha256(f"{webhook_id}/{position}".encode()).digest()
    return "evt_" + base64.b32encode(digest).decode().lower()[:LENGTH]


def headers(event_id: str, body: bytes, signing: Sequence[str], at: int) -> dict[str, str]:
    """Return the headers of a delivery that is made at `at` (Unix seconds), with a signature by each secret."""
    moment, text = datetime.fromtimestamp(at, UTC), body.decode()
    return {
        "content-type": "application/json",
        "webhook-id": event_id,
        "webhook-timestamp": str(at),
        "webhook-signature": " ".join(Webhook(secret).sign(event_id, moment, text) for secret in signing),
    }
