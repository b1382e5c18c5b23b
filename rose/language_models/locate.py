"""Find a base model on this machine, in the hub's cache or at the hub, and say exactly which one it is.

Imports no torch and no transformers: the validation child and the supervisor's checks use it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import struct
from collections.abc import Iterable, Iterator, Set
from pathlib import Path
from typing import Any

import msgspec

from rose.domain.bases import IMPORTED_NAME
from rose.domain.job_values import BaseModel
from rose.errors import InvalidRequest, NoSpace

TINY = "tiny"
"""Name of the small model that ROSE builds itself."""
TINY_VERSION = "2"
"""Its content's version; an older one is kept in a folder of its own, so that its adapters keep their base."""

SMOLLM2 = "smollm2"
"""Name of the small pretrained model that `rose models pull smollm2` brings."""

FACTS_FILE = "rose_model.json"
"""What ROSE knows of a model that it built or imported; see `RoseFacts`."""

MODEL_PATTERNS = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.tiktoken", "merges.txt", "vocab.txt")
_HUB_IGNORED = ("original/*", "onnx/*", "consolidated*.safetensors", "*/*.safetensors", "*.gguf")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_NO_ADAPTER = ("embed", "lm_head", "wte", "wpe")
"""Parts of the names of two-dimensional weights that are no linear layers, and of the output head."""
_EMBEDDINGS = ("embed_tokens", "lm_head", "wte", "word_embeddings", "embed_in", "embed_out", "tok_embeddings")
"""Last parts of the names of weights that have a row for each token."""
_MEBIBYTE = 1 << 20
_UNKNOWN_CONTEXT = 4096
_LARGEST_HEADER = 100 * _MEBIBYTE


class Origin(msgspec.Struct, frozen=True, kw_only=True):
    """The file or folder that a base was imported from."""

    file: str
    """Its name, without the path."""
    sha256: str
    """Of the file's content; of a folder, over the names and contents of its files."""


class RoseFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Content of `rose_model.json`, in the folder of a model that ROSE built or imported."""

    name: str
    version: str
    about: str
    rose_base_learning_rate: float | None = None
    """Learning rate that suits adapters on this model; the formula for real models does not fit toys."""
    origin: Origin | None = None
    """Set for an imported model."""
    quantisation: str | None = None
    """How its numbers were rounded before they came here, for example `Q4_1, dequantised to float16`."""


class LocatedBase(msgspec.Struct, frozen=True, kw_only=True):
    """A base model that lies on this machine, complete."""

    path: Path
    source: str
    revision: str | None
    """Commit at the hub, version of a model that ROSE built or imported, None for a local folder."""
    fingerprint: str
    hidden_size: int
    model_type: str
    context_tokens: int
    parameters: int
    """Numbers in the weight files."""
    weight_bytes: int
    linear_layers: dict[str, tuple[int, int]]
    """Name -> (outputs, inputs) of each layer that can carry an adapter, as the weight files name them."""
    embedding_rows: int | None = None
    """Tokens that the model has numbers for, the fewer of input and output; None where the weights have other names."""
    base_learning_rate: float | None = None
    """Set for models that ROSE built; None: the formula of rose.domain.hyperparameters."""
    origin: Origin | None = None
    """Set for an imported model."""
    quantisation: str | None = None
    """As in `RoseFacts`."""

    def base_model(self) -> BaseModel:
        """Return what events and adapters name."""
        return BaseModel(
            source=self.source,
            revision=self.revision,
            fingerprint=self.fingerprint,
            hidden_size=self.hidden_size,
            model_type=self.model_type,
            origin=self.origin.file if self.origin else None,
            origin_sha256=self.origin.sha256 if self.origin else None,
            quantisation=self.quantisation,
        )


class ModelNotAvailable(InvalidRequest):
    """The base model is not on this machine and could not be fetched."""

    default_code = "model_not_available"


class BaseChanged(InvalidRequest):
    """The base model is not the one that a job, a model or an adapter was made with."""

    default_code = "base_changed"


def tiny_folder(models_dir: Path) -> Path:
    """Return where the model `tiny` lies or will lie."""
    return models_dir / TINY


def outdated_folder(folder: Path, version: str) -> Path:
    """Return where a model of an older version is kept that ROSE has built again in `folder`."""
    return folder.with_name(f"{folder.name}-v{version}")


def is_built(folder: Path, version: str = TINY_VERSION) -> bool:
    """Return whether `folder` holds a complete model that ROSE built, of this version."""
    return built_version(folder) == version


def built_version(folder: Path) -> str | None:
    """Return the version of the complete model that ROSE built in `folder`; None when there is none."""
    facts = read_facts(folder)
    return facts.version if facts else None


def imported_facts(models_dir: Path) -> list[RoseFacts]:
    """Return the facts of every base that was imported into `models_dir`, by name."""
    folders = sorted(models_dir.glob("[!.]*")) if models_dir.is_dir() else []
    found = (read_facts(folder) for folder in folders)
    return [facts for facts in found if facts is not None and facts.origin is not None]


def imported_names(models_dir: Path) -> list[str]:
    """Return the names of the bases that were imported into `models_dir`."""
    return [facts.name for facts in imported_facts(models_dir)]


def imported(models_dir: Path, name: str) -> RoseFacts | None:
    """Return the facts of the imported base `name`; None when there is none."""
    if "/" in name or name.startswith("."):
        return None
    facts = read_facts(models_dir / name)
    return facts if facts is not None and facts.origin is not None else None


def locate(source: str, *, revision: str | None = None, models_dir: Path, offline: bool = False) -> LocatedBase:
    """Return the base model that `source` names: `tiny`, an imported base, a local folder or a hub id.

    A hub id is downloaded into the hub's own cache when it is not there (`HF_TOKEN`, `HF_HOME` and
    `HF_HUB_OFFLINE` count, as does `offline`); `revision` is a commit, branch or, for `tiny`, its version.

    Raises: ModelNotAvailable saying why in one line and what to do.
    """
    if source == TINY:
        return _locate_tiny(models_dir, revision or TINY_VERSION)
    if (facts := imported(models_dir, source)) is not None:
        return describe(models_dir / source, source=source, revision=facts.version)
    if source == SMOLLM2:
        raise ModelNotAvailable(
            f"The model {SMOLLM2!r} is not on this machine.", hint=f"Fetch it, 93 MB: rose models pull {SMOLLM2}"
        )
    folder = Path(source).expanduser()
    if folder.is_dir() or source[:1] in "/~." or (os.sep != "/" and os.sep in source):
        if not folder.is_dir():
            raise ModelNotAvailable(
                f"The base model {source!r} is a local folder that does not exist on this machine.",
                hint="Give the folder that holds config.json, the tokenizer and *.safetensors.",
            )
        return describe(folder.resolve(), source=source, revision=None)
    if IMPORTED_NAME.match(source):
        raise ModelNotAvailable(
            f"No base model {source!r} was imported on this machine.",
            hint=f"Import it here, too: rose models import FILE --name {source}",
        )
    snapshot = _fetch(source, revision, offline)
    return describe(snapshot, source=source, revision=snapshot.name)


def _locate_tiny(models_dir: Path, version: str) -> LocatedBase:
    folder = tiny_folder(models_dir)
    for candidate in (folder, outdated_folder(folder, version)):
        if is_built(candidate, version):
            return describe(candidate, source=TINY, revision=version)
    raise ModelNotAvailable(
        f"The model 'tiny' (version {version}) has not been built yet in {models_dir}.",
        hint="Build it, which takes about a minute: rose models build tiny",
    )


def check_base(found: LocatedBase | BaseModel, expected: BaseModel, what: str) -> None:
    """Refuse a base that is not exactly the one that `what` (a job, a model, an adapter) was made with.

    Raises: BaseChanged naming both fingerprints.
    """
    if found.fingerprint == expected.fingerprint:
        return
    where = f" in {found.path}" if isinstance(found, LocatedBase) and str(found.path) != found.source else ""
    raise BaseChanged(
        f"The base model {found.source!r}{where} is not the one that {what} was made with: its fingerprint is "
        f"{found.fingerprint[:12]}, not {expected.fingerprint[:12]}.",
        param="model",
        hint="Put the original files of the base back, or train a new model on the present ones.",
    )


def describe(folder: Path, *, source: str, revision: str | None) -> LocatedBase:
    """Read what a model folder says of itself and fingerprint it.

    Raises: ModelNotAvailable when config.json, the tokenizer or the weights are missing or unreadable.
    """
    config = _read_json(folder, "config.json", source)
    text: dict[str, Any] = {**config, **(config.get("text_config") or {})}
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")):
        raise _incomplete(source, folder, "it has no tokenizer files")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise _incomplete(source, folder, "it has no *.safetensors weights")
    _check_shards(folder, {path.name for path in weights}, source)
    if quantised := config.get("quantization_config") or text.get("quantization_config"):
        method = quantised.get("quant_method") if isinstance(quantised, dict) else None
        why = f"its weights are quantised ({method or 'unknown method'}); ROSE needs those in full precision"
        raise _incomplete(source, folder, why)
    hidden = _whole(text, "hidden_size", "n_embd", "d_model")
    if not hidden:
        raise _incomplete(source, folder, "its config.json names no hidden_size")
    headers = [_safetensors_header(path, source) for path in weights]
    facts = read_facts(folder)
    return LocatedBase(
        path=folder,
        source=source,
        revision=revision,
        fingerprint=_fingerprint(folder, weights, headers),
        hidden_size=hidden,
        model_type=str(text.get("model_type") or config.get("model_type") or "unknown"),
        context_tokens=_context_tokens(folder, text, source),
        parameters=sum(_numbers(header) for header in headers),
        weight_bytes=sum(path.stat().st_size for path in weights),
        linear_layers={name: shape for header in headers for name, shape in _linear_layers(header)},
        embedding_rows=min((rows for header in headers for rows in _embedding_rows(header)), default=None),
        base_learning_rate=facts.rose_base_learning_rate if facts else None,
        origin=facts.origin if facts else None,
        quantisation=facts.quantisation if facts else None,
    )


def hub_cache_folder(source: str) -> Path:
    """Return where the hub's library keeps, or would keep, the files of this hub id."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{source.replace('/', '--')}"


def _fetch(source: str, revision: str | None, offline: bool) -> Path:
    from huggingface_hub import errors as hub
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                source,
                revision=revision,
                allow_patterns=list(MODEL_PATTERNS),
                ignore_patterns=list(_HUB_IGNORED),
                local_files_only=offline,
            )
        )
    except hub.GatedRepoError:
        why = "its owner asks you to accept terms at the hub first, with the account of HF_TOKEN"
    except hub.RepositoryNotFoundError:
        why = "the hub has no such model, or HF_TOKEN may not read it"
    except hub.RevisionNotFoundError:
        why = f"the hub has no revision {revision!r} of it"
    except hub.HFValidationError:
        why = "it is neither an alias, nor a hub id like owner/name, nor a local folder"
    except hub.LocalEntryNotFoundError:
        offline = offline or os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
        why = "it is not in the hub's cache and " + ("offline mode is on" if offline else "the hub cannot be reached")
    except (hub.HTTPError, OSError) as error:  # HTTPError is that of the HTTP client the hub's library uses
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            folder = hub_cache_folder(source)
            raise NoSpace(
                f"The disk is full: {source!r} does not fit into {folder}.",
                hint=f"Make room there, or set HF_HOME to a larger disk; see also: du -sh {folder.parent}",
            ) from error
        why = f"the download failed: {_first_line(error)}"
    raise ModelNotAvailable(
        f"The base model {source!r} is not available: {why}.",
        hint=f"Fetch it where there is a network with `rose models pull {source}`, or point the name to a local "
        f'folder, for example ROSE_MODEL_ALIASES=\'{{"{source.rpartition("/")[2].lower()}": "/models/my-model"}}\'.',
    ) from None


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:200].rstrip(".")


def _incomplete(source: str, folder: Path, why: str) -> ModelNotAvailable:
    return ModelNotAvailable(
        f"The base model {source!r} cannot be used: {why} ({folder}).",
        hint="A model folder needs config.json, the tokenizer with its chat template, and *.safetensors.",
    )


def _read_json(folder: Path, name: str, source: str) -> dict[str, Any]:
    try:
        content = json.loads((folder / name).read_bytes())
    except FileNotFoundError:
        raise _incomplete(source, folder, f"it has no {name}") from None
    except (OSError, ValueError) as error:
        raise _incomplete(source, folder, f"its {name} cannot be read: {_first_line(error)}") from None
    if not isinstance(content, dict):
        raise _incomplete(source, folder, f"its {name} is not a JSON object")
    return content


def read_facts(folder: Path) -> RoseFacts | None:
    """Return what ROSE wrote down of the model in `folder`; None when it neither built nor imported one there."""
    try:
        return msgspec.json.decode((folder / FACTS_FILE).read_bytes(), type=RoseFacts)
    except (FileNotFoundError, NotADirectoryError, msgspec.DecodeError):
        return None


def _context_tokens(folder: Path, config: dict[str, Any], source: str) -> int:
    """Return the longest text: the model's positions, or less where the tokenizer says less.

    Of `longrope` (Phi) it is what its first set of factors reaches. The second set turns all positions otherwise once a
    text is longer, also those in the cache and those of a short text that shares a row with a long one.
    """
    limits = [_whole(config, "max_position_embeddings", "n_positions", "max_seq_len")]
    rope: Any = config.get("rope_parameters") or config.get("rope_scaling")
    if isinstance(rope, dict) and rope.get("rope_type", rope.get("type")) in ("longrope", "su"):
        limits.append(_whole({**config, **rope}, "original_max_position_embeddings"))
    if (folder / "tokenizer_config.json").is_file():
        longest = _read_json(folder, "tokenizer_config.json", source).get("model_max_length")
        if isinstance(longest, (int, float)) and 0 < longest < 1e9:
            limits.append(int(longest))
    return min((limit for limit in limits if limit), default=_UNKNOWN_CONTEXT)


def _check_shards(folder: Path, present: Set[str], source: str) -> None:
    """Refuse a folder whose index names weight files that it lacks, as after a download that was broken off."""
    name = "model.safetensors.index.json"
    if not (folder / name).is_file():
        return
    places = _read_json(folder, name, source).get("weight_map")
    missing = sorted(set(map(str, places.values())) - present) if isinstance(places, dict) else []
    if missing:
        raise _incomplete(source, folder, f"it lacks {len(missing)} of its weight files, first {missing[0]}")


def _whole(config: dict[str, Any], *names: str) -> int:
    """Return the first of these entries that is a number above 0, else 0."""
    values = (config.get(name) for name in names)
    return next((value for value in values if type(value) is int and value > 0), 0)


def _safetensors_header(path: Path, source: str) -> bytes:
    """Return the JSON header of a safetensors file (8 bytes of length, then the header)."""
    with path.open("rb") as file:
        length = file.read(8)
        size = struct.unpack("<Q", length)[0] if len(length) == 8 else 0
        header = file.read(size) if 0 < size <= _LARGEST_HEADER else b""
    if len(header) != size or not header:
        raise _incomplete(source, path.parent, f"{path.name} is no safetensors file or was cut off")
    try:
        ends = [entry["data_offsets"][1] for name, entry in json.loads(header).items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError):
        raise _incomplete(source, path.parent, f"the header of {path.name} is broken") from None
    if 8 + size + max(ends, default=0) != path.stat().st_size:
        raise _incomplete(source, path.parent, f"{path.name} is not complete")
    return header


def _numbers(header: bytes) -> int:
    total = 0
    for name, entry in json.loads(header).items():
        if name != "__metadata__":
            count = 1
            for length in entry["shape"]:
                count *= length
            total += count
    return total


def _embedding_rows(header: bytes) -> Iterator[int]:
    for name, entry in json.loads(header).items():
        if name != "__metadata__" and name.removesuffix(".weight").rpartition(".")[2] in _EMBEDDINGS:
            yield int(entry["shape"][0])


def _linear_layers(header: bytes) -> Iterator[tuple[str, tuple[int, int]]]:
    for name, entry in json.loads(header).items():
        layer = name.removesuffix(".weight")
        if layer != name and len(entry["shape"]) == 2 and not any(part in layer for part in _NO_ADAPTER):
            yield layer, (entry["shape"][0], entry["shape"][1])


def _fingerprint(folder: Path, weights: Iterable[Path], headers: Iterable[bytes]) -> str:
    """SHA-256 over configuration, tokenizer, chat template and of each weight file header, size, first and last MiB."""
    digest = hashlib.sha256()
    for name in ("config.json", *_TOKENIZER_FILES):
        path = folder / name
        if path.is_file():
            content = path.read_bytes()
            digest.update(f"{name}\0{len(content)}\0".encode())
            digest.update(content)
    for path, header in zip(weights, headers, strict=True):
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0{len(header)}\0".encode())
        digest.update(header)
        with path.open("rb") as file:
            digest.update(file.read(_MEBIBYTE))
            file.seek(max(0, size - _MEBIBYTE))
            digest.update(file.read(_MEBIBYTE))
    return digest.hexdigest()
