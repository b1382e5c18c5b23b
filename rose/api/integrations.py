"""Reads the integrations of a job's creation, and refuses those that nobody who could run the job can serve."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from rose import integrations, leases
from rose.api.body import wrong_type
from rose.api.services import Services
from rose.errors import InvalidRequest

MAX_INTEGRATIONS = 5
MAX_TEXT = 512
MAX_PROJECT = 128
MAX_TAGS = 50
MAX_TAG = 64
NOT_IN_PROJECTS = "/\\#?%:"
"""Weights & Biases refuses the names of projects that contain one of these."""


async def read_integrations(services: Services, body: dict[str, Any]) -> tuple[dict[str, Any], ...] | None:
    """Return the integrations that a request asks for. Raises: InvalidRequest naming the field, Unavailable."""
    wanted = _integrations(body)
    if not wanted:
        return wanted
    trainers = await leases.workers(services.pool, "trainer")
    there = [integrations.announced(one.capabilities) for one in trainers] or [integrations.installed()]
    lacking = [integrations.missing(wanted, one) for one in there]
    if all(lacking):
        name = lacking[0]
        index = next(index for index, one in enumerate(wanted) if one["type"] == name)
        where = "no connected trainer has it" if trainers else "it is not installed"
        raise InvalidRequest(
            f"The integration {name} cannot be served: {where}.",
            code="unsupported_integration",
            param=f"integrations[{index}].type",
            hint=f"pip install 'rose[{name}]' for the trainers and start them again, or leave the integration out.",
        )
    return wanted


def _integrations(body: dict[str, Any]) -> tuple[dict[str, Any], ...] | None:
    given = body.get("integrations")
    if given is None:
        return None
    if not isinstance(given, list):
        wrong_type("integrations", "a list", given)
    if len(given) > MAX_INTEGRATIONS:
        raise InvalidRequest(
            f"integrations has {len(given)} entries; at most {MAX_INTEGRATIONS} are allowed.",
            code="invalid_value",
            param="integrations",
        )
    return tuple(_integration(one, f"integrations[{index}]") for index, one in enumerate(given))


def _integration(given: Any, path: str) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        wrong_type(path, "an object", given)
    if given.get("type") != integrations.WANDB:
        raise InvalidRequest(f"{path}.type must be wandb.", code="invalid_value", param=f"{path}.type")
    return {"type": integrations.WANDB, integrations.WANDB: _wandb(given.get(integrations.WANDB), f"{path}.wandb")}


def _wandb(given: Any, path: str) -> dict[str, Any]:
    """Return project, name, entity and tags as Weights & Biases takes them."""
    if not isinstance(given, Mapping):
        wrong_type(path, "an object", given)
    project = _text(given, "project", path, MAX_PROJECT)
    found = next((one for one in NOT_IN_PROJECTS if one in project), None)
    if found is not None:
        _refuse(f"{path}.project", f"must not contain {' '.join(NOT_IN_PROJECTS)}; it has a {found}")
    tags = given.get("tags") or []
    well_formed = isinstance(tags, list) and all(isinstance(tag, str) and 0 < len(tag) <= MAX_TAG for tag in tags)
    if not well_formed or len(tags) > MAX_TAGS:
        _refuse(f"{path}.tags", f"must be at most {MAX_TAGS} strings of 1 to {MAX_TAG} characters")
    optional = {name: given.get(name) and _text(given, name, path, MAX_TEXT) for name in ("name", "entity")}
    return {"project": project, **optional, "tags": tags}


def _text(given: Mapping[str, Any], name: str, path: str, longest: int) -> str:
    value = given.get(name)
    if not isinstance(value, str):
        wrong_type(f"{path}.{name}", "a string", value)
    if not 0 < len(value) <= longest:
        _refuse(f"{path}.{name}", f"must have 1 to {longest} characters")
    return value


def _refuse(param: str, why: str) -> NoReturn:
    raise InvalidRequest(f"{param} {why}.", code="invalid_value", param=param)
