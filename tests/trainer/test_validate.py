"""The validation child: what it counts, resolves, warns of and refuses; as a real process where that matters."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from rose.domain.artifacts import Artifact
from rose.domain.hyperparameters import LoraSettings
from rose.domain.job_values import BaseModel, BaseRequest, ParentModel
from rose.errors import InvalidRequest
from rose.language_models.locate import BaseChanged, ModelNotAvailable, tiny_folder
from rose.language_models.template import load_template
from tests.eventually import eventually
from tests.hyperparameters import parse
from tests.trainer.runs import SEED_EXAMPLES, pairs, rows
from trainer import fetching
from trainer import validate as validation
from trainer.protocol import Failed, PhaseChanged, Report, ValidationPassed, ValidationSpec

SECONDS = 100
Make = Callable[..., ValidationSpec]


@pytest.fixture
def make(tmp_path: Path, fixture_base: Path) -> Make:
    """Factory of specifications; files are rows or raw bytes."""

    def write(name: str, content: Iterable[dict[str, Any]] | bytes) -> str:
        path = tmp_path / name
        lines = content if isinstance(content, bytes) else b"".join(msgspec.json.encode(row) + b"\n" for row in content)
        path.write_bytes(lines)
        return str(path)

    def spec(
        training: Iterable[dict[str, Any]] | bytes = tuple(rows(SEED_EXAMPLES)),
        validation: Iterable[dict[str, Any]] | bytes | None = None,
        hyperparameters: dict[str, Any] | None = None,
        base: BaseRequest | None = None,
        **more: Any,
    ) -> ValidationSpec:
        values: dict[str, Any] = {
            "job_id": "ftjob_test",
            "base": base or BaseRequest(source=str(fixture_base)),
            "blob_root": str(tmp_path),
            "training_file_id": "file_t",
            "training_file": write("training.jsonl", training),
            "validation_file_id": "file_v" if validation is not None else None,
            "validation_file": write("validation.jsonl", validation) if validation is not None else None,
            "method": "supervised",
            "requested": parse(hyperparameters or {}),
            "seed": 7,
            "minimum_examples": 1,
            "base_learning_rates": {},
            "models_dir": str(tmp_path / "models"),
            "hub_offline": True,
        }
        return ValidationSpec(**{**values, **more})

    return spec


def passed(spec: ValidationSpec) -> ValidationPassed:
    answer = validate(spec)
    assert isinstance(answer, ValidationPassed), answer
    return answer


def refused(spec: ValidationSpec) -> Failed:
    answer = validate(spec)
    assert isinstance(answer, Failed), answer
    return answer


def validate(spec: ValidationSpec) -> ValidationPassed | Failed:
    return validation.validate(spec, lambda _: None)


def warned(answer: ValidationPassed) -> dict[str, str]:
    return {warning.code: warning.message for warning in answer.warnings}


def long_row(words: int, answer: str = "Yes.") -> dict[str, Any]:
    [row] = rows([("word " * words, answer)])
    return row


def test_seeds_two_examples_give_fifty_steps(make: Make, fixture_base: Path) -> None:
    answer = passed(make())
    numbers = answer.hyperparameters
    assert (numbers.n_epochs, numbers.batch_size, numbers.total_steps) == (25, 1, 50)
    assert numbers.learning_rate == numbers.base_learning_rate == 3e-3
    assert (numbers.seed, numbers.training_examples, numbers.maximum_tokens) == (7, 2, 2048)
    template = load_template(fixture_base)
    counted = sum(
        len(template.prompt([{"role": "user", "content": question}]))
        + len(template.tokenizer(said + "<|im_end|>\n", add_special_tokens=False)["input_ids"])
        for question, said in SEED_EXAMPLES
    )
    assert answer.tokens == counted
    assert answer.base.source == str(fixture_base)
    assert answer.base.fingerprint
    assert warned(answer) == {"few_examples": "Training file has 2 example(s); at least 10 are recommended"}


def test_a_rate_from_the_settings_wins_over_the_models_own(make: Make, fixture_base: Path) -> None:
    answer = passed(
        make(base_learning_rates={str(fixture_base): 1e-4}, hyperparameters={"learning_rate_multiplier": 2})
    )
    assert answer.hyperparameters.learning_rate == 2e-4


def test_the_rank_follows_the_learned_tokens_and_the_targeted_layers(make: Make) -> None:
    """k_proj of the fixture takes 4 x (128 + 64) = 768 numbers per rank."""

    def rank(examples: int, **lora: Any) -> int:
        spec = make(training=[long_row(1, "word " * 500)] * examples, hyperparameters={"lora_config": lora})
        chosen = passed(spec).hyperparameters.lora_config
        assert chosen is not None
        return chosen.r

    assert rank(20) == rank(2, target_modules=["k_proj"]) == 16
    assert rank(30, target_modules=["k_proj"]) > 16


def test_needs_are_a_floor_that_grows_with_what_is_trained(make: Make) -> None:
    def needed(**hyperparameters: Any) -> int:
        memory = passed(make(hyperparameters=hyperparameters)).needs["memory_bytes"]
        assert isinstance(memory, int)
        return memory

    one_layer_kind = needed(lora_config={"target_modules": ["q_proj"]})
    small, large, full = needed(), needed(lora_config={"r": 32}), needed(use_lora=False)
    assert 918_912 * 2 < one_layer_kind < small < large < full == 918_912 * 16


@pytest.mark.parametrize(
    ("training", "says"),
    [
        (b'{"messages": [}\n', "Example 1 (line 1): not valid JSON: expecting value at column 15"),
        (
            b'\n{"messages": [{"role": "bot", "content": ""}]}\n',
            'Example 1, message 1 (line 2): messages[0].role is "bot"',
        ),
        (b'{"prompt": "a", "completion": "b"}\n', "prompt/completion pairs; convert the file first"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "lone surrogate"),
    ],
)
def test_bad_data_fails_with_example_line_and_reason(make: Make, training: bytes, says: str) -> None:
    answer = refused(make(training))
    assert (answer.code, answer.param, answer.retryable) == ("invalid_training_file", "training_file", False)
    assert answer.message.startswith("The job failed due to an invalid training file. Invalid file format. Example 1")
    assert says in answer.message


def test_the_first_fifty_problems_are_kept_and_all_are_counted(make: Make) -> None:
    answer = refused(make(b"no json\n" * 70))
    assert len(answer.problems) == 50
    assert answer.problems[49].startswith("Example 50 (line 50): not valid JSON")
    assert "(70 problems in all)" in answer.message


def test_a_bad_validation_file_is_named_as_such(make: Make) -> None:
    answer = refused(make(validation=b"{}\n"))
    assert (answer.code, answer.param) == ("invalid_training_file", "validation_file")
    assert "invalid validation file" in answer.message
    assert (
        refused(make(validation=b"\n")).message == "Validation file has 0 example(s), but must have at least 1 examples"
    )


def test_too_few_examples_fail_with_openais_words(make: Make) -> None:
    answer = refused(make(rows(pairs(7)), minimum_examples=10))
    assert answer.code == "invalid_n_examples"
    assert answer.message == "Training file has 7 example(s), but must have at least 10 examples"
    assert refused(make(b"")).code == "invalid_n_examples"
    assert not warned(passed(make(rows(pairs(10)), minimum_examples=10)))


def test_a_split_that_holds_nothing_out_says_so(make: Make) -> None:
    alone = passed(make(rows(pairs(1)), hyperparameters={"validation_split": 0.2}))
    assert alone.hyperparameters.validation_examples == 0
    assert warned(alone)["nothing_held_out"] == (
        "validation_split is 0.2, but nothing is held out of 1 example(s): there is no validation loss, and training "
        "never stops early"
    )
    for count, asked in ((1, {}), (2, {"validation_split": 0.2}), (1, {"validation_split": 0})):
        assert "nothing_held_out" not in warned(passed(make(rows(pairs(count)), hyperparameters=asked)))


def test_long_examples_are_cut_with_a_warning_that_names_lines(make: Make) -> None:
    training = [*rows(pairs(9)), long_row(3000), long_row(4000)]
    assert warned(passed(make(training))) == {
        "examples_cut": "2 conversation(s) of the training file are longer than the model's context and lose their "
        "oldest turns: lines 10, 11"
    }
    many = passed(make([long_row(3000 + n) for n in range(23)]))
    assert warned(many)["examples_cut"].endswith("19, 20 and 3 more")


def test_an_answer_longer_than_the_context_fails_with_its_line(make: Make) -> None:
    answer = refused(make([*rows(pairs(2)), long_row(1, "word " * 3000)]))
    assert answer.code == "invalid_training_file"
    assert "Example 3 (line 3): the answer alone has" in answer.message
    assert answer.message.count("Example 3") == 1


def test_what_stands_in_both_files_is_named(make: Make) -> None:
    shared = rows([("  What is\tnumber 3?", "it is 111 and very very very NICE.")])
    answer = passed(make(rows(pairs(12)), validation=[*shared, *rows([("New?", "Yes.")])]))
    assert warned(answer) == {
        "validation_overlap": "1 conversation(s) of the training file stand in the validation file too, so the "
        "validation loss says less: line 4"
    }
    assert answer.hyperparameters.validation_examples == 2
    assert answer.validation_tokens > 0


def test_repeated_conversations_are_counted(make: Make) -> None:
    assert warned(passed(make([*rows(pairs(12)), *rows(pairs(3))]))) == {
        "repeated_examples": "3 conversation(s) stand in the training file more than once"
    }


def test_calls_of_different_tools_are_different_conversations(make: Make) -> None:
    def calling(name: str) -> dict[str, Any]:
        call = {"id": "1", "type": "function", "function": {"name": name, "arguments": "{}"}}
        return {"messages": [{"role": "user", "content": "Do."}, {"role": "assistant", "tool_calls": [call]}]}

    assert "repeated_examples" not in warned(passed(make([calling("a"), calling("b")])))
    assert "repeated_examples" in warned(passed(make([calling("a"), calling("a")])))


def test_an_unknown_layer_is_refused_before_a_trainer_loads_the_model(make: Make) -> None:
    spec = make(hyperparameters={"lora_config": {"target_modules": ["q_proj", "c_attn"]}})
    with pytest.raises(InvalidRequest, match=r"names c_attn, .*has: down_proj, gate_proj") as caught:
        validate(spec)
    assert caught.value.param == "hyperparameters.lora_config.target_modules"


def test_a_split_beside_a_validation_file_is_refused(make: Make) -> None:
    with pytest.raises(InvalidRequest, match="exclude each other"):
        validate(make(validation=rows(pairs(2)), hyperparameters={"validation_split": 0.5}))


def test_the_shape_of_the_parents_adapter_is_kept(make: Make, fixture_base: Path) -> None:
    lora = {"r": 4, "lora_alpha": 8.0, "lora_dropout": 0.1, "target_modules": ["q_proj"]}
    parent = ParentModel(name="m", kind="adapter", artifact=Artifact(path="x", bytes=1, sha256="0"), lora=lora)
    pinned = passed(make()).base
    base = BaseRequest(source=str(fixture_base), parent=parent, pinned=pinned)
    assert passed(make(base=base)).hyperparameters.lora_config == msgspec.convert(lora, LoraSettings)
    other = BaseModel(source=str(fixture_base), revision=None, fingerprint="0" * 64)
    with pytest.raises(BaseChanged, match="is not the one that the model 'm' was made with") as caught:
        validate(make(base=BaseRequest(source=str(fixture_base), parent=parent, pinned=other)))
    assert (caught.value.code, caught.value.param) == ("base_changed", "model")


# --- as a process


def start(spec: ValidationSpec, folder: Path) -> tuple[subprocess.Popen[bytes], int]:
    path = folder / "spec.json"
    path.write_bytes(msgspec.json.encode(spec))
    read_fd, write_fd = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-m", "trainer.validate", str(path)],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=[write_fd],
        env={**os.environ, "ROSE_REPORT_FD": str(write_fd)},
        cwd=Path(__file__).parents[2],
    )
    os.close(write_fd)
    return process, read_fd


def finish(process: subprocess.Popen[bytes], read_fd: int) -> tuple[int, Sequence[Report], str]:
    with os.fdopen(read_fd, "rb") as pipe, process:
        reports = [msgspec.json.decode(line, type=Report) for line in pipe]
        log = process.stderr.read().decode() if process.stderr else ""
        return process.wait(SECONDS), reports, log


def test_the_child_answers_by_one_report_and_never_loads_torch(make: Make, tmp_path: Path) -> None:
    status, reports, log = finish(*start(make(), tmp_path))
    assert (status, [type(report) for report in reports]) == (0, [PhaseChanged, ValidationPassed]), log


def test_torch_cannot_be_loaded_by_the_child(make: Make, tmp_path: Path) -> None:
    (tmp_path / "spec.json").write_bytes(msgspec.json.encode(make()))
    code = (
        "import sys, trainer.child, trainer.validate\n"
        f"trainer.validate.main([{str(tmp_path / 'spec.json')!r}])\n"
        "print([name for name, module in sys.modules.items() if name.split('.')[0] == 'torch' and module])"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "ROSE_REPORT_FD": "2"},
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,  # stays open until the output is read: the child leaves when it closes
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.read() == b"[]\n"


def test_a_model_that_is_not_there_is_a_plain_failure(make: Make, tmp_path: Path) -> None:
    status, reports, log = finish(*start(make(base=BaseRequest(source="someone/nothing")), tmp_path))
    [report] = reports
    assert isinstance(report, Failed)
    assert (status, report.code, report.param) == (0, "model_not_available", "model")
    assert "rose models pull someone/nothing" in report.message
    assert "Traceback" not in log


@pytest.mark.anyio
async def test_tiny_is_built_on_the_way_and_the_builder_ends_with_the_child(make: Make, tmp_path: Path) -> None:
    process, read_fd = start(make(base=BaseRequest(source="tiny")), tmp_path)
    child = psutil.Process(process.pid)
    found: list[psutil.Process] = []

    def building() -> bool:
        found[:] = [one for one in child.children() if "rose.language_models.tiny" in one.cmdline()]
        return bool(found)

    await eventually(building, seconds=SECONDS)
    builder = found[0]
    process.send_signal(signal.SIGKILL)
    status, reports, _ = finish(process, read_fd)
    assert status == -signal.SIGKILL
    assert set(reports) <= {PhaseChanged(phase="build")}
    await eventually(lambda: not builder.is_running() or builder.status() == psutil.STATUS_ZOMBIE, seconds=SECONDS)
    assert not tiny_folder(tmp_path / "models").exists()


def test_a_download_is_told_while_it_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Make) -> None:
    """The hub is replaced by files that appear where its library would put them."""
    told: list[str] = []
    heard = threading.Event()

    def download(source: str, **_: Any) -> Any:
        blobs = fetching.hub_cache_folder(source) / "blobs"
        blobs.mkdir(parents=True)
        (blobs / "weights.incomplete").write_bytes(b"x")
        assert heard.wait(SECONDS)
        raise ModelNotAvailable("enough")

    monkeypatch.setattr(fetching, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(fetching, "locate", download)
    monkeypatch.setattr(fetching, "hub_cache_folder", lambda source: tmp_path / "cache" / source)
    with pytest.raises(ModelNotAvailable, match="enough"):
        validation.validate(
            make(base=BaseRequest(source="someone/large")), lambda phase: (told.append(phase), heard.set())[0]
        )
    assert told == ["download"]


def test_a_file_of_problems_is_not_read_to_its_end(make: Make) -> None:
    answer = refused(make(b'{"messages": []}\n' * 3000))
    assert answer.message.endswith("(1000 problems; the rest was not read)")
    assert len(answer.problems) == 50
