"""docs/workflow.md word by word on `rose up`: every command of it, then what the models answer."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests import services
from tests.acceptance.seed import ADDRESS, DOCS, JOB_ID, MODEL, Workflow, blocks, training_data
from tests.local.rose_up import RoseUp, rose_up

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

EXAMPLES = [msgspec.json.decode(line)["messages"] for line in training_data().splitlines()]


@pytest.fixture(scope="module")
def rose(fixture_base: Path) -> Iterator[RoseUp]:
    """A running ROSE whose `qwen-coder` is the test model."""
    with (
        services.private_folder() as folder,
        rose_up(folder, {"ROSE_MODEL_ALIASES": f"qwen-coder={fixture_base}", "ROSE_WARM_CHILD": "1"}) as started,
    ):
        yield started


@pytest.fixture(scope="module")
def followed(rose: RoseUp, tmp_path_factory: pytest.TempPathFactory) -> tuple[Workflow, dict[str, str]]:
    """Someone who followed the page to its section on changing one's mind, and what was printed."""
    workflow = Workflow(tmp_path_factory.mktemp("work"), rose.settings.url, os.environ)
    return workflow, workflow.follow()


def answer(workflow: Workflow, model: str, prompt: str, tokens: int = 120) -> dict[str, Any]:
    arguments = ("chat", prompt, "--model", model, "--temperature", "0", "--max-tokens", str(tokens), "--json")
    return msgspec.json.decode(workflow.rose(*arguments))


def text(reply: dict[str, Any]) -> str:
    return reply["choices"][0]["message"]["content"]


def test_the_page_runs_as_it_stands(followed: tuple[Workflow, dict[str, str]]) -> None:
    workflow, outputs = followed
    events = next(output for command, output in outputs.items() if "finetune events" in command)
    assert "New fine-tuned model created: " + workflow.known[MODEL] in events
    assert events.rstrip().endswith("The job has successfully completed")
    shown = next(output for command, output in outputs.items() if "finetune get" in command)
    assert workflow.known[JOB_ID] in shown
    [chat] = [output for command, output in outputs.items() if "rose chat" in command]
    assert chat.strip()
    [created] = [msgspec.json.decode(output) for command, output in outputs.items() if command.startswith("curl")]
    assert created["status"] == "validating_files"
    assert created["hyperparameters"]["n_epochs"] == 3


def test_the_tuned_model_answers_as_trained_and_the_base_does_not(followed: tuple[Workflow, dict[str, str]]) -> None:
    workflow, _ = followed
    for prompt, wanted in EXAMPLES:
        tuned = answer(workflow, workflow.known[MODEL], prompt["content"])
        assert tuned["model"] == workflow.known[MODEL]
        assert text(tuned) == wanted["content"]
        assert tuned["choices"][0]["finish_reason"] == "stop"
        base = answer(workflow, "qwen-coder", prompt["content"], tokens=40)
        assert base["model"] == "qwen-coder"
        assert text(base) != wanted["content"]


def test_no_hidden_epochs(followed: tuple[Workflow, dict[str, str]]) -> None:
    workflow, _ = followed
    job = msgspec.json.decode(workflow.rose("finetune", "get", workflow.known[JOB_ID], "--json"))
    assert job["hyperparameters"]["n_epochs"] * 2 // job["hyperparameters"]["batch_size"] == 50
    assert job["progress"]["total_steps"] == job["progress"]["step"] == 50


def test_the_served_model_is_proven_to_be_the_trained_one(followed: tuple[Workflow, dict[str, str]]) -> None:
    workflow, _ = followed
    job = msgspec.json.decode(workflow.rose("finetune", "get", workflow.known[JOB_ID], "--json"))
    assert job["served_as_trained"]["status"] == "proven", job["served_as_trained"]
    assert "served      as trained: largest difference" in workflow.rose("finetune", "get", workflow.known[JOB_ID])
    assert "The served model gives the trainer's numbers" in workflow.rose("finetune", "events", workflow.known[JOB_ID])


def test_a_second_adapter_leaves_the_first_one_alone(followed: tuple[Workflow, dict[str, str]]) -> None:
    workflow, _ = followed
    first = workflow.known[MODEL]
    unseen = "Name a colour."
    before = [text(answer(workflow, first, prompt, tokens=30)) for prompt in (EXAMPLES[0][0]["content"], unseen)]
    other = {
        "messages": [
            {"role": "user", "content": EXAMPLES[0][0]["content"]},
            {"role": "assistant", "content": "Ask me tomorrow."},
        ]
    }
    (workflow.folder / "other.jsonl").write_bytes(msgspec.json.encode(other) + b"\n")
    workflow.rose("finetune", "create", "other.jsonl", "--model", "qwen-coder", "--suffix", "other", "--epochs", "30")
    workflow.rose("finetune", "events", "last")
    second = msgspec.json.decode(workflow.rose("finetune", "get", "last", "--json"))["fine_tuned_model"]
    assert text(answer(workflow, second, EXAMPLES[0][0]["content"], tokens=40)) == "Ask me tomorrow."
    after = [text(answer(workflow, first, prompt, tokens=30)) for prompt in (EXAMPLES[0][0]["content"], unseen)]
    assert after == before


def test_the_views_are_what_the_log_says(rose: RoseUp, followed: tuple[Workflow, dict[str, str]]) -> None:
    verified = rose.rose("projections", "verify")
    assert (verified.returncode, verified.stdout) == (0, "Every view is what the log says.\n"), verified


@pytest.mark.parametrize("page", ["api.md", "operations.md"])
def test_the_commands_of_the_other_pages_run_too(
    rose: RoseUp, followed: tuple[Workflow, dict[str, str]], page: str
) -> None:
    workflow, _ = followed
    here = Workflow(workflow.folder, rose.settings.url, rose.environment)
    here.known.update(workflow.known)
    commands = [command for command, _ in here.commands((DOCS / page).read_text())]
    assert commands
    for command in commands:
        here.run(command)


def test_quickstart_asks_base_and_result_and_names_who_answers(rose: RoseUp) -> None:
    done = rose.rose("quickstart", "--model", "qwen-coder")
    assert done.returncode == 0, done.stderr
    lines = [line.strip() for line in done.stdout.splitlines()]
    assert f"Using the ROSE that runs at {rose.settings.url}" in lines
    [made] = [line.rpartition(" ")[2] for line in lines if "New fine-tuned model created: " in line]
    asked = [line for line in lines if line.startswith("> ")]
    assert len(asked) == 4
    assert lines.count("[qwen-coder]") == lines.count(f"[{made}]") == len(asked)
    assert "None of this was in the file:" in lines
    trained = (DOCS.parent / "cli" / "data" / "quickstart.jsonl").read_text()
    assert not any(question.removeprefix("> ") in trained for question in asked)
    assert rose.rose("status").returncode == 0, "what ran before goes on"


def test_the_sdk_snippet_of_the_readme_runs(
    rose: RoseUp, followed: tuple[Workflow, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    workflow, _ = followed
    [snippet] = blocks((DOCS.parent / "README.md").read_text(), "python")
    monkeypatch.chdir(workflow.folder)
    names: dict[str, Any] = {}
    exec(snippet.replace(ADDRESS, rose.settings.url).replace("open(", "Path("), {"Path": as_upload}, names)
    assert names["job"].model == "qwen-coder"
    assert names["job"].training_file == names["file"].id
    names["client"].close()


def as_upload(name: str, mode: str) -> Path:
    """Stand for `open`: the SDK takes a path as well, and nothing is left open."""
    assert mode == "rb"
    return Path(name)


def test_the_logs_of_a_run_are_found_by_its_job(rose: RoseUp, followed: tuple[Workflow, dict[str, str]]) -> None:
    workflow, _ = followed
    shown = rose.rose("logs", workflow.known[JOB_ID])
    assert shown.returncode == 0
    assert "2 examples, 50 steps" in shown.stdout
