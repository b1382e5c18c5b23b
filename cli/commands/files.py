"""`rose upload` and `rose files …`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from cli.options import COMMON, Common
from cli.output import Output, moment, size
from rose.errors import InvalidDataset, InvalidRequest, NotFound

if TYPE_CHECKING:
    from cli.client import Client
    from rose.api import schema

MAX_SHOWN_PROBLEMS = 20
_CHUNK_BYTES = 1 << 20


class CheckedDataset(InvalidDataset):
    """Training data with problems that a local check found."""

    def __init__(self, message: str, details: list[str], hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.details = details


def upload(
    path: Path,
    /,
    *,
    purpose: Annotated[str, Parameter(env_var="ROSE_PURPOSE")] = "fine-tune",
    check: Annotated[bool, Parameter(env_var="ROSE_CHECK")] = True,
    common: Common = COMMON,
) -> None:
    """Upload a file; training data is checked first.

    Parameters
    ----------
    path
        The file; a large one is sent in parts.
    purpose
        What it is for: fine-tune, or another of the API's purposes.
    check
        Check training data before it is sent.
    """
    from cli.uploading import send

    require_file(path)
    if check and purpose == "fine-tune":
        require_good_data(path, "nothing was uploaded")
    with common.client() as client:
        made = send(client, path, purpose, common.output)
    common.output.show(made, identity=made.id, lines=[f"File uploaded: {made.id}"])


def list_files(*, common: Common = COMMON) -> None:
    """List files, newest first."""
    with common.client() as client:
        found = client.files()
    rows = [(item.id, item.filename, item.purpose, size(item.bytes), moment(item.created_at)) for item in found]
    common.output.table(
        ("id", "name", "purpose", "size", "created"),
        rows,
        things=found,
        empty="No files yet. Try: rose upload data.jsonl",
    )


def get(file: str, /, *, common: Common = COMMON) -> None:
    """Show a file.

    Parameters
    ----------
    file
        Its id, a unique beginning of it, or `last`.
    """
    with common.client() as client:
        found = client.file(client.resolve(file, "file_"))
    common.output.show(found, identity=found.id, lines=_lines(found))


def download(
    file: str,
    /,
    *,
    to: Annotated[Path | None, Parameter(name=["--to", "-o"], env_var="ROSE_TO")] = None,
    common: Common = COMMON,
) -> None:
    """Download a file's content.

    Parameters
    ----------
    file
        Its id, a unique beginning of it, or `last`.
    to
        Where to write it; `-` or nothing: standard output.
    """
    import sys

    with common.client() as client:
        file_id = client.resolve(file, "file_")
        with client.download(f"/files/{file_id}/content") as pieces:
            if to is None or str(to) == "-":
                for piece in pieces:
                    sys.stdout.buffer.write(piece)
                sys.stdout.buffer.flush()
                return
            write_whole(pieces, to)
    common.output.talk(f"Written to {to}")


def delete(file: str, /, *, common: Common = COMMON) -> None:
    """Delete a file; jobs that use it keep its content.

    Parameters
    ----------
    file
        Its id, a unique beginning of it, or `last`.
    """
    with common.client() as client:
        gone = client.delete_file(client.resolve(file, "file_"))
    common.output.show(gone, identity=gone.id, lines=[f"File deleted: {gone.id}"])


def check(path: Path, /, *, common: Common = COMMON) -> None:
    """Check training data without a server; exit 6 when it has problems.

    Parameters
    ----------
    path
        A JSONL file of conversations.
    """
    require_file(path)
    examples = require_good_data(path, "it cannot be used")
    common.output.show(
        {"path": str(path), "examples": examples, "problems": []},
        identity=str(examples),
        lines=[f"{path.name}: {examples} examples, no problems"],
    )
    if examples < 10:
        common.output.warn(f"{examples} examples are few; 50 to 100 good ones usually show a clear effect")


def require_file(path: Path) -> None:
    """Raise NotFound unless `path` is a file."""
    if path.is_dir():
        raise InvalidRequest(f"{path} is a folder.", code="no_such_file", hint="Name a file in it.")
    if not path.is_file():
        raise NotFound(f"There is no file {path}.", code="no_such_file")


def require_good_data(path: Path, consequence: str) -> int:
    """Return the number of examples.

    Raises: InvalidDataset for a name that the server refuses; CheckedDataset naming every line with a problem.
    """
    from rose.domain import formats
    from rose.domain.training_data import Problem, check_name
    from rose.methods import read_any

    check_name(path.name)
    examples = 0
    problems: list[Problem] = []
    with path.open("rb") as lines:
        for item in read_any(lines):
            if isinstance(item, Problem):
                problems.append(item)
            else:
                examples += 1
    if not problems and examples:
        return examples
    if not problems:
        raise CheckedDataset(f"{path.name} has no examples; {consequence}", [])
    shown = [f"line {problem.line:<5} {problem.text}" for problem in problems[:MAX_SHOWN_PROBLEMS]]
    if len(problems) > len(shown):
        shown.append(f"… and {len(problems) - len(shown)} more")
    count = f"{len(problems)} problem{'s' if len(problems) != 1 else ''}"
    foreign = any(formats.COMMAND in problem.text for problem in problems)
    convert = f"rose files convert {path} -o {path.with_suffix('.chat.jsonl')}" if foreign else None
    raise CheckedDataset(f"{path.name} has {count}; {consequence}", shown, hint=convert)


def upload_once(client: Client, path: Path, output: Output) -> tuple[schema.File, bool]:
    """Upload training data unless the server has a file of the same content; return it and whether it was there."""
    from cli.uploading import send

    digest = hashlib.sha256()
    with path.open("rb") as content:
        while piece := content.read(_CHUNK_BYTES):
            digest.update(piece)
    for known in client.files():
        if known.sha256 == digest.hexdigest() and known.purpose == "fine-tune":
            return known, True
    return send(client, path, "fine-tune", output), False


def write_whole(pieces: Iterator[bytes], to: Path) -> None:
    """Write a download under a temporary name and rename it, so that no half file stays.

    Raises: NotFound when its folder does not exist; InvalidRequest when it is a folder itself.
    """
    if to.is_dir():
        raise InvalidRequest(f"{to} is a folder.", code="no_such_file", hint="Name a file in it.")
    if not to.parent.is_dir():
        raise NotFound(f"There is no folder {to.parent}.", code="no_such_folder", hint=f"mkdir -p {to.parent}")
    partial = to.with_name(to.name + ".part")
    try:
        with partial.open("wb") as target:
            for piece in pieces:
                target.write(piece)
        partial.replace(to)
    finally:
        partial.unlink(missing_ok=True)


def _lines(item: schema.File) -> list[str]:
    lines = [
        f"id        {item.id}",
        f"name      {item.filename}",
        f"purpose   {item.purpose}",
        f"size      {size(item.bytes)} ({item.bytes} bytes)",
        f"status    {item.status}",
        f"created   {moment(item.created_at)}",
    ]
    if item.sha256:
        lines.append(f"sha256    {item.sha256}")
    return lines
