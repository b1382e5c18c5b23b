"""openai-node's own test suite: where it comes from and how it is run. `python -m tests.clients.openai_node` brings it.

The npm package holds no tests, so they come from the pinned commit of the repository, by git. They are run by vitest,
pinned with all that it needs in `node/package-lock.json`. `ROSE_TEST_OPENAI_NODE` names another repository that has
the commit, for a machine that cannot reach the first.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import msgspec
import platformdirs

VERSION = "7.5.0"
COMMIT = "5b96016f23604d567d0163a78926422612f8701b"
REPOSITORY = "https://github.com/openai/openai-node.git"
PATHS = ("files", "models", "uploads", "fine-tuning", "webhooks")
"""What of its tests/api-resources is about what ROSE offers."""
NEEDED = ("git", "node", "npm")
_TOOLS = Path(__file__).parent / "node"
_DEADLINE = 600


class NotFetched(Exception):
    """The suite could not be brought here."""


class Outcome(msgspec.Struct, frozen=True):
    """What became of one test."""

    name: str
    passed: bool
    said: str


def root() -> Path:
    """Return the folder that holds the suites of clients."""
    return platformdirs.user_cache_path("rose-tests") / "clients"


def folder() -> Path:
    """Return the suite's folder; it is there only when it is whole."""
    sources = [Path(__file__), *sorted(_TOOLS.iterdir())]
    state = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:8]
    return root() / f"openai-node-{VERSION}-{state}"


def fetch() -> Path:
    """Bring the suite unless it is there. Raises: NotFetched naming what could not be brought."""
    done = folder()
    if done.is_dir():
        return done
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if missing:
        raise NotFetched(f"the tests of openai-node need {', '.join(missing)}, which this machine has not")
    root().mkdir(parents=True, exist_ok=True)
    with (root() / "lock-node").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.is_dir():
            _build(done)
    return done


def _build(done: Path) -> None:
    print(f"Fetching the tests of openai-node {VERSION}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=root(), prefix="building-") as temporary:
        here = Path(temporary) / "suite"
        shutil.copytree(_TOOLS, here)
        repository = os.environ.get("ROSE_TEST_OPENAI_NODE", REPOSITORY)
        _run(["git", "init", "--quiet"], here)
        _run(["git", "fetch", "--quiet", "--depth", "1", repository, COMMIT], here)
        _run(["git", "checkout", "--quiet", "FETCH_HEAD", "--", "src", "tests"], here)
        shutil.rmtree(here / ".git")
        _run(["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"], here)
        here.rename(done)


def _run(command: list[str], cwd: Path) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=_DEADLINE, check=False)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "nothing was said").splitlines()[-1]
        raise NotFetched(
            f"the tests of openai-node {VERSION} could not be brought: `{' '.join(command[:2])}` said: {said}. "
            "ROSE_TEST_OPENAI_NODE may name another repository."
        )


def run(base_url: str) -> list[Outcome]:
    """Run the suite against a server and return the outcome of each of its tests."""
    here = fetch()
    with tempfile.TemporaryDirectory() as temporary:
        report = Path(temporary) / "report.json"
        command = ["npx", "--no-install", "vitest", "run", "--reporter=json", f"--outputFile={report}"]
        done = subprocess.run(
            [*command, *(f"tests/api-resources/{path}" for path in PATHS)],
            cwd=here,
            env={**os.environ, "TEST_API_BASE_URL": base_url, "CI": "1"},
            capture_output=True,
            text=True,
            timeout=_DEADLINE,
            check=False,
        )
        if not report.is_file():
            raise RuntimeError(f"vitest wrote no report: {done.stdout[-2000:]}{done.stderr[-2000:]}")
        files = msgspec.json.decode(report.read_bytes())["testResults"]
    return [
        Outcome(one["fullName"], one["status"] == "passed", "\n".join(one.get("failureMessages", ()))[:600])
        for file in files
        for one in file["assertionResults"]
    ]


if __name__ == "__main__":
    try:
        print(fetch())
    except NotFetched as reason:
        sys.exit(str(reason))
