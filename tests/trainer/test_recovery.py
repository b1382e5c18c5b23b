"""A run that was killed and taken up again equals one that was not, bit for bit; damaged points are passed over."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from rose.blobs import Blobs
from rose.domain.job_values import RecoveryPoint, StepMetrics
from tests.trainer.runs import Child, Fault, Job, Outcome, pairs, rows
from trainer.protocol import (
    EXIT_DRAINED,
    CheckpointMade,
    Drained,
    PhaseChanged,
    RecoveryPointMade,
    Report,
    Resumed,
    StepDone,
    Warned,
)
from trainer.recovery import STATE_FILE

ASKED: dict[str, Any] = {
    "n_epochs": 3,
    "batch_size": 3,
    "validation_split": 0.2,
    "early_stopping_patience": 4,
    "lora_config": {"r": 4, "lora_dropout": 0.1},
}
"""Dropout, so that random states count; evaluations, so that the best weights do; 4 steps an epoch."""
STEPS = 12


def job(folder: Path, base: Path, **asked: Any) -> Job:
    return Job(folder, base, rows(pairs(15)), {**ASKED, **asked})


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, fixture_base: Path) -> Outcome:
    outcome = job(tmp_path_factory.mktemp("uninterrupted"), fixture_base).run(recovery_steps=1)
    assert outcome.status == 0, outcome.log
    assert outcome.of(StepDone)[-1].metrics.step == STEPS
    return outcome


def numbers(metrics: StepMetrics) -> StepMetrics:
    """Everything of a step that does not depend on the machine's speed."""
    return msgspec.structs.replace(metrics, tokens_per_second=0, memory_bytes=0)


def assert_joins(whole: Outcome, first: Outcome, second: Outcome) -> None:
    """Check that both attempts together did exactly what the uninterrupted run did."""
    expected = {report.metrics.step: numbers(report.metrics) for report in whole.of(StepDone)}
    for attempt in (first, second):
        for report in attempt.of(StepDone):
            assert numbers(report.metrics) == expected[report.metrics.step]
    seen = {report.metrics.step for attempt in (first, second) for report in attempt.of(StepDone)}
    assert seen == set(expected)
    want, got = whole.weights(), second.weights()
    assert want.keys() == got.keys()
    assert all(torch.equal(want[name], got[name]) for name in want)
    assert second.finished.step == whole.finished.step
    assert second.finished.trained_tokens == whole.finished.trained_tokens
    for made in second.of(CheckpointMade):
        mine, theirs = second.weights(made.artifact), whole.weights(whole.checkpoint(made.step).artifact)
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
        assert made.metrics == whole.checkpoint(made.step).metrics


@pytest.mark.parametrize(
    "fault",
    [
        Fault("step", 1),
        Fault("step", 6),
        Fault("checkpoint", 4),
        Fault("recovery_point", 4),
        Fault("recovery_point", 7),
        Fault("writing", 2),
        Fault("writing", 8),
        Fault("step", 12),
        Fault("recovery_point", 12),
    ],
    ids=lambda fault: f"{fault.kind}-{fault.step}",
)
def test_a_killed_run_goes_on_bit_for_bit(
    tmp_path: Path, fixture_base: Path, uninterrupted: Outcome, fault: Fault
) -> None:
    killed = job(tmp_path, fixture_base).run(recovery_steps=1, fault=fault)
    assert killed.status == -signal.SIGKILL
    points = killed.points(1)
    second = job(tmp_path, fixture_base).run(2, recovery_steps=1, recovery_points=points)
    assert second.status == 0, second.log
    assert second.of(Resumed) == ([Resumed(from_step=points[0].step)] if points else [])
    begins = points[0].step + 1 if points else 1
    assert list(second.losses) == list(range(begins, STEPS + 1))
    assert_joins(uninterrupted, killed, second)
    assert list((killed.blobs.root / "tmp").glob("*")) == []


def test_a_run_killed_at_any_moment_goes_on_bit_for_bit(
    tmp_path: Path, fixture_base: Path, uninterrupted: Outcome
) -> None:
    """Kills by the clock, several times in one job, as a power cut does."""
    draw = random.Random(1)
    attempts: list[Outcome] = []
    points: tuple[RecoveryPoint, ...] = ()

    def kill_soon(report: Report, child: Child) -> None:
        if isinstance(report, PhaseChanged) and report.phase == "train" and child not in armed:
            armed.append(child)
            threading.Timer(draw.uniform(0.0, 0.25), os.kill, (child.process.pid, signal.SIGKILL)).start()

    for epoch in range(1, 5):
        armed: list[Child] = []
        outcome = job(tmp_path, fixture_base).run(epoch, recovery_steps=1, recovery_points=points, watch=kill_soon)
        attempts.append(outcome)
        points = (*outcome.points(epoch), *points)[:2]
        if outcome.status == 0:
            break
    else:
        attempts.append(job(tmp_path, fixture_base).run(5, recovery_steps=1, recovery_points=points))
    merged = Outcome(status=0, reports=[r for o in attempts[:-1] for r in o.reports], log="", blobs=attempts[-1].blobs)
    assert_joins(uninterrupted, merged, attempts[-1])


def test_full_fine_tuning_resumes_bit_for_bit(tmp_path: Path, fixture_base: Path) -> None:
    asked = {"use_lora": False, "n_epochs": 2, "batch_size": 4, "validation_split": 0.2}
    data = rows(pairs(10))
    make = lambda name: Job(tmp_path / name, fixture_base, data, asked, base_learning_rate=1e-3)  # noqa: E731
    whole = make("whole").run(recovery_steps=1)
    killed = make("killed").run(recovery_steps=1, fault=Fault("step", 3))
    second = make("killed").run(2, recovery_steps=1, recovery_points=killed.points(1))
    assert second.of(Resumed) == [Resumed(from_step=2)]
    assert_joins(whole, killed, second)


@pytest.mark.parametrize("damage", ["truncated", "changed", "gone"])
def test_a_damaged_newest_point_is_passed_over_and_named(
    tmp_path: Path, fixture_base: Path, uninterrupted: Outcome, damage: str
) -> None:
    killed = job(tmp_path, fixture_base).run(recovery_steps=1, fault=Fault("recovery_point", 6))
    newest, before = killed.points(1)
    weights = killed.blobs.path(newest.artifact.path) / "weights.safetensors"
    match damage:
        case "truncated":
            os.truncate(weights, weights.stat().st_size // 2)
        case "changed":
            content = bytearray(weights.read_bytes())
            content[-1] ^= 1
            weights.write_bytes(content)
        case _:
            killed.blobs.delete(newest.artifact.path)
    second = job(tmp_path, fixture_base).run(2, recovery_steps=1, recovery_points=(newest, before))
    (resumed,) = second.of(Resumed)
    assert resumed.from_step == before.step == 5
    (reason,) = resumed.rejected
    assert reason.startswith("step 6: ")
    assert {"truncated": "bytes, not", "changed": "other content", "gone": "missing"}[damage] in reason
    assert_joins(uninterrupted, killed, second)


def test_with_no_usable_point_the_run_begins_again_and_says_so(
    tmp_path: Path, fixture_base: Path, uninterrupted: Outcome
) -> None:
    killed = job(tmp_path, fixture_base).run(recovery_steps=1, fault=Fault("recovery_point", 3))
    for point in killed.points(1):
        killed.blobs.delete(point.artifact.path)
    second = job(tmp_path, fixture_base).run(2, recovery_steps=1, recovery_points=killed.points(1))
    (resumed,) = second.of(Resumed)
    assert (resumed.from_step, len(resumed.rejected)) == (0, 2)
    assert_joins(uninterrupted, killed, second)


def test_a_point_of_other_settings_is_not_taken_up(tmp_path: Path, fixture_base: Path) -> None:
    killed = job(tmp_path, fixture_base).run(recovery_steps=1, fault=Fault("recovery_point", 3))
    other = job(tmp_path, fixture_base, learning_rate_multiplier=2.0)
    (resumed,) = other.run(2, recovery_points=killed.points(1)).of(Resumed)
    assert resumed.from_step == 0
    assert all("other data, settings or another base" in reason for reason in resumed.rejected)


def test_early_stopping_counts_on_after_a_kill(tmp_path: Path, fixture_base: Path) -> None:
    asked = {"n_epochs": 12, "batch_size": 6, "early_stopping_patience": 2, "learning_rate_multiplier": 3.0}
    whole = job(tmp_path / "whole", fixture_base, **asked).run(recovery_steps=1)
    assert whole.finished.stopped_early
    last = whole.finished.steps_run
    killed = job(tmp_path / "killed", fixture_base, **asked).run(recovery_steps=1, fault=Fault("step", last - 1))
    second = job(tmp_path / "killed", fixture_base, **asked).run(2, recovery_steps=1, recovery_points=killed.points(1))
    assert second.finished.stopped_early
    assert second.finished.steps_run == last
    assert_joins(whole, killed, second)


def drain_in_evaluation() -> None:
    """Let the order to drain come in the middle of the first evaluation."""
    from trainer import optimization, run

    evaluate = optimization.Optimization.evaluate

    def evaluate_while_draining(self: Any, documents: Any, interrupted: Any) -> Any:
        runs[0].channel.draining.set()
        return evaluate(self, documents, interrupted)

    runs: list[run.Run] = []
    start = run.Run.run
    run.Run.run = lambda self: runs.append(self) or start(self)  # type: ignore[func-returns-value]
    optimization.Optimization.evaluate = evaluate_while_draining


def test_a_drain_does_not_wait_for_an_evaluation(tmp_path: Path, fixture_base: Path, uninterrupted: Outcome) -> None:
    drained = job(tmp_path, fixture_base).run(prepare=drain_in_evaluation)
    assert drained.status == EXIT_DRAINED
    assert drained.of(Drained) == [Drained(step=1)]
    assert not drained.of(StepDone)
    second = job(tmp_path, fixture_base).run(2, recovery_steps=1, recovery_points=drained.points(1))
    assert second.of(Resumed) == [Resumed(from_step=1)]
    assert_joins(uninterrupted, drained, second)


def test_another_number_of_threads_is_equivalent_and_said(tmp_path: Path, fixture_base: Path) -> None:
    killed = job(tmp_path, fixture_base).run(recovery_steps=1, fault=Fault("recovery_point", 10))
    second = job(tmp_path, fixture_base).run(2, threads=2, recovery_points=killed.points(1))
    assert [warning.code for warning in second.of(Warned)] == ["equivalent_resume"]
    assert "threads 1 -> 2" in second.of(Warned)[0].message


def test_points_that_no_event_names_are_removed(tmp_path: Path, fixture_base: Path) -> None:
    killed = job(tmp_path, fixture_base).run(recovery_steps=1, fault=Fault("recovery_point", 4))
    named = killed.points(1)[1:]  # the newest report was never written to the log
    second = job(tmp_path, fixture_base).run(2, recovery_points=named, fault=Fault("resumed", 0))
    assert second.of(Resumed) == [Resumed(from_step=3)]
    assert [path.name for path in second.blobs.root.glob("jobs/ftjob_test/e1/recovery/*")] == ["step-3"]


def test_a_point_that_finds_no_room_is_a_warning_and_the_run_goes_on(tmp_path: Path, fixture_base: Path) -> None:
    outcome = job(tmp_path, fixture_base).run(recovery_steps=1, prepare=no_room_for_points)
    assert outcome.status == 0
    assert [warning.code for warning in outcome.of(Warned)] == ["no_recovery_point"] * 2
    assert [made.step for made in outcome.of(RecoveryPointMade)] == [1, 2, 3, 7, 8, 9, 10, 11]
    assert list((outcome.blobs.root / "tmp").glob("*")) == []


def no_room_for_points() -> None:
    """Fill the disk while steps 4 to 6 and 12 write their points."""
    import errno

    from trainer import recovery

    save = recovery.save_file

    def save_or_fail(tensors: dict[str, Any], path: Path) -> None:
        steps = [int(value) for name, value in tensors.items() if name.endswith("/step")]
        if path.name == recovery.MOMENTS_FILE and steps[0] in (4, 5, 6, 12):
            raise OSError(errno.ENOSPC, "No space left on device")
        save(tensors, path)

    recovery.save_file = save_or_fail


def test_a_point_of_a_version_that_rendered_otherwise_is_not_taken_up_and_the_run_begins_anew(
    tmp_path: Path, fixture_base: Path, uninterrupted: Outcome
) -> None:
    killed = job(tmp_path, fixture_base).run(recovery_steps=1, fault=Fault("recovery_point", 4))
    points = tuple(older_version(killed.blobs, point) for point in killed.points(1))
    second = job(tmp_path, fixture_base).run(2, recovery_points=points)
    [resumed] = second.of(Resumed)
    assert resumed.anew
    assert resumed.from_step == 0
    assert "another version of ROSE, which rendered the file's conversations otherwise" in resumed.rejected[0]
    assert list(second.losses) == list(range(1, STEPS + 1))
    assert second.losses == uninterrupted.losses


def older_version(blobs: Blobs, point: RecoveryPoint) -> RecoveryPoint:
    """Return the point as a version of ROSE would have left it that made other tokens of the same file."""
    folder = blobs.temporary_folder()
    shutil.copytree(blobs.path(point.artifact.path), folder, dirs_exist_ok=True)
    stored = json.loads((folder / STATE_FILE).read_text())
    del stored["rendering"]
    (folder / STATE_FILE).write_text(json.dumps({**stored, "plan": "0" * 64}))
    blobs.delete(point.artifact.path)
    return msgspec.structs.replace(point, artifact=blobs.publish_folder(folder, point.artifact.path))
