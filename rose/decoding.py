"""Turns what a client sent into the struct that describes it; every refusal names the field, what it is and may be.

The struct is the only description: msgspec checks the value against it, and the sentences about a value that does not
fit, or about a key that nobody reads, are made from it, too. Two rules are added to msgspec's: a key that is null
counts as absent where the struct does not know it, since newer clients send such keys; and a struct that forbids
unknown fields says which key was probably meant.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import msgspec
from msgspec import inspect

from rose.errors import InvalidRequest
from rose.wording import LISTS, kinds, may_be, members, shown, sizes_broken, type_of

Value = TypeVar("Value")

MAX_KEY_SHOWN = 80
MAX_DEPTH = 100
"""Values in values that a body may hold; templates and other readers of it would fail where it is much deeper."""
_SURROGATE = re.compile("[\ud800-\udfff]")
_LOWEST, _HIGHEST = -(1 << 63), (1 << 64) - 1
"""Numbers that every reader of JSON can hold; with them infinity, which `1e999` is read as, is refused, too."""
_NO_ENTRY = object()


def convert(
    value: Any,
    kind: type[Value],
    param: str = "",
    *,
    texts: bool = False,
    elsewhere: Mapping[str, str] | None = None,
) -> Value:
    """Return `value` (of JSON's types) as `kind`.

    `param` is the path of the value in the request, "" for a body itself. With `texts` numbers are read from texts, as
    an address or a form has them. `elsewhere` says what keys are called here that have quite another name in other
    programs.

    Raises: InvalidRequest naming the first field that does not fit.
    """
    info = described(kind)
    known = _without_unknown(value, info, param, _Meant(info, param, elsewhere or {}))
    try:
        return msgspec.convert(known, kind, strict=not texts, str_keys=True)
    except msgspec.ValidationError as error:
        raise _refusal(str(error), known, kind, param, texts) from None


@functools.cache
def described(kind: Any) -> inspect.Type:
    """Return msgspec's description of a type."""
    return inspect.type_info(kind)


def check_values(value: Any, path: str = "", *, nul_allowed: bool = False) -> None:
    """Check the texts and numbers in a JSON value, in memory that does not grow with its size.

    Raises: InvalidRequest naming the field whose key or text has a lone surrogate or (unless `nul_allowed`) a NUL,
    whose number does not fit into 64 bits, or that is nested too deeply.
    """
    place: list[str | int] = []
    inside: list[Iterator[tuple[str | int, Any]]] = [iter([(path, value)])]
    while inside:
        for name, item in inside[-1]:
            problem = _problem(name, nul_allowed) or _problem(item, nul_allowed)
            if problem is not None:
                raise _unusable(problem, [*place, name])
            if isinstance(item, (dict, list)):
                if len(inside) > MAX_DEPTH:
                    raise _unusable(("is nested too deeply", "invalid_json"), place[:2])
                inside.append(iter(item.items()) if isinstance(item, dict) else enumerate(item))
                place.append(name)
                break
        else:
            inside.pop()
            del place[-1:]


def _problem(value: Any, nul_allowed: bool) -> tuple[str, str] | None:
    """Return what is wrong with a key, a text or a number, and the code for it."""
    if isinstance(value, str):
        if "\0" in value and not nul_allowed:
            return "contains a NUL character", "invalid_text"
        if _SURROGATE.search(value):
            return "contains half of a surrogate pair, which is no character", "invalid_text"
    elif isinstance(value, (int, float)) and not _LOWEST <= value <= _HIGHEST:
        return "is a number out of range", "invalid_value"
    return None


def _unusable(problem: tuple[str, str], place: list[str | int]) -> InvalidRequest:
    """Return the error about the value at `place`: names of fields and indices of lists, from the outside in."""
    where = ""
    for name in place:
        where = _at(where, name)
    what, code = problem
    return InvalidRequest(f"{where or 'The text'} {what}.", code=code, param=where or None)


# --- keys


class _Meant:
    """Finds what somebody meant by a key: a near key, or the place where the key belongs."""

    def __init__(self, info: inspect.Type, param: str, elsewhere: Mapping[str, str]) -> None:
        self._info = info
        self._param = param
        self._elsewhere = elsewhere

    def refusal(self, path: str, key: str, allowed: Iterable[str]) -> InvalidRequest:
        """Return the error about an unknown key of the object at `path`."""
        shown = _at(path, key)
        near = self._nearest(self._elsewhere.get(key.casefold(), key), path)
        known = ", ".join(_at(path, name) for name in allowed)
        return InvalidRequest(
            f"Unknown parameter: {shown}. " + (f"Did you mean {near}?" if near else f"Allowed are {known}."),
            code="unknown_parameter",
            param=shown,
        )

    def _nearest(self, key: str, path: str) -> str | None:
        """Return the place of the most similar key: the same object first, then within it, the outermost, the first."""
        key = key.casefold()[:MAX_KEY_SHOWN]
        places = list(_places(self._info, self._param))
        names = [name for name, _ in places]
        near = [name for name in names if name == key]
        near += [name for name in names if f"_{name}".endswith(f"_{key}") or key.endswith(f"_{name}")]
        near += difflib.get_close_matches(key, names, n=1, cutoff=0.65)
        inside = f"{path}." if path else ""
        found = [place for name, place in places if name in near[:1]]
        return min(found, key=lambda place: (not place.startswith(inside), place.count(".")), default=None)


def _places(info: inspect.Type, path: str) -> Iterator[tuple[str, str]]:
    """Yield each key that a description has, with its path."""
    for one in members(info):
        if isinstance(one, inspect.StructType):
            for field in one.fields:
                place = _at(path, field.encode_name)
                yield field.encode_name, place
                yield from _places(field.type, place)
        elif isinstance(one, (inspect.ListType, inspect.VarTupleType)):
            yield from _places(one.item_type, f"{path}[0]")


def _without_unknown(value: Any, info: inspect.Type, path: str, meant: _Meant) -> Any:
    """Return the value without keys that are unknown and null; what need not change is not copied.

    Raises: InvalidRequest naming the first key, from the outside in, that is unknown where none may be.
    """
    if isinstance(value, list):
        item = next((one.item_type for one in members(info) if isinstance(one, LISTS)), None)
        if item is None:
            return value
        return [_without_unknown(one, item, f"{path}[{index}]", meant) for index, one in enumerate(value)]
    if not isinstance(value, dict):
        return value
    struct = _struct_of(value, info)
    if struct is None:
        inner = next((one.value_type for one in members(info) if isinstance(one, inspect.DictType)), None)
        if inner is None or isinstance(inner, inspect.AnyType):
            return value
        return {key: _without_unknown(one, inner, _at(path, key), meant) for key, one in value.items()}
    fields = {field.encode_name: field.type for field in struct.fields}
    known = set(fields) | ({struct.tag_field} if struct.tag_field else set())
    if struct.forbid_unknown_fields:
        for key, one in value.items():
            if key not in known and one is not None:
                tag = [struct.tag_field] if struct.tag_field else []
                raise meant.refusal(path, key, [*tag, *fields])
    return {
        key: _without_unknown(one, fields[key], _at(path, key), meant) if key in fields else one
        for key, one in value.items()
        if key in known
    }


def _struct_of(value: dict[str, Any], info: inspect.Type) -> inspect.StructType | None:
    """Return which struct of the description the object is meant to be: the only one, or the one with its tag."""
    structs = [one for one in members(info) if isinstance(one, inspect.StructType)]
    if len(structs) == 1:
        return structs[0]
    return next((one for one in structs if one.tag_field and value.get(one.tag_field) == one.tag), None)


# --- sentences


def _refusal(told: str, value: Any, kind: Any, param: str, texts: bool) -> InvalidRequest:
    """Make an error that names the field out of msgspec's sentence `Expected … - at `$.field``."""
    text, _, place = told.partition(" - at `")
    in_keys = place.startswith("key` in `")
    place = place.removeprefix("key` in `").rstrip("`").removeprefix("$")
    where, found, info = _follow(told, value, kind, place, texts)
    where = f"{param}{where}" if param else where.removeprefix(".")
    if missing := re.fullmatch(r"Object missing required field `(.+)`", text):
        where = _at(where, missing[1])
        return _error(f"Missing required parameter: {where}.", "missing_required_parameter", where)
    if in_keys:
        return _about_a_key(told, found, info, where, value, kind, texts)
    where_or_body = where or "The request body"
    if not texts and re.fullmatch(r"Expected `[^`]+`, got `[^`]+`", text):
        message = f"{where_or_body} must be {kinds(info)}; it is {type_of(found)}."
        return _error(message, "invalid_type", where)
    if isinstance(found, (str, list, dict)) and (size := sizes_broken(found, info)):
        return _error(f"{where_or_body} must have {size}; it has {len(found)}.", "invalid_value", where)
    return _error(f"{where_or_body} is {shown(found)}; it must be {may_be(info)}.", "invalid_value", where)


def _about_a_key(
    told: str, found: Any, info: inspect.Type | None, where: str, value: Any, kind: Any, texts: bool
) -> InvalidRequest:
    path = where if where.startswith(("[", ".")) or not where else f".{where}"
    key = _culprit(told, value, path, found if isinstance(found, dict) else {}, kind, texts)
    keys = next((one.key_type for one in members(info) if isinstance(one, inspect.DictType)), None)
    size = sizes_broken(key, keys) or may_be(keys)
    return _error(f"Keys of {where} must have {size}; {key[:80]!r} has {len(key)}.", "invalid_value", where)


def _follow(told: str, value: Any, kind: Any, place: str, texts: bool) -> tuple[str, Any, inspect.Type | None]:
    """Return where msgspec's path leads: the path with every key named, the value there, and what it may be."""
    info: inspect.Type | None = described(kind)
    where, root = "", value
    while place:
        step = re.match(r"\[(\d+|\.\.\.)\]", place)
        if step is None:
            name, info = _field(place[1:], value, info)
            where, place = f"{where}.{name}", place[1 + len(name) :]
            value = value.get(name, _NO_ENTRY) if isinstance(value, dict) else _NO_ENTRY
            continue
        place, options = place[step.end() :], members(info)
        if step[1] == "...":
            entries = value if isinstance(value, dict) else {}
            key = _culprit(told, root, where, entries, kind, texts)
            where, value = f"{where}.{_at('', key)}", entries.get(key, _NO_ENTRY)
            info = next((one.value_type for one in options if isinstance(one, inspect.DictType)), None)
        else:
            where, at = f"{where}[{step[1]}]", int(step[1])
            value = value[at] if isinstance(value, list) and at < len(value) else _NO_ENTRY
            info = next((one.item_type for one in options if isinstance(one, LISTS)), None)
    return where, value, info


def _field(place: str, value: Any, info: inspect.Type | None) -> tuple[str, inspect.Type | None]:
    """Return the field that a path begins with, and what it may be; the name of a field may have brackets."""
    struct = _struct_of(value, info) if isinstance(value, dict) and info is not None else None
    for field in sorted(struct.fields if struct else (), key=lambda one: -len(one.encode_name)):
        if re.match(rf"{re.escape(field.encode_name)}(?=[.\[]|$)", place):
            return field.encode_name, field.type
    return re.split(r"[.\[]", place, maxsplit=1)[0], None


def _culprit(told: str, root: Any, where: str, entries: dict[str, Any], kind: Any, texts: bool) -> str:
    """Return the key of the entry that msgspec's path leaves open as `[...]`: the first that alone gives the error."""
    for key, one in entries.items():
        try:
            msgspec.convert(_replaced(root, where, {key: one}), kind, strict=not texts, str_keys=True)
        except msgspec.ValidationError as error:
            if str(error) == told:
                return key
    return next(iter(entries), "")


def _replaced(root: Any, where: str, entries: dict[str, Any]) -> Any:
    """Return a copy of `root` with the object at a path replaced."""
    steps = re.findall(r"\.([^.\[]+)|\[(\d+)\]", where)
    if not steps:
        return entries
    name, index = steps[0]
    rest = where[len(name) + 1 :] if name else where[len(index) + 2 :]
    if name:
        return {**root, name: _replaced(root[name], rest, entries)}
    return [_replaced(one, rest, entries) if at == int(index) else one for at, one in enumerate(root)]


def _error(message: str, code: str, param: str) -> InvalidRequest:
    return InvalidRequest(message, code=code, param=param or None)


def _at(path: str, name: str | int) -> str:
    """Return the path of an entry; a key is shown up to a length, and as what can be sent."""
    if isinstance(name, int):
        return f"{path}[{name}]"
    shown = name[:MAX_KEY_SHOWN].encode("utf-8", "replace").decode().replace("\0", "?")
    return f"{path}.{shown}" if path else shown


def json_schema(kind: Any) -> dict[str, Any]:
    """Return the JSON Schema of a type, with nothing referred to: what is used twice stands there twice.

    A struct that forbids unknown fields allows them with the value null; see `convert`.
    """
    schema = msgspec.json.schema(kind)
    return _resolved(schema, schema.pop("$defs", {}))


def _resolved(schema: Any, named: Mapping[str, Any]) -> Any:
    if isinstance(schema, list):
        return [_resolved(one, named) for one in schema]
    if not isinstance(schema, dict):
        return schema
    name = schema.get("$ref", "").rpartition("/")[2]
    if name:
        return {**_resolved(named[name], named), **{key: one for key, one in schema.items() if key != "$ref"}}
    kept = {key: _resolved(one, named) for key, one in schema.items() if key != "discriminator"}
    if kept.get("additionalProperties") is False:
        kept["additionalProperties"] = {"type": "null"}
    if "description" in kept and isinstance(kept["description"], str):
        kept["description"] = " ".join(kept["description"].split())
    return kept
