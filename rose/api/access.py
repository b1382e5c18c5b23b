"""Who may call: holders of an API key, or without configured keys whoever sits at this machine.

Without keys any key passes, as the SDKs always send one. Then a web page that the user happens to look at must not get
in: neither by a form or script of another origin, nor by a name that points at this machine (DNS rebinding).
"""

from __future__ import annotations

import hashlib
import hmac
from ipaddress import ip_address
from urllib.parse import urlsplit

from litestar.connection import ASGIConnection
from litestar.handlers import BaseRouteHandler

from rose.api.services import services_of
from rose.errors import NotAuthorised
from rose.settings import Settings

PUBLIC = "public"
"""Marks a route that needs no key: `get(..., opt={PUBLIC: True})`."""


class ForeignPage(NotAuthorised):
    """A web page of another origin may not call this server."""

    status = 403
    default_code = "foreign_page"


async def check_access(connection: ASGIConnection, handler: BaseRouteHandler) -> None:  # type: ignore[type-arg]
    """Let a call pass or refuse it. Raises: NotAuthorised, ForeignPage."""
    settings = services_of(connection.app).settings
    if handler.opt.get(PUBLIC):
        return
    if settings.api_keys:
        _check_key(connection.headers.get("authorization", ""), settings.api_keys)
    else:
        _check_page(connection.headers.get("host", ""), connection.headers.get("origin"), settings)


def _check_key(authorization: str, keys: tuple[str, ...]) -> None:
    scheme, _, given = authorization.partition(" ")
    given = given.strip()
    if scheme.lower() != "bearer" or not given:
        raise NotAuthorised(
            "You didn't provide an API key. Send it as `Authorization: Bearer KEY`.",
            hint="The command line and the SDKs read it from OPENAI_API_KEY.",
        )
    digest = hashlib.sha256(given.encode("utf-8", "surrogateescape")).digest()
    matches = [hmac.compare_digest(digest, hashlib.sha256(key.encode()).digest()) for key in keys]
    if not any(matches):
        raise NotAuthorised(f"Incorrect API key provided: {given[:4] if len(given) > 8 else ''}…")


def _check_page(host: str, origin: str | None, settings: Settings) -> None:
    """Browsers tell the origin of a page that writes, and under which name they found this server."""
    allowed = origin is None or bool({origin, "*"} & set(settings.cors_origins))
    if not allowed and origin not in (f"http://{host}", f"https://{host}"):
        raise ForeignPage(
            f"Pages of {origin} may not call this server.", hint="The setting cors_origins allows an origin."
        )
    name = _hostname(f"//{host}")
    if not _is_this_machine(name) and name not in (settings.host, _hostname(settings.url)):
        raise ForeignPage(
            f"This server is not called {name!r}.",
            hint="Set public_url to the address that people use, or set api_keys.",
        )


def _hostname(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _is_this_machine(name: str) -> bool:
    try:
        return ip_address(name).is_loopback
    except ValueError:
        return name == "localhost" or name.endswith(".localhost")
