"""docs/moving-from-openai.md as somebody follows it: one terminal, one Python session, every command and snippet."""

from __future__ import annotations

import os
import re
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from openai import BadRequestError, NotFoundError, OpenAI

from tests import services
from tests.acceptance.seed import ADDRESS, BLOCK, DOCS, training_data
from tests.local.rose_up import RoseUp, rose_up

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

PAGE = (DOCS / "moving-from-openai.md").read_text()
ALIASES = re.findall(r'`ROSE_MODEL_ALIASES="(.+)" rose up`', PAGE)
SECONDS = 300
NOT_OFFERED = [
    *("completions", "embeddings", "responses", "batches", "evals", "assistants", "vector_stores"),
    *("images/generations", "audio/speech", "moderations"),
]
OLD = "ft:gpt-4o-mini-2024-07-18:acme::9uJPbR69"


class Follower:
    """Somebody with a terminal and a Python session: what one block sets, the next ones have."""

    def __init__(self, folder: Path, rose: RoseUp) -> None:
        self.folder = folder
        self.rose = rose
        self.names: dict[str, Any] = {}
        self._environment = {
            **rose.environment,
            "PATH": f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}",
            "NO_COLOR": "1",
        }

    def at_home(self, text: str) -> str:
        """Return a block with the address that this ROSE has."""
        return text.replace(ADDRESS, self.rose.settings.url)

    def terminal(self, block: str) -> str:
        """Run a block of commands; one that fails fails the test."""
        script = f"{self.at_home(block)}\nenv -0 > environment"
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=self.folder,
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
        pairs = (one.partition("=") for one in (self.folder / "environment").read_text().split("\0") if one)
        self._environment = {name: value for name, _, value in pairs}
        return done.stdout

    def session(self, block: str) -> None:
        """Run a block of Python as the SDK's user does."""
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(self.folder)
            for name in ("OPENAI_BASE_URL", "OPENAI_API_KEY"):
                patch.setenv(name, self._environment[name])
            exec(block.replace('open("training_data.jsonl", "rb")', 'Path("training_data.jsonl")'), self.names)


@pytest.fixture(scope="module")
def followed(fixture_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Follower, dict[str, str]]]:
    """Somebody who followed the page to its end, and what each block printed; ROSE has the second set of aliases."""
    assert len(ALIASES) == 2
    first, second = (aliases.replace("smollm2", str(fixture_base)) for aliases in ALIASES)
    with services.private_folder() as data:
        folder = tmp_path_factory.mktemp("work")
        (folder / "training_data.jsonl").write_text(training_data())
        printed: dict[str, str] = {}
        before, heading, after = PAGE.partition("### 6.")
        assert heading
        with rose_up(data, {"ROSE_MODEL_ALIASES": first}) as rose:
            follower = Follower(folder, rose)
            follower.names["Path"] = Path
            _follow(follower, before, printed)
        with rose_up(
            data, {"ROSE_MODEL_ALIASES": second.replace("MODEL", follower.names["job"].fine_tuned_model)}
        ) as rose:
            moved = Follower(folder, rose)
            moved.names = follower.names
            moved.terminal(f"export OPENAI_BASE_URL={ADDRESS}/v1 OPENAI_API_KEY=any")
            with client(rose) as now:
                listed = {model.id for model in now.models.list()}
                answer = now.chat.completions.create(
                    model=OLD,
                    messages=[{"role": "user", "content": "What is recursion?"}],
                    temperature=0,
                    max_tokens=80,
                )
            printed["old names"] = msgspec.json.encode([sorted(listed), answer.to_dict()]).decode()
            _follow(moved, after, printed)
            yield moved, printed
        follower.names["client"].close()


def _follow(follower: Follower, part: str, printed: dict[str, str]) -> None:
    for language, block in BLOCK.findall(part):
        if language == "bash":
            printed[block] = follower.terminal(block)
        else:
            assert language == "python"
            follower.session(block)


def client(rose: RoseUp, key: str = "any") -> OpenAI:
    return OpenAI(base_url=f"{rose.settings.url}/v1", api_key=key, max_retries=0, timeout=120)


def test_the_page_runs_as_it_stands(followed: tuple[Follower, dict[str, str]]) -> None:
    follower, printed = followed
    job = follower.names["job"]
    assert (job.status, job.model) == ("succeeded", "gpt-4o-mini-2024-07-18")
    assert re.fullmatch(r"gpt-4o-mini-2024-07-18-ft-\d{8}_\d{6}-acme", job.fine_tuned_model)
    assert follower.names["answer"].model == job.fine_tuned_model
    [listed] = [output for block, output in printed.items() if "/models" in block]
    assert {"gpt-4o-mini", "gpt-4o-mini-2024-07-18"} <= {one["id"] for one in msgspec.json.decode(listed)["data"]}
    [trained] = [output for block, output in printed.items() if "finetune metrics" in block]
    assert "The job has successfully completed" in trained
    assert "train_loss\t" in trained


def test_an_old_name_is_answered_by_the_model_that_replaces_it(followed: tuple[Follower, dict[str, str]]) -> None:
    follower, printed = followed
    listed, answer = msgspec.json.decode(printed["old names"])
    assert OLD in listed
    assert answer["model"] == follower.names["job"].fine_tuned_model
    [taught] = [
        line["messages"][1]["content"]
        for line in map(msgspec.json.decode, training_data().splitlines())
        if line["messages"][0]["content"] == "What is recursion?"
    ]
    assert answer["choices"][0]["message"]["content"] == taught


def test_the_new_project_is_empty_and_every_call_needs_a_key(followed: tuple[Follower, dict[str, str]]) -> None:
    _, printed = followed
    [shown] = [output for block, output in printed.items() if "projects create" in block]
    assert '"data":[]' in shown
    assert {line.split("\t")[1] for line in shown.splitlines() if "\t" in line} >= {"search"}


def test_what_the_table_says_differs_does(followed: tuple[Follower, dict[str, str]]) -> None:
    follower, _ = followed
    key = follower.terminal('printf %s "$ROSE_API_KEY"')
    name, file = "gpt-4o-mini-2024-07-18", follower.names["file"].id
    with client(follower.rose, key) as sdk:
        jobs = sdk.fine_tuning.jobs
        done = jobs.retrieve(follower.names["job"].id)
        assert file.startswith("file_")
        assert done.id.startswith("ftjob_")
        assert done.model_extra is not None
        assert done.model_extra["reserved_model"] == done.fine_tuned_model
        checkpoints = [one.fine_tuned_model_checkpoint for one in jobs.checkpoints.list(done.id)]
        assert checkpoints == [f"{done.fine_tuned_model}:ckpt-step-{2 * epoch}" for epoch in range(20, 0, -1)]
        [result] = done.result_files
        assert sdk.files.content(result).text.startswith("step,train_loss,")
        assert any("few" in warning["code"] for warning in done.model_extra["warnings"])
        with pytest.raises(BadRequestError) as refused:
            jobs.create(model=name, training_file=file, method={"type": "reinforcement"})
        assert refused.value.code == "unsupported_method"
        with pytest.raises(BadRequestError, match="suffix"):
            jobs.create(model=name, training_file=file, suffix="two words")
        with pytest.raises(BadRequestError, match="succeeded") as refused:
            jobs.cancel(done.id)
        assert refused.value.code == "invalid_job_state"
        with pytest.raises(BadRequestError, match=r"Did you mean hyperparameters\.n_epochs"):
            jobs.create(model=name, training_file=file, extra_body={"n_epoch": 1})
        with pytest.raises(NotFoundError):
            sdk.files.retrieve("file-9uJPbR69")
        with pytest.raises(NotFoundError, match=name):
            sdk.chat.completions.create(model="gpt-5", messages=[{"role": "user", "content": "x"}])
        with pytest.raises(BadRequestError, match="webhook_private_targets"):
            sdk.webhooks.create(name="ends", url="https://127.0.0.1/ends", event_types=["fine_tuning.job.succeeded"])
        asked: Any = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]
        with pytest.raises(BadRequestError, match=r"content\[0\]"):
            sdk.chat.completions.create(model=name, messages=asked)
        with pytest.raises(BadRequestError, match="response_format"):
            sdk.chat.completions.create(
                model=name, messages=[{"role": "user", "content": "x"}], response_format={"type": "json_object"}
            )


def test_preferences_are_trained_as_there(followed: tuple[Follower, dict[str, str]]) -> None:
    """OpenAI's DPO: its data, its beta, and the numbers that tell whether the preferred answers win."""
    follower, _ = followed
    key = follower.terminal('printf %s "$ROSE_API_KEY"')
    pairs = b"".join(
        msgspec.json.encode(
            {
                "input": {"messages": [{"role": "user", "content": f"Is {n} a number?"}]},
                "preferred_output": [{"role": "assistant", "content": f"Yes, {n} is one."}],
                "non_preferred_output": [{"role": "assistant", "content": "Who knows."}],
            }
        )
        + b"\n"
        for n in range(12)
    )
    with client(follower.rose, key) as sdk:
        file = sdk.files.create(file=("pairs.jsonl", pairs), purpose="fine-tune")
        asked: Any = {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.2, "n_epochs": 4, "batch_size": 4}}}
        name = "gpt-4o-mini-2024-07-18"
        job = sdk.fine_tuning.jobs.create(model=name, training_file=file.id, method=asked)
        shown = follower.terminal(f"rose finetune watch {job.id}")
        done = sdk.fine_tuning.jobs.retrieve(job.id)
        assert done.status == "succeeded", shown
        assert done.method is not None
        assert done.method.type == "dpo"
        assert done.method.dpo is not None
        assert done.method.dpo.hyperparameters is not None
        assert done.method.dpo.hyperparameters.beta == 0.2
        series = sdk.get(
            f"/fine_tuning/jobs/{job.id}/metrics?metrics=reward_accuracy,reward_margin", cast_to=dict[str, Any]
        )
        assert series["series"]["reward_accuracy"][-1] == 1.0
        assert series["series"]["reward_margin"][0] == 0.0 < series["series"]["reward_margin"][-1]
        assert done.fine_tuned_model is not None
        sdk.chat.completions.create(
            model=done.fine_tuned_model, messages=[{"role": "user", "content": "Is 3 a number?"}], max_tokens=8
        )
        asked["dpo"]["hyperparameters"]["beta"] = 3
        with pytest.raises(BadRequestError, match="beta"):
            sdk.fine_tuning.jobs.create(model=name, training_file=file.id, method=asked)


@pytest.mark.parametrize("path", NOT_OFFERED)
def test_what_is_not_offered_is_a_404(followed: tuple[Follower, dict[str, str]], path: str) -> None:
    follower, _ = followed
    key = follower.terminal('printf %s "$ROSE_API_KEY"')
    with client(follower.rose, key) as sdk, pytest.raises(NotFoundError):
        sdk.post(f"/{path}", cast_to=dict[str, Any], body={"model": "gpt-4o-mini", "input": "x", "prompt": "x"})
    assert path.partition("/")[0].replace("_", " ") in PAGE
