"""Each hyperparameter changes what it says and nothing else: seen in the recorded run, one knob at a time."""

from __future__ import annotations

import functools
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from rose.domain import training_data
from rose.language_models.template import load_template
from rose.methods import supervised
from tests.trainer.runs import Job, Outcome, pairs, rows
from trainer.batches import Example
from trainer.held_out import Question, question_of, split
from trainer.protocol import StepDone, Warned
from trainer.reading import read_file

# PEFT asks transformers by a name that it warns of.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

ASKED: dict[str, Any] = {
    "n_epochs": 2,
    "batch_size": 2,
    "warmup_ratio": 0.25,
    "validation_split": 0.0,
    "lora_config": {"r": 4, "lora_alpha": 8},
}
HYBRID = """
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' %}
{{- '<think>\\n' + message.reasoning_content | default('') + '\\n</think>\\n\\n' }}
{%- endif %}
{{- message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"""
"""A family whose models think or not, as the prompt says."""
EXAMPLES = 8
STEPS = 8
LAYERS = 4 * 7


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, fixture_base: Path) -> Any:
    """Factory of finished runs of the same job with single knobs changed; equal requests run once."""

    @functools.cache
    def finished(knob: str, value: Any) -> Outcome:
        asked = {**ASKED, "lora_config": dict(ASKED["lora_config"])}
        changes: dict[str, Any] = {}
        match knob:
            case "" | "again":
                pass
            case "seed":
                changes["seed"] = value
            case "use_lora":
                asked["use_lora"] = value
                del asked["lora_config"]
            case "r" | "lora_alpha" | "lora_dropout" | "target_modules":
                asked["lora_config"][knob] = value
            case _:
                asked[knob] = value
        outcome = Job(tmp_path_factory.mktemp("knob"), fixture_base, rows(pairs(EXAMPLES)), asked, **changes).run()
        assert outcome.status == 0, outcome.log
        return outcome

    return lambda knob="", value=None: finished(knob, value)


def rates(outcome: Outcome) -> list[float]:
    return [report.metrics.learning_rate for report in outcome.of(StepDone)]


def trainable(outcome: Outcome) -> int:
    return sum(tensor.numel() for tensor in outcome.weights().values())


def test_the_same_job_twice_is_the_same_run(run: Any) -> None:
    first, again = run(), run("again")
    assert first.losses == again.losses
    assert all(torch.equal(tensor, again.weights()[name]) for name, tensor in first.weights().items())


def test_n_epochs(run: Any) -> None:
    usual, more = run(), run("n_epochs", 3)
    assert (len(usual.losses), len(more.losses)) == (8, 12)
    assert more.finished.trained_tokens == usual.finished.trained_tokens * 3 // 2
    assert more.losses[1] == usual.losses[1]
    assert trainable(more) == trainable(usual)


def test_batch_size(run: Any) -> None:
    usual, larger = run(), run("batch_size", 4)
    assert (len(usual.losses), len(larger.losses)) == (8, 4)
    assert larger.finished.trained_tokens == usual.finished.trained_tokens
    assert [report.metrics.epoch for report in larger.of(StepDone)] == [0.5, 1.0, 1.5, 2.0]


def test_learning_rate_multiplier(run: Any) -> None:
    usual, faster = run(), run("learning_rate_multiplier", 3)
    assert rates(faster) == pytest.approx([3 * rate for rate in rates(usual)])
    assert faster.losses[1] == usual.losses[1]
    assert faster.losses[2] != usual.losses[2]
    assert len(faster.losses) == len(usual.losses)


def test_warmup_ratio(run: Any) -> None:
    usual, none = run(), run("warmup_ratio", 0.0)
    peak = 5e-3
    assert rates(usual) == pytest.approx([peak / 2, peak, *(peak * left / 6 for left in (6, 5, 4, 3, 2, 1))])
    assert rates(none) == pytest.approx([peak * left / 8 for left in (8, 7, 6, 5, 4, 3, 2, 1)])
    assert none.losses[1] == usual.losses[1]


def test_seed(run: Any) -> None:
    usual, other = run(), run("seed", 8)
    assert other.losses[1] != usual.losses[1]
    assert rates(other) == rates(usual)
    assert other.finished.trained_tokens == usual.finished.trained_tokens


def test_r(run: Any) -> None:
    usual, larger = run(), run("r", 8)
    assert trainable(larger) == 2 * trainable(usual)
    assert {tensor.shape[0] for name, tensor in larger.weights().items() if "lora_A" in name} == {8}
    assert larger.losses[1] == usual.losses[1]


def test_lora_alpha(run: Any) -> None:
    usual, stronger = run(), run("lora_alpha", 64)
    assert trainable(stronger) == trainable(usual)
    assert stronger.losses[1] == usual.losses[1]
    assert stronger.losses[2] != usual.losses[2]


def test_lora_dropout_is_in_training_only(run: Any, tmp_path: Path, fixture_base: Path) -> None:
    usual, dropped = run(), run("lora_dropout", 0.5)
    assert dropped.losses[1] == usual.losses[1]  # the adapter begins as nothing, whatever reaches it
    assert dropped.losses[3] != usual.losses[3]
    assert trainable(dropped) == trainable(usual)
    asked = {**ASKED, "lora_config": {"r": 4, "lora_dropout": 0.5}}
    data = rows(pairs(EXAMPLES))
    outcome = Job(tmp_path, fixture_base, data, asked, validation_data=rows(pairs(3))).run()
    last = outcome.of(StepDone)[-1].metrics
    assert last.full_valid_loss == pytest.approx(loss_of(outcome, fixture_base, rows(pairs(3)), STEPS), abs=1e-4)


def test_target_modules(run: Any) -> None:
    usual, fewer = run(), run("target_modules", ("q_proj", "v_proj"))
    assert len(usual.weights()) == 2 * LAYERS
    assert {name.split(".")[-3] for name in fewer.weights()} == {"q_proj", "v_proj"}
    assert len(fewer.weights()) == 2 * 4 * 2
    assert fewer.losses[1] == usual.losses[1]


def test_use_lora(run: Any, fixture_base: Path) -> None:
    usual, full = run(), run("use_lora", False)
    assert (usual.finished.kind, full.finished.kind) == ("adapter", "full")
    base = AutoModelForCausalLM.from_pretrained(fixture_base)
    assert trainable(full) == sum(parameter.numel() for parameter in base.parameters())
    changed = [name for name, tensor in full.weights().items() if not torch.equal(tensor, base.state_dict()[name])]
    assert len(changed) == len(full.weights())
    assert full.losses[1] == usual.losses[1]
    assert rates(full) == rates(usual)


@pytest.mark.parametrize(
    ("thinking", "asked", "learned"),
    [
        (True, "assistant\n", "<think>\n\n</think>\n\nSeven.<|im_end|>"),
        (False, "assistant\n<think>\n\n</think>\n\n", "Seven.<|im_end|>"),
    ],
)
def test_thinking(tmp_path: Path, fixture_base: Path, thinking: bool, asked: str, learned: str) -> None:
    """Of an answer without a thought: the empty thought is learned by a model that thinks, and asked of another."""
    tokenizer = AutoTokenizer.from_pretrained(fixture_base)
    tokenizer.chat_template = HYBRID
    base = tmp_path / "base"
    shutil.copytree(fixture_base, base)
    tokenizer.save_pretrained(base)
    data = rows([("3+4?", "Seven.")])
    job = Job(tmp_path / "job", base, data, {**ASKED, "n_epochs": 10, "batch_size": 1, "thinking": thinking})
    ((document,),) = [example.documents for example in rendered(job)]
    labels = [token for token, counts in zip(document.ids, document.weights, strict=True) if counts]
    assert tokenizer.decode(labels) == learned
    assert tokenizer.decode(document.ids).endswith(f"{asked}{learned}\n")
    outcome = job.run()
    assert outcome.finished.trained_tokens == 10 * len(document)
    assert outcome.losses[10] < outcome.losses[1]


def loss_of(outcome: Outcome, base: Path, data: list[dict[str, Any]], step: int | None = None) -> float:
    """Mean loss per label token of a checkpoint (or the final model) on `data`, by PEFT and transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    artifact = outcome.finished.artifact if step is None else outcome.checkpoint(step).artifact
    model = AutoModelForCausalLM.from_pretrained(base)
    tuned = PeftModel.from_pretrained(model, outcome.blobs.path(artifact.path))
    total, count = 0.0, 0
    for row in data:
        rendered = tokenizer.apply_chat_template(row["messages"], return_dict=True, return_assistant_tokens_mask=True)
        ids = torch.tensor(rendered["input_ids"])
        mask = torch.tensor(rendered["assistant_masks"], dtype=torch.bool)
        with torch.no_grad():
            logits = tuned(input_ids=ids[None]).logits[0]
        total += float(torch.nn.functional.cross_entropy(logits[:-1][mask[1:]], ids[1:][mask[1:]], reduction="sum"))
        count += int(mask[1:].sum())
    return total / count


def test_validation_split(run: Any, fixture_base: Path) -> None:
    usual, held = run(), run("validation_split", 0.25)
    assert len(held.losses) == 6  # six examples are left to train on
    assert held.finished.trained_tokens < usual.finished.trained_tokens
    steps = [report.metrics for report in held.of(StepDone)]
    assert all(step.valid_loss is not None and step.valid_mean_token_accuracy is not None for step in steps)
    assert [step.step for step in steps if step.full_valid_loss is not None] == [3, 6]
    assert all(report.metrics.valid_loss is None for report in usual.of(StepDone))
    sides = split(questions(held.blobs.root.parent / "training.jsonl"), 2, 7)
    held_out = [rows(pairs(EXAMPLES))[index] for index in sides.validation]
    for step in (3, 6):
        expected = loss_of(held, fixture_base, held_out, step)
        assert steps[step - 1].full_valid_loss == pytest.approx(expected, abs=1e-4)


def questions(path: Path) -> list[Question]:
    with path.open("rb") as lines:
        found = list(training_data.read_examples(lines))
    return [question_of(example) for example in found if isinstance(example, training_data.ChatExample)]


def test_equal_prompts_never_stand_on_both_sides(tmp_path: Path, fixture_base: Path) -> None:
    """Three answers to each of four questions, in other spelling: the split takes whole questions."""
    data = rows((f"{'What' if n % 2 else 'what '} is number  {n % 4}?", f"Answer {n}.") for n in range(12))
    job = Job(tmp_path, fixture_base, data, {"n_epochs": 1, "validation_split": 0.25})
    assert job.hyperparameters.validation_examples == 3
    asked = questions(job.training_file)
    sides = split(asked, 3, 7)
    keys = [question.whole for question in asked]
    assert len({keys[row] for row in sides.validation}) == 1
    assert not {keys[row] for row in sides.validation} & {keys[row] for row in sides.training}
    assert not job.run().of(Warned)


def test_one_prompt_for_all_is_divided_with_a_warning(tmp_path: Path, fixture_base: Path) -> None:
    data = rows(("Again?", f"Answer {n}.") for n in range(10))
    outcome = Job(tmp_path, fixture_base, data, {"n_epochs": 1, "validation_split": 0.2, "batch_size": 4}).run()
    assert [warning.code for warning in outcome.of(Warned)] == ["validation_overlap"]
    assert len(outcome.losses) == 2


def test_conversations_that_begin_with_the_same_greeting_are_told_apart(tmp_path: Path, fixture_base: Path) -> None:
    """The greeting comes before anything is asked; it made all rows one question, and the first rows were held out."""
    hello = {"role": "assistant", "content": "Hello!"}
    data = [{"messages": [hello, *row["messages"]]} for row in rows(pairs(20))]
    job = Job(tmp_path, fixture_base, data, {"n_epochs": 1, "validation_split": 0.2, "batch_size": 4})
    sides = split(questions(job.training_file), 4, 7)
    assert sides.validation != (0, 1, 2, 3)
    outcome = job.run()
    assert not outcome.of(Warned)
    held_out = [data[row] for row in sides.validation]
    last = outcome.of(StepDone)[-1].metrics
    assert last.full_valid_loss == pytest.approx(loss_of(outcome, fixture_base, held_out, 4), abs=1e-4)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, fixture_base: Path) -> Outcome:
    """A run that gets worse on validation data which contradicts what is trained."""
    asked = {**ASKED, "n_epochs": 10, "batch_size": 4, "early_stopping_patience": 3, "learning_rate_multiplier": 2.0}
    contrary = rows((question, "No idea at all.") for question, _ in pairs(3))
    job = Job(tmp_path_factory.mktemp("stopped"), fixture_base, rows(pairs(EXAMPLES)), asked, validation_data=contrary)
    return job.run()


def test_early_stopping_patience(stopped: Outcome) -> None:
    losses = {report.metrics.step: report.metrics.valid_loss for report in stopped.of(StepDone)}
    best = min(losses, key=lambda step: losses[step] or math.inf)
    assert stopped.finished.stopped_early
    assert stopped.finished.steps_run == best + 3 == len(losses) < 20
    assert stopped.finished.step == best


def test_the_final_model_is_the_best_one(stopped: Outcome, fixture_base: Path) -> None:
    contrary = rows((question, "No idea at all.") for question, _ in pairs(3))
    best = min(report.metrics.valid_loss or math.inf for report in stopped.of(StepDone))
    assert loss_of(stopped, fixture_base, contrary) == pytest.approx(best, abs=1e-4)


def test_without_patience_all_steps_run_and_the_best_is_kept(tmp_path: Path, fixture_base: Path) -> None:
    asked = {**ASKED, "n_epochs": 5, "batch_size": 4, "learning_rate_multiplier": 2.0}
    contrary = rows((question, "No idea at all.") for question, _ in pairs(3))
    outcome = Job(tmp_path, fixture_base, rows(pairs(EXAMPLES)), asked, validation_data=contrary).run()
    losses = {report.metrics.step: report.metrics.valid_loss or math.inf for report in outcome.of(StepDone)}
    assert len(losses) == outcome.finished.steps_run == 10
    assert not outcome.finished.stopped_early
    assert outcome.finished.step == min(losses, key=lambda step: losses[step]) < 10


def test_evaluation_does_not_disturb_training(tmp_path: Path, fixture_base: Path) -> None:
    """With dropout, a single random number drawn by an evaluation would change every later step."""
    asked = {**ASKED, "lora_config": {"r": 4, "lora_dropout": 0.3}}
    data = rows(pairs(EXAMPLES))
    without = Job(tmp_path / "without", fixture_base, data, asked).run()
    evaluated = Job(tmp_path / "with", fixture_base, data, asked, validation_data=rows(pairs(2))).run()
    assert evaluated.losses == without.losses


def rendered(job: Job) -> list[Example]:
    """Return the job's training examples as its run reads them."""
    return read_file(job.training_file, supervised, load_template(job.base), job.hyperparameters, lambda: None)


def two_answers(weight: int | None) -> list[dict[str, Any]]:
    first: dict[str, Any] = {"role": "assistant", "content": "I do not know."}
    if weight is not None:
        first["weight"] = weight
    return [
        {
            "messages": [
                {"role": "user", "content": "What is number 3?"},
                first,
                {"role": "user", "content": "Guess."},
                {"role": "assistant", "content": "It is 111.", "weight": 1},
            ]
        }
    ]


@pytest.mark.parametrize(
    ("weight", "learned"),
    [(0, "It is 111.<|im_end|>"), (1, "I do not know.<|im_end|>It is 111.<|im_end|>")],
)
def test_messages_of_weight_0_are_read_but_not_learned(
    tmp_path: Path, fixture_base: Path, weight: int, learned: str
) -> None:
    job = Job(tmp_path, fixture_base, two_answers(weight), {**ASKED, "n_epochs": 30, "batch_size": 1})
    tokenizer = AutoTokenizer.from_pretrained(fixture_base)
    ((document,),) = [example.documents for example in rendered(job)]
    labels = [token for token, counts in zip(document.ids, document.weights, strict=True) if counts]
    assert tokenizer.decode(labels) == learned
    outcome = job.run()
    assert outcome.losses[30] < 0.5
    assert outcome.finished.trained_tokens == 30 * len(document)
    forgotten = rows([("What is number 3?", "I do not know.")])
    assert (loss_of(outcome, fixture_base, forgotten) < 0.5) is bool(weight)
