"""OpenAI's own test suites: which, where from, and what they need. `python -m tests.clients.suites` brings them.

The source distributions of openai-python hold the tests. They are brought by pip into a folder outside the repository,
pinned by version and hash, each with an environment of its own.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import NamedTuple

import platformdirs

_DEADLINE = 900
_NEEDED = (
    "pytest==9.1.0",
    "pytest-asyncio==1.4.0",
    "pytest-xdist==3.8.0",
    "dirty-equals",
    "nest_asyncio",
    "respx",
    "rich",
)
_INI = """[pytest]
asyncio_mode = auto
asyncio_default_fixture_loop_scope = session
xfail_strict = true
addopts = --tb=line -q -p no:cacheprovider
"""


class NotFetched(Exception):
    """A suite could not be brought here."""


class Suite(NamedTuple):
    """A release of openai-python."""

    version: str
    sha256: str
    paths: tuple[str, ...]
    """What of its tests is about what ROSE offers."""


_RESOURCES = ("test_files.py", "test_uploads.py", "uploads", "test_models.py", "fine_tuning", "test_webhooks.py")
_COMMON = tuple(f"api_resources/{name}" for name in _RESOURCES)
_NEWEST = (
    *_COMMON,
    "api_resources/webhooks",
    "lib/test_webhooks.py",
    "lib/test_webhook_signature.py",
    "lib/test_webhook_endpoint_with_secret.py",
    "lib/test_uploads.py",
    "lib/test_fine_tuning_positional_arguments.py",
)
SUITES = (
    Suite("3.54.0", "2e393e63f8a38be6452806f9ef0b6534fecd6d41ab3b2165180dfce3599249cd", _NEWEST),
    Suite("2.54.0", "e3e6f8bc1ba30ddf381ace1a14340eed381cb984a1a59bd0f34b5be3b5d49cfa", _COMMON),
    Suite("1.109.1", "d173ed8dbca665892a6db099b4a2dfac624f94d20a93f46eb0b56aae940ed869", _COMMON),
)


def root() -> Path:
    """Return the folder that holds the suites."""
    return platformdirs.user_cache_path("rose-tests") / "clients"


def folder(suite: Suite) -> Path:
    """Return the suite's folder: `tests` and the environment `.venv`; it is there only when it is whole."""
    state = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]
    return root() / f"openai-{suite.version}-{state}"


def fetch(suite: Suite) -> Path:
    """Bring the suite unless it is there. Raises: NotFetched naming what could not be brought."""
    done = folder(suite)
    if done.is_dir():
        return done
    root().mkdir(parents=True, exist_ok=True)
    with (root() / f"lock-{suite.version}").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.is_dir():
            _build(suite, done)
    return done


def _build(suite: Suite, done: Path) -> None:
    print(f"Fetching the tests of openai-python {suite.version}", file=sys.stderr, flush=True)
    building = Path(tempfile.mkdtemp(dir=root(), prefix="building-"))
    try:
        pinned = f"openai=={suite.version}"
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        _run([*pip, "--no-binary", "openai", "--dest", str(building), pinned], pinned)
        archive = building / f"openai-{suite.version}.tar.gz"
        found = hashlib.sha256(archive.read_bytes()).hexdigest()
        if found != suite.sha256:
            raise NotFetched(f"{pinned} has the SHA-256 {found}, not {suite.sha256}")
        with tarfile.open(archive) as opened:
            opened.extractall(building, filter="data")
        source = building / f"openai-{suite.version}"
        (source / "pytest.ini").write_text(_INI)
        for path in source.iterdir():  # the package itself comes from the environment, as a user has it
            if path.name not in ("tests", "pytest.ini"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        _run([sys.executable, "-m", "venv", str(source / ".venv")], "an environment")
        python = str(source / ".venv/bin/python")
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        _run([*install, *_NEEDED, f"openai[aiohttp]=={suite.version}"], pinned)
        source.rename(done)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _run(command: list[str], what: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=_DEADLINE, check=False)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "nothing was said").splitlines()[-1]
        raise NotFetched(f"{what} could not be brought by pip: {said}")


def run(suite: Suite, base_url: str, *, processes: int = 1) -> tuple[int, str]:
    """Run the suite against a server; return pytest's status and what it printed, with a line for each outcome."""
    here = fetch(suite)
    targets = [f"tests/{path}" for path in suite.paths]
    command = [".venv/bin/python", "-m", "pytest", "-rA", *(["-n", str(processes)] if processes > 1 else []), *targets]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "PYTHONPATH"))}
    environment |= {"TEST_API_BASE_URL": base_url, "OPENAI_API_KEY": "any"}
    done = subprocess.run(
        command, cwd=here, env=environment, capture_output=True, text=True, timeout=_DEADLINE, check=False
    )
    return done.returncode, done.stdout + done.stderr


if __name__ == "__main__":
    for one in SUITES:
        fetch(one)
