"""One training of the quality benchmark, by the trainer's own code, in a process of its own.

`python -m benchmarks.quality_run SPEC.json` prints what was measured as JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch

from benchmarks.quality_tasks import Pair, Question, Task, tasks
from rose.domain.hyperparameter_requests import HyperparametersRequest
from rose.domain.job_values import BaseRequest
from rose.language_models.template import ChatTemplate, load_template
from rose.methods.method import Unit
from trainer.attention import use_attention
from trainer.child import Channel
from trainer.hardware import Hardware
from trainer.protocol import RunSpec, ValidationPassed, ValidationSpec
from trainer.reading import read_file
from trainer.run import Run
from trainer.validate import validate

MAX_ANSWER_TOKENS = 48


class Training(msgspec.Struct, frozen=True, kw_only=True):
    """What one process does."""

    task: str
    asked: dict[str, Any]
    """Hyperparameters of the job's request."""
    seed: int
    models: str
    folder: str
    threads: int
    asks_base: bool
    """Ask the base, too; its answers are the same for every seed and setting."""
    base: str = "smollm2"


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """How well the held-out questions are answered, before and after."""

    base_right: float
    base_loss: float
    right: float
    loss: float
    """Mean cross-entropy of the held-out answers per token, nats."""
    training_loss: float
    learning_rate: float
    steps: int
    seconds: float
    answers: list[str]


def main(arguments: Sequence[str]) -> None:
    """Train as the file says and print the figures."""
    with open(arguments[0], "rb") as file:
        training = msgspec.json.decode(file.read(), type=Training)
    print(msgspec.json.encode(measure(training)).decode())


def measure(training: Training) -> Measured:
    """Train, then ask the held-out questions, and the base before."""
    task = next(task for task in tasks() if task.name == training.task)
    run = Run(spec(training, task), Channel(os.open(os.devnull, os.O_WRONLY), 0, 60.0))
    run.hardware = Hardware(run.spec)
    run.load()
    template = load_template(Path(training.models) / training.base)
    held_out = _held_out(run, template, task, Path(training.folder))
    base_loss = run.optimization.evaluate(held_out, lambda: False).loss
    base_answers = (
        ask(run.trained.model, template, task.questions) if training.asks_base else [""] * len(task.questions)
    )
    began = time.perf_counter()
    loss = 0.0
    while not run.is_over():
        run.train_step()
        loss = run.state.metrics.train_loss if run.state.metrics else loss
        run.state.unfinished = False
    seconds = time.perf_counter() - began
    answers = ask(run.trained.model, template, task.questions)
    return Measured(
        base_right=share_right(task.questions, base_answers),
        base_loss=base_loss,
        right=share_right(task.questions, answers),
        loss=run.optimization.evaluate(held_out, lambda: False).loss,
        training_loss=loss,
        learning_rate=run.hyperparameters.learning_rate,
        steps=run.state.step,
        seconds=seconds,
        answers=answers,
    )


def share_right(questions: Sequence[Question], answers: Sequence[str]) -> float:
    """Return the share of the questions that are answered as their task wants it."""
    return sum(question.right(answer) for question, answer in zip(questions, answers, strict=True)) / len(questions)


def ask(model: Any, template: ChatTemplate, questions: Sequence[Question]) -> list[str]:
    """Return the model's most likely answer to each question, at most MAX_ANSWER_TOKENS long."""
    trained_with = model.config._attn_implementation
    use_attention(model, "sdpa")  # packed attention, which a run trains with, takes one row
    model.eval()
    rows = [template.prompt([{"role": "user", "content": question.text}]) for question in questions]
    width = max(map(len, rows))
    padding = template.tokenizer.pad_token_id
    ids = torch.tensor([[padding] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    with torch.no_grad():
        made = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=MAX_ANSWER_TOKENS,
            do_sample=False,
            eos_token_id=sorted(template.stop_ids),
            pad_token_id=padding,
        )
    use_attention(model, trained_with)
    return [template.tokenizer.decode(row[width:], skip_special_tokens=True) for row in made]


def _write(path: Path, pairs: Sequence[Pair]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for question, answer in pairs:
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def _held_out(run: Run, template: ChatTemplate, task: Task, folder: Path) -> list[Unit]:
    """Return the held-out questions with their answers as the trainer reads a file."""
    path = _write(folder / "held_out.jsonl", [(question.text, question.answer) for question in task.questions])
    wanted = msgspec.structs.replace(run.hyperparameters, thinking=False)
    examples = read_file(path, run.method, template, wanted, lambda: None)
    return [unit for example in examples for unit in example.units]


def spec(training: Training, task: Task) -> RunSpec:
    """Return the run that trains on the task, as a trainer's validation would make it."""
    folder = Path(training.folder)
    file = _write(folder / "training.jsonl", task.training)
    wanted = ValidationSpec(
        job_id="ftjob_quality",
        base=BaseRequest(source=training.base),
        blob_root=str(folder / "blobs"),
        training_file_id="file_quality",
        training_file=str(file),
        validation_file_id=None,
        validation_file=None,
        method="supervised",
        requested=msgspec.convert(training.asked, HyperparametersRequest),
        seed=training.seed,
        minimum_examples=1,
        base_learning_rates={},
        models_dir=training.models,
        hub_offline=True,
    )
    passed = validate(wanted, lambda phase: None)
    if not isinstance(passed, ValidationPassed):
        raise SystemExit(f"{training.task} was refused: {passed.message}")
    return RunSpec(
        job_id=wanted.job_id,
        epoch=1,
        model_name="quality",
        base=passed.base,
        parent=None,
        blob_root=wanted.blob_root,
        training_file=wanted.training_file,
        validation_file=None,
        hyperparameters=passed.hyperparameters,
        models_dir=training.models,
        device="cpu",
        threads=training.threads,
        hub_offline=True,
    )


if __name__ == "__main__":
    main(sys.argv[1:])
