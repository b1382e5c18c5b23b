"""Parquet and Arrow through pyarrow: rows in small batches, JSON columns decoded, fillers of structs taken out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import msgspec

from rose.conversion.opening import missing_package
from rose.conversion.rows import Row
from rose.errors import InvalidDataset

_BATCH_ROWS = 64
_BROKEN = (OSError, UnicodeDecodeError, MemoryError)
"""What pyarrow raises beside its own errors over damaged bytes: names that are no text, lengths beyond all memory."""


def rows_of_parquet(path: Path, name: str) -> Iterator[Row]:
    """Yield the rows of a Parquet file."""
    arrow = _arrow("Parquet")
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path, pre_buffer=False, arrow_extensions_enabled=True) as file:
            yield from _rows(file.schema_arrow, file.iter_batches(batch_size=_BATCH_ROWS), name)
    except (arrow.lib.ArrowException, *_BROKEN) as problem:
        raise _unreadable(name, problem) from None


def rows_of_stream(content: IO[bytes], name: str, *, file: bool) -> Iterator[Row]:
    """Yield the rows of an Arrow file, or of a stream, which the datasets library calls a file."""
    arrow = _arrow("Arrow")
    try:
        if file:
            reader = arrow.ipc.open_file(content)
            batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
        else:
            reader = arrow.ipc.open_stream(content)
            batches = iter(reader)
        yield from _rows(reader.schema, batches, name)
    except (arrow.lib.ArrowException, *_BROKEN) as problem:
        raise _unreadable(name, problem) from None


def _rows(schema: Any, batches: Iterator[Any], name: str) -> Iterator[Row]:
    plans = {field.name: _json_inside(field.type) for field in schema}
    number = 0
    for batch in batches:
        batch.validate(full=True)  # a damaged offset or text would break Python itself, not raise
        for start in range(0, batch.num_rows, _BATCH_ROWS):
            for value in batch.slice(start, _BATCH_ROWS).to_pylist():
                number += 1
                yield _row(value, plans, f"{name} row {number}")


def _row(value: Mapping[str, Any], plans: Mapping[str, Any], place: str) -> Row:
    try:
        found = {key: without_fillers(_decoded(inner, plans[key])) for key, inner in value.items()}
    except RecursionError:
        return Row(place=place, problem="is nested too deeply")
    return Row(place=place, value=found)


def _json_inside(kind: Any) -> Any:
    """Return where JSON texts lie in a type: True for one itself, else the places inside it, else None."""
    if getattr(kind, "extension_name", None) == "arrow.json":
        return True
    types = _arrow("Arrow").types
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        inside = _json_inside(kind.value_type)
        return None if inside is None else [inside]
    if types.is_struct(kind):
        fields = {field.name: _json_inside(field.type) for field in kind}
        found = {name: inside for name, inside in fields.items() if inside is not None}
        return found or None
    return None


def _decoded(value: Any, plan: Any) -> Any:
    if plan is None or value is None:
        return value
    if plan is True:
        return _json(value)
    if isinstance(plan, list):
        return [_decoded(one, plan[0]) for one in value]
    return {key: _decoded(inner, plan.get(key)) for key, inner in value.items()}


def without_fillers(value: Any) -> Any:
    """Return a value without the nulls among a schema's properties.

    Every struct of a column has the fields of all of them, null where a row lacks one. Among `properties` a null can
    be nothing else, since a property is described by an object; elsewhere it may be meant, and stays.
    """
    if isinstance(value, list):
        return [without_fillers(one) for one in value]
    if not isinstance(value, dict):
        return value
    inner = {key: without_fillers(one) for key, one in value.items()}
    if isinstance(inner.get("properties"), dict):
        inner["properties"] = {key: one for key, one in inner["properties"].items() if one is not None}
    return inner


def _json(text: Any) -> Any:
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError, TypeError):
        return text


def _arrow(what: str) -> Any:
    try:
        import pyarrow
        from pyarrow import ipc as _ipc  # noqa: F401  # pyright: ignore[reportUnusedImport]: not loaded by the first
    except ImportError:
        raise missing_package("pyarrow", f"read {what}") from None
    return pyarrow


def _unreadable(name: str, problem: Exception) -> InvalidDataset:
    first = str(problem).splitlines()[0] if str(problem) else type(problem).__name__
    return InvalidDataset(f"{name} is damaged or cut off: {first}.", hint="Fetch or write it again.")
