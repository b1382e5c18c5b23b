"""Graders through the official client: every kind, the sandbox and grading models as they are."""

from __future__ import annotations

from typing import Any

import anyio
import anyio.to_thread
import openai
import pytest

from tests.api.running import Running

pytestmark = pytest.mark.anyio

EXACT = {
    "type": "string_check",
    "name": "exact",
    "input": "{{sample.output_text}}",
    "reference": "{{item.answer}}",
    "operation": "eq",
}
LENGTH = {
    "type": "python",
    "name": "length",
    "source": "def grade(sample, item):\n    return len(sample['output_text']) / item['longest']\n",
    "image_tag": "2025-05-08",
}
NEAR = {
    "type": "text_similarity",
    "name": "near",
    "input": "{{sample.output_text}}",
    "reference": "{{item.answer}}",
    "evaluation_metric": "rouge_l",
}


@pytest.fixture
def graders(shared_api: Running) -> Any:
    """The official client's graders, which refuse an answer that is not of OpenAI's types."""
    return shared_api.openai.copy(_extra_kwargs={"_strict_response_validation": True}).fine_tuning.alpha.graders


def flags(run: Any) -> set[str]:
    """Return the errors that are set."""
    return {name for name, value in run.metadata.errors.to_dict().items() if value is True}


async def test_a_string_check(graders: Any) -> None:
    run = await graders.run(grader=EXACT, model_sample="red", item={"answer": "red"})
    assert (run.reward, run.metadata.name, run.metadata.type) == (1.0, "exact", "string_check")
    assert flags(run) == set()
    assert run.metadata.execution_time >= 0
    assert run.metadata.token_usage is None
    assert run.metadata.sampled_model_name is None
    assert (run.sub_rewards, run.api_model_grader_token_usage_per_model) == ({}, {})
    assert (await graders.run(grader=EXACT, model_sample="blue", item={"answer": "red"})).reward == 0.0


async def test_a_multi_grader_computes_with_the_rewards_of_the_others(graders: Any) -> None:
    multi = {
        "type": "multi",
        "name": "all",
        "graders": {"exact": EXACT, "near": NEAR, "length": LENGTH},
        "calculate_output": "0.5 * exact + max(near, 0.25) ^ 2 - length / 2",
    }
    item = {"answer": "one two three four", "longest": 10}
    run = await graders.run(grader=multi, model_sample="one two", item=item)
    assert run.sub_rewards == {"exact": 0.0, "near": pytest.approx(2 / 3), "length": 0.7}
    assert run.reward == pytest.approx((2 / 3) ** 2 - 0.35)
    assert run.metadata.scores == run.sub_rewards
    assert flags(run) == set()


@pytest.mark.parametrize(
    ("grader", "sample", "item", "flag", "words"),
    [
        (EXACT, "red", None, "invalid_variable_error", "there is no 'answer'"),
        ({**EXACT, "input": "{{item.a | upper}}"}, "red", {"answer": 1}, "invalid_variable_error", "no template"),
        ({**EXACT, "input": "{{sample.output_json.x}}"}, "red", {"answer": 1}, "sample_parse_error", "not valid JSON"),
        (LENGTH, "red", {}, "python_grader_runtime_error", "KeyError: 'longest'"),
        ({**LENGTH, "source": "def grade(:"}, "red", {}, "python_grader_runtime_error", "SyntaxError"),
        (NEAR, "red " * 2000, {"answer": "x"}, "other_error", "rouge_l compares at most"),
        (
            {"type": "multi", "name": "m", "graders": {"a": EXACT}, "calculate_output": "a / 0"},
            "red",
            {"answer": "red"},
            "formula_parse_error",
            "divides by zero",
        ),
        (
            {"type": "multi", "name": "m", "graders": {"a": EXACT}, "calculate_output": "b"},
            "red",
            {"answer": "red"},
            "formula_parse_error",
            "names 'b'",
        ),
    ],
)
async def test_a_fault_of_grading_is_a_flag_and_no_reward(
    graders: Any, grader: Any, sample: str, item: Any, flag: str, words: str
) -> None:
    run = await graders.run(grader=grader, model_sample=sample, **({} if item is None else {"item": item}))
    assert run.reward == 0.0
    assert flags(run) == {flag}
    assert words in run.metadata.errors.to_dict()[f"{flag}_details"]


async def test_faults_of_a_multi_grader_name_theirs_and_the_others_count(graders: Any) -> None:
    multi = {
        "type": "multi",
        "name": "all",
        "graders": {"exact": EXACT, "length": LENGTH, "broken": {**LENGTH, "source": "1/0"}},
        "calculate_output": "exact + length + broken",
    }
    run = await graders.run(grader=multi, model_sample="red", item={"answer": "red"})
    assert run.reward == 1.0
    assert run.sub_rewards == {"exact": 1.0, "length": 0.0, "broken": 0.0}
    assert flags(run) == {"python_grader_runtime_error"}
    details = run.metadata.errors.python_grader_runtime_error_details
    assert "length: Traceback" in details
    assert "broken: Traceback" in details


async def test_a_source_cannot_reach_the_server(graders: Any, shared_api: Running) -> None:
    source = """
import os, socket

def refused(attempt):
    try:
        attempt()
    except OSError:
        return 1
    return 0

def grade(sample, item):
    return (
        refused(lambda: socket.create_connection(("127.0.0.1", item["port"])))
        + refused(lambda: os.listdir(item["data"]))
        + refused(lambda: os.kill(item["server"], 9))
        + refused(lambda: open("/etc/hostname"))
        + (not any(name.startswith("ROSE") for name in os.environ))
    )
"""
    import os

    settings = shared_api.services.settings
    item = {"port": settings.port, "data": str(settings.data_dir), "server": os.getpid()}
    assert settings.data_dir.exists()
    run = await graders.run(grader={"type": "python", "name": "spy", "source": source}, model_sample="", item=item)
    assert (run.reward, flags(run)) == (5.0, set())


async def test_grading_does_not_hold_up_others(graders: Any, shared_api: Running) -> None:
    waiting = {"type": "python", "name": "slow", "source": "def grade(sample, item):\n    while True: pass\n"}
    async with anyio.create_task_group() as tasks:
        for _ in range(6):
            tasks.start_soon(lambda: graders.run(grader=waiting, model_sample=""))
        for _ in range(20):
            assert (await shared_api.http.get("/health")).status_code == 200
            assert (await graders.run(grader=EXACT, model_sample="", item={"answer": ""})).reward == 1.0
        tasks.cancel_scope.cancel()
    # Those who have left make room for this one, long before their minute is over.
    with anyio.fail_after(50):
        assert (await graders.run(grader=LENGTH, model_sample="red", item={"longest": 3})).reward == 1.0


MULTI = {"type": "multi", "name": "all", "graders": {"exact": EXACT, "near": NEAR}, "calculate_output": "exact * near"}


@pytest.mark.parametrize("grader", [EXACT, NEAR, LENGTH, {**MULTI, "graders": EXACT, "calculate_output": "exact"}])
async def test_a_grader_that_can_be_used_is_repeated(graders: Any, grader: dict[str, Any]) -> None:
    valid = await graders.validate(grader=grader)
    assert valid.grader.to_dict() == grader


async def test_a_map_of_graders_is_repeated(shared_api: Running) -> None:
    """As in OpenAI's guide; the SDK's own types know only one grader there, so the strict client cannot read it."""
    valid = await shared_api.openai.fine_tuning.alpha.graders.validate(grader=MULTI)  # type: ignore[arg-type]
    assert valid.grader is not None
    assert valid.grader.to_dict() == MULTI


@pytest.mark.parametrize(
    ("grader", "param", "words"),
    [
        ({**EXACT, "operation": "contains"}, "grader.operation", "one of eq, ilike, like, ne"),
        ({**EXACT, "reference": "{{row.a}}"}, "grader.reference", "item or sample"),
        ({**MULTI, "calculate_output": "exact +"}, "grader.calculate_output", "invalid syntax"),
        ({**LENGTH, "source": "def grade(:"}, "grader.source", "SyntaxError"),
        ({**LENGTH, "source": "def score(a, b): pass"}, "grader.source", "defines no function grade(sample, item)"),
        ({**LENGTH, "source": "import socket; socket.socket()"}, "grader.source", "PermissionError"),
        ({**MULTI, "graders": {"exact": {**LENGTH, "source": "x"}}}, "grader.graders.exact.source", "NameError"),
    ],
)
async def test_a_grader_that_cannot_be_used_is_refused(graders: Any, grader: Any, param: str, words: str) -> None:
    if "calculate_output" in grader and "near" not in grader["graders"]:
        grader = {**grader, "calculate_output": "exact"}
    with pytest.raises(openai.BadRequestError) as caught:
        await graders.validate(grader=grader)
    assert caught.value.param == param
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, "grader", "Missing required parameter: grader"),
        ({"grader": EXACT}, "model_sample", "Missing required parameter"),
        ({"grader": EXACT, "model_sample": 3}, "model_sample", "must be a string; it is a number"),
        ({"grader": EXACT, "model_sample": "", "item": "x"}, "item", "must be an object; it is a string"),
        ({"grader": EXACT, "model_sample": "", "items": {}}, "items", "Did you mean item?"),
        ({"grader": {**EXACT, "operation": "x"}, "model_sample": ""}, "grader.operation", "one of"),
        ({"grader": "exact", "model_sample": ""}, "grader", "must be an object"),
    ],
)
async def test_a_request_that_is_none_is_refused(shared_api: Running, body: Any, param: str, words: str) -> None:
    answer = await shared_api.http.post("/v1/fine_tuning/alpha/graders/run", json=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == param
    assert words in error["message"]


async def test_a_metric_whose_library_is_missing_is_refused(graders: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    for call in (graders.validate(grader=NEAR), graders.run(grader=NEAR, model_sample="", item={"answer": ""})):
        with pytest.raises(openai.BadRequestError, match=r"pip install 'rose\[graders\]'") as caught:
            await call
        assert caught.value.param == "grader.evaluation_metric"


async def test_without_a_sandbox_no_source_runs(graders: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from rose.graders import sandbox

    sandbox.forget()
    monkeypatch.setattr(sandbox.sys, "platform", "darwin")
    try:
        for call in (graders.validate(grader=LENGTH), graders.run(grader=LENGTH, model_sample="", item={})):
            with pytest.raises(openai.BadRequestError, match="need Linux") as caught:
                await call
            assert (caught.value.param, caught.value.code) == ("grader.type", "python_grader_unavailable")
    finally:
        sandbox.forget()
