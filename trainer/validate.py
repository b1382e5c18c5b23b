"""The validation child: `python -m trainer.validate SPEC.json`, started by a trainer's supervisor. Never torch.

Finds the base, reads the files, counts tokens and resolves every `auto`, so that nothing is left to decide when the
run starts. Ends with `ValidationPassed` or `Failed`.
"""

from __future__ import annotations

import hashlib
import logging
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from rose.domain.hyperparameters import DataFacts, Hyperparameters, LoraSettings, resolve
from rose.domain.job_values import BaseRequest
from rose.domain.training_data import ChatExample, Problem, read_examples
from rose.errors import InvalidDataset, RoseError
from rose.language_models.locate import (
    FACTS_FILE,
    TINY,
    LocatedBase,
    ModelNotAvailable,
    locate,
    tiny_folder,
    verify_fingerprint,
)
from rose.language_models.template import load_tokenizer, render_training
from trainer.child import failed, log_to_standard_error, open_channel, read_spec
from trainer.protocol import Failed, ValidationPassed, ValidationSpec, Warned

log = logging.getLogger(__name__)

MAX_PROBLEMS = 50
MAX_LINES_NAMED = 20
FEW_EXAMPLES = 10
BYTES_PER_PARAMETER_FROZEN = 4
"""float32 at most: what a CPU holds; a GPU holds bfloat16."""
BYTES_PER_PARAMETER_TRAINED = 16
"""Weight, gradient and two Adam moments in float32."""


class DataFile(msgspec.Struct, kw_only=True):
    """What was found in one file."""

    examples: int = 0
    tokens: int = 0
    problem_count: int = 0
    problems: list[str] = []
    cut_lines: list[int] = []
    digests: dict[bytes, int] = {}
    """Hash of each conversation -> its first line."""


def main(arguments: Sequence[str]) -> int:
    """Validate the specification and return the exit status: 0 when it was answered, also by `Failed`."""
    log_to_standard_error()
    spec = read_spec(arguments, ValidationSpec)
    channel = open_channel(spec.abandon_seconds)
    try:
        channel.report(validate(spec))
    except RoseError as error:
        channel.report(failed(error))
    return 0


def validate(spec: ValidationSpec) -> ValidationPassed | Failed:
    """Return what the job will train with, or why it cannot. Raises: RoseError (model, template or settings)."""
    located = _locate(spec)
    tokenizer = load_tokenizer(located.path)
    training = _read(Path(spec.training_file), tokenizer, located.context_tokens)
    refusal = _refusal(training, "training_file", spec.minimum_examples)
    validation: DataFile | None = None
    if refusal is None and spec.validation_file is not None:
        validation = _read(Path(spec.validation_file), tokenizer, located.context_tokens)
        refusal = _refusal(validation, "validation_file", 1)
    if refusal is not None:
        return refusal
    numbers = resolve(spec.hyperparameters, _facts(spec, located, training, validation), spec.seed)
    return ValidationPassed(
        base=located.base_model(),
        hyperparameters=numbers,
        tokens=training.tokens,
        validation_tokens=validation.tokens if validation else 0,
        needs=_needs(located, numbers),
        warnings=tuple(_warnings(training, validation)),
    )


def _locate(spec: ValidationSpec) -> LocatedBase:
    base: BaseRequest = spec.base
    models = Path(spec.models_dir)
    revision = base.pinned.revision if base.pinned else None
    if base.source == TINY and revision is None and not (tiny_folder(models) / FACTS_FILE).is_file():
        _build_tiny(models)
    located = locate(base.source, revision=revision, models_dir=models, offline=spec.hub_offline)
    if base.pinned is not None:
        verify_fingerprint(located, base.pinned)
    return located


def _build_tiny(models: Path) -> None:
    """Build the toy model in a process of its own, since only that may load torch."""
    log.info("building the model %r in %s; this takes about a minute", TINY, models)
    command = [sys.executable, "-m", "rose.language_models.tiny", str(tiny_folder(models))]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=sys.stderr, check=False)
    if done.returncode != 0:
        raise ModelNotAvailable(
            f"The model {TINY!r} could not be built in {models} (exit status {done.returncode}).",
            hint="The log of this job's validation says why; try `rose models build tiny`.",
        )


def _read(path: Path, tokenizer: Any, maximum_tokens: int) -> DataFile:
    found = DataFile()
    with path.open("rb") as lines:
        for item in read_examples(lines):
            if isinstance(item, Problem):
                _note(found, item.sentence)
                continue
            try:
                rendering = render_training(tokenizer, item, maximum_tokens)
            except InvalidDataset as error:
                _note(found, f"Example {item.number} (line {item.line}): {error.message}")
                continue
            found.examples += 1
            found.tokens += rendering.tokens
            if rendering.cut:
                found.cut_lines.append(item.line)
            found.digests.setdefault(_digest(item), item.line)
    return found


def _note(found: DataFile, sentence: str) -> None:
    found.problem_count += 1
    if len(found.problems) < MAX_PROBLEMS:
        found.problems.append(sentence)


def _digest(example: ChatExample) -> bytes:
    """Return the hash of what is said, whatever the white space and case."""
    digest = hashlib.sha256()
    for message in example.messages:
        digest.update(f"{message['role']}\0{' '.join(str(message['content']).split()).casefold()}\0".encode())
    return digest.digest()


def _refusal(found: DataFile, param: str, minimum: int) -> Failed | None:
    if found.problem_count:
        more = f" ({found.problem_count} problems in all)" if found.problem_count > 1 else ""
        return Failed(
            code="invalid_training_file",
            message=f"The job failed due to an invalid {param.replace('_', ' ')}. Invalid file format. "
            f"{found.problems[0]}{more}",
            param=param,
            problems=tuple(found.problems),
        )
    if found.examples < minimum:
        kind = param.replace("_", " ").capitalize()
        return Failed(
            code="invalid_n_examples",
            message=f"{kind} has {found.examples} example(s), but must have at least {minimum} examples",
            param=param,
        )
    return None


def _facts(spec: ValidationSpec, located: LocatedBase, training: DataFile, validation: DataFile | None) -> DataFacts:
    parent = spec.base.parent
    rates = spec.base_learning_rates
    return DataFacts(
        examples=training.examples,
        validation_file_examples=validation.examples if validation else None,
        hidden_size=located.hidden_size,
        model_type=located.model_type,
        context_tokens=located.context_tokens,
        base_learning_rate=rates.get(located.source, located.base_learning_rate),
        parent_lora=msgspec.convert(parent.lora, LoraSettings) if parent and parent.lora else None,
    )


def _needs(located: LocatedBase, numbers: Hyperparameters) -> dict[str, int | str]:
    per_parameter = BYTES_PER_PARAMETER_FROZEN if numbers.use_lora else BYTES_PER_PARAMETER_TRAINED
    return {"device": "any", "memory_bytes": min(located.parameters * per_parameter, located.weight_bytes * 8)}


def _warnings(training: DataFile, validation: DataFile | None) -> list[Warned]:
    warnings: list[Warned] = []
    if training.examples < FEW_EXAMPLES:
        text = f"Training file has {training.examples} example(s); at least {FEW_EXAMPLES} are recommended"
        warnings.append(Warned(code="few_examples", message=text))
    for name, found in (("training", training), ("validation", validation)):
        if found is not None and found.cut_lines:
            text = (
                f"{len(found.cut_lines)} conversation(s) of the {name} file are longer than the model's context and "
                f"lose their oldest turns: {_named(found.cut_lines)}"
            )
            warnings.append(Warned(code="examples_cut", message=text))
    repeated = training.examples - len(training.digests)
    if repeated:
        warnings.append(
            Warned(code="repeated_examples", message=f"{repeated} conversation(s) stand in the training file twice")
        )
    if validation is not None:
        shared = sorted(line for digest, line in validation.digests.items() if digest in training.digests)
        if shared:
            text = (
                f"{len(shared)} conversation(s) of the validation file stand in the training file too, "
                f"so the validation loss says less: {_named(shared)}"
            )
            warnings.append(Warned(code="validation_overlap", message=text))
    return warnings


def _named(lines: Sequence[int]) -> str:
    shown = ", ".join(map(str, lines[:MAX_LINES_NAMED]))
    return f"lines {shown}" + (f" and {len(lines) - MAX_LINES_NAMED} more" if len(lines) > MAX_LINES_NAMED else "")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
