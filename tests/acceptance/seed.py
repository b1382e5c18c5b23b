"""docs/workflow.md as it stands: read the page, fill in the ids, run each command, check its output.

Used against `rose up` and against the services of compose.yaml; the page is the test.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sysconfig
import time
from collections.abc import Mapping
from pathlib import Path

import msgspec

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGE = DOCS / "workflow.md"
BLOCK = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)
OUTPUT = re.compile(r"# Output: (.*)")
FILE_ID = "file_abc123"
JOB_ID = "ftjob_xyz789"
MODEL = "qwen-coder-ft-20240611_123456-my-model-v1"
ADDRESS = "http://localhost:8004"
SECONDS = 300


def blocks(page: str, language: str) -> list[str]:
    """Return a page's code blocks of a language, in order."""
    return [text for kind, text in BLOCK.findall(page) if kind == language]


def training_data() -> str:
    """Return the JSONL that the page shows."""
    [text] = blocks(PAGE.read_text(), "jsonl")
    return text


class Workflow:
    """A person who follows the page in a folder."""

    def __init__(self, folder: Path, url: str, environment: Mapping[str, str]) -> None:
        self.folder = folder
        self.url = url
        self.environment = {
            **environment,
            "ROSE_URL": url,
            "PATH": f"{sysconfig.get_path('scripts')}:{environment['PATH']}",
            "NO_COLOR": "1",
        }
        self.known: dict[str, str] = {ADDRESS: url}
        (folder / "training_data.jsonl").write_text(training_data())

    def commands(self, page: str) -> list[tuple[str, str | None]]:
        """Return every command of a page with the output line that it promises."""
        found: list[tuple[str, str | None]] = []
        for block in blocks(page, "bash"):
            promised = OUTPUT.search(block)
            joined = re.sub(r"\\\n\s*", " ", block)
            lines = [block] if "-d '{" in block else joined.split("\n")
            runnable = [line for line in lines if line.strip() and not line.startswith("#")]
            found.extend((line, promised.group(1) if promised else None) for line in runnable)
        return found

    def run(self, command: str, *, status: int = 0) -> str:
        """Run one command of the page with the known ids filled in; return its standard output."""
        for placeholder, value in self.known.items():
            command = command.replace(placeholder, value)
        # Poetry only puts .venv/bin in front of PATH for `poetry run`, which has been done here.
        command = command.replace("poetry run ", "")
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        assert done.returncode == status, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def rose(self, *arguments: str, status: int = 0) -> str:
        """Run `rose` with arguments."""
        return self.run(shlex.join(["rose", *arguments]), status=status)

    def follow(self, *, before: str | None = None) -> dict[str, str]:
        """Run the page in order, all of it or what stands before a heading, and return each command's output."""
        page = PAGE.read_text()
        assert before is None or before in page
        outputs: dict[str, str] = {}
        for command, promised in self.commands(page if before is None else page.partition(before)[0]):
            if "finetune pause" in command:
                self._make_a_long_job()
            output = self.run(command)
            outputs[command] = output
            if promised:
                self._check_promise(output, promised)
            if "finetune events" in command:
                job = msgspec.json.decode(self.rose("finetune", "get", self.known[JOB_ID], "--json"))
                assert job["status"] == "succeeded", job
                self.known[MODEL] = job["fine_tuned_model"]
        return outputs

    def _check_promise(self, output: str, promised: str) -> None:
        """Check `File uploaded: file_abc123` and remember the id that stands there."""
        words, _, placeholder = promised.rpartition(" ")
        line = output.strip().splitlines()[0]
        prefix = placeholder.partition("_")[0] + "_"
        assert re.fullmatch(re.escape(words) + " " + prefix + "[a-z2-7]{20}", line), line
        self.known.setdefault(placeholder, line.rpartition(" ")[2])

    def _make_a_long_job(self) -> None:
        """Create a job that is still there to be paused, and wait until it is past its validation."""
        self.rose("finetune", "create", "training_data.jsonl", "--model", "qwen-coder", "--epochs", "50")
        deadline = time.monotonic() + SECONDS
        while msgspec.json.decode(self.rose("finetune", "get", "last", "--json"))["status"] == "validating_files":
            assert time.monotonic() < deadline, "the validation takes too long"
