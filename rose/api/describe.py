"""Prints the OpenAPI document without a running server: `python -m rose.api.describe`, what `make docs` commits."""

from __future__ import annotations

import sys
from typing import Any, cast

import msgspec

from rose.api.app import litestar_app
from rose.api.services import Services
from rose.settings import Settings


def openapi() -> dict[str, Any]:
    """Return the document that `/openapi.json` shows. The application is only described, so nothing is opened."""
    parts = dict.fromkeys(("pool", "tailer", "blobs", "commands", "engines", "line", "limits", "meter"))
    app = litestar_app(Services(settings=Settings(), **cast("dict[str, Any]", parts)))
    document = app.openapi_schema.to_schema()
    document["paths"] = dict(sorted(document["paths"].items()))  # the framework keeps the paths of a handler in a set
    return document


def encoded() -> bytes:
    """Return the document as indented JSON, the bytes of `docs/openapi.json`."""
    return msgspec.json.format(msgspec.json.encode(openapi()), indent=2) + b"\n"


if __name__ == "__main__":
    sys.stdout.buffer.write(encoded())
