"""Make a base of a GGUF or a model folder: whole or not at all, once, with its origin beside it.

One import at a time holds the lock of the models folder. It works in a folder of its own, which gets its name at the
end; what a killed one left is cleared by the next.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rose.domain.bases import FETCHED
from rose.errors import NoSpace
from rose.language_models.imports.architectures import Config, architecture_of
from rose.language_models.imports.gguf_file import GgufFile, NotImportable, open_gguf
from rose.language_models.imports.progress import Progress
from rose.language_models.imports.tokenizer import write_tokenizer
from rose.language_models.imports.weights import Planned, check_complete, plan, write_weights
from rose.language_models.locate import (
    FACTS_FILE,
    MODEL_PATTERNS,
    ModelNotAvailable,
    Origin,
    RoseFacts,
    describe,
    imported_facts,
    read_facts,
)

LEFTOVER_PREFIX = ".import-"
"""Begins the name of every folder that is worked in."""
LOCK = ".imports.lock"
SIDE_BYTES = 64 << 20
"""Room for tokenizer and configuration; the largest tokenizers take half of it."""
PIECE_BYTES = 4 << 20
FORMS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Forms that need no dequantising, as config.json names them."""


class Imported(msgspec.Struct, frozen=True, kw_only=True):
    """What an import has made, or found."""

    name: str
    path: str
    source: str
    sha256: str
    quantisation: str | None
    existed: bool
    """The same content was there already, under this name."""


def import_model(
    source: Path,
    name: str,
    *,
    models: Path,
    min_free_bytes: int = 0,
    chat_template: str | None = None,
    progress: Progress | None = None,
) -> Imported:
    """Make the base `name` in `models` of a GGUF or a model folder, unless the same content is there already.

    Raises: NotImportable; NoSpace before anything is written.
    """
    progress = progress or Progress()
    with only_import(models, progress):
        if source.is_dir():
            return _import_folder(source, name, models, min_free_bytes, progress)
        return import_gguf(source, name, models, min_free_bytes, chat_template, progress)


@contextmanager
def only_import(models: Path, progress: Progress) -> Generator[None]:
    """Hold the lock of the models folder, which is made if need be, and clear what killed imports have left in it.

    The system releases the lock when its holder dies.
    """
    models.mkdir(parents=True, exist_ok=True)
    with (models / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress.phase("wait")
            fcntl.flock(lock, fcntl.LOCK_EX)
        for folder in models.glob(f"{LEFTOVER_PREFIX}*"):
            shutil.rmtree(folder)
        yield


def import_gguf(
    source: Path, name: str, models: Path, min_free_bytes: int, chat_template: str | None, progress: Progress
) -> Imported:
    """Make the base `name` of a GGUF while holding the lock; as `import_model`."""
    file = open_gguf(source)
    architecture = architecture_of(file)
    config = architecture.config(file)
    planned = plan(file, architecture, config)
    model = _empty_model(config, file)
    check_complete(planned, _shapes(model), file)
    digest = _hash([source], progress)
    facts = _gguf_facts(file, name, digest, planned)
    if known := _already(models, facts):
        return known
    _check_taken(models / name, name, digest)
    needed = sum(one.bytes for one in planned) + SIDE_BYTES
    check_room(models, needed, min_free_bytes)

    def fill(folder: Path) -> None:
        write_tokenizer(file, folder, chat_template)
        (folder / "config.json").write_bytes(_config_file(config, model, planned))
        progress.phase("convert", sum(one.bytes for one in planned))
        write_weights(folder / "model.safetensors", planned, progress.advance)

    return _made(models, facts, fill)


def _gguf_facts(file: GgufFile, name: str, digest: str, planned: list[Planned]) -> RoseFacts:
    kind = file.quantisation
    stored = {one.source.tensor_type.name: one.kind for one in planned}
    return RoseFacts(
        name=name,
        version=digest[:12],
        about=f"Imported from {file.path.name}.",
        origin=Origin(file=file.path.name, sha256=digest),
        quantisation=None if kind in FORMS else f"{kind}, dequantised to {FORMS[stored[kind]]}",
    )


def _empty_model(config: Config, file: GgufFile) -> Any:
    """Return transformers' model of this configuration, without numbers. Raises: NotImportable where it makes none."""
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise NotImportable(
            f"The numbers in {file.path.name} make no {file.architecture} model: {error}",
            hint="Convert the model again with a current converter of llama.cpp.",
        ) from error


def _shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every weight that the model's files must hold."""
    shapes = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    return shapes


def _config_file(config: Config, model: Any, planned: list[Planned]) -> bytes:
    """Return config.json: what the file said, and nothing of this version of transformers, so that it is the same."""
    largest = max(planned, key=lambda one: one.bytes)
    said = {key: value for key, value in config.items() if value is not None}
    return _json({**said, "architectures": [type(model).__name__], "dtype": FORMS[largest.kind]})


def _import_folder(source: Path, name: str, models: Path, min_free_bytes: int, progress: Progress) -> Imported:
    _check_is_model(source)
    files = sorted({path for pattern in MODEL_PATTERNS for path in source.glob(pattern) if path.is_file()})
    files = [path for path in files if path.name != FACTS_FILE]
    digest = _hash(files, progress)
    before = read_facts(source)
    facts = RoseFacts(
        name=name,
        version=digest[:12],
        about=f"Imported from the folder {source.resolve().name}.",
        origin=Origin(file=source.resolve().name, sha256=digest),
        quantisation=before.quantisation if before else None,
        rose_base_learning_rate=before.rose_base_learning_rate if before else None,
    )
    if known := _already(models, facts):
        return known
    _check_taken(models / name, name, digest)
    total = sum(path.stat().st_size for path in files)
    check_room(models, total, min_free_bytes)

    def fill(folder: Path) -> None:
        progress.phase("copy", total)
        for path in files:
            _copy(path, folder / path.name, progress.advance)

    return _made(models, facts, fill)


def _check_is_model(source: Path) -> None:
    weights = sorted(source.glob("*.gguf"))
    if weights and not any(source.glob("*.safetensors")):
        raise NotImportable(
            f"{source} holds {weights[0].name} and no *.safetensors.",
            hint=f"Import the file: rose models import {source / weights[0].name}",
        )
    try:
        describe(source, source=str(source), revision=None)
    except ModelNotAvailable as error:
        raise NotImportable(error.message, hint=error.hint) from error
    has_template = (source / "chat_template.jinja").is_file() or _template_in_config(source)
    if not has_template:
        raise NotImportable(
            f"The model in {source} has no chat template.",
            hint="Take the instruct version of the model, or put its chat_template.jinja into the folder.",
        )


def _template_in_config(folder: Path) -> bool:
    try:
        config = msgspec.json.decode((folder / "tokenizer_config.json").read_bytes(), type=dict[str, Any])
    except (FileNotFoundError, msgspec.DecodeError):
        return False
    return bool(config.get("chat_template"))


def _already(models: Path, facts: RoseFacts) -> Imported | None:
    assert facts.origin is not None
    for known in imported_facts(models):
        if known.origin is not None and known.origin.sha256 == facts.origin.sha256:
            return _imported(models, known, existed=True)
    return None


def _check_taken(folder: Path, name: str, digest: str) -> None:
    if FETCHED.get(name.casefold(), digest) != digest:
        raise NotImportable(
            f"{name} is the name of the model that `rose models pull {name.casefold()}` brings; this is another one.",
            code="name_taken",
            param="name",
            hint="Give it another name: --name my-model",
        )
    if folder.exists() or any(other.name.casefold() == name.casefold() for other in folder.parent.iterdir()):
        raise NotImportable(
            f"There is another model called {name!r} in {folder.parent}.",
            code="name_taken",
            param="name",
            hint="Give it another name: --name my-model; or remove that folder, if no model of yours needs it.",
        )


def check_room(models: Path, needed: int, min_free_bytes: int) -> None:
    """Raises: NoSpace when so many bytes would leave less than `min_free_bytes` on the disk."""
    free = shutil.disk_usage(models).free
    if needed + min_free_bytes > free:
        raise NoSpace(
            f"The base needs {needed / 1e6:.0f} MB in {models}, beside {min_free_bytes / 1e6:.0f} MB that stay free; "
            f"{free / 1e6:.0f} MB are free.",
            hint="Make room there, or set ROSE_DATA_DIR to a larger disk. Nothing was written.",
        )


def _made(models: Path, facts: RoseFacts, fill: Callable[[Path], None]) -> Imported:
    """Fill a new folder and give it its name as the last step."""
    temporary = Path(tempfile.mkdtemp(dir=models, prefix=LEFTOVER_PREFIX))
    try:
        fill(temporary)
        (temporary / FACTS_FILE).write_bytes(_json(facts))
        describe(temporary, source=facts.name, revision=facts.version)
        _sync(temporary)
        temporary.chmod(0o755)
        temporary.rename(models / facts.name)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return _imported(models, facts, existed=False)


def _sync(folder: Path) -> None:
    for path in (*folder.iterdir(), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _imported(models: Path, facts: RoseFacts, *, existed: bool) -> Imported:
    assert facts.origin is not None
    return Imported(
        name=facts.name,
        path=str(models / facts.name),
        source=facts.origin.file,
        sha256=facts.origin.sha256,
        quantisation=facts.quantisation,
        existed=existed,
    )


def _hash(files: list[Path], progress: Progress) -> str:
    """Return the SHA-256 of one file's content, or of the names and contents of several."""
    progress.phase("hash", sum(path.stat().st_size for path in files))
    digest = hashlib.sha256()
    for path in files:
        if len(files) > 1:
            digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while piece := file.read(PIECE_BYTES):
                digest.update(piece)
                progress.advance(len(piece))
    return digest.hexdigest()


def _copy(source: Path, target: Path, advance: Callable[[int], None]) -> None:
    with source.open("rb") as reading, target.open("wb") as writing:
        while piece := reading.read(PIECE_BYTES):
            advance(writing.write(piece))


def _json(thing: Any) -> bytes:
    return msgspec.json.format(msgspec.json.encode(thing)) + b"\n"
