"""Folders that hold data sets: what the `datasets` library saves, and LLaMA-Factory's data folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from rose.conversion.llama_factory import Layout, layout_of
from rose.errors import InvalidDataset, InvalidRequest, NotFound

_MOST_BYTES = 16 << 20


class Found(msgspec.Struct, frozen=True):
    """The files of a folder, and how their columns are named where the folder says it."""

    paths: tuple[Path, ...]
    what: str
    layout: Layout | None = None


def look_into(folder: Path, dataset: str | None) -> Found:
    """Return the files of a folder's data set.

    Raises: InvalidDataset when it is none of the known folders, or leads outside itself; InvalidRequest when it has
    several data sets and none was named.
    """
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        return Found(_saved_files(folder), "a folder of the datasets library")
    if (folder / "dataset_dict.json").is_file():
        splits = _read(folder / "dataset_dict.json").get("splits")
        names = [str(one) for one in splits] if isinstance(splits, list) else []
        if len(names) == 1:
            return look_into(_inside(folder, names[0]), dataset)
        raise InvalidRequest(
            f"{folder} has {len(names)} parts: {', '.join(names[:10])}.",
            hint=f"Name one: {folder / (names[0] if names else '…')}",
        )
    if (folder / "dataset_info.json").is_file():
        return _llama_factory(folder, dataset)
    raise InvalidDataset(
        f"{folder} is a folder, and no data set that is known by its files.",
        hint="Name the files in it; folders are read with state.json or dataset_info.json in them.",
    )


def _saved_files(folder: Path) -> tuple[Path, ...]:
    listed = _read(folder / "state.json").get("_data_files")
    names = [one.get("filename") for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []
    if not names or not all(isinstance(one, str) for one in names):
        raise InvalidDataset(f"{folder / 'state.json'} names no data files.")
    return tuple(_file(folder, str(name)) for name in names)


def _llama_factory(folder: Path, dataset: str | None) -> Found:
    entries = {name: one for name, one in _read(folder / "dataset_info.json").items() if isinstance(one, dict)}
    local = sorted(name for name, one in entries.items() if isinstance(one.get("file_name"), str) and not _afar(one))
    chosen = dataset or (local[0] if len(local) == 1 else None)
    if chosen is None and local:
        raise InvalidRequest(
            f"{folder} has {len(local)} data sets: {', '.join(local[:10])}{', …' if len(local) > 10 else ''}.",
            param="dataset",
            hint=f"Name one: --dataset {local[0]}",
        )
    if chosen is None or chosen not in local:
        what = f"{chosen} is no data set of {folder} with a file" if chosen else f"{folder} names no files"
        raise InvalidDataset(f"{what}; what lies on a hub or is made by a script is not read.")
    target = _inside(folder, entries[chosen]["file_name"])
    paths = tuple(sorted(one for one in target.iterdir() if one.is_file())) if target.is_dir() else (target,)
    if not paths or not all(one.is_file() for one in paths):
        raise NotFound(f"There is no file {target}, which dataset_info.json names.", code="no_such_file")
    return Found(paths, f"the data set {chosen} of LLaMA-Factory", layout_of(entries[chosen], chosen))


def _afar(entry: Mapping[str, Any]) -> bool:
    return any(entry.get(name) for name in ("script_url", "hf_hub_url", "ms_hub_url", "om_hub_url", "cloud_file_name"))


def _read(path: Path) -> Mapping[str, Any]:
    with path.open("rb") as file:
        raw = file.read(_MOST_BYTES)
    try:
        value = msgspec.json.decode(raw)
    except (msgspec.DecodeError, RecursionError) as problem:
        raise InvalidDataset(f"{path} is not valid JSON: {problem}.") from None
    if not isinstance(value, dict):
        raise InvalidDataset(f"{path} holds no JSON object.")
    return value


def _file(folder: Path, name: str) -> Path:
    path = _inside(folder, name)
    if not path.is_file():
        raise NotFound(f"There is no file {path}, which the folder names.", code="no_such_file")
    return path


def _inside(folder: Path, name: str) -> Path:
    """Return a path of the folder. Raises: InvalidDataset when it leads outside."""
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise InvalidDataset(f"{folder} names the file {name!r}, which lies outside of it.")
    return folder / name
