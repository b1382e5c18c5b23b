"""Bring a job's base model to this machine: find, download or build it, and keep telling that it goes on. No torch.

A download of many gigabytes takes longer than any sensible limit for silence, so each growth is told; one that hangs
grows no more and is found by the supervisor's watchdog.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

from rose.domain.job_values import BaseRequest
from rose.errors import NoSpace, RoseError
from rose.language_models.import_process import COMMAND, answer
from rose.language_models.locate import (
    SMOLLM2,
    TINY,
    LocatedBase,
    ModelNotAvailable,
    check_base,
    hub_cache_folder,
    imported,
    is_built,
    locate,
    tiny_folder,
)

log = logging.getLogger(__name__)

LOOK_SECONDS = 5.0
"""How often a download's size is looked at."""

Tell = Callable[[str], None]
"""Takes the phase that goes on: `download`, `build` or `validate`."""


def fetch_base(base: BaseRequest, *, models: Path, offline: bool, tell: Tell) -> LocatedBase:
    """Return the requested base, complete and on this machine.

    Raises: ModelNotAvailable when it cannot be had; BaseChanged when the model to go on from was made with another.
    """
    revision = base.pinned.revision if base.pinned else None
    if base.source == TINY and revision is None and not is_built(tiny_folder(models)):
        _build_tiny(models, tell)
    if base.source == SMOLLM2 and not offline and imported(models, SMOLLM2) is None:
        _fetch_smollm2(models, tell)
    with _telling_growth(hub_cache_folder(base.source), tell):
        located = locate(base.source, revision=revision, models_dir=models, offline=offline)
    if base.pinned is not None:
        made = f"the model '{base.parent.name}'" if base.parent else "what the job goes on from"
        check_base(located, base.pinned, made)
    return located


def _build_tiny(models: Path, tell: Tell) -> None:
    """Build the toy model in a process of its own, since only that may load torch."""
    folder = tiny_folder(models)
    log.info("building the model %r in %s; this takes about a minute", TINY, folder)
    command = [sys.executable, "-m", "rose.language_models.tiny", str(folder), "--leave-with-stdin"]
    # The pipe to it closes with this process, however that ends, and the builder leaves with the pipe.
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as builder:
        assert builder.stdout is not None
        for line in builder.stdout:
            log.info("%s", line.rstrip())
            tell("build")
        status = builder.wait()
    if status != 0:
        raise ModelNotAvailable(
            f"The model {TINY!r} could not be built in {models} (exit status {status}).",
            hint="The log of this job's validation says why; try `rose models build tiny`.",
        )


def _fetch_smollm2(models: Path, tell: Tell) -> None:
    """Fetch and import the small pretrained model, in a process of its own, since only that may load torch."""
    log.info("fetching the model %r into %s", SMOLLM2, models)
    tell("download")
    command = [*COMMAND, "--smollm2", "--models", str(models), "--leave-with-stdin"]
    lines: list[str] = []
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as importer:
        assert importer.stdout is not None
        for line in importer.stdout:
            lines.append(line)
            log.info("%s", line.rstrip())
            tell("download")
    try:
        answer("".join(lines))
    except NoSpace:
        raise
    except RoseError as error:
        raise ModelNotAvailable(error.message, code=error.code, hint=error.hint) from error


@contextmanager
def _telling_growth(folder: Path, tell: Tell) -> Generator[None]:
    """While the block runs, tell `download` whenever the files in `folder` have become more."""
    done = threading.Event()
    before = _size(folder)

    def look() -> None:
        size = before
        while not done.wait(LOOK_SECONDS):
            now = _size(folder)
            if now > size:
                tell("download")
            size = now

    watcher = threading.Thread(target=look, name="download", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.lstat().st_size
        except FileNotFoundError:
            continue  # a part that has just got its final name
    return total
