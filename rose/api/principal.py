"""Who calls: the project that a request works in, and what its key allows. Handlers take both from here only."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from litestar import Request
from litestar.di import NamedDependency
from litestar.params import SkipValidation

from rose.domain.projects import DEFAULT_PROJECT
from rose.errors import RoseError

Scope = Literal["read", "write", "admin"]
EVERYTHING: frozenset[Scope] = frozenset(("read", "write", "admin"))


class Principal(msgspec.Struct, frozen=True, kw_only=True):
    """A caller."""

    project: str = DEFAULT_PROJECT
    key_id: str | None = None
    """None without keys, and for a key of the settings."""
    scopes: frozenset[Scope] = EVERYTHING


class NotAllowed(RoseError):
    """This key may not do that."""

    status = 403
    exit_code = 4
    kind = "invalid_request_error"
    default_code = "insufficient_scope"


ThePrincipal = NamedDependency[SkipValidation[Principal]]
"""The type under which a handler asks for its caller; the parameter is called `principal`."""


def principal_of(request: Request[Any, Any, Any]) -> Principal:
    """Return who the guard found to call (rose/api/access.py)."""
    return request.scope["state"].get("principal", Principal())
