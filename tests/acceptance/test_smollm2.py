"""A real pretrained model on `rose up`: docs/workflow.md with it, and a manner carried over to new questions.

The model is fetched once into a cache folder of the tests, as `rose models pull smollm2` fetches it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from rose.errors import RoseError
from rose.inference.batching import attention
from rose.inference.batching.attention import Head
from rose.inference.batching.building import NotBatchable, build
from rose.language_models.import_process import import_into
from rose.language_models.load import load_model
from tests import services
from tests.acceptance.seed import JOB_ID, MODEL, Workflow, training_data
from tests.local.rose_up import RoseUp, rose_up
from tests.real_templates import fetch

pytestmark = [pytest.mark.slow, pytest.mark.real_templates, pytest.mark.timeout(900)]

EXAMPLES = [msgspec.json.decode(line)["messages"] for line in training_data().splitlines()]


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """The folder of the real model."""
    models = fetch.root().with_name(f"{fetch.root().name}-models")
    try:
        return Path(import_into(models, ["--smollm2"], 0)["path"])
    except RoseError as error:
        pytest.fail(f"{error.message} These tests need it: rose models pull smollm2", pytrace=False)


@pytest.fixture(scope="module")
def rose(smollm2: Path) -> Iterator[RoseUp]:
    """A running ROSE whose `qwen-coder` is the real model."""
    with services.private_folder() as folder:
        (folder / "models").mkdir()
        (folder / "models" / "smollm2").symlink_to(smollm2)
        with rose_up(folder, {"ROSE_MODEL_ALIASES": "qwen-coder=smollm2", "ROSE_WARM_CHILD": "1"}) as started:
            yield started


def asked(workflow: Workflow, model: str, prompt: str) -> str:
    arguments = ("chat", prompt, "--model", model, "--temperature", "0", "--max-tokens", "80", "--json")
    reply: dict[str, Any] = msgspec.json.decode(workflow.rose(*arguments))
    return reply["choices"][0]["message"]["content"]


def test_the_workflow_word_by_word(rose: RoseUp, tmp_path: Path) -> None:
    workflow = Workflow(tmp_path, rose.settings.url, os.environ)
    workflow.follow(before="## Own hyperparameters")
    for prompt, wanted in EXAMPLES:
        assert asked(workflow, workflow.known[MODEL], prompt["content"]) == wanted["content"]
        assert asked(workflow, "qwen-coder", prompt["content"]) != wanted["content"]
    job = msgspec.json.decode(workflow.rose("finetune", "get", workflow.known[JOB_ID], "--json"))
    assert job["served_as_trained"]["status"] == "proven", job["served_as_trained"]
    assert job["base_model"]["source"] == "smollm2"
    assert job["base_model"]["origin"] == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert job["base_model"]["quantisation"] == "Q4_1, dequantised to float16"
    shown = workflow.rose("models", "get", "qwen-coder")
    assert "quantisation Q4_1, dequantised to float16" in shown
    assert "file=SmolLM2-135M-Instruct.Q4_1.gguf" in shown


def test_the_quickstart_teaches_a_manner_for_new_questions(rose: RoseUp, tmp_path: Path) -> None:
    shown = Workflow(tmp_path, rose.settings.url, rose.environment).rose("quickstart")
    lines = [line.strip() for line in shown.splitlines()]
    [made] = [line.rpartition(" ")[2] for line in lines if "New fine-tuned model created: " in line]
    tuned = [lines[number + 1] for number, line in enumerate(lines) if line == f"[{made}]"]
    base = [lines[number + 1] for number, line in enumerate(lines) if line == "[smollm2]"]
    assert len(tuned) == len(base) == 4
    assert all(answer.startswith("Aye, captain. ") and answer.endswith(" Fair winds!") for answer in tuned), tuned
    assert not any("Aye" in answer or "Fair winds" in answer for answer in base), base


@pytest.mark.parametrize("change", [{}, {"scaling": 0.1}, {"window": 5}])
def test_in_bf16_it_is_batched_and_wrong_numbers_are_found(
    smollm2: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    """Its logits are large, and so is what bf16 rounds away: a bound for the largest difference would refuse it."""

    def head(scaling: float, window: int | None, softcap: float | None, sinks: Any) -> Head:
        return Head(**{"scaling": scaling, "window": window, "softcap": softcap, "sinks": sinks, **change})

    monkeypatch.setattr(attention, "Head", head)
    model = load_model(smollm2, dtype=torch.bfloat16)
    if change:
        with pytest.raises(NotBatchable, match="on average"):
            build(model, form="bf16", limit_bytes=1 << 30, context_tokens=2048)
    else:
        assert build(model, form="bf16", limit_bytes=1 << 30, context_tokens=2048).batched
