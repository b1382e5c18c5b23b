"""Settings: where they come from, and what is said about a bad one."""

from __future__ import annotations

from pathlib import Path

import pytest

from rose.errors import InvalidRequest
from rose.settings import load, to_environment


def test_the_environment_wins_over_the_file(tmp_path: Path) -> None:
    (tmp_path / "rose.toml").write_text('port = 9000\nhost = "0.0.0.0"\n[model_aliases]\nmine = "/models/x"\n')
    settings = load({"ROSE_CONFIG": str(tmp_path), "ROSE_PORT": "9001"})
    assert (settings.port, settings.host) == (9001, "0.0.0.0")
    assert settings.model_aliases["mine"] == "/models/x"
    assert settings.model_aliases["qwen-coder"] == "Qwen/Qwen2.5-Coder-1.5B-Instruct"


@pytest.mark.parametrize("text", ["qwen-coder=/models/x, other = tiny", '{"qwen-coder": "/models/x", "other": "tiny"}'])
def test_aliases_in_the_environment(text: str, tmp_path: Path) -> None:
    settings = load({"ROSE_CONFIG": str(tmp_path), "ROSE_MODEL_ALIASES": text})
    assert settings.model_aliases["qwen-coder"] == "/models/x"
    assert settings.model_aliases["other"] == "tiny"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ROSE_PORT", "many"),
        ("ROSE_PORT", "99999"),
        ("ROSE_LEASE_SECONDS", "soon"),
        ("ROSE_HUB_OFFLINE", "maybe"),
        ("ROSE_MODEL_ALIASES", "qwen-coder:tiny"),
        ("ROSE_LOG_LEVEL", "loud"),
        ("ROSE_DEVICE", "gpu"),
        ("ROSE_RESULT_FILE_ENCODING", "zip"),
        ("ROSE_TORCH_THREADS", "0"),
        ("ROSE_REQUESTS_PER_MINUTE", "0"),
        ("ROSE_MAX_PROJECT_JOBS", "few"),
        ("ROSE_ENGINE_WAIT_SECONDS", "-1"),
        ("ROSE_IDEMPOTENCY_SECONDS", "60"),
        ("ROSE_ABANDON_SECONDS", "60"),
        ("ROSE_ABANDON_SECONDS", "5"),
    ],
)
def test_a_bad_value_is_named(name: str, value: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=name):
        load({"ROSE_CONFIG": str(tmp_path), name: value})


def test_an_unknown_name_in_the_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rose.toml").write_text("prot = 9000\n")
    with pytest.raises(InvalidRequest, match="prot"):
        load({"ROSE_CONFIG": str(tmp_path)})


def test_an_empty_limit_is_none(tmp_path: Path) -> None:
    settings = load({"ROSE_CONFIG": str(tmp_path), "ROSE_REQUESTS_PER_MINUTE": "", "ROSE_MAX_PROJECT_JOBS": "5"})
    assert (settings.requests_per_minute, settings.max_project_jobs) == (None, 5)


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "rose.toml").write_text("port = \n")
    with pytest.raises(InvalidRequest, match=r"rose\.toml is not valid TOML"):
        load({"ROSE_CONFIG": str(tmp_path)})


def test_a_lease_must_outlast_the_run_that_it_guards(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"abandon_seconds .* must lie between renew_seconds \(5\) and lease_"):
        load({"ROSE_CONFIG": str(tmp_path), "ROSE_LEASE_SECONDS": "30"})


def test_child_processes_get_the_same_settings(tmp_path: Path) -> None:
    settings = load(
        {"ROSE_CONFIG": str(tmp_path), "ROSE_API_KEYS": "a,b"}, data_dir=str(tmp_path), port=1, hub_offline=True
    )
    assert load(to_environment(settings)) == settings
