"""The documents of the interfaces: `/docs` shows `/openapi.json`; `/asyncapi.json` describes the NATS subjects.

The page is Swagger UI (Apache-2.0), whose files come with the package openapi-ui-bundles. Nothing is loaded from
elsewhere, and the policy that goes with the page lets the browser load nothing from elsewhere.
"""

from __future__ import annotations

import functools

import anyio.to_thread
from litestar import Response
from litestar.exceptions import NotFoundException
from litestar.params import FromPath
from openapi_ui_bundles import swagger_ui

from rose import asyncapi
from rose.api.access import PUBLIC
from rose.api.errors import AnyRequest, path_of
from rose.api.routes import get

OPENAPI = "/openapi.json"
KINDS = {"css": "text/css", "js": "text/javascript", "png": "image/png"}
VENDORED = ("swagger-ui.css", "swagger-ui-bundle.js", "favicon-32x32.png")
POLICY = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; font-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
CACHED = {"cache-control": "public, max-age=86400"}
PAGE = """<!doctype html>
<html lang="en">
<head>
  <meta charset="utf-8">
  <meta name="viewport" content="width=device-width, initial-scale=1">
  <title>ROSE: API</title>
  <link rel="icon" type="image/png" href="docs/favicon-32x32.png">
  <link rel="stylesheet" href="docs/swagger-ui.css">
  <style>
    body { margin: 0; font-family: sans-serif }
    nav { padding: 0.8em 1.5em; background: #1b1b1b; color: #fff }
    nav a { margin-left: 1.5em; color: #ffd0d8 }
  </style>
</head>
<body>
  <nav><b>ROSE</b> <a href="openapi.json">HTTP: OpenAPI</a> <a href="asyncapi.json">NATS events: AsyncAPI</a></nav>
  <div id="page">This page needs JavaScript; the documents above do not.</div>
  <script src="docs/swagger-ui-bundle.js"></script>
  <script src="docs/start.js"></script>
</body>
</html>
"""
START = """SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#page",
  deepLinking: true,
  docExpansion: "list",
  defaultModelsExpandDepth: 0,
  persistAuthorization: true,
  validatorUrl: null,
});
"""


def refuse_below(request: AnyRequest) -> None:
    """Refuse what lies below the document, where Litestar would answer with a page of its own and the document again.

    Raises: NotFoundException.
    """
    if path_of(request).rstrip("/") != OPENAPI:
        raise NotFoundException()


@get("/docs", opt={PUBLIC: True}, include_in_schema=False)
async def page() -> Response[str]:
    """Show the API on a page that can also call it."""
    return Response(PAGE, media_type="text/html", headers=POLICY)


@get("/docs/{name:str}", opt={PUBLIC: True}, include_in_schema=False)
async def part(name: FromPath[str]) -> Response[bytes]:
    """Send a part of the page."""
    if name != "start.js" and name not in VENDORED:
        raise NotFoundException()
    content = START.encode() if name == "start.js" else await anyio.to_thread.run_sync(_vendored, name)
    kind = KINDS[name.rpartition(".")[2]]
    return Response(content, media_type=kind, headers={**CACHED, "x-content-type-options": "nosniff"})


@get("/asyncapi.json", opt={PUBLIC: True}, include_in_schema=False)
async def events() -> Response[bytes]:
    """Describe the NATS subjects."""
    return Response(await anyio.to_thread.run_sync(_asyncapi), media_type="application/json")


@functools.cache
def _vendored(name: str) -> bytes:
    return (swagger_ui.static_path / name).read_bytes()


@functools.cache
def _asyncapi() -> bytes:
    return asyncapi.encoded()


HANDLERS = (page, part, events)
