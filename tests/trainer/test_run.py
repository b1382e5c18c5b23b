"""A whole run by its real child process: what it reports, what it leaves on disk, how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from rose.domain.job_values import ParentModel
from tests.trainer.runs import SEED_EXAMPLES, Child, Job, Outcome, pairs, rows
from trainer.protocol import (
    EXIT_DRAINED,
    CheckpointMade,
    Drained,
    Failed,
    Finished,
    PhaseChanged,
    RecoveryPointMade,
    Report,
    Resumed,
    StepDone,
    Warned,
)

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def seed_job(tmp_path_factory: pytest.TempPathFactory, fixture_base: Path) -> Job:
    """docs/workflow.md's two examples with nothing else said."""
    return Job(tmp_path_factory.mktemp("seed"), fixture_base, rows(SEED_EXAMPLES))


@pytest.fixture(scope="module")
def seed_run(seed_job: Job) -> Outcome:
    return seed_job.run()


def answer(model: Any, base: Path, question: str) -> str:
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        made = model.generate(**ids, max_new_tokens=100, do_sample=False)
    return tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def test_a_run_says_all_that_happens_in_order(seed_run: Outcome) -> None:
    assert seed_run.status == 0
    steps = [report.metrics for report in seed_run.of(StepDone)]
    assert [step.step for step in steps] == list(range(1, 51))
    assert {step.total_steps for step in steps} == {50}
    assert [step.epoch for step in steps[:4]] == [0.5, 1.0, 1.5, 2.0]
    assert all(step.tokens_per_second > 0 and step.memory_bytes > 0 for step in steps)
    assert all(step.valid_loss is None and step.full_valid_loss is None for step in steps)
    phases = [report.phase for report in seed_run.of(PhaseChanged)]
    assert phases[:3] == ["load", "train", "save"]
    assert all(before != after for before, after in pairwise(phases))
    assert isinstance(seed_run.reports[-1], Finished)
    assert not seed_run.of(Warned)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks transformers by an old name
def test_seeds_two_examples_are_learned_by_heart_with_the_defaults(seed_run: Outcome, fixture_base: Path) -> None:
    assert min(seed_run.losses[step] for step in (49, 50)) < 0.05
    folder = seed_run.blobs.path(seed_run.finished.artifact.path)
    base = AutoModelForCausalLM.from_pretrained(fixture_base)
    wanted = dict(SEED_EXAMPLES)
    assert not any(answer(base, fixture_base, question) == wanted[question] for question in wanted)
    tuned = PeftModel.from_pretrained(base, folder)
    assert {question: answer(tuned, fixture_base, question) for question in wanted} == wanted


def test_the_loss_falls_by_windows(seed_run: Outcome) -> None:
    losses = list(seed_run.losses.values())
    windows = [sum(losses[start : start + 10]) / 10 for start in range(0, 50, 10)]
    assert all(later < earlier for earlier, later in pairwise(windows))


def test_trained_tokens_are_tokens_times_epochs(seed_run: Outcome, seed_job: Job, fixture_base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(fixture_base)
    tokens = sum(
        len(tokenizer.apply_chat_template(row["messages"], return_dict=True)["input_ids"]) for row in seed_job.data
    )
    assert seed_run.finished.trained_tokens == tokens * 25
    assert seed_run.of(StepDone)[-1].metrics.trained_tokens == tokens * 25


def test_every_epoch_leaves_a_checkpoint_that_is_a_model(seed_run: Outcome) -> None:
    made = seed_run.of(CheckpointMade)
    assert [(one.step, one.epoch_number) for one in made] == [(2 * epoch, epoch) for epoch in range(1, 26)]
    assert made[0].artifact.path == "jobs/ftjob_test/e1/checkpoints/step-2"
    assert made[0].metrics == {
        "step": 2.0,
        "train_loss": seed_run.losses[2],
        "train_mean_token_accuracy": seed_run.of(StepDone)[1].metrics.train_mean_token_accuracy,
    }
    last, final = seed_run.weights(made[-1].artifact), seed_run.weights()
    assert all(torch.equal(last[name], final[name]) for name in final)
    config = json.loads((seed_run.blobs.path(made[0].artifact.path) / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (16, 32, "LORA")


def test_a_recovery_point_follows_the_checkpoint_at_an_epochs_end(seed_run: Outcome) -> None:
    order = [(type(report), report.step) for report in seed_run.reports if hasattr(report, "step")]
    for step in (2, 50):
        assert order.index((CheckpointMade, step)) < order.index((RecoveryPointMade, step))


def test_the_program_itself_runs_from_the_command_line(tmp_path: Path, fixture_base: Path) -> None:
    job = Job(tmp_path / "job", fixture_base, rows(pairs(2)), {"n_epochs": 1})
    path = tmp_path / "spec.json"
    path.write_bytes(msgspec.json.encode(job.spec()))
    reports, report_end = os.pipe()
    with subprocess.Popen(
        [sys.executable, "-m", "trainer.run", str(path)],
        cwd=REPOSITORY,
        env={**os.environ, "ROSE_REPORT_FD": str(report_end)},
        pass_fds=[report_end],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        os.close(report_end)
        with os.fdopen(reports, "rb") as lines:
            last = lines.read().splitlines()[-1]
        _, log = process.communicate(timeout=60)
    assert process.returncode == 0, log.decode()
    assert msgspec.json.decode(last, type=Report).__class__ is Finished


@pytest.mark.parametrize("how", ["order", "signal"])
def test_a_drain_ends_the_step_makes_a_point_and_exits_75(tmp_path: Path, fixture_base: Path, how: str) -> None:
    job = Job(tmp_path, fixture_base, rows(pairs(4)), {"n_epochs": 25, "batch_size": 2})

    def drain_after_three(report: Report, child: Child) -> None:
        if isinstance(report, StepDone) and report.metrics.step == 3:
            if how == "order":
                child.drain()
            else:
                os.kill(child.process.pid or 0, signal.SIGTERM)

    outcome = job.run(watch=drain_after_three)
    assert outcome.status == EXIT_DRAINED
    (drained,) = outcome.of(Drained)
    assert outcome.reports[-1] is drained
    newest = outcome.points(1)[0]
    assert newest.step == drained.step == outcome.of(StepDone)[-1].metrics.step >= 3
    assert not outcome.of(Finished)
    resumed = job.run(2, recovery_points=outcome.points(1), watch=drain_after_three)
    assert resumed.of(Resumed) == [Resumed(from_step=drained.step)]


@pytest.fixture(scope="module")
def full_job(tmp_path_factory: pytest.TempPathFactory, fixture_base: Path) -> Job:
    asked = {"use_lora": False, "n_epochs": 40}
    return Job(tmp_path_factory.mktemp("full"), fixture_base, rows(SEED_EXAMPLES), asked, base_learning_rate=1e-3)


@pytest.fixture(scope="module")
def full_run(full_job: Job) -> Outcome:
    return full_job.run()


def test_full_fine_tuning_writes_a_whole_model(full_run: Outcome) -> None:
    assert full_run.finished.kind == "full"
    assert full_run.losses[80] < 0.1
    folder = full_run.blobs.path(full_run.finished.artifact.path)
    assert "rose_packed" not in (folder / "config.json").read_text()
    tuned = AutoModelForCausalLM.from_pretrained(folder)
    assert tuned.lm_head.weight.data_ptr() == tuned.model.embed_tokens.weight.data_ptr()
    assert {question: answer(tuned, folder, question) for question, _ in SEED_EXAMPLES} == dict(SEED_EXAMPLES)


def parent_of(outcome: Outcome, job: Job) -> ParentModel:
    lora = job.hyperparameters.lora_config
    return ParentModel(
        name="parent",
        kind=outcome.finished.kind,
        artifact=outcome.finished.artifact,
        lora=msgspec.to_builtins(lora) if lora and outcome.finished.kind == "adapter" else None,
    )


@pytest.mark.parametrize("alpha", [32, 64])
def test_training_goes_on_from_an_adapter(tmp_path: Path, seed_run: Outcome, seed_job: Job, alpha: int) -> None:
    asked = {"n_epochs": 2, "lora_config": {"lora_alpha": alpha}, "learning_rate_multiplier": 0.01}
    job = Job(tmp_path, seed_job.base, seed_job.data, asked, parent=parent_of(seed_run, seed_job))
    job.blobs = seed_job.blobs
    outcome = job.run(epoch=7)
    assert outcome.losses[1] < 0.05
    assert outcome.finished.kind == "adapter"


@pytest.mark.parametrize(("use_lora", "epoch"), [(True, 2), (False, 3)])
def test_training_goes_on_from_a_full_model(
    tmp_path: Path, full_job: Job, full_run: Outcome, use_lora: bool, epoch: int
) -> None:
    asked = {"n_epochs": 2, "use_lora": use_lora, "learning_rate_multiplier": 0.01}
    job = Job(tmp_path, full_job.base, full_job.data, asked, parent=parent_of(full_run, full_job))
    job.blobs = full_job.blobs
    outcome = job.run(epoch=epoch)
    assert outcome.losses[1] < 0.2
    assert outcome.finished.kind == "full"  # an adapter on other weights than the base's could not be served on it
    folder = outcome.blobs.path(outcome.finished.artifact.path)
    tuned = AutoModelForCausalLM.from_pretrained(folder)
    assert {question: answer(tuned, folder, question) for question, _ in SEED_EXAMPLES} == dict(SEED_EXAMPLES)


def test_full_fine_tuning_goes_on_from_an_adapter(tmp_path: Path, seed_run: Outcome, seed_job: Job) -> None:
    parent = msgspec.structs.replace(parent_of(seed_run, seed_job), lora=None)
    asked = {"n_epochs": 1, "use_lora": False, "learning_rate_multiplier": 0.001}
    job = Job(tmp_path, seed_job.base, seed_job.data, asked, parent=parent)
    job.blobs = seed_job.blobs
    outcome = job.run(epoch=8)
    assert outcome.losses[1] < 0.05
    assert outcome.finished.kind == "full"


def failure(outcome: Outcome) -> Failed:
    assert outcome.status == 1
    (failed,) = outcome.of(Failed)
    assert outcome.reports[-1] is failed
    return failed


def test_a_changed_base_is_refused(tmp_path: Path, fixture_base: Path) -> None:
    job = Job(tmp_path, fixture_base, rows(pairs(2)))
    other = msgspec.structs.replace(job.located.base_model(), fingerprint="0" * 64)
    failed = failure(job.run(base=other))
    assert (failed.code, failed.param, failed.retryable) == ("base_changed", "model", False)
    assert f"is not the one that the job {job.spec().job_id} was made with" in failed.message
    assert "000000000000" in failed.message


def test_changed_data_is_refused(tmp_path: Path, fixture_base: Path) -> None:
    job = Job(tmp_path, fixture_base, rows(pairs(3)))
    plan = job.hyperparameters
    job.training_file.write_text(job.training_file.read_text().splitlines()[0] + "\n")
    failed = failure(job.run(hyperparameters=plan))
    assert failed.code == "data_changed"
    assert "1 training" in failed.message
    assert "held 3" in failed.message


def test_a_damaged_parent_is_refused(tmp_path: Path, seed_run: Outcome, seed_job: Job) -> None:
    parent = parent_of(seed_run, seed_job)
    damaged = msgspec.structs.replace(parent.artifact, sha256="0" * 64)
    job = Job(tmp_path, seed_job.base, seed_job.data, parent=msgspec.structs.replace(parent, artifact=damaged))
    job.blobs = seed_job.blobs
    assert failure(job.run(epoch=9)).code == "blob_mismatch"


def test_an_exploding_loss_ends_the_run_and_keeps_the_checkpoints(
    tmp_path: Path, seed_run: Outcome, seed_job: Job
) -> None:
    asked = {"n_epochs": 20, "learning_rate_multiplier": 1000, "warmup_ratio": 1.0}
    job = Job(tmp_path, seed_job.base, seed_job.data, asked, parent=parent_of(seed_run, seed_job))
    job.blobs = seed_job.blobs
    outcome = job.run(epoch=10)
    failed = failure(outcome)
    assert (failed.code, failed.retryable) == ("training_diverged", False)
    assert "learning_rate_multiplier" in failed.message
    assert outcome.losses[1] < 0.05
    assert all(loss > 1 for loss in list(outcome.losses.values())[-4:])
    assert outcome.of(CheckpointMade)
    for made in outcome.of(CheckpointMade):
        outcome.blobs.verify(made.artifact)


def speak_always() -> None:
    """Take every chance to show that the run goes on."""
    from trainer import run

    run.Run.alive.__defaults__ = (0.0,)


def test_long_phases_show_that_they_go_on(tmp_path: Path, fixture_base: Path) -> None:
    asked = {"n_epochs": 1, "batch_size": 6, "validation_split": 0.25}
    outcome = Job(tmp_path, fixture_base, rows(pairs(8)), asked).run(prepare=speak_always)
    phases = [report.phase for report in outcome.of(PhaseChanged)]
    assert phases[: 1 + 8] == ["load"] * 9  # once by itself, once per example
    assert phases.count("train") > 1
    assert phases.count("evaluate") > 1


def break_gradients() -> None:
    """Make every gradient from step 3 on infinite, as an overflow would."""
    from trainer import optimization

    attempt = optimization.Optimization._attempt  # pyright: ignore[reportPrivateUsage]

    def broken(self: Any, documents: Any) -> tuple[float, float, float]:
        loss, accuracy, norm = attempt(self, documents)
        return (float("nan"), accuracy, norm) if self.state.step >= 2 else (loss, accuracy, norm)

    optimization.Optimization._attempt = broken  # pyright: ignore[reportPrivateUsage]


def test_steps_that_are_not_finite_are_skipped_three_times_at_most(tmp_path: Path, fixture_base: Path) -> None:
    outcome = Job(tmp_path, fixture_base, rows(pairs(8)), {"n_epochs": 2, "batch_size": 1}).run(prepare=break_gradients)
    failed = failure(outcome)
    assert failed.code == "training_diverged"
    assert "step 6 is nan" in failed.message
    assert [warning.code for warning in outcome.of(Warned)] == ["step_skipped"] * 3
    assert list(outcome.losses) == [1, 2]


def test_a_full_disk_stops_at_the_checkpoint_and_can_be_tried_again(tmp_path: Path, fixture_base: Path) -> None:
    job = Job(tmp_path, fixture_base, rows(pairs(4)), {"n_epochs": 2, "batch_size": 1})
    outcome = job.run(min_free_bytes=1 << 60, recovery_steps=1)
    failed = failure(outcome)
    assert (failed.code, failed.retryable) == ("no_space", True)
    assert [warning.code for warning in outcome.of(Warned)] == ["no_recovery_point"]
    assert list(outcome.losses) == [1, 2, 3, 4]
    assert list((outcome.blobs.root / "tmp").glob("*")) == []


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # as above
def test_the_numbers_of_the_final_model_are_those_of_the_saved_one(tmp_path: Path, fixture_base: Path) -> None:
    """Transformers and PEFT read the folder that was published; the best weights are not the last ones."""
    asked = {"n_epochs": 6, "batch_size": 2, "learning_rate_multiplier": 10, "validation_split": 0.25}
    run = Job(tmp_path, fixture_base, rows(pairs(12)), asked).run()
    scored = run.finished.scored
    assert scored is not None
    assert (len(scored.rows), scored.held_out, scored.trained_as, scored.routed) == (3, True, "fp32", False)
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(fixture_base), str(run.blobs.path(run.finished.artifact.path))
    )
    model.eval()
    for row in scored.rows:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row.ids])).logits[0]
        wanted = torch.log_softmax(logits.float(), dim=-1)
        judged = [float(wanted[at - 1, row.ids[at]]) for at in row.learned]
        assert row.logprobs == pytest.approx(judged, abs=1e-4)
        assert 1 < len(row.learned) < len(row.ids)
