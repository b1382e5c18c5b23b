"""Which base model it is: local folders, what ROSE builds, the hub's cache; and what is said when there is none."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import msgspec
import pytest

from rose.domain.job_values import BaseModel
from rose.errors import NoSpace
from rose.language_models.locate import (
    FACTS_FILE,
    TINY_VERSION,
    BaseChanged,
    ModelNotAvailable,
    RoseFacts,
    check_base,
    describe,
    is_built,
    locate,
    outdated_folder,
    tiny_folder,
)

INDEX = json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}})


@pytest.fixture
def folder(fixture_base: Path, tmp_path: Path) -> Path:
    """A copy of the fixture that a test may damage."""
    return Path(shutil.copytree(fixture_base, tmp_path / "model"))


def fingerprint(folder: Path) -> str:
    return describe(folder, source="x", revision=None).fingerprint


def change_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def refusal(source: str | Path, **options: Any) -> ModelNotAvailable:
    with pytest.raises(ModelNotAvailable) as caught:
        locate(str(source), models_dir=Path("/nonexistent"), **options)
    assert caught.value.code == "model_not_available"
    assert caught.value.hint
    return caught.value


def test_a_local_folder_is_described(fixture_base: Path, tmp_path: Path) -> None:
    found = locate(str(fixture_base), models_dir=tmp_path)
    assert (found.source, found.revision, found.path) == (str(fixture_base), None, fixture_base)
    assert (found.model_type, found.hidden_size, found.context_tokens) == ("qwen3", 128, 2048)
    assert 900_000 < found.parameters < 950_000
    assert found.base_learning_rate == 3e-3
    assert found.linear_layers["model.layers.0.mlp.down_proj"] == (128, 384)
    assert len(found.linear_layers) == 4 * 7
    assert found.base_model() == BaseModel(
        source=str(fixture_base), revision=None, fingerprint=found.fingerprint, hidden_size=128, model_type="qwen3"
    )


def test_a_relative_folder_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    assert locate("./model", models_dir=folder).path == folder.resolve()
    assert locate("model", models_dir=folder).path == folder.resolve()


def test_every_part_of_a_model_changes_its_fingerprint(folder: Path) -> None:
    seen = {fingerprint(folder)}
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    seen.add(fingerprint(folder))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    seen.add(fingerprint(folder))
    change_config(folder, rope_theta=1.0)
    seen.add(fingerprint(folder))
    (folder / "tokenizer_config.json").write_text("{}")
    seen.add(fingerprint(folder))
    assert len(seen) == 5


def test_what_is_not_the_model_does_not_change_its_fingerprint(folder: Path) -> None:
    before = fingerprint(folder)
    (folder / "README.md").write_text("new")
    (folder / FACTS_FILE).unlink()
    assert fingerprint(folder) == before
    assert describe(folder, source="x", revision=None).base_learning_rate is None


def test_another_model_than_the_validated_one_is_refused(folder: Path) -> None:
    found = describe(folder, source="x", revision=None)
    check_base(found, found.base_model(), "the job j")
    change_config(folder, rope_theta=1.0)
    now = describe(folder, source="x", revision=None)
    with pytest.raises(BaseChanged) as caught:
        check_base(now, found.base_model(), "the job j")
    assert (caught.value.code, caught.value.status, caught.value.param) == ("base_changed", 400, "model")
    assert caught.value.message == (
        f"The base model 'x' in {folder} is not the one that the job j was made with: its fingerprint is "
        f"{now.fingerprint[:12]}, not {found.fingerprint[:12]}."
    )


def test_the_tokenizer_may_shorten_the_context(folder: Path) -> None:
    change_config(folder, max_position_embeddings=4096)
    assert describe(folder, source="x", revision=None).context_tokens == 2048
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 1e30}))
    assert describe(folder, source="x", revision=None).context_tokens == 4096


def test_a_rope_of_two_lengths_counts_as_its_shorter_one(folder: Path) -> None:
    older = {"type": "longrope"}  # as before transformers 5
    change_config(folder, rope_parameters=None, rope_scaling=older, original_max_position_embeddings=512)
    assert describe(folder, source="x", revision=None).context_tokens == 512
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 256}
    change_config(folder, rope_parameters=rope, original_max_position_embeddings=None)
    assert describe(folder, source="x", revision=None).context_tokens == 256


def test_a_text_model_inside_a_larger_one_is_described(folder: Path) -> None:
    change_config(folder, hidden_size=None, text_config={"hidden_size": 64, "model_type": "inner"})
    found = describe(folder, source="x", revision=None)
    assert (found.hidden_size, found.model_type) == (64, "inner")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json cannot be read"),
        (lambda folder: (folder / "config.json").write_text("[]"), "not a JSON object"),
        (lambda folder: (folder / "config.json").write_text("{}"), "names no hidden_size"),
        (lambda folder: change_config(folder, hidden_size="many"), "names no hidden_size"),
        (lambda folder: change_config(folder, quantization_config={"quant_method": "awq"}), r"quantised \(awq\)"),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text(INDEX),
            "lacks 1 of its weight files, first model-2.safetensors",
        ),
        (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer files"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"no \*.safetensors weights"),
        (lambda folder: _cut(folder / "model.safetensors", 1_000_000), "model.safetensors is not complete"),
        (lambda folder: _cut(folder / "model.safetensors", 100), "was cut off"),
        (lambda folder: _cut(folder / "model.safetensors", 3), "was cut off"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\4" + b"\0" * 7 + b"abcd"), "is broken"),
    ],
)
def test_an_incomplete_folder_says_what_is_missing(folder: Path, damage: Any, says: str) -> None:
    damage(folder)
    error = refusal(folder)
    assert says.replace("\\", "") in error.message
    assert str(folder) in error.message


def _cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def test_a_folder_that_does_not_exist_is_named() -> None:
    assert "does not exist on this machine" in refusal("/nonexistent/model").message


def test_a_model_that_is_nowhere_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    error = refusal("someone/some-model", offline=True)
    assert "offline mode is on" in error.message
    assert "rose models pull someone/some-model" in str(error.hint)
    assert 'ROSE_MODEL_ALIASES=\'{"some-model":' in str(error.hint)


def test_a_download_that_fills_the_disk_is_no_fault_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fill)
    with pytest.raises(NoSpace, match=r"'someone/large' does not fit into .*models--someone--large.*HF_HOME"):
        locate("someone/large", models_dir=Path("/nonexistent"))


def test_a_name_that_cannot_be_a_model_is_refused() -> None:
    assert "neither an alias, nor a hub id" in refusal("no such model!", offline=True).message


def test_the_hubs_cache_is_used_with_its_commit(fixture_base: Path, tmp_path: Path) -> None:
    """In a process of its own: the hub's library reads its folders' names when it is imported."""
    commit = "c" * 40
    repository = tmp_path / "models--someone--some-model"
    shutil.copytree(fixture_base, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    code = """
import sys
from pathlib import Path
from rose.language_models.locate import locate
found = locate("someone/some-model", models_dir=Path("/nonexistent"), offline=True)
print(found.revision, found.fingerprint, sorted({"torch", "transformers"} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"HF_HUB_CACHE": str(tmp_path), "PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.stdout.split(maxsplit=2) == [commit, fingerprint(fixture_base), "[]\n"], done.stderr


def _as_tiny(folder: Path, target: Path, version: str) -> None:
    shutil.copytree(folder, target)
    facts = RoseFacts(name="tiny", version=version, about="", rose_base_learning_rate=1e-3)
    (target / FACTS_FILE).write_bytes(msgspec.json.encode(facts))


def test_tiny_is_found_by_version(fixture_base: Path, tmp_path: Path) -> None:
    error = refusal("tiny")
    assert "rose models build tiny" in str(error.hint)
    _as_tiny(fixture_base, tiny_folder(tmp_path), TINY_VERSION)
    found = locate("tiny", models_dir=tmp_path)
    assert (found.source, found.revision, found.base_learning_rate) == ("tiny", TINY_VERSION, 1e-3)
    with pytest.raises(ModelNotAvailable, match="version 0"):
        locate("tiny", revision="0", models_dir=tmp_path)
    _as_tiny(fixture_base, outdated_folder(tiny_folder(tmp_path), "0"), "0")
    assert locate("tiny", revision="0", models_dir=tmp_path).path == tmp_path / "tiny-v0"


def test_a_half_built_model_is_not_built(folder: Path) -> None:
    assert is_built(folder, "0")
    assert not is_built(folder, "1")
    (folder / FACTS_FILE).write_text("{")
    assert not is_built(folder, "0")
    assert not is_built(folder / "nothing")
