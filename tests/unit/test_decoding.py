"""What does not fit a struct is refused by a sentence that names the field, what it is and what it may be."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
import pytest
from msgspec import UNSET, Meta, UnsetType

from rose.decoding import convert, json_schema
from rose.errors import InvalidRequest

Auto = Literal["auto"]


class Inner(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """An object in another."""

    rank: Annotated[int, Meta(ge=1, le=512)] | Auto | UnsetType = UNSET


class Shape(msgspec.Struct, kw_only=True, tag="shape"):
    size: Annotated[int, Meta(ge=0)]


class Colour(msgspec.Struct, kw_only=True, tag="colour"):
    red: float


class Body(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A body with one field of each kind."""

    name: Annotated[str, Meta(min_length=1, max_length=5)]
    count: Annotated[int, Meta(ge=1, le=50)] | Auto | UnsetType = UNSET
    rate: Annotated[float, Meta(gt=0, le=1000)] | None = None
    share: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    inner: Inner | Auto | None = None
    pairs: (
        Annotated[
            dict[Annotated[str, Meta(min_length=1, max_length=4)], Annotated[str, Meta(max_length=5)]],
            Meta(max_length=2),
        ]
        | None
    ) = None
    list_: Annotated[list[Annotated[str, Meta(min_length=1)]], Meta(max_length=2)] = msgspec.field(
        name="list", default_factory=list
    )
    things: dict[str, Shape | Colour] = {}
    level: Literal["low", "medium", "high"] = "low"
    flag: bool | None = None
    bracketed: Annotated[int, Meta(ge=3)] = msgspec.field(name="life[seconds]", default=3)


REFUSED: list[tuple[Any, str | None, str, str]] = [
    ({"name": None}, "name", "invalid_type", "name must be a string; it is null."),
    ({"name": 3}, "name", "invalid_type", "name must be a string; it is a number."),
    ({"name": ""}, "name", "invalid_value", "name must have 1 to 5 characters; it has 0."),
    ({"name": UNSET}, "name", "missing_required_parameter", "Missing required parameter: name."),
    ({"count": 99}, "count", "invalid_value", "count is 99; it must be auto or a whole number from 1 to 50."),
    ({"count": "x"}, "count", "invalid_value", "count is 'x'; it must be auto or a whole number from 1 to 50."),
    ({"count": 1.5}, "count", "invalid_type", "count must be auto or a whole number; it is 1.5."),
    ({"count": True}, "count", "invalid_type", "count must be auto or a whole number; it is a boolean."),
    ({"rate": 0}, "rate", "invalid_value", "rate is 0; it must be a number above 0, up to 1000."),
    ({"share": 1}, "share", "invalid_value", "share is 1; it must be a number from 0 to below 1."),
    ({"inner": {"rank": 0}}, "inner.rank", "invalid_value", "inner.rank is 0; it must be auto or a whole number from"),
    ({"inner": 3}, "inner", "invalid_type", "inner must be auto or an object; it is a number."),
    ({"inner": {"rnk": 4}}, "inner.rnk", "unknown_parameter", "Unknown parameter: inner.rnk. Did you mean inner.rank?"),
    ({"rank": 4}, "rank", "unknown_parameter", "Unknown parameter: rank. Did you mean inner.rank?"),
    ({"zzz": 4}, "zzz", "unknown_parameter", "Unknown parameter: zzz. Allowed are name, count, rate,"),
    ({"pairs": {"a": "1", "b": 2}}, "pairs.b", "invalid_type", "pairs.b must be a string; it is a number."),
    ({"pairs": {"a": "1", "b": "222222"}}, "pairs.b", "invalid_value", "pairs.b must have at most 5 characters; it ha"),
    ({"pairs": {"a": "1", "longer": ""}}, "pairs", "invalid_value", "Keys of pairs must have 1 to 4 characters; 'long"),
    ({"pairs": dict.fromkeys("abc", "")}, "pairs", "invalid_value", "pairs must have at most 2 pairs; it has 3."),
    ({"list": ["a", ""]}, "list[1]", "invalid_value", "list[1] must have at least 1 character; it has 0."),
    ({"list": ["a", 3]}, "list[1]", "invalid_type", "list[1] must be a string; it is a number."),
    ({"list": "a"}, "list", "invalid_type", "list must be a list; it is a string."),
    ({"level": "x"}, "level", "invalid_value", "level is 'x'; it must be one of high, low, medium."),
    ({"flag": "yes"}, "flag", "invalid_type", "flag must be a boolean; it is a string."),
    ({"life[seconds]": 1}, "life[seconds]", "invalid_value", "life[seconds] is 1; it must be a whole number of 3 or"),
    (
        {"things": {"a": {"type": "shape", "size": 1}, "b": {"type": "shape", "size": -1}}},
        "things.b.size",
        "invalid_value",
        "things.b.size is -1; it must be a whole number of 0 or more.",
    ),
    ([], None, "invalid_type", "The request body must be an object; it is a list."),
]


@pytest.mark.parametrize(("change", "param", "code", "says"), REFUSED)
def test_a_refusal_names_the_field_what_it_is_and_what_it_may_be(
    change: Any, param: str | None, code: str, says: str
) -> None:
    value = change
    if isinstance(change, dict):
        value = {name: one for name, one in ({"name": "rose"} | change).items() if one is not UNSET}
    with pytest.raises(InvalidRequest) as refused:
        convert(value, Body)
    assert (refused.value.param, refused.value.code) == (param, code)
    assert refused.value.message.startswith(says), refused.value.message


def test_a_path_before_the_value_stands_before_every_name() -> None:
    with pytest.raises(InvalidRequest) as refused:
        convert({"name": "rose", "inner": {"rank": 0}}, Body, "grader.graders.near")
    assert refused.value.param == "grader.graders.near.inner.rank"
    with pytest.raises(InvalidRequest) as refused:
        convert({}, Body, "grader")
    assert refused.value.param == "grader.name"


def test_an_unknown_key_that_is_null_counts_as_absent_at_every_depth() -> None:
    body = convert({"name": "rose", "newer": None, "inner": {"rank": 4, "newer": None}}, Body)
    assert body.inner == Inner(rank=4)


def test_numbers_of_an_address_are_texts() -> None:
    assert convert({"name": "rose", "count": "7"}, Body, texts=True).count == 7
    with pytest.raises(InvalidRequest) as refused:
        convert({"name": "rose", "share": "many"}, Body, texts=True)
    assert refused.value.message == "share is 'many'; it must be a number from 0 to below 1."


def test_the_schema_allows_what_is_read_and_refers_to_nothing() -> None:
    schema = json_schema(Body)
    assert schema["required"] == ["name"]
    assert schema["additionalProperties"] == {"type": "null"}
    assert "$ref" not in str(schema)
    [inner] = [one for one in schema["properties"]["inner"]["anyOf"] if one.get("type") == "object"]
    assert set(inner["properties"]) == {"rank"}
