"""Reads the body of a job's creation; every refusal names the field, what it is and what it may be."""

from __future__ import annotations

import secrets
import time
from importlib.metadata import version
from typing import Any

from litestar.openapi.spec import OpenAPIType, Schema

from projections import files as files_view
from rose.api.body import optional_object, optional_text, require_text, wrong_type
from rose.api.integrations import read_integrations
from rose.api.known_keys import check_keys
from rose.api.model_names import base_request, find_model
from rose.api.routes import TEXT, WHOLE, closed, listing, optional, record
from rose.api.services import Services
from rose.domain import bases, hyperparameter_requests
from rose.domain.job_commands import CreateJob
from rose.domain.job_values import PinnedFile
from rose.domain.training_data import check_name
from rose.errors import InvalidRequest, NotFound
from rose.ids import new_id

MAX_SEED = 2_147_483_647
MAX_METADATA_PAIRS = 16
MAX_METADATA_KEY = 64
MAX_METADATA_VALUE = 512
METHODS = ("supervised", "dpo", "reinforcement")
SUPPORTED_METHODS = ("supervised",)
_ELSEWHERE = {"lr": "learning_rate_multiplier", "rank": "r", "lora_r": "r", "lora_rank": "r"}
"""What other trainers call some of the keys."""
_LORA = Schema(
    one_of=[
        closed(**dict.fromkeys(hyperparameter_requests.LORA_KEYS, Schema())),
        Schema(type=OpenAPIType.NULL),
        Schema(const="auto"),
    ]
)
_HYPERPARAMETERS = closed(**{**dict.fromkeys(hyperparameter_requests.KEYS, Schema()), "lora_config": _LORA})
_WANDB = closed(("project",), project=TEXT, name=optional(TEXT), entity=optional(TEXT), tags=optional(listing(TEXT)))
CREATE_BODY = closed(
    ("model", "training_file"),
    model=TEXT,
    training_file=TEXT,
    validation_file=optional(TEXT),
    suffix=optional(TEXT),
    seed=optional(WHOLE),
    method=optional(
        closed(
            type=TEXT,
            supervised=optional(closed(hyperparameters=optional(_HYPERPARAMETERS))),
            dpo=optional(record()),
            reinforcement=optional(record()),
        )
    ),
    hyperparameters=optional(_HYPERPARAMETERS),
    metadata=optional(record()),
    integrations=optional(listing(closed(("type", "wandb"), type=TEXT, wandb=_WANDB))),
)


async def read_create_job(services: Services, project: str, body: dict[str, Any]) -> CreateJob:
    """Return the command that a request asks for.

    Raises: InvalidRequest naming the field, also one that nobody reads: a job that trains otherwise than its request
    says would cost hours.
    """
    check_keys(body, CREATE_BODY, _ELSEWHERE)
    model = require_text(body, "model")
    training_id = require_text(body, "training_file")
    validation_id = optional_text(body, "validation_file")
    suffix = _suffix(body)
    seed = _seed(body)
    method, asked = _method(body)
    metadata = _metadata(body)
    integrations = await read_integrations(services, body)
    training = await _file(services, project, training_id, "training_file")
    validation = None if validation_id is None else await _file(services, project, validation_id, "validation_file")
    if validation is not None and asked.validation_split not in ("auto", 0):
        raise InvalidRequest(
            "validation_split and validation_file exclude each other. Remove one.",
            code="invalid_combination",
            param="hyperparameters.validation_split",
        )
    try:
        named = await find_model(services, project, model)
    except NotFound as error:
        raise InvalidRequest(error.message, code=error.code, param="model", hint=error.hint) from None
    return CreateJob(
        job_id=new_id("ftjob_"),
        at=int(time.time()),
        project=project,
        model=model,
        base_request=base_request(named),
        training_file=training,
        validation_file=validation,
        suffix=suffix,
        seed=secrets.randbelow(MAX_SEED + 1) if seed is None else seed,
        method=method,
        requested=asked,
        model_name="",
        metadata=metadata,
        integrations=integrations,
        code_version=version("rose"),
    )


def _suffix(body: dict[str, Any]) -> str | None:
    value = body.get("suffix")
    if value is None:
        return None
    if not isinstance(value, str):
        wrong_type("suffix", "a string", value)
    return bases.check_suffix(value)


def _seed(body: dict[str, Any]) -> int | None:
    value = body.get("seed")
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool):
        wrong_type("seed", f"a whole number from 0 to {MAX_SEED}", value)
    if not 0 <= value <= MAX_SEED:
        raise InvalidRequest(f"seed must be a whole number from 0 to {MAX_SEED}.", code="invalid_value", param="seed")
    return value


def _method(body: dict[str, Any]) -> tuple[str, hyperparameter_requests.HyperparametersRequest]:
    """Return method and hyperparameters; what `method` says wins over the top-level `hyperparameters`."""
    top = optional_object(body, "hyperparameters")
    hyperparameter_requests.parse(top)
    given = optional_object(body, "method") or {}
    kind = given.get("type", "supervised")
    if kind not in METHODS:
        raise InvalidRequest(
            f"method.type must be one of {', '.join(METHODS)}.", code="invalid_value", param="method.type"
        )
    if kind not in SUPPORTED_METHODS:
        raise InvalidRequest(
            f"The method {kind} is not supported; supported: {', '.join(SUPPORTED_METHODS)}.",
            code="unsupported_method",
            param="method.type",
        )
    inner = optional_object(given, f"method.{kind}") or {}
    special = optional_object(inner, f"method.{kind}.hyperparameters")
    path = f"method.{kind}.hyperparameters"
    hyperparameter_requests.parse(special, path=path)
    merged = {**(top or {}), **(special or {})}
    return kind, hyperparameter_requests.parse(merged, path=path if special else "hyperparameters")


def _metadata(body: dict[str, Any]) -> dict[str, str] | None:
    given = optional_object(body, "metadata")
    if given is None:
        return None
    if len(given) > MAX_METADATA_PAIRS:
        raise InvalidRequest(
            f"metadata has {len(given)} pairs; at most {MAX_METADATA_PAIRS} are allowed.",
            code="invalid_value",
            param="metadata",
        )
    for key, value in given.items():
        if not 0 < len(key) <= MAX_METADATA_KEY:
            raise InvalidRequest(
                f"Keys of metadata have 1 to {MAX_METADATA_KEY} characters; {key[:80]!r} has {len(key)}.",
                code="invalid_value",
                param="metadata",
            )
        if not isinstance(value, str):
            wrong_type(f"metadata.{key}", "a string", value)
        if len(value) > MAX_METADATA_VALUE:
            raise InvalidRequest(
                f"metadata.{key} has {len(value)} characters; at most {MAX_METADATA_VALUE} are allowed.",
                code="invalid_value",
                param=f"metadata.{key}",
            )
    return given


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
