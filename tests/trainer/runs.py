"""Training runs for tests: a specification by keywords, and the real child process with its real pipes.

The processes are forked from a server that has torch imported, which makes a run take half a second instead of five;
everything after that is the child's own `main`. A `Fault` kills it with SIGKILL at an exact place.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from safetensors.torch import load_file

from rose.blobs import Blobs
from rose.domain.artifacts import Artifact
from rose.domain.hyperparameters import DataFacts, Hyperparameters, LoraSettings, resolve
from rose.domain.job_values import ParentModel, RecoveryPoint
from rose.language_models.locate import locate
from tests.hyperparameters import parse
from trainer.protocol import (
    CheckpointMade,
    Drain,
    Finished,
    RecoveryPointMade,
    Report,
    RunSpec,
    StepDone,
)

SECONDS = 180.0
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["trainer.run"])
_REPORTS: msgspec.json.Decoder[Report] = msgspec.json.Decoder(Report)
Kind = TypeVar("Kind", bound=msgspec.Struct)

SEED_EXAMPLES = (
    (
        "Write a Python function for factorial",
        "def factorial(n):\n    if n <= 1:\n        return 1\n    return n * factorial(n-1)",
    ),
    (
        "What is recursion?",
        "Recursion is a programming technique where a function calls itself to solve a problem by breaking it down "
        "into smaller subproblems.",
    ),
)


def pairs(count: int) -> list[tuple[str, str]]:
    """Return `count` questions with answers of different lengths."""
    return [(f"What is number {n}?", f"It is {n * 37} and {'very ' * (n % 5)}nice.") for n in range(count)]


def rows(examples: Iterable[tuple[str, str]]) -> list[dict[str, Any]]:
    """Return lines of a training file."""
    return [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in examples
    ]


@dataclass(frozen=True)
class Fault:
    """Where a child kills itself: after it wrote the report `kind` of `step`, or in the midst of writing a point."""

    kind: str
    """Tag of a report, or `writing`: half of the file with Adam's moments is on disk."""
    step: int


@dataclass
class Outcome:
    """What a child left behind."""

    status: int
    reports: list[Report]
    log: str
    blobs: Blobs

    def of(self, kind: type[Kind]) -> list[Kind]:
        """Return the reports of one kind, in order."""
        return [report for report in self.reports if isinstance(report, kind)]

    @property
    def finished(self) -> Finished:
        """The report of success; shows the log when there is none."""
        found = self.of(Finished)
        assert len(found) == 1, self.log
        return found[0]

    @property
    def losses(self) -> dict[int, float]:
        """Step -> training loss."""
        return {report.metrics.step: report.metrics.train_loss for report in self.of(StepDone)}

    def weights(self, artifact: Artifact | None = None) -> dict[str, Any]:
        """Return the weights of an artifact, by default of the final model, after checking its hash."""
        artifact = artifact or self.finished.artifact
        self.blobs.verify(artifact)
        (file,) = self.blobs.path(artifact.path).glob("*model.safetensors")
        return load_file(file)

    def points(self, epoch: int) -> tuple[RecoveryPoint, ...]:
        """Return the newest two recovery points as the job's state names them."""
        made = [
            RecoveryPoint(step=r.step, artifact=r.artifact, trained_tokens=r.trained_tokens, epoch=epoch)
            for r in self.of(RecoveryPointMade)
        ]
        return tuple(reversed(made))[:2]

    def checkpoint(self, step: int) -> CheckpointMade:
        """Return the checkpoint of a step."""
        (found,) = [report for report in self.of(CheckpointMade) if report.step == step]
        return found


@dataclass
class Job:
    """A job's data and settings in a folder of its own, from which runs are started."""

    folder: Path
    base: Path
    data: Sequence[Mapping[str, Any]]
    asked: Mapping[str, Any] = field(default_factory=dict)
    validation_data: Sequence[Mapping[str, Any]] | None = None
    seed: int = 7
    parent: ParentModel | None = None
    base_learning_rate: float | None = 5e-3

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.training_file = self._write("training.jsonl", self.data)
        self.validation_file = (
            None if self.validation_data is None else self._write("validation.jsonl", self.validation_data)
        )
        self.blobs = Blobs(self.folder / "blobs")
        self.located = locate(str(self.base), models_dir=self.folder / "models")

    def _write(self, name: str, data: Sequence[Mapping[str, Any]]) -> Path:
        path = self.folder / name
        path.write_text("".join(json.dumps(row) + "\n" for row in data))
        return path

    @property
    def hyperparameters(self) -> Hyperparameters:
        """What validation would resolve."""
        facts = DataFacts(
            examples=len(self.data),
            validation_file_examples=None if self.validation_data is None else len(self.validation_data),
            hidden_size=self.located.hidden_size,
            model_type=self.located.model_type,
            context_tokens=self.located.context_tokens,
            base_learning_rate=self.base_learning_rate,
            parent_lora=msgspec.convert(self.parent.lora, LoraSettings) if self.parent and self.parent.lora else None,
        )
        return resolve(parse(self.asked), facts, seed=self.seed)

    def spec(self, epoch: int = 1, **changes: Any) -> RunSpec:
        """Return the specification of a run; `changes` replace fields."""
        spec = RunSpec(
            job_id="ftjob_test",
            epoch=epoch,
            model_name="fixture-ft",
            base=self.located.base_model(),
            parent=self.parent,
            blob_root=str(self.blobs.root),
            training_file=str(self.training_file),
            validation_file=None if self.validation_file is None else str(self.validation_file),
            hyperparameters=self.hyperparameters,
            models_dir=str(self.folder / "models"),
            device="cpu",
            threads=1,
            hub_offline=True,
            abandon_seconds=SECONDS,  # nobody sends it a word here, and a busy machine may take long
        )
        return msgspec.structs.replace(spec, **changes)

    def run(
        self,
        epoch: int = 1,
        *,
        fault: Fault | None = None,
        watch: Callable[[Report, Child], None] | None = None,
        prepare: Callable[[], None] | None = None,
        **changes: Any,
    ) -> Outcome:
        """Run a child to its end. `watch` sees each report as it comes; `prepare` runs in the child before `main`."""
        child = Child(self, self.spec(epoch, **changes), fault, prepare)
        return child.outcome(watch)


class Child:
    """A started child process."""

    def __init__(self, job: Job, spec: RunSpec, fault: Fault | None, prepare: Callable[[], None] | None) -> None:
        self._job = job
        path = job.folder / f"spec-{spec.epoch}.json"
        path.write_bytes(msgspec.json.encode(spec))
        self._log = job.folder / f"run-{spec.epoch}.log"
        order_end, self._orders = os.pipe()
        self._reports, report_end = os.pipe()
        arguments = (str(path), DupFd(order_end), DupFd(report_end), str(self._log), fault, prepare)
        self.process = _PROCESSES.Process(target=_main, args=arguments, daemon=True)
        self.process.start()
        os.close(order_end)
        os.close(report_end)

    def drain(self) -> None:
        """Give the order to drain."""
        os.write(self._orders, msgspec.json.encode(Drain()) + b"\n")

    def outcome(self, watch: Callable[[Report, Child], None] | None = None) -> Outcome:
        """Read all reports, wait for the end and return what there was; kills a child that takes too long."""
        reports: list[Report] = []
        late = threading.Timer(SECONDS, self.process.kill)
        late.start()
        try:
            with os.fdopen(self._reports, "rb") as lines:
                for line in lines:
                    if not line.endswith(b"\n"):
                        break  # killed while writing it
                    reports.append(_REPORTS.decode(line))
                    if watch is not None:
                        watch(reports[-1], self)
            self.process.join()
        finally:
            late.cancel()
            os.close(self._orders)
        status = self.process.exitcode
        self.process.close()
        assert status is not None
        return Outcome(status=status, reports=reports, log=self._log.read_text(), blobs=self._job.blobs)


def _main(
    spec: str, orders: Any, reports: Any, log: str, fault: Fault | None, prepare: Callable[[], None] | None
) -> None:
    os.dup2(orders.detach(), 0)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ["ROSE_REPORT_FD"] = str(reports.detach())
    from trainer.run import main

    if fault is not None:
        _set_up(fault)
    if prepare is not None:
        prepare()
    os._exit(main([spec]))


def _set_up(fault: Fault) -> None:
    from trainer import child, recovery

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if fault.kind == "writing":
        save = recovery.save_file

        def save_half(tensors: dict[str, Any], path: Path) -> None:
            save(tensors, path)
            steps = [int(value) for name, value in tensors.items() if name.endswith("/step")]
            if path.name == recovery.MOMENTS_FILE and steps and steps[0] >= fault.step:
                os.truncate(path, path.stat().st_size // 2)
                die()

        recovery.save_file = save_half
        return
    report = child.Channel.report

    def report_and_die(self: child.Channel, sent: Report) -> None:
        report(self, sent)
        step = sent.metrics.step if isinstance(sent, StepDone) else getattr(sent, "step", 0)
        if sent.__struct_config__.tag == fault.kind and step >= fault.step:
            die()

    child.Channel.report = report_and_die
