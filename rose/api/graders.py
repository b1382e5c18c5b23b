"""`/v1/fine_tuning/alpha/graders`: tries a grader on one answer, or only checks it. Nothing is stored."""

from __future__ import annotations

import time
from typing import Any

import msgspec
from litestar import Response
from litestar.openapi.spec import OpenAPIType, Schema

from rose.api.body import check_values, read_object, wrong_type
from rose.api.chat import CLIENT_LEFT, target_of, unless_client_leaves
from rose.api.engines import ask_engine
from rose.api.errors import AnyRequest
from rose.api.known_keys import check_keys
from rose.api.model_names import Named, find_model
from rose.api.principal import ThePrincipal
from rose.api.routes import NUMBER, TEXT, WHOLE, closed, listing, optional, post, record
from rose.api.services import Services, TheServices
from rose.errors import InvalidRequest, NotFound, RoseError
from rose.graders import grading, reading
from rose.graders.kinds import Grader, LabelModel, Python, SamplingParams, ScoreModel, TextSimilarity
from rose.graders.model_graders import Asker, ModelAnswer
from rose.graders.results import Errors, Fault, Graded, Usage


def _kind(name: str, required: tuple[str, ...], **properties: Schema) -> Schema:
    kind = Schema(type=OpenAPIType.STRING, enum=[name])
    return record(("type", "name", *required), type=kind, name=TEXT, **properties)


_MESSAGES = listing(record(("role", "content"), role=TEXT, content=Schema(one_of=[TEXT, listing(record(("type",)))])))
_SAMPLING = optional(
    record(
        (),
        seed=optional(WHOLE),
        temperature=optional(NUMBER),
        top_p=optional(NUMBER),
        max_completions_tokens=optional(WHOLE),
        reasoning_effort=optional(TEXT),
    )
)
_SINGLE = (
    _kind("string_check", ("input", "reference", "operation"), input=TEXT, reference=TEXT, operation=TEXT),
    _kind(
        "text_similarity",
        ("input", "reference", "evaluation_metric"),
        input=TEXT,
        reference=TEXT,
        evaluation_metric=TEXT,
    ),
    _kind("python", ("source",), source=TEXT, image_tag=optional(TEXT)),
    _kind(
        "score_model",
        ("model", "input"),
        model=TEXT,
        input=_MESSAGES,
        range=optional(listing(NUMBER)),
        sampling_params=_SAMPLING,
    ),
)
_MULTI = _kind("multi", ("graders", "calculate_output"), graders=record(), calculate_output=TEXT)
GRADER = Schema(one_of=[*_SINGLE, _MULTI], description="A grader: see docs/graders.md.")
_RUN_KEYS = closed(("grader", "model_sample"), grader=record(), model_sample=TEXT, item=optional(record()))
_CHECK_KEYS = closed(("grader",), grader=record())


class Metadata(msgspec.Struct, frozen=True, kw_only=True):
    """How the reward came about."""

    name: str
    type: str
    errors: Errors
    execution_time: float
    """Seconds."""
    scores: dict[str, float]
    """Of a multi grader: the reward of each."""
    token_usage: int | None
    """Tokens of all grading models together; null when none was asked."""
    sampled_model_name: str | None
    """The grading model of a score_model grader."""


class GraderRun(msgspec.Struct, frozen=True, kw_only=True):
    """The result of a grader."""

    reward: float
    """0 where an error stands in `metadata.errors`."""
    metadata: Metadata
    sub_rewards: dict[str, float]
    """Of a multi grader: the reward of each."""
    model_grader_token_usage_per_model: dict[str, Usage]


class ValidGrader(msgspec.Struct, frozen=True, kw_only=True):
    """A grader that can be used."""

    grader: dict[str, Any]


@post(
    "/v1/fine_tuning/alpha/graders/run",
    answer=GraderRun,
    body=record(("grader", "model_sample"), grader=GRADER, model_sample=TEXT, item=optional(record())),
)
async def run_grader(request: AnyRequest, services: TheServices, principal: ThePrincipal) -> Response[Any]:
    """Grade one answer. What goes wrong in grading is a flag of `metadata.errors`, and the reward 0."""
    body = await read_object(request, nul_allowed=True)
    check_keys(body, _RUN_KEYS)
    grader = reading.read(_required(body, "grader"))
    sample, item = _required(body, "model_sample"), body.get("item")
    if not isinstance(sample, str):
        wrong_type("model_sample", "a string", sample)
    if item is not None and not isinstance(item, dict):
        wrong_type("item", "an object", item)
    ask = _asker(services, await _models(services, principal.project, grader))
    started = time.monotonic()
    graded = await unless_client_leaves(request, grading.grade(grader, sample, item or {}, ask))
    if graded is None:
        return Response(None, status_code=CLIENT_LEFT)
    return Response(_answer(grader, graded, time.monotonic() - started), status_code=200)


@post("/v1/fine_tuning/alpha/graders/validate", answer=ValidGrader, body=record(("grader",), grader=GRADER))
async def validate_grader(request: AnyRequest, services: TheServices, principal: ThePrincipal) -> ValidGrader:
    """Check that a grader can be used here: its fields, templates, formula, source, metric and model."""
    body = await read_object(request, nul_allowed=True)
    check_keys(body, _CHECK_KEYS)
    given = _required(body, "grader")
    grader = reading.read(given)
    reading.check(grader)
    await _models(services, principal.project, grader)
    for param, one in reading.parts(grader):
        if isinstance(one, Python):
            await grading.check_source(one, param)
        elif isinstance(one, TextSimilarity):
            await grading.check_metric(one, param)
    return ValidGrader(grader=given)


def _required(body: dict[str, Any], name: str) -> Any:
    if body.get(name) is None:
        raise InvalidRequest(f"Missing required parameter: {name}.", code="missing_required_parameter", param=name)
    return body[name]


async def _models(services: Services, project: str, grader: Grader) -> dict[str, Named]:
    """Return the grading models by name. Raises: NotFound naming the field of one that is not there."""
    found: dict[str, Named] = {}
    for param, one in reading.parts(grader):
        if isinstance(one, (ScoreModel, LabelModel)):
            check_values({f"{param}.model": one.model})
            try:
                found[one.model] = await find_model(services, project, one.model)
            except NotFound as error:
                where = f"{param}.model"
                raise NotFound(error.message, code=error.code, param=where, hint=error.hint) from None
    return found


def _asker(services: Services, models: dict[str, Named]) -> Asker:
    """Return what asks this installation's models."""

    async def ask(model: str, messages: list[dict[str, Any]], sampling: SamplingParams) -> ModelAnswer:
        target = target_of(models[model])
        asking = {
            "model": model,
            "messages": messages,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": sampling.seed,
            "max_completion_tokens": sampling.token_limit,
            "reasoning_effort": sampling.reasoning_effort,
            "rose": msgspec.to_builtins(target),
        }
        try:
            answer = await ask_engine(
                services, target.base.fingerprint, lambda url: services.engines.complete(url, asking)
            )
        except RoseError as error:
            long = error.code == "context_length_exceeded"
            raise Fault("truncated_observation_error" if long else "model_grader_server_error", str(error)) from error
        choice = answer["choices"][0]
        return ModelAnswer(
            text=choice["message"].get("content") or "",
            refusal=choice["message"].get("refusal"),
            cut=choice.get("finish_reason") == "length",
            usage=msgspec.convert(answer["usage"], Usage),
        )

    return ask


def _answer(grader: Grader, graded: Graded, seconds: float) -> GraderRun:
    return GraderRun(
        reward=graded.reward,
        metadata=Metadata(
            name=grader.name,
            type=str(grader.__struct_config__.tag),
            errors=graded.errors,
            execution_time=seconds,
            scores=graded.sub_rewards,
            token_usage=sum(used.total_tokens for used in graded.usage.values()) if graded.usage else None,
            sampled_model_name=grader.model if isinstance(grader, ScoreModel) else None,
        ),
        sub_rewards=graded.sub_rewards,
        model_grader_token_usage_per_model=graded.usage,
    )


HANDLERS = (run_grader, validate_grader)
