"""Start the process that imports a base, and take its answer. No torch here: only that process may load it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec

from rose.errors import RoseError, error_of

COMMAND = (sys.executable, "-m", "rose.language_models.imports")
CLEARING_SECONDS = 10.0


def import_into(models: Path, arguments: list[str], min_free_bytes: int) -> dict[str, Any]:
    """Import into the folder `models` while its progress shows on standard error; return what was made.

    Raises: RoseError, the importing process's own.
    """
    command = [*COMMAND, *arguments, "--models", str(models), "--min-free-bytes", str(min_free_bytes)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as importer:
        try:
            said, _ = importer.communicate()
        except KeyboardInterrupt:  # it heard of it, too, and takes away what it has begun
            importer.wait(CLEARING_SECONDS)
            raise
    return answer(said)


def answer(text: str) -> dict[str, Any]:
    """Return what the importing process printed last. Raises: RoseError, its own, or that it gave no answer."""
    lines = text.strip().splitlines()
    try:
        found = msgspec.json.decode(lines[-1] if lines else "", type=dict[str, Any])
    except msgspec.DecodeError:
        raise RoseError(
            "The import ended without an answer; the lines above say why.",
            code="import_failed",
            hint="The trainer extra is needed: pip install 'rose[trainer]'",
        ) from None
    problem = found.get("error")
    if problem is None:
        return found
    kind = error_of(problem["status"], problem["code"])
    raise kind(problem["message"], code=problem["code"], param=problem["param"], hint=problem["hint"])
