"""Graders through the official client: every kind, the sandbox and grading models as they are."""

from __future__ import annotations

from typing import Any

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
