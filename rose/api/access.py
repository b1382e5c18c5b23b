"""Who may call: holders of an API key, or while there is no key at all whoever sits at this machine.

A key of the settings administers the default project; one that was created (rose/tenants.py) works in its project, with
its scope. From the first created key on every call needs one. Without keys any key passes, as the SDKs always send one.
Then a web page that the user happens to look at must not get in: neither by a form or script of another origin, nor by
a name that points at this machine (DNS rebinding).
"""

from __future__ import annotations

import hmac
import time
from ipaddress import ip_address
from urllib.parse import urlsplit

from litestar import Request
from litestar.connection import ASGIConnection
from litestar.handlers import BaseRouteHandler

from projections import keys as keys_view
from rose.api.principal import NEEDS, Principal
from rose.api.receiving import drain
from rose.api.services import services_of
from rose.domain.keys import SCOPE_CLOSURE, SCOPES
from rose.errors import LimitReached, NotAllowed, NotAuthorised
from rose.settings import Settings

PUBLIC = "public"
"""Marks a route that needs no key: `get(..., opt={PUBLIC: True})`."""


class ForeignPage(NotAllowed):
    """A web page of another origin may not call this server."""

    default_code = "foreign_page"


async def check_access(connection: ASGIConnection, handler: BaseRouteHandler) -> None:  # type: ignore[type-arg]
    """Let a call pass, with who calls in its state, or refuse it.

    Raises: NotAuthorised, NotAllowed, ForeignPage, LimitReached.
    """
    services = services_of(connection.app)
    if handler.opt.get(PUBLIC):
        return
    secret = _secret(connection.headers.get("authorization", ""))
    guarded, key = await keys_view.recognise(services.pool, secret) if secret else (None, None)
    if secret and _is_static(secret, services.settings.api_keys):
        principal = Principal()
    elif key is not None and key.opens(int(time.time())):
        principal = Principal(project=key.project, key_id=key.id, scopes=SCOPE_CLOSURE[key.scope])
    elif services.settings.api_keys or guarded or (guarded is None and await keys_view.in_use(services.pool)):
        raise _refusal(secret)
    else:
        _check_page(connection.headers.get("host", ""), connection.headers.get("origin"), services.settings)
        principal = Principal()
    connection.scope["state"]["principal"] = principal
    try:
        services.limits.take_request(principal.project, connection.scope)
    except LimitReached:
        if isinstance(connection, Request):
            await drain(connection.stream())
        raise
    method = str(dict(connection.scope).get("method"))
    needed = handler.opt.get(NEEDS) or ("read" if method in ("GET", "HEAD") else "write")
    if needed not in principal.scopes:
        raise NotAllowed(
            f"This key has the scope {_widest(principal)}; {method} {connection.scope['path']} needs {needed}.",
            hint="Ask whoever administers this ROSE for another key.",
        )


def _secret(authorization: str) -> str:
    scheme, _, given = authorization.partition(" ")
    return given.strip() if scheme.lower() == "bearer" else ""


def _is_static(secret: str, keys: tuple[str, ...]) -> bool:
    """Say whether the secret is one of the settings'; in a time that does not tell how much of it is right."""
    given = keys_view.digest(secret)
    return sum(hmac.compare_digest(given, keys_view.digest(key)) for key in keys) > 0


def _refusal(secret: str) -> NotAuthorised:
    if not secret:
        return NotAuthorised(
            "You didn't provide an API key. Send it as `Authorization: Bearer KEY`.",
            hint="The command line reads it from ROSE_API_KEY, the SDKs from OPENAI_API_KEY.",
        )
    return NotAuthorised(
        f"Incorrect API key provided: {secret[:4] if len(secret) > 8 else ''}…",
        hint="It may have been revoked or have expired; whoever administers this ROSE makes another.",
    )


def _widest(principal: Principal) -> str:
    return next(scope for scope in reversed(SCOPES) if scope in principal.scopes)


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
