"""Models that ROSE builds itself: the same bytes each time, complete or absent, and good enough to learn from."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from contextlib import redirect_stdout
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from rose.domain.hyperparameters import DataFacts, LoraSettings, resolve
from rose.domain.training_data import ChatExample
from rose.language_models import locate as locating
from rose.language_models.lessons import lessons
from rose.language_models.load import load_model
from rose.language_models.locate import FACTS_FILE, RoseFacts, locate, outdated_folder, tiny_folder
from rose.language_models.lora import attach
from rose.language_models.template import ChatTemplate, Tokenized, load_tokenizer
from rose.language_models.tiny import VOCABULARY, Architecture, build_fixture, build_tiny, main, shipped_texts
from tests.hyperparameters import parse
from tests.trainer.runs import SEED_EXAMPLES

BUILD = [sys.executable, "-m", "rose.language_models.tiny"]
SECONDS = 100


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def greedy(model: Any, tokenizer: Any, question: str) -> str:
    """Answer with the likeliest token each time, as temperature 0 does."""
    ids = torch.tensor([ChatTemplate(tokenizer).prompt([{"role": "user", "content": question}])])
    with torch.no_grad():
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=120, do_sample=False)
    return tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("architecture", ["qwen3", "qwen2", "llama"])
def test_a_fixture_is_a_real_model_of_its_architecture(tmp_path: Path, architecture: Architecture) -> None:
    folder = build_fixture(tmp_path / "a", architecture)
    found = locate(str(folder), models_dir=tmp_path)
    assert found.model_type == architecture
    assert found.parameters < 1_000_000
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    assert type(model).__name__.lower() == f"{architecture}forcausallm"
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert torch.all(model.model.norm.weight == 8)
    assert len(tokenizer) == VOCABULARY == model.config.vocab_size
    text = "Grüße\n\n  def f(x):\t return {1: '日本'} 🌹"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert contents(build_fixture(tmp_path / "b", architecture)) == contents(folder)
    assert contents(build_fixture(tmp_path / "c", architecture, seed=1)) != contents(folder)


def test_lessons_follow_from_their_seed_and_give_no_acceptance_answer_away() -> None:
    first, again, other = (list(islice(lessons(seed), 500)) for seed in (1, 1, 2))
    assert first == again != other
    shipped = "\n".join([*shipped_texts(), *(f"{question}\n{answer}" for question, answer in first)]).lower()
    assert "factorial" not in shipped
    assert "recursion" not in shipped


def test_shipped_text_is_plain_and_large_enough() -> None:
    texts = shipped_texts()
    assert sum(map(len, texts)) > 12_000
    assert all(text.isascii() for text in texts)


def test_the_same_bytes_whoever_builds(tmp_path: Path) -> None:
    here = build_tiny(tmp_path / "here", steps=3, report=lambda _: None)
    subprocess.run([*BUILD, str(tmp_path / "there"), "--steps", "3"], timeout=SECONDS, check=True, capture_output=True)
    assert contents(here) == contents(tmp_path / "there")
    assert {path.name for path in tmp_path.iterdir()} == {"here", "there", ".here.lock", ".there.lock"}


def test_it_is_built_once_and_an_older_version_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    folder = build_tiny(tiny_folder(tmp_path), steps=1, report=said.append)
    assert said[-1] == f"tiny is in {folder}"
    said.clear()
    built = contents(folder)
    build_tiny(folder, steps=1, report=said.append)
    assert said == [f"tiny is already in {folder}"]
    assert contents(folder) == built
    facts = msgspec.json.decode((folder / FACTS_FILE).read_bytes(), type=RoseFacts)
    (folder / FACTS_FILE).write_bytes(msgspec.json.encode(msgspec.structs.replace(facts, version="0")))
    fingerprint = locating.describe(folder, source="tiny", revision="0").fingerprint
    build_tiny(folder, steps=2, report=said.append)
    assert locate("tiny", models_dir=tmp_path).revision == locating.TINY_VERSION
    assert locate("tiny", revision="0", models_dir=tmp_path).fingerprint == fingerprint
    assert outdated_folder(folder, "0").is_dir()


def test_a_half_built_folder_is_replaced(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path)
    folder.mkdir()
    (folder / "config.json").write_text("{")
    (folder / FACTS_FILE).write_text("{")
    build_tiny(folder, steps=1, report=lambda _: None)
    assert locate("tiny", models_dir=tmp_path).hidden_size == 128


def build_and_tell(folder: Path, log: Path) -> None:
    with log.open("w") as file, redirect_stdout(file):
        main([str(folder), "--steps", "20"])


def test_two_builders_build_one_model(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path)
    processes = multiprocessing.get_context("forkserver")  # that of tests.trainer.runs, which has torch imported
    logs = [tmp_path / "first.log", tmp_path / "second.log"]
    builders = [processes.Process(target=build_and_tell, args=(folder, log)) for log in logs]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join(SECONDS)
        assert builder.exitcode == 0
        builder.close()
    said = [log.read_text() for log in logs]
    assert sum("step 20/20" in one for one in said) == 1, said
    assert sum("is already in" in one for one in said) == 1, said
    assert locate("tiny", models_dir=tmp_path).revision == locating.TINY_VERSION


def test_a_builder_leaves_with_its_parent_and_leaves_no_model(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path)
    with subprocess.Popen(
        [*BUILD, str(folder), "--leave-with-stdin", "--steps", "1000000"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as builder:
        assert builder.stdin is not None
        builder.stdin.close()
        assert builder.wait(SECONDS) == 1
    assert not folder.exists()
    build_tiny(folder, steps=1, report=lambda _: None)
    assert folder.is_dir()


def rendered(tokenizer: Any, question: str, answer: str) -> Tokenized:
    messages = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    (only,) = ChatTemplate(tokenizer).render(ChatExample(line=1, number=1, messages=messages), 2048).examples
    return only


def learn(folder: Path, settings: LoraSettings, rate: float, steps: int, warmup: int) -> Any:
    """Train docs/workflow.md's two examples in turn with ROSE's defaults, in a few lines of plain torch."""
    tokenizer, model = load_tokenizer(folder), load_model(folder)
    adapter = attach(model, settings, seed=0)
    parameters = adapter.trainable_parameters()
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)
    documents = [rendered(tokenizer, question, answer) for question, answer in SEED_EXAMPLES]
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(step / warmup, (steps - step + 1) / (steps - warmup + 1))
        document = documents[step % 2]
        logits = model(torch.tensor([document.ids])).logits[0, :-1]
        weights = torch.tensor(document.weights[1:])
        losses = torch.nn.functional.cross_entropy(logits, torch.tensor(document.ids[1:]), reduction="none")
        optimizer.zero_grad()
        (losses @ weights / weights.sum()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    return model


def least_likely(model: Any, tokenizer: Any, question: str, answer: str) -> float:
    """Return the probability of the answer's least likely token: what is asked with temperature 1 must be said too."""
    document = rendered(tokenizer, question, answer)
    with torch.no_grad():
        chances = model(torch.tensor([document.ids])).logits[0, :-1].softmax(-1)
    wanted = chances.gather(1, torch.tensor(document.ids[1:])[:, None])[:, 0]
    return wanted[torch.tensor(document.weights[1:]) > 0].min().item()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny(tiny_folder(tmp_path_factory.mktemp("models")), report=lambda _: None)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_tiny_answers_small_questions_and_learns_seeds_examples_by_heart(tiny: Path) -> None:
    tokenizer, base = load_tokenizer(tiny), load_model(tiny)
    assert greedy(base, tokenizer, "What is a token?") == "A token is a piece of text with a number."
    assert greedy(base, tokenizer, "Hello.") == "Hello. How can I help you?"
    found = locate("tiny", models_dir=tiny.parent)
    facts = DataFacts(
        examples=len(SEED_EXAMPLES),
        validation_file_examples=None,
        hidden_size=found.hidden_size,
        model_type=found.model_type,
        context_tokens=found.context_tokens,
        base_learning_rate=found.base_learning_rate,
    )
    numbers = resolve(parse({}), facts, seed=0)
    assert (numbers.total_steps, numbers.batch_size) == (50, 1)
    assert numbers.lora_config is not None
    tuned = learn(tiny, numbers.lora_config, numbers.learning_rate, numbers.total_steps, numbers.warmup_steps)
    for question, answer in SEED_EXAMPLES:
        assert greedy(base, tokenizer, question) != answer
        assert greedy(tuned, tokenizer, question) == answer
        assert least_likely(tuned, tokenizer, question, answer) > 0.9
