"""`/v1/fine_tuning/alpha/graders`: tries a grader on one answer, or only checks it. Nothing is stored."""

from __future__ import annotations

import time
from typing import Any

import msgspec
from litestar import Response

from rose.api import schema
from rose.api.accounts import Account
from rose.api.chat import CLIENT_LEFT, target_of, unless_client_leaves
from rose.api.decoding import read_body
from rose.api.engines import ask_engine
from rose.api.errors import AnyRequest
from rose.api.model_names import Named, find_model
from rose.api.principal import ThePrincipal
from rose.api.routes import post
from rose.api.services import Services, TheServices
from rose.decoding import check_values
from rose.errors import NotFound, RoseError
from rose.graders import grading, reading
from rose.graders.kinds import Grader, LabelModel, Python, SamplingParams, ScoreModel, TextSimilarity
from rose.graders.model_graders import Asker, ModelAnswer
from rose.graders.results import Fault, Graded, Usage


@post("/v1/fine_tuning/alpha/graders/run", answer=schema.GraderRun, body=schema.RunGrader)
async def run_grader(request: AnyRequest, services: TheServices, principal: ThePrincipal) -> Response[Any]:
    """Grade one answer. What goes wrong in grading is a flag of `metadata.errors`, and the reward 0."""
    body = await read_body(request, schema.RunGrader, nul_allowed=True)
    grader = reading.read(body.grader)
    models = await _models(services, principal.project, grader)
    if models:
        services.limits.require_tokens(principal.project, request.scope)
    ask = _asker(request, services, principal.project, models)
    started = time.monotonic()
    graded = await unless_client_leaves(request, grading.grade(grader, body.model_sample, body.item or {}, ask))
    if graded is None:
        return Response(None, status_code=CLIENT_LEFT)
    return Response(_answer(grader, graded, time.monotonic() - started), status_code=200)


@post("/v1/fine_tuning/alpha/graders/validate", answer=schema.ValidGrader, body=schema.ValidateGrader)
async def validate_grader(request: AnyRequest, services: TheServices, principal: ThePrincipal) -> schema.ValidGrader:
    """Check that a grader can be used here: its fields, templates, formula, source, metric and model."""
    body = await read_body(request, schema.ValidateGrader, nul_allowed=True)
    grader = reading.read(body.grader)
    reading.check(grader)
    await _models(services, principal.project, grader)
    for param, one in reading.parts(grader):
        if isinstance(one, Python):
            await grading.check_source(one, param)
        elif isinstance(one, TextSimilarity):
            await grading.check_metric(one, param)
    return schema.ValidGrader(grader=body.grader)


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


def _asker(request: AnyRequest, services: Services, project: str, models: dict[str, Named]) -> Asker:
    """Return what asks this installation's models."""

    async def ask(model: str, messages: list[dict[str, Any]], sampling: SamplingParams) -> ModelAnswer:
        target = target_of(models[model], project)
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
                services,
                project,
                target.base.fingerprint,
                lambda place: services.engines.complete(place.url, asking),
            )
        except RoseError as error:
            long = error.code == "context_length_exceeded"
            raise Fault("truncated_observation_error" if long else "model_grader_server_error", str(error)) from error
        Account(services, project, models[model].name, request.scope).count_answer(answer)
        choice = answer["choices"][0]
        return ModelAnswer(
            text=choice["message"].get("content") or "",
            refusal=choice["message"].get("refusal"),
            cut=choice.get("finish_reason") == "length",
            usage=msgspec.convert(answer["usage"], Usage),
        )

    return ask


def _answer(grader: Grader, graded: Graded, seconds: float) -> schema.GraderRun:
    return schema.GraderRun(
        reward=graded.reward,
        metadata=schema.GraderMetadata(
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
