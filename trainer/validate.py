"""The validation child: `python -m trainer.validate SPEC.json`, started by a trainer's supervisor. Never torch.

Finds the base, reads the files, counts tokens and resolves every `auto`, so that nothing is left to decide when the
run starts. Ends with `ValidationPassed` or `Failed`.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple, cast

import msgspec

from rose.domain.hyperparameter_requests import TARGETS_ALL
from rose.domain.hyperparameters import DataFacts, Hyperparameters, LoraSettings, resolve, resolve_thinking
from rose.domain.training_data import Problem, has_thought
from rose.errors import InvalidDataset, InvalidRequest, RoseError
from rose.language_models.chat.caveats import SENTENCES
from rose.language_models.locate import BaseChanged, LocatedBase, ModelNotAvailable
from rose.language_models.template import ChatTemplate, load_template
from rose.methods import method_of
from rose.methods.method import Item, Method, Rendered
from trainer.child import failed, log_to_standard_error, open_channel, read_spec
from trainer.fetching import Tell, fetch_base
from trainer.protocol import Failed, PhaseChanged, ValidationPassed, ValidationSpec, Warned

MAX_PROBLEMS = 50
STOP_AFTER_PROBLEMS = 1000
"""A file with so many is not read to its end: to say that a template refuses a line takes many tries."""
MAX_LINES_NAMED = 20
FEW_EXAMPLES = 10
MAX_REMEMBERED = 1_000_000
"""Conversations of a file that are compared with others; 100 MB of memory."""
BYTES_PER_FROZEN_NUMBER = 2
"""bfloat16. Needs are a floor: a machine that has less cannot run the job, one that has more may still be short."""
BYTES_PER_TRAINED_NUMBER = 16
"""Weight, gradient and two Adam moments in float32."""


class DataFile(msgspec.Struct, kw_only=True):
    """What was found in one file."""

    examples: int = 0
    tokens: int = 0
    label_tokens: int = 0
    """Those of them that are learned."""
    problem_count: int = 0
    problems: list[str] = []
    cut: int = 0
    cut_lines: list[int] = []
    repeated: int = 0
    shared: int = 0
    """Conversations that stand in the other file too."""
    shared_lines: list[int] = []
    caveats: dict[str, int] = {}
    """What a person should know of the rendering, by code: how often it is so."""
    caveat_lines: dict[str, int] = {}
    """The first line of each."""
    digests: set[int] = set()
    """Hashes of the conversations, at most MAX_REMEMBERED."""


def main(arguments: Sequence[str]) -> int:
    """Validate the specification and return the exit status: 0 when it was answered, also by `Failed`."""
    log_to_standard_error()
    # transformers loads torch wherever it is installed; counting tokens needs neither its seconds nor its memory.
    cast(dict[str, Any], sys.modules)["torch"] = None
    spec = read_spec(arguments, ValidationSpec)
    channel = open_channel(spec.abandon_seconds)
    try:
        channel.report(validate(spec, lambda phase: channel.report(PhaseChanged(phase=phase))))
    except RoseError as error:
        channel.report(failed(error, param="model" if isinstance(error, (ModelNotAvailable, BaseChanged)) else None))
    return 0


def validate(spec: ValidationSpec, tell: Tell) -> ValidationPassed | Failed:
    """Return what the job will train with, or why it cannot; `tell` hears what takes long.

    Raises: RoseError (model, template or settings).
    """
    located = fetch_base(spec.base, models=Path(spec.models_dir), offline=spec.hub_offline, tell=tell)
    tell("validate")
    template = load_template(located.path, rows=located.embedding_rows)
    method = method_of(spec.method)
    thoughts = _count_thoughts(method, Path(spec.training_file))
    thinking, _ = resolve_thinking(spec.requested.thinking, thoughts)
    reader = _Reader(method, template, located.context_tokens, thinking)
    validation: DataFile | None = None
    if spec.validation_file is not None:
        validation = reader.read(Path(spec.validation_file), frozenset())
    others = validation.digests if validation else frozenset[int]()
    training = reader.read(Path(spec.training_file), others)
    refusal = _refusal(training, "training_file", spec.minimum_examples)
    if refusal is None and validation is not None:
        refusal = _refusal(validation, "validation_file", 1)
    if refusal is not None:
        return refusal
    facts = msgspec.structs.replace(_facts(spec, method, located, training, validation), thoughts=thoughts)
    numbers = resolve(spec.requested, facts, spec.seed)
    _check_targets(numbers, located)
    return ValidationPassed(
        base=located.base_model(),
        hyperparameters=numbers,
        tokens=training.tokens,
        validation_tokens=validation.tokens if validation else 0,
        needs=_needs(located, numbers),
        warnings=(*_warnings(training, validation), *_held_out(numbers)),
    )


def _count_thoughts(method: Method, path: Path) -> int:
    """Return how many examples of a file have an answer with a thought that is learned."""
    with path.open("rb") as lines:
        items = (item for item in method.read(lines) if not isinstance(item, Problem))
        return sum(any(map(has_thought, item.conversations)) for item in items)


class _Reader(NamedTuple):
    """How files are read: as the run will."""

    method: Method
    template: ChatTemplate
    maximum_tokens: int
    thinking: bool

    def read(self, path: Path, others: Set[int]) -> DataFile:
        """Read and render a whole file, one line at a time; `others` are the conversations of the other file."""
        found = DataFile()
        with path.open("rb") as lines:
            for item in self.method.read(lines):
                if found.problem_count == STOP_AFTER_PROBLEMS:
                    break
                if isinstance(item, Problem):
                    _note(found, item.sentence)
                    continue
                try:
                    rendering = self.method.render(item, self.template, self.maximum_tokens, thinking=self.thinking)
                except InvalidDataset as error:
                    _note(found, error.message)
                    continue
                _take_in(found, item, rendering)
                _compare(found, item, others)
                del found.cut_lines[MAX_LINES_NAMED:], found.shared_lines[MAX_LINES_NAMED:]
        return found


def _take_in(found: DataFile, item: Item, rendering: Rendered) -> None:
    found.examples += 1
    found.tokens += rendering.tokens
    found.label_tokens += rendering.label_tokens
    if rendering.cut:
        found.cut += 1
        found.cut_lines.append(item.line)
    for caveat in rendering.caveats:
        found.caveats[caveat.code] = found.caveats.get(caveat.code, 0) + caveat.count
        found.caveat_lines.setdefault(caveat.code, item.line)


def _note(found: DataFile, sentence: str) -> None:
    found.problem_count += 1
    if len(found.problems) < MAX_PROBLEMS:
        found.problems.append(sentence)


def _compare(found: DataFile, item: Item, others: Set[int]) -> None:
    digest = _digest(item)
    if digest in others:
        found.shared += 1
        found.shared_lines.append(item.line)
    if digest in found.digests:
        found.repeated += 1
    elif len(found.digests) < MAX_REMEMBERED:
        found.digests.add(digest)


def _digest(item: Item) -> int:
    """Return 64 bits of the hash of what is said, whatever the white space and case."""
    digest = hashlib.sha256()
    for message in (message for conversation in item.conversations for message in conversation.messages):
        digest.update(f"{message['role']}\0{' '.join(str(message['content']).split()).casefold()}\0".encode())
        if "tool_calls" in message or "function_call" in message:
            digest.update(msgspec.json.encode([message.get("tool_calls"), message.get("function_call")]))
    return int.from_bytes(digest.digest()[:8])


def _refusal(found: DataFile, param: str, minimum: int) -> Failed | None:
    if found.problem_count:
        count = found.problem_count
        said = f"{count} problems in all" if count < STOP_AFTER_PROBLEMS else f"{count} problems; the rest was not read"
        more = f" ({said})" if count > 1 else ""
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


def _facts(
    spec: ValidationSpec, method: Method, located: LocatedBase, training: DataFile, validation: DataFile | None
) -> DataFacts:
    parent = spec.base.parent
    rates = spec.base_learning_rates
    asked = spec.requested.lora_config.target_modules
    targets = (TARGETS_ALL,) if isinstance(asked, str) else asked
    return DataFacts(
        examples=training.examples,
        validation_file_examples=validation.examples if validation else None,
        hidden_size=located.hidden_size,
        model_type=located.model_type,
        context_tokens=located.context_tokens,
        base_learning_rate=rates.get(located.source, located.base_learning_rate),
        parent_lora=msgspec.convert(parent.lora, LoraSettings) if parent and parent.lora else None,
        label_tokens=training.label_tokens,
        method_rate=method.RATE,
        method_options={name: (option.default, option.why) for name, option in method.OPTIONS.items()},
        lora_numbers_per_rank=sum(outputs + inputs for outputs, inputs in _targeted(located, targets)),
    )


def _check_targets(numbers: Hyperparameters, located: LocatedBase) -> None:
    """Refuse a layer name that the base does not have, before a trainer loads it. Raises: InvalidRequest."""
    targets = numbers.lora_config.target_modules if numbers.lora_config else ()
    unknown = [target for target in targets if target != TARGETS_ALL and not _targeted(located, (target,))]
    if unknown:
        available = sorted({name.rpartition(".")[2] for name in located.linear_layers})
        raise InvalidRequest(
            f"lora_config.target_modules names {', '.join(unknown)}, which {located.source} does not have. "
            f"It has: {', '.join(available)}.",
            code="invalid_value",
            param="hyperparameters.lora_config.target_modules",
        )


def _targeted(located: LocatedBase, targets: Sequence[str]) -> list[tuple[int, int]]:
    """Return the shapes of the layers that `targets` stand for."""
    return [
        shape
        for name, shape in located.linear_layers.items()
        if any(target == TARGETS_ALL or f".{name}".endswith(f".{target}") for target in targets)
    ]


def _needs(located: LocatedBase, numbers: Hyperparameters) -> dict[str, int | str]:
    """Estimate the least memory that the run takes; the activations are not counted, the trainer fits them."""
    lora = numbers.lora_config
    if lora is None:
        return {"device": "any", "memory_bytes": located.parameters * BYTES_PER_TRAINED_NUMBER}
    trained = lora.r * sum(outputs + inputs for outputs, inputs in _targeted(located, lora.target_modules))
    memory = located.parameters * BYTES_PER_FROZEN_NUMBER + trained * BYTES_PER_TRAINED_NUMBER
    return {"device": "any", "memory_bytes": memory}


def _warnings(training: DataFile, validation: DataFile | None) -> list[Warned]:
    warnings: list[Warned] = []
    if training.examples < FEW_EXAMPLES:
        text = f"Training file has {training.examples} example(s); at least {FEW_EXAMPLES} are recommended"
        warnings.append(Warned(code="few_examples", message=text))
    for name, found in (("training", training), ("validation", validation)):
        if found is not None and found.cut:
            text = (
                f"{found.cut} conversation(s) of the {name} file are longer than the model's context and "
                f"lose their oldest turns: {_named(found.cut_lines, found.cut)}"
            )
            warnings.append(Warned(code="examples_cut", message=text))
        warnings += _caveats(name, found) if found is not None else ()
    if training.repeated:
        text = f"{training.repeated} conversation(s) stand in the training file more than once"
        warnings.append(Warned(code="repeated_examples", message=text))
    if training.shared:
        text = (
            f"{training.shared} conversation(s) of the training file stand in the validation file too, "
            f"so the validation loss says less: {_named(training.shared_lines, training.shared)}"
        )
        warnings.append(Warned(code="validation_overlap", message=text))
    return warnings


def _held_out(numbers: Hyperparameters) -> Iterator[Warned]:
    """Yield a warning when validation was asked for and there is nothing to measure on."""
    if numbers.validation_split and not numbers.validation_examples:
        text = (
            f"validation_split is {numbers.validation_split:g}, but nothing is held out of "
            f"{numbers.training_examples} example(s): there is no validation loss, and training never stops early"
        )
        yield Warned(code="nothing_held_out", message=text)


def _caveats(name: str, found: DataFile) -> Iterator[Warned]:
    """Yield a warning for each thing that a person should know of how the file's conversations are rendered."""
    for code, count in found.caveats.items():
        text = f"{SENTENCES[code].format(count=count)} ({name} file, first in line {found.caveat_lines[code]})"
        yield Warned(code=code, message=text)


def _named(lines: Sequence[int], count: int) -> str:
    shown = ", ".join(map(str, lines))
    more = f" and {count - len(lines)} more" if count > len(lines) else ""
    return f"line{'s' if count > 1 else ''} {shown}{more}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
