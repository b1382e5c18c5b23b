"""Grading models: a small model that has learned to grade, asked through the API and a real engine."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import msgspec
import openai
import pytest

from rose import leases
from rose.graders import model_graders, reading, templates
from rose.graders.kinds import LabelModel, Multi, ScoreModel
from rose.log.pool import Pool
from rose.settings import Settings
from tests.api.conftest import serving
from tests.api.running import Running, free_port
from tests.api.test_graders import EXACT, flags
from tests.eventually import eventually

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(300)]

INPUT = [{"role": "user", "content": "Rate {{sample.output_text}}"}]
LESSONS = {"red": '{"steps": [], "result": 3.5}', "blue": '{"result": 99}', "dim": "no idea"}
LABELS = {"red": '{"steps": [], "result": "good"}', "blue": "Bad."}
STEPS = 150


class Judge(msgspec.Struct, frozen=True, kw_only=True):
    """An API with an engine, and a model that grades."""

    api: Running
    graders: Any
    """The official client's graders, which refuse an answer that is not of OpenAI's types."""
    folder: str

    def score(self, **more: Any) -> dict[str, Any]:
        """Return a score_model grader that asks the model."""
        sampling = {"temperature": 0, "max_completions_tokens": 40}
        asked = {"model": self.folder, "input": INPUT, "range": [0, 5], "sampling_params": sampling}
        return {"type": "score_model", "name": "judge", **asked, **more}

    def label(self, **more: Any) -> dict[str, Any]:
        """Return a label_model grader in a multi grader."""
        one = {**self.score(), "type": "label_model", "labels": ["good", "bad"], "passing_labels": ["good"], **more}
        del one["range"]
        return {"type": "multi", "name": "all", "graders": {"label": one}, "calculate_output": "label"}


def _conversation(grader: dict[str, Any], sample: str) -> list[dict[str, Any]]:
    read = reading.read(grader)
    one = read.graders["label"] if isinstance(read, Multi) else read
    assert isinstance(one, (ScoreModel, LabelModel))
    return model_graders.messages_for(one, {"sample": templates.sample_of(sample), "item": {}})


def teach(base: Path, folder: Path, lessons: list[tuple[list[dict[str, Any]], str]]) -> None:
    """Write a copy of `base` that has learned answers by heart."""
    import shutil

    import torch

    from rose.language_models.load import load_model
    from rose.language_models.template import load_template

    template = load_template(base)
    model = load_model(base)
    model.requires_grad_(True)
    end = min(template.stop_ids)
    sequences: list[tuple[list[int], list[int]]] = []
    for messages, answer in lessons:
        prompt = template.prompt(messages)
        learned = [*template.tokenizer.encode(answer, add_special_tokens=False), end]
        sequences.append((prompt + learned, [-100] * len(prompt) + learned))
    longest = max(len(ids) for ids, _ in sequences)
    ids = torch.tensor([row + [end] * (longest - len(row)) for row, _ in sequences])
    labels = torch.tensor([row + [-100] * (longest - len(row)) for _, row in sequences])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(STEPS):
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss.item() < 0.01:
            break
    assert loss.item() < 0.05
    shutil.copytree(base, folder)
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def judge_folder(fixture_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learned to grade three words."""
    folder = tmp_path_factory.mktemp("judge") / "judge"
    judge = Judge(api=None, graders=None, folder=str(folder))  # type: ignore[arg-type]
    lessons = [(_conversation(judge.score(), sample), answer) for sample, answer in LESSONS.items()]
    lessons += [(_conversation(judge.label(), sample), answer) for sample, answer in LABELS.items()]
    teach(fixture_base, folder, lessons)
    return folder


@pytest.fixture
async def judge(settings: Any, database_dsn: str, pool: Pool, judge_folder: Path) -> AsyncIterator[Judge]:
    from rose.app import PROCESSES

    given: Settings = settings(
        port=free_port(), database_url=database_dsn, device="cpu", hub_offline=True, inference_threads=1
    )
    stop = anyio.Event()
    async with serving(given, pool) as api, anyio.create_task_group() as tasks:
        tasks.start_soon(PROCESSES["inference"], given, stop)
        await eventually(lambda: leases.workers(pool, "inference"))
        strict = api.openai.copy(_extra_kwargs={"_strict_response_validation": True})
        yield Judge(api=api, graders=strict.fine_tuning.alpha.graders, folder=str(judge_folder))
        stop.set()


async def test_a_model_gives_a_score_within_the_range(judge: Judge) -> None:
    run = await judge.graders.run(grader=judge.score(), model_sample="red")
    assert (run.reward, flags(run)) == (3.5, set())
    assert run.metadata.sampled_model_name == judge.folder
    usage = run.api_model_grader_token_usage_per_model[judge.folder]
    assert usage["prompt_tokens"] > usage["completion_tokens"] > 3
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] == run.metadata.token_usage
    assert (await judge.graders.run(grader=judge.score(), model_sample="blue")).reward == 5.0


async def test_an_answer_without_a_score_is_a_flag(judge: Judge) -> None:
    run = await judge.graders.run(grader=judge.score(), model_sample="dim")
    assert (run.reward, flags(run)) == (0.0, {"model_grader_parse_error"})
    assert "'no idea'" in run.metadata.errors.to_dict()["model_grader_parse_error_details"]
    assert run.metadata.token_usage > 0


async def test_sampling_params_reach_the_model(judge: Judge) -> None:
    cut = judge.score(sampling_params={"temperature": 0, "max_completions_tokens": 2})
    run = await judge.graders.run(grader=cut, model_sample="red")
    assert flags(run) == {"model_grader_parse_error"}
    assert "cut off at its token limit" in run.metadata.errors.to_dict()["model_grader_parse_error_details"]
    assert run.api_model_grader_token_usage_per_model[judge.folder]["completion_tokens"] == 2


async def test_a_model_chooses_a_label(judge: Judge) -> None:
    graders = judge.api.openai.fine_tuning.alpha.graders
    passed: Any = await graders.run(grader=judge.label(), model_sample="red")  # type: ignore[arg-type]
    assert (passed.reward, passed.sub_rewards, flags(passed)) == (1.0, {"label": 1.0}, set())
    failed: Any = await graders.run(grader=judge.label(), model_sample="blue")  # type: ignore[arg-type]
    assert (failed.reward, flags(failed)) == (0.0, set())
    other = judge.label(passing_labels=["bad"])
    assert (await graders.run(grader=other, model_sample="blue")).reward == 1.0  # type: ignore[arg-type]


async def test_models_and_checks_are_combined(judge: Judge) -> None:
    multi = {
        "type": "multi",
        "name": "all",
        "graders": {"exact": EXACT, "judge": judge.score(), "again": judge.score()},
        "calculate_output": "exact + judge / 5 + again",
    }
    run = await judge.graders.run(grader=multi, model_sample="red", item={"answer": "red"})
    assert run.reward == pytest.approx(1 + 0.7 + 3.5)
    usage = run.api_model_grader_token_usage_per_model
    assert list(usage) == [judge.folder]
    alone = await judge.graders.run(grader=judge.score(), model_sample="red")
    assert run.metadata.token_usage == 2 * alone.metadata.token_usage


async def test_what_is_longer_than_the_context_is_a_flag(judge: Judge) -> None:
    run = await judge.graders.run(grader=judge.score(), model_sample="red " * 5000)
    assert flags(run) == {"truncated_observation_error"}
    assert "context holds" in run.metadata.errors.to_dict()["truncated_observation_error_details"]


async def test_a_model_that_is_not_there_is_refused_by_name(judge: Judge) -> None:
    unknown = judge.score(model="gpt-4o")
    for call in (judge.graders.validate(grader=unknown), judge.graders.run(grader=unknown, model_sample="")):
        with pytest.raises(openai.NotFoundError, match="gpt-4o") as caught:
            await call
        assert caught.value.param == "grader.model"
    assert (await judge.graders.validate(grader=judge.score())).grader.to_dict() == judge.score()


async def test_a_model_that_cannot_be_asked_is_a_flag(api: Running, judge_folder: Path) -> None:
    """Without an engine."""
    judge = Judge(api=api, graders=api.openai.fine_tuning.alpha.graders, folder=str(judge_folder))
    run = await judge.graders.run(grader=judge.score(), model_sample="red")
    assert (run.reward, flags(run)) == (0.0, {"model_grader_server_error"})
    assert "No inference engine" in run.metadata.errors.api_model_grader_server_error_details
