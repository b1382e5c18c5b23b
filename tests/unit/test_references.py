"""What the repository refers to is in the repository, and there under the heading that is named."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ELSEWHERE = re.compile(r"\b(DESIGN|TRAINING|CONTRACT|SERVING|TEMPLATES|MIGRATION|STYLE|SEED)(\.md\b|'s\b|,? \(?\d)")
"""Texts of ROSE's making that no reader of the repository has: chapters by number, or by name."""
PAGE = re.compile(r'\b(docs/[\w/-]+\.md)(?:[\s#*-]*,[\s#*-]*"([^"]+)")?')
READ = (".md", ".py", ".sql", ".toml", ".yaml", ".yml", "Makefile", "Dockerfile")


def _tracked() -> list[Path]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    paths = [ROOT / name for name in listed.split("\0") if name.endswith(READ)]
    return [path for path in paths if path.exists() and path != Path(__file__)]


def test_nothing_refers_to_texts_that_are_not_here() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in _tracked()
        for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1)
        if ELSEWHERE.search(line)
    ]
    assert found == [], "write what is meant into docs/, and name that page and heading"


def test_pages_and_headings_that_are_named_exist() -> None:
    missing: list[str] = []
    for path in _tracked():
        for page, heading in PAGE.findall(path.read_text("utf-8")):
            wanted = " ".join(heading.split())
            file = ROOT / page
            headings = re.findall(r"^#+ (.*)$", file.read_text("utf-8"), re.MULTILINE) if file.exists() else None
            if headings is None or (wanted and wanted not in headings):
                missing.append(f"{path.relative_to(ROOT)}: {page} {wanted}")
    assert missing == []


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("as in {} 4", "DESIGN"),
        ("({} 3, 5)", "CONTRACT"),
        ("{}.md's files", "SEED"),
        ("see {}'s list", "STYLE"),
        ("{} (3)", "SERVING"),
    ],
)
def test_such_references_are_recognised(line: str, name: str) -> None:
    assert ELSEWHERE.search(line.format(name))
