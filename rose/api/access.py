"""API keys: who may call. Without configured keys every call passes, as the SDKs always send some key."""

from __future__ import annotations

import hashlib
import hmac

from litestar.connection import ASGIConnection
from litestar.handlers import BaseRouteHandler

from rose.api.services import services_of
from rose.errors import NotAuthorised

PUBLIC = "public"
"""Marks a route that needs no key: `get(..., opt={PUBLIC: True})`."""


def require_key(connection: ASGIConnection, handler: BaseRouteHandler) -> None:  # type: ignore[type-arg]
    """Refuse a call without a valid key. Raises: NotAuthorised."""
    keys = services_of(connection.app).settings.api_keys
    if not keys or handler.opt.get(PUBLIC):
        return
    scheme, _, given = connection.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not given.strip():
        raise NotAuthorised(
            "You didn't provide an API key. Send it as `Authorization: Bearer KEY`.",
            hint="The command line and the SDKs read it from OPENAI_API_KEY.",
        )
    digest = hashlib.sha256(given.strip().encode("utf-8", "surrogateescape")).digest()
    matches = [hmac.compare_digest(digest, hashlib.sha256(key.encode()).digest()) for key in keys]
    if not any(matches):
        shown = given.strip()[:4] + "…" if len(given.strip()) > 8 else "…"
        raise NotAuthorised(f"Incorrect API key provided: {shown}")
