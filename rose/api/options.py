"""Answers OPTIONS. The framework's own answer names only the methods of the first handler of a path."""

from __future__ import annotations

import re
from collections.abc import Sequence

import litestar
from litestar import Response
from litestar.handlers import HTTPRouteHandler

from rose.api.errors import AnyRequest

_TYPE = re.compile(r":\w+(?=\})")
"""How a path names a parameter's type, as in `{file_id:str}`; the path of a request's scope is without."""


def options(handlers: Sequence[HTTPRouteHandler]) -> HTTPRouteHandler:
    """Return the handler that names in `Allow` what each path of these handlers takes."""
    methods: dict[str, set[str]] = {}
    for handler in handlers:
        for path in handler.paths:
            methods.setdefault(path, {"OPTIONS"}).update(handler.http_methods)
    templates = {_TYPE.sub("", path): names for path, names in methods.items()}

    @litestar.route(sorted(methods), http_method="OPTIONS", status_code=204, include_in_schema=False)
    async def allowed(request: AnyRequest) -> Response[None]:
        names = templates[request.scope["path_template"]]
        return Response(None, status_code=204, headers={"allow": ", ".join(sorted(names))})

    return allowed
