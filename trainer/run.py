"""One training run, top to bottom: `python -m trainer.run SPEC.json`, started by a trainer's supervisor.

Load, resume, then step by step: train, evaluate, report, save; at the end write the final model. Ends by `Finished`,
`Drained` (exit 75) or `Failed`. Decides nothing about the job and never speaks to Postgres or NATS.
"""

from __future__ import annotations

import logging
import math
import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

import msgspec
import torch

from rose.blobs import Blobs
from rose.domain.artifacts import Artifact
from rose.domain.hyperparameters import Hyperparameters
from rose.domain.job_values import StepMetrics
from rose.errors import InvalidDataset, NoSpace, RoseError, Unavailable
from rose.language_models.template import ChatTemplate, load_template
from rose.methods import method_of
from rose.methods.method import Unit
from trainer.batches import Example, Schedule, plan_hash
from trainer.child import Channel, failed, log_to_standard_error, open_channel, read_spec
from trainer.forward import choose_forward
from trainer.hardware import Hardware
from trainer.held_out import split
from trainer.optimization import Evaluation, Interrupted, Optimization
from trainer.proof import sample
from trainer.protocol import (
    EXIT_DRAINED,
    CheckpointMade,
    Drained,
    Finished,
    PhaseChanged,
    RecoveryPointMade,
    Resumed,
    RunSpec,
    ScoredRow,
    ScoredRows,
    StepDone,
    Warned,
)
from trainer.reading import read_file
from trainer.recovery import Recovery, RunState
from trainer.saving import save_folder
from trainer.trained_model import TrainedModel, load_trained_model, locate_base

log = logging.getLogger(__name__)

ALIVE_SECONDS = 20.0
"""Time between signs of life within a phase, well below the watchdog's shortest patience."""

TOKEN_ACCURACY = "mean_token_accuracy"
"""What a method measures that has fields of its own in a step's report."""
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""How configurations of transformers call the number of experts."""


def main(arguments: Sequence[str]) -> int:
    """Run the specification and return the exit status: 0 finished, 75 drained, 1 failed and said why."""
    log_to_standard_error()
    spec = read_spec(arguments, RunSpec)
    channel = open_channel(spec.abandon_seconds)
    _drain_on_terminate(channel)
    try:
        return Run(spec, channel).run()
    except RoseError as error:
        log.exception("The run failed.")
        # Room on the disk and services come back; everything else would end the same way again.
        again = isinstance(error, (NoSpace, Unavailable))
        channel.report(msgspec.structs.replace(failed(error), retryable=again))
        return 1


def _drain_on_terminate(channel: Channel) -> None:
    """Let SIGTERM ask for a drain, as the supervisor's order does; a second one ends the process at once."""

    def terminate(number: int, frame: FrameType | None) -> None:
        if channel.draining.is_set():
            os._exit(128 + number)
        channel.draining.set()

    signal.signal(signal.SIGTERM, terminate)


class Run:
    """One run. `run` reads from top to bottom what happens."""

    def __init__(self, spec: RunSpec, channel: Channel) -> None:
        self.spec = spec
        self.channel = channel
        self.hyperparameters: Hyperparameters = spec.hyperparameters
        self.schedule = Schedule(spec.hyperparameters)
        self.method = method_of(spec.method)
        self.blobs = Blobs(Path(spec.blob_root))
        self.folder = f"jobs/{spec.job_id}/e{spec.epoch}"
        self.best: dict[str, torch.Tensor] | None = None
        self.point_made_at = time.monotonic()
        self.point_failed = False
        self.phase = ""
        self.spoke_at = time.monotonic()
        self.training: list[Example] = []
        self.validation: list[Unit] = []

    def run(self) -> int:
        """Do all of it and return the exit status."""
        self.report_phase("load")
        self.blobs.sweep_temporary(owner=f"{self.spec.job_id}.", older_than_seconds=0)
        self.hardware = Hardware(self.spec)
        self.load()
        self.resume()
        if self.drained():
            return EXIT_DRAINED
        while self.state.unfinished or not self.is_over():
            if not self.state.unfinished:
                self.train_step()
            with suppress(Interrupted):
                self.complete_step()
            if self.drained():
                return EXIT_DRAINED
        self.finish()
        return 0

    @property
    def state(self) -> RunState:
        """What changes during the run; the optimization holds it."""
        return self.optimization.state

    # --- before the first step

    def load(self) -> None:
        """Read base, data and model, and make everything that a step needs."""
        spec = self.spec
        located = locate_base(spec)
        validation = self.read_data(load_template(located.path, rows=located.embedding_rows))
        self.validation = [unit for example in validation for unit in example.units]
        torch.manual_seed(self.hyperparameters.seed)
        random.seed(self.hyperparameters.seed)
        self.trained: TrainedModel = load_trained_model(spec, located, self.blobs, self.hardware)
        documents = [document for example in self.training for document in example.documents]
        forward, caveat = choose_forward(self.trained.model, documents, self.hardware.device)
        if caveat:
            self.warn("not_packed", caveat)
        self.optimization = Optimization(
            self.trained,
            self.hyperparameters,
            self.method,
            forward,
            self.hardware,
            RunState(token_budget=self.hardware.token_budget),
            self.method.blind_loss([unit for example in self.training for unit in example.units]),
            self.warn,
            self.alive,
        )
        parent = spec.parent.artifact.sha256 if spec.parent else "none"
        self.recovery = Recovery(
            self.blobs,
            folder=f"{self.folder}/recovery",
            owner=self.owner,
            plan=plan_hash(self.training, validation, self.hyperparameters, spec.method, spec.base.fingerprint, parent),
            hardware=self.hardware,
            known=spec.recovery_points,
            min_free_bytes=spec.min_free_bytes,
        )
        log.info(
            "%d examples, %d steps, %d trainable numbers, %s",
            len(self.training),
            self.schedule.total_steps,
            sum(p.numel() for p in self.trained.parameters.values()),
            self.hardware.describe(),
        )

    def read_data(self, template: ChatTemplate) -> list[Example]:
        """Read the files, set the training examples and return the validation examples.

        Raises: InvalidDataset when there are others than validation counted.
        """
        wanted = self.hyperparameters
        rows = read_file(Path(self.spec.training_file), self.method, template, wanted, self.alive)
        if self.spec.validation_file is not None:
            self.training = rows
            validation = read_file(Path(self.spec.validation_file), self.method, template, wanted, self.alive)
        else:
            sides = split([row.question for row in rows], wanted.validation_examples, wanted.seed)
            self.training = [rows[index] for index in sides.training]
            validation = [rows[index] for index in sides.validation]
            if sides.leaked:
                self.warn(
                    "validation_overlap",
                    f"{sides.leaked} of {len(validation)} held-out examples ask the same as trained ones, because too "
                    "many examples ask the same; the validation loss will look better than it is.",
                )
        found = (len(self.training), len(validation))
        if found != (wanted.training_examples, wanted.validation_examples):
            raise InvalidDataset(
                f"The files hold {found[0]} training and {found[1]} validation examples; when the job was validated "
                f"they held {wanted.training_examples} and {wanted.validation_examples}.",
                code="data_changed",
                hint="Create a new job.",
            )
        return validation

    def resume(self) -> None:
        """Go on from the newest usable recovery point; without one, note what the method compares with later."""
        self.recovery.sweep(self.spec.job_id)
        point, rejected = self.recovery.newest()
        if point is not None:
            restored = self.recovery.restore(point, self.trained.parameters, self.optimization.optimizer)
            self.best = restored.best
            self.optimization.state = restored.state
            if restored.state.checkpointing:
                self.optimization.recompute_activations()
            if restored.difference:
                self.warn(
                    "equivalent_resume",
                    f"The run goes on equivalently, but not bit for bit, because of: {restored.difference}.",
                )
            self.take_reference(restored.reference)
        elif self.method.NEEDS_REFERENCE:
            self.report_phase("evaluate")
            with suppress(Interrupted):
                self.optimization.note_reference(self.units(), self.channel.draining.is_set)
        if point is not None or rejected:
            anew = point is None and self.recovery.plan_changed
            self.channel.report(Resumed(from_step=self.state.step, rejected=rejected, anew=anew))

    def units(self) -> list[Unit]:
        """Return all of the training data's, then those of the validation data."""
        return [*(unit for example in self.training for unit in example.units), *self.validation]

    def reference(self) -> torch.Tensor | None:
        """Return what was noted before the first step about each document of `units`, fp32, for a recovery point."""
        if not self.method.NEEDS_REFERENCE:
            return None
        return torch.tensor([number for unit in self.units() for number in unit.reference or ()], dtype=torch.float32)

    def take_reference(self, numbers: torch.Tensor | None) -> None:
        """Note what a recovery point says of the model before the first step."""
        if numbers is not None:
            known = iter(numbers.tolist())
            for unit in self.units():
                unit.reference = tuple(next(known) for _ in unit.documents)

    # --- the loop

    def is_over(self) -> bool:
        """Tell whether no step is left: all are done, or the evaluations stopped improving."""
        patience = self.hyperparameters.early_stopping_patience
        return self.state.step >= self.schedule.total_steps or (patience is not None and self.state.misses >= patience)

    def train_step(self) -> None:
        """Take one optimizer step and leave its numbers in the state, to be completed and reported."""
        self.report_phase("train")
        state, number = self.state, self.state.step + 1
        examples = [self.training[index] for index in self.schedule.step_examples(number)]
        units = [unit for example in examples for unit in example.units]
        rate = self.schedule.learning_rate(number)
        result = self.optimization.step(units, rate)
        state.step = number
        state.trained_tokens += result.tokens
        self.optimization.judge(number, result)
        state.unfinished = True
        state.metrics = None
        if not result.applied:
            return
        state.metrics = StepMetrics(
            step=number,
            total_steps=self.schedule.total_steps,
            epoch=self.schedule.epoch_fraction(number),
            train_loss=result.loss,
            train_mean_token_accuracy=result.measured.pop(TOKEN_ACCURACY, 0.0),
            learning_rate=rate,
            gradient_norm=result.gradient_norm,
            trained_tokens=state.trained_tokens,
            tokens_per_second=result.tokens / result.seconds,
            memory_bytes=self.hardware.peak_memory_bytes(),
            measured=result.measured or msgspec.UNSET,
        )

    def complete_step(self) -> None:
        """Evaluate if it is time, report the step, and save what is due.

        Raises: Interrupted when a drain was asked for during the evaluation; then nothing was reported.
        """
        state, metrics = self.state, self.state.metrics
        ends_epoch = self.schedule.ends_epoch(state.step)
        evaluation = self.evaluate() if self.schedule.evaluates_after(state.step) else None
        if evaluation is not None and metrics is not None:
            accuracy = evaluation.measured.pop(TOKEN_ACCURACY, None)
            metrics = msgspec.structs.replace(
                metrics,
                valid_loss=evaluation.loss,
                valid_mean_token_accuracy=accuracy,
                full_valid_loss=evaluation.loss if ends_epoch else None,
                full_valid_mean_token_accuracy=accuracy if ends_epoch else None,
                valid_measured=evaluation.measured or msgspec.UNSET,
            )
        if metrics is not None:
            self.channel.report(StepDone(metrics=metrics))
        state.unfinished, state.metrics = False, None
        if ends_epoch:
            self.save_checkpoint(metrics)
        if self.is_point_due(ends_epoch):
            self.save_recovery_point()

    def evaluate(self) -> Evaluation | None:
        """Compute the validation loss and keep the weights if they are the best so far; None when it is not finite."""
        state = self.state
        self.report_phase("evaluate")
        evaluation = self.optimization.evaluate(self.validation, self.channel.draining.is_set)
        if not math.isfinite(evaluation.loss):
            self.warn("evaluation_not_finite", f"The validation loss after step {state.step} is {evaluation.loss}.")
            state.misses += 1
            return None
        if state.best_loss is None or evaluation.loss < state.best_loss:
            state.best_loss, state.best_step, state.misses = evaluation.loss, state.step, 0
            self.best = self.trained.snapshot()
        else:
            state.misses += 1
        return evaluation

    def drained(self) -> bool:
        """When a drain was asked for, make a recovery point, say so and return True."""
        if not self.channel.draining.is_set():
            return False
        if self.state.step > self.recovery.last_step or self.state.unfinished:
            self.save_recovery_point()
        self.channel.report(Drained(step=self.state.step))
        return True

    # --- saving

    def is_point_due(self, ends_epoch: bool) -> bool:
        """Tell whether a recovery point is made now: at an epoch's end and after the interval in seconds or steps."""
        steps = self.spec.recovery_steps
        return (
            ends_epoch
            or (steps is not None and self.state.step - self.recovery.last_step >= steps)
            or time.monotonic() - self.point_made_at >= self.spec.recovery_seconds
        )

    def save_recovery_point(self) -> None:
        """Make a recovery point; where the disk is full the run goes on without, and says so once."""
        self.report_phase("save")
        self.point_made_at = time.monotonic()
        try:
            artifact = self.recovery.write(
                self.state, self.trained.parameters, self.optimization.optimizer, self.best, self.reference()
            )
        except NoSpace as error:
            if not self.point_failed:
                self.warn("no_recovery_point", f"No recovery point after step {self.state.step}: {error}")
            self.point_failed = True
        else:
            self.point_failed = False
            self.channel.report(
                RecoveryPointMade(step=self.state.step, artifact=artifact, trained_tokens=self.state.trained_tokens)
            )

    def save_checkpoint(self, metrics: StepMetrics | None) -> None:
        """Write the usable model of an epoch. Raises: NoSpace."""
        state = self.state
        self.report_phase("save")
        artifact = self.save_model(f"{self.folder}/checkpoints/step-{state.step}")
        names = (
            "train_loss",
            "train_mean_token_accuracy",
            "valid_loss",
            "valid_mean_token_accuracy",
            "full_valid_loss",
            "full_valid_mean_token_accuracy",
        )
        numbers = {name: getattr(metrics, name) for name in names} if metrics else {}
        self.channel.report(
            CheckpointMade(
                step=state.step,
                epoch_number=state.step // self.schedule.steps_per_epoch,
                artifact=artifact,
                metrics={"step": float(state.step)} | {k: v for k, v in numbers.items() if v is not None},
            )
        )

    def finish(self) -> None:
        """Write the final model, the best one when there is validation data, and say that the run is complete."""
        self.report_phase("save")
        state = self.state
        step = state.step
        if self.best is not None:
            self.trained.take(self.best)
            step = state.best_step
        artifact = self.save_model(f"{self.folder}/model")
        self.channel.report(
            Finished(
                artifact=artifact,
                kind=self.trained.kind,
                step=step,
                steps_run=state.step,
                trained_tokens=state.trained_tokens,
                stopped_early=state.step < self.schedule.total_steps,
                scored=self.score(),
            )
        )

    def score(self) -> ScoredRows:
        """Say how likely the finished model finds the learned tokens of some held-out rows, else of trained ones."""
        held_out = [document for unit in self.validation for document in unit.documents]
        trained = [document for example in self.training for document in example.documents]
        rows: list[ScoredRow] = []
        for document in sample(held_out or trained, self.hyperparameters.seed):
            self.alive()
            found = self.optimization.logprobs(document)
            rows.append(
                ScoredRow(
                    ids=document.ids.tolist(),
                    learned=[at for at, weight in enumerate(document.weights) if at and weight],
                    logprobs=[number if math.isfinite(number) else None for number in found],
                )
            )
        dtype = next(self.trained.model.parameters()).dtype
        precision = self.hardware.precision(dtype, trains_weights=self.trained.trains_weights)
        return ScoredRows(
            rows=rows,
            held_out=bool(held_out),
            trained_as=precision,
            routed=any(hasattr(self.trained.model.config.get_text_config(), name) for name in EXPERT_COUNTS),
        )

    def save_model(self, relative: str) -> Artifact:
        """Write the present weights as a usable model. Raises: NoSpace."""
        return save_folder(
            self.blobs,
            relative,
            self.trained.save,
            owner=self.owner,
            needed_bytes=self.trained.saved_bytes(),
            min_free_bytes=self.spec.min_free_bytes,
        )

    @property
    def owner(self) -> str:
        """Beginning of the names of this run's temporary folders, by which the next attempt removes leftovers."""
        return f"{self.spec.job_id}.e{self.spec.epoch}"

    def report_phase(self, phase: str) -> None:
        """Tell the supervisor what the run is doing now, unless it knows."""
        if phase != self.phase:
            self.phase = phase
            self.alive(after_seconds=0.0)

    def alive(self, after_seconds: float = ALIVE_SECONDS) -> None:
        """Show the watchdog that a long phase goes on, by saying its name again."""
        if time.monotonic() - self.spoke_at >= after_seconds:
            self.channel.report(PhaseChanged(phase=self.phase))
            self.spoke_at = time.monotonic()

    def warn(self, code: str, message: str) -> None:
        """Tell the user something that does not stop the run."""
        log.warning("%s", message)
        self.channel.report(Warned(code=code, message=message))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
