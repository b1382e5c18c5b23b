"""Says in words what a value is and what a type allows, for refusals: `auto or a whole number from 1 to 50`."""

from __future__ import annotations

import math
from typing import Any

from msgspec import inspect

MAX_CHOICES_SHOWN = 12
LISTS = (inspect.ListType, inspect.VarTupleType)


def shown(value: Any) -> str:
    """Return a value as it was sent, up to a length."""
    if isinstance(value, str):
        return repr(value[:80])
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return repr(value)[:80]


def type_of(value: Any) -> str:
    """Return what a value of JSON is, in words."""
    if isinstance(value, float):
        return f"{value}"
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string"}
    return names.get(type(value), "a list" if isinstance(value, list) else "an object")


def members(info: inspect.Type | None) -> list[Any]:
    """Return the alternatives of a description: of a union its members, else itself."""
    if isinstance(info, inspect.Metadata):
        return members(info.type)
    if isinstance(info, inspect.UnionType):
        return [one for each in info.types for one in members(each)]
    return [] if info is None else [info]


def may_be(info: inspect.Type | None) -> str:
    """Say what a value may be, with its bounds: `auto or a whole number from 1 to 50`."""
    return _joined(info, bounds=True)


def kinds(info: inspect.Type | None) -> str:
    """Say of which types a value may be, without bounds."""
    return _joined(info, bounds=False)


def _joined(info: inspect.Type | None, *, bounds: bool) -> str:
    options = members(info)
    choices = [str(value) for one in options if isinstance(one, inspect.LiteralType) for value in one.values]
    others = [_words(one, bounds) for one in options if not isinstance(one, (inspect.LiteralType, inspect.NoneType))]
    if len(choices) > 2 and not others:
        rest = ", …" if len(choices) > MAX_CHOICES_SHOWN else ""
        return f"one of {', '.join(choices[:MAX_CHOICES_SHOWN])}{rest}"
    words = list(dict.fromkeys([*choices, *others]))
    if not words:
        return "another value"
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _words(info: Any, bounds: bool) -> str:
    match info:
        case inspect.IntType():
            return f"a whole number{_range(info) if bounds else ''}"
        case inspect.FloatType():
            return f"a number{_range(info) if bounds else ''}"
        case inspect.BoolType():
            return "true or false" if bounds else "a boolean"
        case inspect.StrType():
            size = _size(info, "characters") if bounds else ""
            return f"a string of {size}" if size else "a string"
        case inspect.ListType() | inspect.VarTupleType():
            size = _size(info, "entries") if bounds else ""
            return f"a list of {size}" if size else "a list"
        case inspect.TupleType(item_types=items):
            return f"a list of {len(items)} entries"
        case _:
            return "an object"


def _range(info: Any) -> str:
    """Return the bounds of a number in words, with a space before them."""
    low = info.ge if info.ge is not None else info.gt
    high = info.le if info.le is not None else info.lt
    below = "" if info.le is not None else "below "
    if low is None and high is None:
        return ""
    if high is None:
        return f" of {low:g} or more" if info.ge is not None else f" above {low:g}"
    if low is None:
        return f" up to {below}{_number(high)}"
    return (
        f" from {_number(low)} to {below}{_number(high)}"
        if info.ge is not None
        else (f" above {_number(low)}, up to {below}{_number(high)}")
    )


def _number(value: float) -> str:
    return str(int(value)) if math.isfinite(value) and value == int(value) else f"{value:g}"


def _size(info: Any, what: str) -> str:
    """Return the bounds of a length in words, "" when there are none."""
    low, high = info.min_length, info.max_length
    if low is None and high is None:
        return ""
    if high is None:
        return f"at least {low} {_singular(what) if low == 1 else what}"
    return f"{low} to {high} {what}" if low is not None else f"at most {high} {what}"


def _singular(what: str) -> str:
    return {"characters": "character", "entries": "entry", "pairs": "pair"}[what]


def sizes_broken(found: Any, info: inspect.Type | None) -> str:
    """Return the bounds that the length of a text, list or object breaks, in words; "" when it breaks none."""
    wanted, what = (
        ((inspect.StrType,), "characters")
        if isinstance(found, str)
        else (LISTS, "entries")
        if isinstance(found, list)
        else ((inspect.DictType,), "pairs")
    )
    for one in members(info):
        if isinstance(one, wanted):
            low, high = one.min_length or 0, one.max_length
            if len(found) < low or (high is not None and len(found) > high):
                return _size(one, what)
    return ""
