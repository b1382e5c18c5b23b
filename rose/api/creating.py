"""Turns a request to create a job into the command: looks up what it names, refuses what cannot go together."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable
from importlib.metadata import version
from typing import Any, NoReturn

import msgspec

from projections import files as files_view
from rose import integrations, leases
from rose.api import schema
from rose.api.model_names import base_request, find_model
from rose.api.services import Services
from rose.domain import bases
from rose.domain.hyperparameter_requests import HyperparametersRequest, LoraRequest
from rose.domain.job_commands import CreateJob
from rose.domain.job_values import PinnedFile
from rose.domain.training_data import check_name
from rose.errors import InvalidRequest, NotFound
from rose.ids import new_id
from rose.methods import method_of

ELSEWHERE = {"lr": "learning_rate_multiplier", "rank": "r", "lora_r": "r", "lora_rank": "r"}
"""What other trainers call some of the keys."""
NOT_IN_PROJECTS = "/\\#?%:"
"""Weights & Biases refuses the names of projects that contain one of these."""
_SWITCH = {"on": True, "off": False}
_UNSUPPORTED_LORA = {
    "use_dora": "DoRA adapters are refused by the serving engines",
    "modules_to_save": "adapters with extra trained modules are refused by the serving engines",
    "bias": "adapters with biases are refused by the serving engines",
}
_NEVER_TARGETED = ("lm_head", "embed_tokens")


async def job_command(services: Services, project: str, body: schema.CreateJob) -> CreateJob:
    """Return the command that a request asks for. Raises: InvalidRequest naming the field, Unavailable."""
    suffix = None if body.suffix is None else bases.check_suffix(body.suffix)
    method, asked = _method(body)
    wanted = await _integrations(services, body.integrations)
    training = await _file(services, project, body.training_file, "training_file")
    validation = None
    if body.validation_file is not None:
        validation = await _file(services, project, body.validation_file, "validation_file")
        if asked.validation_split not in ("auto", 0):
            raise InvalidRequest(
                "validation_split and validation_file exclude each other. Remove one.",
                code="invalid_combination",
                param="hyperparameters.validation_split",
            )
    try:
        named = await find_model(services, project, body.model)
    except NotFound as error:
        raise InvalidRequest(error.message, code=error.code, param="model", hint=error.hint) from None
    return CreateJob(
        job_id=new_id("ftjob_"),
        at=int(time.time()),
        project=project,
        model=body.model,
        base_request=base_request(named),
        training_file=training,
        validation_file=validation,
        suffix=suffix,
        seed=secrets.randbelow(schema.MAX_SEED + 1) if body.seed is None else body.seed,
        method=method,
        requested=asked,
        model_name="",
        metadata=body.metadata,
        integrations=wanted,
        code_version=version("rose"),
    )


def _method(body: schema.CreateJob) -> tuple[str, HyperparametersRequest]:
    """Return method and hyperparameters; what `method` says wins over the top-level `hyperparameters`."""
    given = body.method or schema.Method()
    method = method_of(given.type)
    top = body.hyperparameters or schema.Hyperparameters()
    section = getattr(given, given.type, None)
    special: schema.Hyperparameters | None = section.hyperparameters if section else None
    asked = requested(top)
    if special is not None:
        path = f"method.{given.type}.hyperparameters"
        requested(special, path, method.OPTIONS)
        asked = requested(type(special)(**_named(top) | _named(special)), path, method.OPTIONS)
    return given.type, asked


def _named(given: msgspec.Struct) -> dict[str, Any]:
    """Return what a request names."""
    return {name: value for name, value in msgspec.structs.asdict(given).items() if value is not msgspec.UNSET}


def requested(
    given: schema.Hyperparameters, path: str = "hyperparameters", options: Iterable[str] = ()
) -> HyperparametersRequest:
    """Return the hyperparameters of a request as a job keeps them; what was left out is `auto`.

    `options` are the names of those that only the method has.

    Raises: InvalidRequest naming the key below `path` that cannot be honoured, or that another one makes void.
    """
    values = _named(given)
    own = {name: values.pop(name) for name in options if name in values}
    lora = values.pop("lora_config", None)
    if values.get("thinking") in _SWITCH:
        values["thinking"] = _SWITCH[values["thinking"]]
    shape = _lora(lora, f"{path}.lora_config") if isinstance(lora, schema.LoraConfig) else LoraRequest()
    if given.use_lora is False and shape != LoraRequest():
        raise InvalidRequest(
            f"{path}.use_lora is false, so {path}.lora_config has no effect. Remove one of the two.",
            code="invalid_combination",
            param=f"{path}.lora_config",
        )
    return HyperparametersRequest(**values, lora_config=shape, options=own)


def _lora(given: schema.LoraConfig, path: str) -> LoraRequest:
    values = _named(given)
    for key, reason in _UNSUPPORTED_LORA.items():
        if values.pop(key) not in (None, False, [], "none"):
            _refuse(f"{path}.{key}", f"is not supported: {reason}", "unsupported_parameter")
    targets = values.get("target_modules")
    if isinstance(targets, list):
        for name in targets:
            if name.rpartition(".")[2] in _NEVER_TARGETED:
                why = f"names {name!r}, which cannot carry an adapter. Leave it out"
                _refuse(f"{path}.target_modules", why, "unsupported_parameter")
        values["target_modules"] = tuple(targets)
    return LoraRequest(**values)


async def _integrations(
    services: Services, given: list[schema.Integration] | None
) -> tuple[dict[str, Any], ...] | None:
    """Return the integrations as the job keeps them. Raises: InvalidRequest when none could serve one, Unavailable."""
    if not given:
        return None if given is None else ()
    for index, one in enumerate(given):
        found = next((mark for mark in NOT_IN_PROJECTS if mark in one.wandb.project), None)
        if found is not None:
            param = f"integrations[{index}].wandb.project"
            _refuse(param, f"must not contain {' '.join(NOT_IN_PROJECTS)}; it has a {found}")
    wanted = tuple(
        {**msgspec.to_builtins(one), "wandb": {**msgspec.to_builtins(one.wandb), "tags": one.wandb.tags or []}}
        for one in given
    )
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


async def _file(services: Services, project: str, file_id: str, param: str) -> PinnedFile:
    state = await files_view.get(services.pool, project, file_id, now=int(time.time()))
    if state is None or state.artifact is None:
        raise InvalidRequest(
            f"invalid {param}: {file_id} does not exist.",
            code="file_not_found",
            param=param,
            hint="`rose files list` shows the files; `rose upload FILE` adds one.",
        )
    if state.purpose != "fine-tune":
        raise InvalidRequest(
            f"invalid {param}: {file_id} has the purpose {state.purpose}; fine-tune is needed.",
            code="invalid_file_purpose",
            param=param,
            hint="Upload it again with purpose fine-tune.",
        )
    check_name(state.filename, param)
    return PinnedFile(id=state.id, filename=state.filename, artifact=state.artifact)


def _refuse(param: str, why: str, code: str = "invalid_value") -> NoReturn:
    raise InvalidRequest(f"{param} {why}.", code=code, param=param)
