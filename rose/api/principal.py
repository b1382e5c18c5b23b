"""Who calls: the project that a request works in, and what its key allows. Handlers take both from here only."""

from __future__ import annotations

from typing import Any

import msgspec
from litestar import Request
from litestar.di import NamedDependency
from litestar.params import SkipValidation

from rose.domain.keys import SCOPE_CLOSURE, Scope
from rose.domain.projects import DEFAULT_PROJECT

EVERYTHING = SCOPE_CLOSURE["admin"]
NEEDS = "scope"
"""The scope that a route needs: `post(..., opt={NEEDS: "read"})`; without it read for GET and write for all else."""


class Principal(msgspec.Struct, frozen=True, kw_only=True):
    """A caller."""

    project: str = DEFAULT_PROJECT
    key_id: str | None = None
    """None without keys, and for a key of the settings."""
    scopes: frozenset[Scope] = EVERYTHING


ThePrincipal = NamedDependency[SkipValidation[Principal]]
"""The type under which a handler asks for its caller; the parameter is called `principal`."""


def principal_of(request: Request[Any, Any, Any]) -> Principal:
    """Return who the guard found to call (rose/api/access.py)."""
    return request.scope["state"].get("principal", Principal())
