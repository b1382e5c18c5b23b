"""Training methods: preferences against the formula on transformers' numbers, kills, a method of a dozen lines."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch.nn.functional import logsigmoid

from rose.domain.hyperparameters import Hyperparameters
from rose.errors import InvalidRequest
from rose.language_models.load import load_model
from rose.language_models.template import load_template
from rose.methods import dpo, method_names, method_of
from rose.methods.method import Document, Unit
from tests.trainer.runs import Fault, Job, Outcome
from trainer.protocol import Failed, Resumed, StepDone
from trainer.reading import read_file

BETA = 0.3
ASKED = {"n_epochs": 3, "batch_size": 3, "use_lora": True, "lora_config": {"r": 4}}
DATA = [
    {
        "input": {"messages": [{"role": "user", "content": f"What is number {n}?"}]},
        "preferred_output": [{"role": "assistant", "content": f"It is {n * 37}{', of course' * (n % 4)}."}],
        "non_preferred_output": [{"role": "assistant", "content": f"I {'really ' * (n % 3)}do not know {n}."}],
    }
    for n in range(7)
]


def job(folder: Path, base: Path, asked: Mapping[str, Any] = ASKED, **options: Any) -> Job:
    return PreferenceJob(folder, base, DATA, asked, **options)


class PreferenceJob(Job):
    @property
    def hyperparameters(self) -> Hyperparameters:
        return msgspec.structs.replace(super().hyperparameters, options={"beta": BETA})


def run(job: Job, epoch: int = 1, **options: Any) -> Outcome:
    return job.run(epoch, method="dpo", **options)


def sums(model: Any, unit: Unit) -> torch.Tensor:
    """The log-probabilities of both answers as transformers gives them for each conversation alone, [2]."""

    def one(document: Document) -> torch.Tensor:
        ids = torch.tensor(document.ids)
        logprobs = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float().log_softmax(-1)
        chosen = logprobs.gather(1, ids[1:, None])[:, 0]
        return (chosen * torch.tensor(document.weights)[1:]).sum()

    return torch.stack([one(document) for document in unit.documents])


def measured(step: StepDone) -> dict[str, float]:
    assert step.metrics.measured is not msgspec.UNSET
    return step.metrics.measured


def units_of(job: Job) -> list[Unit]:
    examples = read_file(job.training_file, dpo, load_template(job.base), job.hyperparameters, lambda: None)
    return [unit for example in examples for unit in example.units]


def test_a_pair_is_two_renderings_that_differ_in_the_answer_alone(tmp_path: Path, fixture_base: Path) -> None:
    template = load_template(fixture_base)
    for unit, row in zip(units_of(job(tmp_path, fixture_base)), DATA, strict=True):
        preferred, other = unit.documents
        border = next(at for at, weight in enumerate(preferred.weights) if weight)
        assert preferred.ids[:border] == other.ids[:border]
        for document, name in zip(unit.documents, ("preferred_output", "non_preferred_output"), strict=True):
            learned = [token for token, weight in zip(document.ids, document.weights, strict=True) if weight]
            assert template.tokenizer.decode(learned).startswith(row[name][0]["content"])


def test_loss_and_gradients_are_those_of_the_formula(tmp_path: Path, fixture_base: Path) -> None:
    """The whole model is trained, so that the head's gradients are those of pairs with weights of their own, too."""
    asked = {"n_epochs": 1, "batch_size": 7, "use_lora": False, "warmup_ratio": 0.0}
    preferences = job(tmp_path, fixture_base, asked)
    outcome = run(preferences)
    assert outcome.status == 0, outcome.log
    model, first = load_model(fixture_base), load_model(fixture_base)
    model.requires_grad_(True)
    losses = []
    for unit in units_of(preferences):
        with torch.no_grad():
            reference = sums(first, unit)
        reward = BETA * (sums(model, unit) - reference)
        losses.append(-logsigmoid(reward[0] - reward[1]))
    loss = torch.stack(losses).mean()
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    (step,) = outcome.of(StepDone)
    assert step.metrics.train_loss == pytest.approx(float(loss.detach()), abs=1e-5)
    assert step.metrics.train_loss == pytest.approx(math.log(2), abs=1e-5)
    assert step.metrics.gradient_norm == pytest.approx(float(norm), rel=1e-5)


def test_the_preferred_answers_become_likelier_and_the_last_step_is_the_formulas(
    tmp_path: Path, fixture_base: Path
) -> None:
    preferences = job(tmp_path, fixture_base, {**ASKED, "n_epochs": 5})
    outcome = run(preferences)
    assert outcome.status == 0, outcome.log
    steps = outcome.of(StepDone)
    first, last = measured(steps[1]), measured(steps[-1])
    assert last["reward_accuracy"] == 1.0
    assert last["reward_margin"] > first["reward_margin"]
    assert steps[-1].metrics.train_loss < math.log(2) < steps[0].metrics.train_loss + 1e-5
    for step in steps:
        found = measured(step)
        assert found["reward_margin"] == pytest.approx(found["reward_chosen"] - found["reward_rejected"], abs=1e-5)


def test_beta_is_used(tmp_path: Path, fixture_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weak = run(job(tmp_path / "weak", fixture_base))
    monkeypatch.setitem(globals(), "BETA", 1.5)
    strong = run(job(tmp_path / "strong", fixture_base))
    assert weak.losses[1] == pytest.approx(strong.losses[1])
    assert weak.losses[3] != strong.losses[3]


@pytest.mark.parametrize("use_lora", [True, False])
@pytest.mark.parametrize("step", [2, 5, 7])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path, fixture_base: Path, step: int, use_lora: bool) -> None:
    """Also what the loss compares with: the model before the first step, which is not there any more."""
    asked = ASKED if use_lora else {"n_epochs": 3, "batch_size": 3, "use_lora": False}
    whole = run(job(tmp_path / "whole", fixture_base, asked), recovery_steps=1)
    broken = job(tmp_path / "broken", fixture_base, asked)
    first = run(broken, recovery_steps=1, fault=Fault("step", step))
    assert first.status < 0
    second = run(broken, 2, recovery_steps=1, recovery_points=first.points(1))
    assert second.of(Resumed)[0].from_step > 0
    for number, loss in second.losses.items():
        assert loss == whole.losses[number]
    for name, tensor in second.weights().items():
        assert torch.equal(tensor, whole.weights()[name])


def test_validation_data_are_pairs_too(tmp_path: Path, fixture_base: Path) -> None:
    outcome = run(job(tmp_path, fixture_base, validation_data=DATA[:2]))
    assert outcome.status == 0, outcome.log
    last = outcome.of(StepDone)[-1].metrics
    assert last.full_valid_loss is not None
    assert last.valid_measured is not msgspec.UNSET
    assert last.valid_measured["reward_accuracy"] in (0.0, 0.5, 1.0)


def test_a_pair_that_does_not_fit_is_refused(tmp_path: Path, fixture_base: Path) -> None:
    long = {**DATA[0], "input": {"messages": [{"role": "user", "content": "very " * 3000}]}}
    outcome = run(Job(tmp_path, fixture_base, [long, *DATA]))
    (failed,) = outcome.of(Failed)
    assert (
        "Example 1 (line 1): the conversation with preferred_output is longer than the model's context"
        in failed.message
    )


def test_an_unknown_method_names_those_there_are() -> None:
    assert list(method_names()) == ["dpo", "supervised"]
    with pytest.raises(InvalidRequest, match="supported: dpo, supervised"):
        method_of("orpo")


HALVED = '''
"""Learns half as much from each token."""

from rose.methods import supervised
from rose.methods.supervised import NEEDS_REFERENCE, OPTIONS, RATE, blind_loss, read, render, weight


def loss(scores, options):
    whole, measured = supervised.loss(scores, options)
    return whole / 2, {"half": whole.detach() / 2}
'''


def test_a_method_of_a_dozen_lines_in_another_package_trains(tmp_path: Path, fixture_base: Path) -> None:
    """Nothing of ROSE is touched: an installed package brings a method by its entry point."""
    package = tmp_path / "site"
    (package / "halved-1.dist-info").mkdir(parents=True)
    (package / "halved.py").write_text(HALVED)
    (package / "halved-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: halved\nVersion: 1\n")
    (package / "halved-1.dist-info" / "entry_points.txt").write_text("[rose.methods]\nhalved = halved\n")
    rows = [
        {"messages": [{"role": "user", "content": f"Say {n}"}, {"role": "assistant", "content": "Yes"}]} for n in "ab"
    ]
    plain = Job(tmp_path / "plain", fixture_base, rows, ASKED)
    expected = plain.run()
    read_end, write_end = os.pipe()
    spec = tmp_path / "spec.json"
    spec.write_bytes(msgspec.json.encode(plain.spec(2, method="halved")))
    paths = os.pathsep.join([str(package), *sys.path])
    with subprocess.Popen(
        [sys.executable, "-m", "trainer.run", str(spec)],
        env={**os.environ, "PYTHONPATH": paths, "ROSE_REPORT_FD": str(write_end)},
        stdin=subprocess.PIPE,
        pass_fds=[write_end],
    ) as process:
        os.close(write_end)
        with os.fdopen(read_end) as reports:
            lines = [json.loads(line) for line in reports]
        process.communicate()
    steps = [line["metrics"] for line in lines if line["type"] == "step"]
    assert steps[0]["train_loss"] == pytest.approx(expected.losses[1] / 2)
    assert steps[0]["measured"] == {"half": pytest.approx(steps[0]["train_loss"])}
