"""The process that imports: `python -m rose.language_models.imports FILE --name N --models FOLDER`, or `--smollm2`.

Its last line on standard output is JSON, what was made or the error; what it does meanwhile goes to standard error, as
a bar on a terminal. It is a process of its own since only that may load torch.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from rose.errors import RoseError
from rose.language_models.imports.progress import BarProgress, Progress, bar

if TYPE_CHECKING:
    from rose.language_models.imports.importing import Imported


def main(arguments: Sequence[str]) -> int:
    """Import what the arguments name; print what was made, or the error, as JSON."""
    parser = argparse.ArgumentParser(prog="python -m rose.language_models.imports", description=main.__doc__)
    parser.add_argument("source", type=Path, nargs="?", help="a .gguf or a model folder")
    parser.add_argument("--smollm2", action="store_true", help="fetch and import SmolLM2-135M-Instruct")
    parser.add_argument("--name", help="the base's name")
    parser.add_argument("--models", type=Path, required=True, help="the folder of bases")
    parser.add_argument("--min-free-bytes", type=int, default=0, help="disk space that must stay free")
    parser.add_argument("--chat-template", type=Path, help="a Jinja file, for a GGUF without one")
    parser.add_argument("--leave-with-stdin", action="store_true", help="stop when standard input closes")
    given = parser.parse_args(arguments)
    if given.leave_with_stdin:
        threading.Thread(target=_leave_with_stdin, daemon=True).start()
    try:
        with bar() as shown:
            made = _work(given, BarProgress(shown))
    except RoseError as error:
        fields = {"message": error.message, "code": error.code, "param": error.param, "hint": error.hint}
        print(msgspec.json.encode({"error": {**fields, "status": error.status}}).decode(), flush=True)
        return 1
    except KeyboardInterrupt:
        return 130
    print(msgspec.json.encode(made).decode(), flush=True)
    return 0


def _work(given: argparse.Namespace, progress: Progress) -> Imported:
    # Loaded here and not above, so that Ctrl-C ends it quietly from the start.
    from transformers.utils import logging as transformers_logging

    from rose.language_models.imports.importing import import_model
    from rose.language_models.imports.smollm2 import pull_smollm2

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if given.smollm2:
        return pull_smollm2(given.models, min_free_bytes=given.min_free_bytes, progress=progress)
    return import_model(
        given.source,
        given.name,
        models=given.models,
        min_free_bytes=given.min_free_bytes,
        chat_template=given.chat_template.read_text() if given.chat_template else None,
        progress=progress,
    )


def _leave_with_stdin() -> None:
    while os.read(0, 4096):
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
