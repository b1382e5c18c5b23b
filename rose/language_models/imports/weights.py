"""Write the numbers of a GGUF as safetensors, in pieces: memory holds some rows of one tensor at a time."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from gguf import GGMLQuantizationType, ReaderTensor
from gguf.quants import dequantize

from rose.language_models.imports.architectures import DERIVED, Architecture, Config
from rose.language_models.imports.gguf_file import GgufFile, NotImportable

PIECE_NUMBERS = 4 << 20
"""Numbers that are dequantised at a time: 16 MiB as float32, and some times that on the way."""
STORED_AS = {GGMLQuantizationType.F32: "F32", GGMLQuantizationType.F16: "F16", GGMLQuantizationType.BF16: "BF16"}
"""Types that safetensors has, too, and that are kept exactly; all others become float16, which they were made from."""
WIDTHS = {"F32": 4, "F16": 2, "BF16": 2}

Change = Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]


class Planned(msgspec.Struct, frozen=True, kw_only=True):
    """One tensor on its way into the base."""

    name: str
    source: ReaderTensor
    shape: tuple[int, ...]
    kind: str
    change: Change | None
    whole: bool
    """The change needs all rows at once."""

    @property
    def bytes(self) -> int:
        """Size in the base."""
        return int(self.source.n_elements) * WIDTHS[self.kind]


def plan(file: GgufFile, architecture: Architecture, config: Config) -> list[Planned]:
    """Return every tensor of the file with its place and form in the base.

    Raises: NotImportable for a tensor that has no place, or is stored in a way that cannot be read.
    """
    planned: list[Planned] = []
    for tensor in file.tensors.values():
        if tensor.name in DERIVED:
            continue
        name = architecture.target(tensor.name)
        if name is None:
            raise NotImportable(
                f"{file.path.name} has a tensor {tensor.name} that a {file.architecture} model has no place for.",
                hint="Import the folder with its original *.safetensors: rose models import FOLDER",
            )
        planned.append(_planned(tensor, name, architecture, config))
    return planned


def _planned(tensor: ReaderTensor, name: str, architecture: Architecture, config: Config) -> Planned:
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    leaf = tensor.name.split(".")[-2]
    kind = STORED_AS.get(tensor.tensor_type, "F16")
    change: Change | None = None
    if architecture.permuted and leaf in heads:
        change = _unpermuted(heads[leaf])
    elif architecture.norm_plus_one and name.endswith("norm.weight"):
        change, kind = _minus_one, "F32"
    return Planned(
        name=name,
        source=tensor,
        shape=tuple(int(length) for length in reversed(tensor.shape)),
        kind=kind,
        change=change,
        whole=change is not None,
    )


def check_complete(planned: list[Planned], expected: Mapping[str, tuple[int, ...]], file: GgufFile) -> None:
    """Compare with what the model of transformers has. Raises: NotImportable naming the first weight that differs."""
    found = {one.name: one.shape for one in planned}
    for name, shape in expected.items():
        if found.get(name) != shape:
            has = f"has the shape {list(found[name])} there" if name in found else "is not in it"
            raise NotImportable(
                f"{file.path.name} is no complete {file.architecture} model: {name} of shape {list(shape)} {has}.",
                hint="Convert the model again with a current converter of llama.cpp.",
            )


def write_weights(path: Path, planned: list[Planned], advance: Callable[[int], None]) -> None:
    """Write a safetensors file (8 bytes of length, a JSON header, then the numbers); `advance` hears of bytes written.

    Raises: NotImportable when a tensor's type cannot be read or its numbers are not finite.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for one in planned:
        entries[one.name] = {"dtype": one.kind, "shape": one.shape, "data_offsets": [end, end + one.bytes]}
        end += one.bytes
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for one in planned:
            for piece in _pieces(one):
                advance(file.write(piece))


def _pieces(one: Planned) -> Iterator[bytes]:
    data = one.source.data
    rows = len(data)
    step = rows if one.whole else max(1, PIECE_NUMBERS * rows // int(one.source.n_elements))
    for start in range(0, rows, step):
        try:
            numbers = dequantize(data[start : start + step], one.source.tensor_type)
        except NotImplementedError:
            raise NotImportable(
                f"The tensor {one.source.name} is stored as {one.source.tensor_type.name}, which cannot be read.",
                hint="Give a GGUF of another quantisation, for example Q8_0 or Q4_K_M.",
            ) from None
        yield _stored(one.change(numbers) if one.change else numbers, one)


def _stored(numbers: np.ndarray[Any, Any], one: Planned) -> bytes:
    with np.errstate(over="ignore"):
        stored = numbers.astype(np.float16) if one.kind == "F16" else numbers.astype(np.float32, copy=False)
    if not np.isfinite(stored).all():
        raise NotImportable(
            f"The tensor {one.source.name} has numbers that are not finite, or too large for float16.",
            hint="The file is damaged, or converted wrongly: get it again, or another quantisation of it.",
        )
    if one.kind == "BF16":  # the upper half of a float32: exact, since that is what the file has
        return (np.ascontiguousarray(stored).view(np.uint32) >> 16).astype(np.uint16).tobytes()
    return stored.tobytes()


def _minus_one(numbers: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return numbers - 1


def _unpermuted(heads: int) -> Change:
    """Return what undoes llama.cpp's order of rows: within each head, pairs of neighbours become two halves."""

    def change(numbers: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        half = numbers.shape[0] // heads // 2
        return numbers.reshape(heads, half, 2, *numbers.shape[1:]).swapaxes(1, 2).reshape(numbers.shape)

    return change
