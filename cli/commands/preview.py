"""`rose files preview`: a line of training data as a model sees it, with what is learned marked."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from cyclopts import Parameter

from cli.commands.files import require_file
from cli.options import COMMON, Common
from cli.output import Output
from rose.api import schema
from rose.domain.previews import Preview
from rose.errors import InvalidRequest


def preview(
    file: str,
    /,
    *,
    model: Annotated[str, Parameter(name=["--model", "-m"], env_var="ROSE_MODEL")],
    line: Annotated[int, Parameter(name=["--line", "-l"], env_var="ROSE_LINE")] = 1,
    count: Annotated[int, Parameter(name=["--count", "-n"], env_var="ROSE_COUNT")] = 1,
    thinking: Annotated[Literal["auto", "on", "off"], Parameter(env_var="ROSE_THINKING")] = "auto",
    common: Common = COMMON,
) -> None:
    """Show lines of training data as a model sees them; what is learned is coloured, or in ⟦brackets⟧ in a pipe.

    Parameters
    ----------
    file
        A JSONL file on this machine, or the id of an uploaded one, a unique beginning of it, or `last`.
    model
        The base or fine-tuned model whose template and tokenizer count.
    line
        The first line to show.
    count
        How many lines.
    thinking
        Whether the model is asked to think first; auto: as a job on this file would train.
    """
    path = Path(file)
    asked = schema.PreviewFile(model=model, line=line, count=count, thinking=thinking)
    with common.client() as client:
        if path.exists():
            require_file(path)
            found = client.preview(None, _content(path, asked))
            data = [msgspec.structs.replace(shown, line=shown.line + line - 1) for shown in found.data]
            found = msgspec.structs.replace(found, data=data)
        else:
            found = client.preview(client.resolve(file, "file_"), asked)
    common.output.show(found, lines=_lines(found, common.output))


def _content(path: Path, asked: schema.PreviewFile) -> schema.PreviewContent:
    """Return only the lines that are shown, so that a large file is not sent whole."""
    from rose.methods import thinks

    first, thinking = (asked.line or 1) - 1, asked.thinking
    with path.open("rb") as file:
        wanted = list(islice(file, first, first + (asked.count or 1)))
    if not wanted:
        raise InvalidRequest(f"{path} has no line {first + 1}.", code="invalid_value", param="line")
    if thinking == "auto":
        with path.open("rb") as file:
            thinking = "on" if thinks(file) else "off"
    content = b"".join(wanted).decode("utf-8", "replace")
    return schema.PreviewContent(model=asked.model, line=1, count=asked.count, thinking=thinking, content=content)


def _lines(found: Preview, output: Output) -> Iterator[str]:
    for shown in found.data:
        if shown.problem:
            yield f"line {shown.line}: cannot be learned from: {shown.problem}"
            continue
        sequences = len(shown.sequences)
        cut = ", cut to the model's context" if shown.cut else ""
        yield (
            f"line {shown.line}: {sequences} sequence{'s' if sequences != 1 else ''}, {shown.tokens} tokens, "
            f"{shown.learned_tokens} learned, thinking {'on' if found.thinking else 'off'}{cut}"
        )
        for pieces in shown.sequences:
            yield ""
            yield "".join(output.marked(piece.text) if piece.learned else piece.text for piece in pieces)
        yield ""
