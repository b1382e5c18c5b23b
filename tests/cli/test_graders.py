"""Graders from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.cli.conftest import Rose

pytestmark = pytest.mark.anyio

PYTHON = {"type": "python", "name": "length", "source": "def grade(s, i):\n    return len(s['output_text']) / i['n']\n"}
EXACT = {
    "type": "string_check",
    "name": "exact",
    "input": "{{sample.output_text}}",
    "reference": "{{item.answer}}",
    "operation": "eq",
}
BOTH = {
    "type": "multi",
    "name": "both",
    "graders": {"exact": EXACT, "length": PYTHON},
    "calculate_output": "exact - length / 4",
}


def file(folder: Path, content: Any) -> str:
    path = folder / "grader.json"
    path.write_bytes(msgspec.json.encode(content))
    return str(path)


async def test_an_answer_is_graded(shared_rose: Rose, tmp_path: Path) -> None:
    grader = file(tmp_path, BOTH)
    item = tmp_path / "item.json"
    item.write_text('{"answer": "red", "n": 6}')
    done = await shared_rose("graders", "run", grader, "--sample", "red", "--item", str(item))
    assert (done.status, done.out, done.err) == (0, "reward 0.875\n  exact 1\n  length 0.5\n", "")
    done = await shared_rose("graders", "run", grader, "-s", "-", "-i", '{"answer": "red", "n": 6}', "-q", text="red")
    assert (done.status, done.out) == (0, "0.875\n")
    done = await shared_rose("graders", "run", grader, "-s", "red", "-i", '{"answer": "red", "n": 6}', "--json")
    assert msgspec.json.decode(done.out)["sub_rewards"] == {"exact": 1.0, "length": 0.5}


async def test_what_goes_wrong_in_grading_is_said_and_exits_1(shared_rose: Rose, tmp_path: Path) -> None:
    done = await shared_rose("graders", "run", file(tmp_path, PYTHON), "-s", "red")
    assert (done.status, done.out) == (1, "reward 0\n")
    assert done.err.startswith("python_grader_runtime_error: Traceback")
    assert "KeyError: 'n'" in done.err


async def test_a_grader_is_checked(shared_rose: Rose, tmp_path: Path) -> None:
    done = await shared_rose("graders", "validate", file(tmp_path, BOTH))
    assert (done.status, done.out) == (0, "both (multi) can be used.\n")
    done = await shared_rose("graders", "validate", file(tmp_path, {**EXACT, "operation": "equals"}))
    assert done.status == 2
    assert "grader.operation is 'equals'; it must be one of eq, ilike, like, ne." in done.err


async def test_files_that_hold_no_grader_are_named(shared_rose: Rose, tmp_path: Path) -> None:
    path = tmp_path / "grader.json"
    assert (await shared_rose("graders", "validate", str(path))).status == 3
    path.write_text("{")
    done = await shared_rose("graders", "validate", str(path))
    assert (done.status, "grader.json is not valid JSON" in done.err) == (2, True)
    path.write_text("[]")
    assert "must hold a JSON object" in (await shared_rose("graders", "validate", str(path))).err
    done = await shared_rose("graders", "run", file(tmp_path, EXACT), "-s", "x", "-i", "{x}")
    assert (done.status, "--item is not valid JSON" in done.err) == (2, True)
