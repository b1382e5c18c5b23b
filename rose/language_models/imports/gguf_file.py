"""Open a GGUF and read what it says; what is damaged, split or no GGUF at all is refused with its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gguf import GGUFReader, ReaderTensor

from rose.errors import InvalidRequest

MAGIC = b"GGUF"


class NotImportable(InvalidRequest):
    """This cannot be made into a base model."""

    default_code = "model_not_importable"


class GgufFile:
    """What a GGUF holds: its values by name and its tensors, mapped and not read."""

    def __init__(self, path: Path, reader: GGUFReader) -> None:
        self.path = path
        self.tensors: dict[str, ReaderTensor] = {tensor.name: tensor for tensor in reader.tensors}
        self._fields = reader.fields

    def value(self, key: str, default: Any = None) -> Any:
        """Return the value of `key`, or `default` where the file has none."""
        field = self._fields.get(key)
        return default if field is None else field.contents()

    def length(self, key: str) -> int:
        """Return how many elements the array `key` has, without reading them; 0 where there is none."""
        field = self._fields.get(key)
        return 0 if field is None else len(field.data)

    def of_model(self, key: str, default: Any = None) -> Any:
        """Return the value of `{architecture}.{key}`."""
        return self.value(f"{self.architecture}.{key}", default)

    def required(self, key: str) -> Any:
        """Return the value of `{architecture}.{key}`. Raises: NotImportable where the file has none."""
        found = self.of_model(key)
        if found is None:
            raise NotImportable(
                f"{self.path.name} does not say {self.architecture}.{key}.",
                hint="Convert the model again with a current converter of llama.cpp.",
            )
        return found

    @property
    def architecture(self) -> str:
        """The kind of model, as llama.cpp names it."""
        return str(self.value("general.architecture", ""))

    @property
    def quantisation(self) -> str:
        """The type that most numbers are stored in, for example `Q4_1`."""
        numbers: dict[str, int] = {}
        for tensor in self.tensors.values():
            kind = tensor.tensor_type.name
            numbers[kind] = numbers.get(kind, 0) + int(tensor.n_elements)
        return max(numbers, key=lambda kind: numbers[kind], default="")


def open_gguf(path: Path) -> GgufFile:
    """Open a GGUF that is whole and complete.

    Raises: NotImportable saying what is wrong with it.
    """
    with path.open("rb") as opened:
        start = opened.read(len(MAGIC))
    if start != MAGIC:
        raise NotImportable(
            f"{path.name} is no GGUF: it begins with {start!r}, not {MAGIC!r}.",
            hint="Give a .gguf file, or the folder that holds config.json, the tokenizer and *.safetensors.",
        )
    try:
        reader = GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError) as error:
        raise _damaged(path, f"reading it ends with {type(error).__name__}: {error}") from error
    file = GgufFile(path, reader)
    _check_whole(file)
    size = path.stat().st_size
    for tensor in reader.tensors:
        if int(tensor.data_offset) + int(tensor.n_bytes) > size:
            raise _damaged(path, f"the numbers of {tensor.name} lie beyond its end")
    if not file.architecture or not file.tensors:
        raise NotImportable(
            f"{path.name} holds no model: it names no architecture or has no tensors.",
            hint="Some GGUF files hold a vocabulary or a vision part only; give the one with the model.",
        )
    return file


def _check_whole(file: GgufFile) -> None:
    parts = file.value("split.count", 0)
    if parts > 1:
        raise NotImportable(
            f"{file.path.name} is part {file.value('split.no', 0) + 1} of {parts}; ROSE reads a GGUF of one file.",
            hint=f"Join them first: llama-gguf-split --merge {file.path.name} whole.gguf",
        )


def _damaged(path: Path, why: str) -> NotImportable:
    return NotImportable(
        f"{path.name} is damaged or was cut off: {why}.", hint="Copy or download it again, and compare its size."
    )
