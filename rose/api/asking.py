"""Who asks for a change, and whether the same was asked before: `Idempotency-Key` and the SDKs' silent retries.

SDK retries carry no key, only `x-stainless-retry-count`; then an equal request of the last two minutes gets the answer
that was stored for it.
"""

from __future__ import annotations

import hashlib

from litestar import Response

from rose.api.errors import AnyRequest
from rose.api.services import Services
from rose.commands import RETRY_WINDOW_SECONDS, Request
from rose.errors import InvalidRequest
from rose.ids import new_id
from rose.log import read
from rose.log.append import Actor

MAX_KEY_LENGTH = 255


def caller_of(request: AnyRequest) -> str:
    """Return a name for the caller: a hash of its API key, so that the log never holds the key."""
    key = request.headers.get("authorization", "")
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:16]


async def asked(request: AnyRequest, services: Services, content: bytes) -> tuple[Request, bytes | None]:
    """Return the request as the log will know it, and the stored answer when it was asked and answered before.

    `content` stands for the body in the comparison.

    Raises: InvalidRequest when the key was used for something else.
    """
    caller = caller_of(request)
    parts = (caller, request.method, request.scope["path"], hashlib.sha256(content).hexdigest())
    request_hash = hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).hexdigest()
    actor = Actor(kind="client", name=caller, request_id=request.scope["state"].get("request_id"))
    key = request.headers.get("idempotency-key")
    if key:
        if len(key) > MAX_KEY_LENGTH or not key.isascii() or not key.isprintable():
            raise InvalidRequest(
                f"Idempotency-Key must be 1 to {MAX_KEY_LENGTH} printable ASCII characters.",
                code="invalid_value",
                param="Idempotency-Key",
            )
        command_id = f"client/{caller}/{key}"
        known = await read.find_command(services.pool, command_id)
        if known is not None and known.request_hash != request_hash:
            raise InvalidRequest(
                "This Idempotency-Key was used for another request. Take a fresh key.",
                code="idempotency_key_reused",
                param="Idempotency-Key",
            )
    else:
        command_id = new_id("command/")
        known = None
        if _retry_count(request) > 0:
            known = await read.find_request(services.pool, request_hash, within_seconds=RETRY_WINDOW_SECONDS)
    made = Request(actor=actor, command_id=command_id, request_hash=request_hash)
    return made, known.response if known else None


def stored_answer(response: bytes) -> Response[bytes]:
    """Return an answer that was stored with its command, and say that it is one."""
    return Response(response, status_code=200, media_type="application/json", headers={"idempotent-replayed": "true"})


def _retry_count(request: AnyRequest) -> int:
    text = request.headers.get("x-stainless-retry-count", "0")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 5 else 0
