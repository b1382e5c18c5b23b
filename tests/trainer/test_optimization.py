"""When memory runs out a step begins again with less at once; a loss out of bounds ends the run."""

from __future__ import annotations

from array import array
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from rose.domain.hyperparameters import LoraSettings
from rose.language_models.load import load_model
from rose.language_models.lora import attach
from rose.methods import supervised
from rose.methods.method import Document, Scores, Unit
from tests.trainer.runs import Job, pairs, rows
from trainer.forward import choose_forward
from trainer.hardware import Hardware, OutOfMemory
from trainer.optimization import Optimization, StepResult, TrainingDiverged
from trainer.protocol import Failed
from trainer.recovery import RunState
from trainer.trained_model import TrainedModel

LORA = LoraSettings(r=4, lora_alpha=8.0, lora_dropout=0.2, target_modules=("all-linear",))
DOCUMENTS = [
    Document(
        ids=array("q", [(7 * position + start) % 1000 for position in range(length)]),
        weights=array("f", [0.0, *[1.0] * (length - 1)]),
    )
    for start, length in enumerate((40, 25, 30, 12))
]
UNITS = [Unit((document,)) for document in DOCUMENTS]


class Rig:
    """An optimization on the fixture base whose forward passes fail above `limit` tokens."""

    def __init__(self, base: Path, folder: Path, *, budget: int, limit: int | None = None) -> None:
        job = Job(folder, base, rows(pairs(4)))
        self.limit = limit
        self.eased_by_recomputing = False
        self.sizes: list[int] = []
        self.warnings: list[str] = []
        model = load_model(base)
        adapter = attach(model, LORA, seed=1)
        parameters = {
            f"{n}.{half}": p
            for n, layer in adapter.layers.items()
            for half, p in layer.named_parameters()
            if "lora" in half
        }
        self.trained = TrainedModel(model, parameters, "adapter", lambda target: None)
        forward, _ = choose_forward(model, DOCUMENTS, torch.device("cpu"))
        method: Any = SimpleNamespace(weight=supervised.weight, loss=self.loss)
        self.optimization = Optimization(
            self.trained,
            job.hyperparameters,
            method,
            forward,
            Hardware(job.spec()),
            RunState(token_budget=budget),
            supervised.blind_loss(UNITS),
            lambda code, message: self.warnings.append(message),
            lambda: None,
        )

    def loss(self, scores: Scores, options: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        size = sum(unit.tokens for unit in scores.units)
        result = supervised.loss(scores, options)  # memory runs out after random numbers were drawn
        recomputing = self.eased_by_recomputing and self.optimization.state.checkpointing
        if self.limit is not None and size > self.limit and not recomputing:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        self.sizes.append(size)
        return result

    def step(self) -> tuple[StepResult, dict[str, torch.Tensor]]:
        torch.manual_seed(3)
        result = self.optimization.step(UNITS, 1e-3)
        return result._replace(seconds=0), self.trained.snapshot()


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_a_step_that_ran_out_of_memory_gives_what_it_gives_with_less_at_once(
    tmp_path: Path, fixture_base: Path
) -> None:
    easy = Rig(fixture_base, tmp_path, budget=53)
    tight = Rig(fixture_base, tmp_path, budget=107, limit=55)
    expected, weights = easy.step()
    result, tight_weights = tight.step()
    assert tight.optimization.state.token_budget == 53
    assert tight.sizes == easy.sizes
    assert "53 tokens at once" in tight.warnings[0]
    assert result == expected
    assert same(weights, tight_weights)


def test_one_example_alone_is_recomputed_rather_than_given_up(tmp_path: Path, fixture_base: Path) -> None:
    easy = Rig(fixture_base, tmp_path, budget=40)
    tight = Rig(fixture_base, tmp_path, budget=40, limit=35)
    tight.eased_by_recomputing = True
    expected, _ = easy.step()
    result, _ = tight.step()
    assert tight.optimization.state.checkpointing
    assert "recomputed" in tight.warnings[0]
    assert result.loss == pytest.approx(expected.loss, rel=1e-6)
    assert result.gradient_norm == pytest.approx(expected.gradient_norm, rel=1e-5)


def test_what_cannot_fit_names_what_would(tmp_path: Path, fixture_base: Path) -> None:
    tight = Rig(fixture_base, tmp_path, budget=1000, limit=20)
    with pytest.raises(OutOfMemory, match=r"One example of 40 tokens does not fit .* examples of at most about 20"):
        tight.step()


def test_moments_that_cannot_fit_name_what_would(
    tmp_path: Path, fixture_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(fixture_base, tmp_path, budget=1000)
    monkeypatch.setattr(rig.optimization.optimizer, "step", lambda: torch.empty(1 << 46))
    with pytest.raises(OutOfMemory, match=r"moments do not fit .* What would fit: a smaller base model, or a trainer"):
        rig.step()


def test_an_evaluation_shrinks_too(tmp_path: Path, fixture_base: Path) -> None:
    easy = Rig(fixture_base, tmp_path, budget=1000)
    tight = Rig(fixture_base, tmp_path, budget=1000, limit=60)
    expected = easy.optimization.evaluate(UNITS, lambda: False)
    found = tight.optimization.evaluate(UNITS, lambda: False)
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    assert found.measured == pytest.approx(expected.measured, rel=1e-6)
    assert max(tight.sizes) <= 60


def test_other_errors_are_not_taken_for_a_lack_of_memory(tmp_path: Path, fixture_base: Path) -> None:
    rig = Rig(fixture_base, tmp_path, budget=1000)
    wrong = Document(ids=array("q", [99_999, 1]), weights=array("f", [0.0, 1.0]))
    with pytest.raises(IndexError):
        rig.optimization.step([Unit((wrong,))], 1e-3)


def result(loss: float, *, applied: bool = True) -> StepResult:
    return StepResult(loss=loss, measured={}, gradient_norm=1.0, tokens=1, seconds=1.0, applied=applied)


def test_single_bad_steps_are_forgiven(tmp_path: Path, fixture_base: Path) -> None:
    rig = Rig(fixture_base, tmp_path, budget=1000)
    judge = rig.optimization.judge
    for step in range(1, 30):
        judge(step, result(float("nan"), applied=False) if step % 2 else result(100.0 if step % 4 else 2.0))
    assert rig.optimization.state.skipped == 1
    for step in range(30, 34):
        judge(step, result(250.0))
    with pytest.raises(TrainingDiverged, match="exploded: it was 100"):
        judge(34, result(250.0))


def test_the_blind_loss_is_the_entropy_of_the_labels() -> None:
    document = Document(ids=array("q", [5, 1, 1, 2, 2, 9]), weights=array("f", [0.0, 1.0, 1.0, 1.0, 1.0, 0.0]))
    assert supervised.blind_loss([Unit((document,))]) == pytest.approx(0.6931, abs=1e-4)


def need_too_much_memory() -> None:
    """Let every forward pass ask torch's CPU allocator for more memory than any machine has."""
    from trainer import forward

    compute = forward.likelihoods

    def compute_hugely(model: Any, *more: Any) -> Any:
        if model.training:
            torch.empty(1 << 46)
        return compute(model, *more)

    forward.likelihoods = compute_hugely


def need_too_much_for_the_model() -> None:
    """The same while the model is loaded."""
    from trainer import trained_model

    trained_model.load_model = lambda *_, **__: torch.empty(1 << 46)


@pytest.mark.parametrize(
    ("prepare", "advice"),
    [
        (need_too_much_memory, "LoRA instead of full fine-tuning"),
        (need_too_much_for_the_model, "What would fit: LoRA (use_lora true), or a trainer with more memory"),
    ],
)
def test_a_machine_without_memory_fails_the_job_with_advice(
    tmp_path: Path, fixture_base: Path, prepare: Any, advice: str
) -> None:
    outcome = Job(tmp_path, fixture_base, rows(pairs(2)), {"use_lora": False}).run(prepare=prepare)
    assert outcome.status == 1, outcome.log
    (failed,) = outcome.of(Failed)
    assert (failed.code, failed.retryable) == ("out_of_memory", False)
    assert advice in failed.message


def test_the_state_survives_as_json() -> None:
    state = RunState(token_budget=5, step=3, first_loss=2.5)
    assert msgspec.json.decode(msgspec.json.encode(state), type=RunState) == state
