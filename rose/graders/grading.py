"""Grades an answer: one path for a request of the API and for whoever else has graders to run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, assert_never

import anyio
import anyio.lowlevel
import anyio.to_thread

from rose.errors import InvalidRequest
from rose.graders import model_graders, sandbox, similarity, templates
from rose.graders.formula import Formula, FormulaError
from rose.graders.kinds import (
    Grader,
    LabelModel,
    Multi,
    Operation,
    Python,
    SamplingParams,
    ScoreModel,
    Single,
    StringCheck,
    TextSimilarity,
)
from rose.graders.model_graders import Asker
from rose.graders.reading import parts
from rose.graders.results import Fault, Graded, Usage

MODEL_SECONDS = 600.0
"""Longest wait for a grading model, which may have to be loaded first."""
_AT_ONCE = max(1, min(4, (os.cpu_count() or 2) // 2))
"""Sources and comparisons that run side by side; more would only all become slower."""
_limiter: anyio.lowlevel.RunVar[anyio.CapacityLimiter] = anyio.lowlevel.RunVar("graders")


async def grade(grader: Grader, text: str, item: dict[str, Any], ask: Asker, *, param: str = "grader") -> Graded:
    """Return the reward of a model's answer `text` for `item`; what went wrong is among its faults.

    Raises: InvalidRequest naming the part of the grader that this server cannot do.
    """
    values = {"sample": templates.sample_of(text), "item": item}
    if not isinstance(grader, Multi):
        return await _graded(grader, values, ask, param)
    found = {
        name: await _graded(one, values, ask, where)
        for name, (where, one) in zip(grader.graders, parts(grader, param), strict=True)
    }
    rewards = {name: graded.reward for name, graded in found.items()}
    faults = [
        Fault(fault.flag, f"{name}: {fault.details}") for name, graded in found.items() for fault in graded.faults
    ]
    usage: dict[str, Usage] = {}
    for graded in found.values():
        for model, used in graded.usage.items():
            usage[model] = usage.get(model, Usage()).plus(used)
    reward = 0.0
    try:
        reward = Formula(grader.calculate_output, frozenset(rewards)).value(rewards)
    except FormulaError as error:
        faults.append(Fault("formula_parse_error", f"calculate_output makes no reward: {error}."))
    return Graded(reward=reward, sub_rewards=rewards, faults=tuple(faults), usage=usage)


async def check_source(grader: Python, param: str) -> None:
    """Load a source in the sandbox and look for its function. Raises: InvalidRequest saying what is wrong with it."""
    try:
        await _run(grader.source, None, None, param)
    except Fault as fault:
        if fault.flag == "python_grader_runtime_error":
            raise InvalidRequest(
                f"{param}.source cannot be used: {fault.details}", code="invalid_source", param=f"{param}.source"
            ) from None


async def check_metric(grader: TextSimilarity, param: str) -> None:
    """Check that this server can compute a metric. Raises: InvalidRequest saying what it lacks."""
    try:
        await anyio.to_thread.run_sync(similarity.require, grader.evaluation_metric, limiter=_limit())
    except similarity.NotInstalled as error:
        raise _lacking(error, f"{param}.evaluation_metric") from None


async def _graded(grader: Single, values: Mapping[str, Any], ask: Asker, param: str) -> Graded:
    usage: dict[str, Usage] = {}
    try:
        reward = await _reward(grader, values, ask, param, usage)
    except templates.UnreadableSample as problem:
        return Graded(reward=0.0, faults=(Fault("sample_parse_error", str(problem)),))
    except templates.MissingVariable as problem:
        return Graded(reward=0.0, faults=(Fault("invalid_variable_error", str(problem)),))
    except Fault as fault:
        return Graded(reward=0.0, faults=(fault,), usage=usage)
    return Graded(reward=reward, usage=usage)


async def _reward(grader: Single, values: Mapping[str, Any], ask: Asker, param: str, usage: dict[str, Usage]) -> float:
    match grader:
        case StringCheck():
            text, reference = (templates.fill(given, values) for given in (grader.input, grader.reference))
            return float(string_check(grader.operation, text, reference))
        case TextSimilarity():
            text, reference = (templates.fill(given, values) for given in (grader.input, grader.reference))
            return await _similarity(grader, text, reference, param)
        case Python():
            return await _run(grader.source, values["sample"], values["item"], param)
        case ScoreModel() | LabelModel():
            messages = model_graders.messages_for(grader, values)
            try:
                with anyio.fail_after(MODEL_SECONDS):
                    answer = await ask(grader.model, messages, grader.sampling_params or SamplingParams())
            except TimeoutError:
                raise Fault(
                    "unresponsive_reward_error", f"{grader.model} did not answer within {MODEL_SECONDS:g} seconds."
                ) from None
            usage[grader.model] = answer.usage
            if isinstance(grader, ScoreModel):
                return model_graders.score(grader, answer)
            return float(model_graders.passes(grader, answer))
        case _:
            assert_never(grader)


def string_check(operation: Operation, text: str, reference: str) -> bool:
    """Compare two texts; `like` and `ilike` ask whether the text contains the reference, `ilike` without case."""
    match operation:
        case "eq":
            return text == reference
        case "ne":
            return text != reference
        case "like":
            return reference in text
        case "ilike":
            return reference.casefold() in text.casefold()
        case _:
            assert_never(operation)


async def _similarity(grader: TextSimilarity, text: str, reference: str, param: str) -> float:
    try:
        return await anyio.to_thread.run_sync(
            similarity.similarity, grader.evaluation_metric, text, reference, limiter=_limit()
        )
    except similarity.TooLong as problem:
        raise Fault("other_error", str(problem)) from None
    except similarity.NotInstalled as error:
        raise _lacking(error, f"{param}.evaluation_metric") from None


async def _run(source: str, sample: dict[str, Any] | None, item: Any, param: str) -> float:
    run = sandbox.Run(source, sample, item)
    try:
        return await anyio.to_thread.run_sync(run.reward, abandon_on_cancel=True, limiter=_limit())
    except sandbox.SourceFailed as problem:
        raise Fault("python_grader_runtime_error", str(problem)) from None
    except sandbox.SandboxFailed as problem:
        raise Fault("python_grader_server_error", str(problem)) from None
    except sandbox.Unavailable as error:
        raise _lacking(error, f"{param}.type") from None
    finally:
        run.kill()


def _lacking(error: InvalidRequest, param: str) -> InvalidRequest:
    return InvalidRequest(error.message, code=error.code, param=param, hint=error.hint)


def _limit() -> anyio.CapacityLimiter:
    """Return what bounds the work of this event loop."""
    try:
        return _limiter.get()
    except LookupError:
        limiter = anyio.CapacityLimiter(_AT_ONCE)
        _limiter.set(limiter)
        return limiter
