"""Services outside of ROSE that a job's metrics also go to: which there are, and which this environment can serve."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import metadata
from typing import Any

WANDB = "wandb"
INTEGRATIONS = (WANDB,)
"""Types that a job may name; each is also the name of the distribution, and of ROSE's extra, that it takes."""


def installed() -> tuple[str, ...]:
    """Return the integrations whose distribution is installed here; nothing is imported.

    Not by looking for a module: a folder `wandb`, which that program leaves where it ran, passes for one.
    """
    return tuple(name for name in INTEGRATIONS if _is_installed(name))


def missing(wanted: Iterable[Mapping[str, Any]] | None, there: Iterable[str]) -> str | None:
    """Return the first integration of a job that is not among those `there`, or None. Pure."""
    known = frozenset(there)
    return next((str(one["type"]) for one in wanted or () if one["type"] not in known), None)


def announced(capabilities: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the integrations that a worker says it has; an older one says nothing. Pure."""
    return tuple(map(str, capabilities.get("integrations", ())))


def _is_installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True
