"""The AsyncAPI 3.0 document of the NATS subjects, made from the event structs; no event is listed here by hand.

`python -m rose.asyncapi docs/subjects.md` makes the table on that page anew.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import msgspec
from msgspec import inspect as types

from rose.domain.catalogue import EVENTS, UPCASTERS
from rose.subjects import ALL_EVENTS, CONTENT_TYPE, STREAM, CloudEvent, oversize_subject, subject_of

OVERSIZE = "event.oversize"
"""Key of the channel and the message of an event that goes out without its data."""
_SCHEMAS = "#/components/schemas/"
_PARAMETERS = {
    "project": "Id of the project that the entity belongs to; `default` until there are others.",
    "id": "Id of the entity; of a model, that of the job that made it.",
}
_HEADERS = {
    "Nats-Msg-Id": "The event's id: who has seen it can drop the message.",
    "Nats-Expected-Last-Sequence": "The position before this one, by which JetStream keeps the order.",
    "Content-Type": CONTENT_TYPE,
    "ce-id": "The CloudEvent's id.",
    "ce-type": "The CloudEvent's type.",
}
_ABOUT = f"""Every change in ROSE is one event of its log. The relay copies each one, in order, into the JetStream
stream `{STREAM}` (subjects `{ALL_EVENTS}`), whose sequence numbers are the log's positions. A durable pull consumer
that drops the ids it has seen applies every event exactly once. New kinds of events and new fields come without
notice: ignore what you do not know."""


def document() -> dict[str, Any]:
    """Return the document."""
    names = [*EVENTS, OVERSIZE]
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "ROSE events",
            "version": version("rose"),
            "description": _ABOUT.replace("\n", " "),
            "license": {"name": "Apache-2.0", "url": "https://www.apache.org/licenses/LICENSE-2.0"},
        },
        "defaultContentType": CONTENT_TYPE,
        "servers": {
            "nats": {
                "host": "{host}",
                "protocol": "nats",
                "description": "The NATS of this installation.",
                "variables": {"host": {"default": "127.0.0.1:4222", "description": "Host and port."}},
                "security": [{"$ref": f"#/components/securitySchemes/{name}"} for name in ("token", "user")],
            }
        },
        "channels": {name: _channel(name) for name in names},
        "operations": {
            name: {
                "action": "send",
                "channel": {"$ref": f"#/channels/{name}"},
                "summary": _summary(name),
                "messages": [{"$ref": f"#/channels/{name}/messages/{name}"}],
            }
            for name in names
        },
        "components": {
            "messages": {name: _message(name) for name in names},
            "schemas": _schemas(),
            "parameters": {name: {"description": text} for name, text in _PARAMETERS.items()},
            "securitySchemes": {
                "token": {
                    "type": "apiKey",
                    "in": "password",
                    "description": "The token in the data folder of `rose up`.",
                },
                "user": {"type": "userPassword", "description": "A user of a NATS server that ROSE does not start."},
            },
        },
    }


def encoded() -> bytes:
    """Return the document as indented JSON, the bytes of `docs/asyncapi.json`."""
    return msgspec.json.format(msgspec.json.encode(document()), indent=2) + b"\n"


def table() -> str:
    """Return the table of docs/subjects.md: every subject, and what has happened."""
    rows = [(address(name).replace("{", "<").replace("}", ">"), _summary(name)) for name in (*EVENTS, OVERSIZE)]
    return "\n".join(["| subject | what happened |", "|---|---|", *(f"| `{where}` | {text} |" for where, text in rows)])


def with_table(page: str) -> str:
    """Return docs/subjects.md with its table as the code makes it."""
    return re.sub(r"^\| subject \|.*?$(?=\n\n)", lambda _: table(), page, count=1, flags=re.MULTILINE | re.DOTALL)


def address(name: str) -> str:
    """Return the subject of an event's wire name, with `{project}` and `{id}` where those stand."""
    if name == OVERSIZE:
        return oversize_subject("{project}")
    subject = subject_of("project", name, "entity/id")
    assert subject is not None, f"{name} makes no subject"
    root, number, _, entity, _, event = subject.split(".")
    return ".".join((root, number, "{project}", entity, "{id}", event))


def _channel(name: str) -> dict[str, Any]:
    where = address(name)
    given = [parameter for parameter in _PARAMETERS if f"{{{parameter}}}" in where]
    return {
        "address": where,
        "messages": {name: {"$ref": f"#/components/messages/{name}"}},
        "parameters": {one: {"$ref": f"#/components/parameters/{one}"} for one in given},
    }


def _summary(name: str) -> str:
    if name == OVERSIZE:
        return "An event whose content NATS would refuse, without its data."
    return (inspect.getdoc(EVENTS[name][1]) or "").partition("\n\n")[0].replace("\n", " ")


def _message(name: str) -> dict[str, Any]:
    event = {"$ref": f"{_SCHEMAS}{CloudEvent.__name__}"}
    own = {"type": "object", "required": ["dataref"]} if name == OVERSIZE else _own(name)
    return {
        "name": name,
        "title": name if name == OVERSIZE else EVENTS[name][1].__name__,
        "summary": _summary(name),
        "contentType": CONTENT_TYPE,
        "headers": {
            "type": "object",
            "properties": {key: {"type": "string", "description": text} for key, text in _HEADERS.items()},
        },
        "payload": {"allOf": [event, own]},
    }


def _own(name: str) -> dict[str, Any]:
    """Describe what sets this message apart: its type, and its data by the number of their schema."""
    schema, kind = EVENTS[name]
    older = sorted(number for wire_name, number in UPCASTERS if wire_name == name)
    forms: list[dict[str, Any]] = [{"schemaversion": {"const": schema}, "data": {"$ref": f"{_SCHEMAS}{kind.__name__}"}}]
    if older:
        before = {"type": "object", "description": "As earlier versions of ROSE wrote it."}
        forms.append({"schemaversion": {"enum": older}, "data": before})
    return {
        "type": "object",
        "required": ["data"],
        "properties": {"type": {"const": f"{ALL_EVENTS.removesuffix('>')}{name}"}},
        "oneOf": [{"properties": form} for form in forms],
    }


def _schemas() -> dict[str, Any]:
    """Return the schema of each struct, with the sentence that stands under each field."""
    kinds = [CloudEvent, *(kind for _, kind in EVENTS.values())]
    _, schemas = msgspec.json.schema_components(kinds, ref_template=f"{_SCHEMAS}{{name}}")
    for struct in {one for kind in types.multi_type_info(kinds) for one in _structs(kind)}:
        described = schemas[struct.__name__]
        described["description"] = inspect.getdoc(struct) or ""
        for field, text in _sentences(struct).items():
            described["properties"][field].setdefault("description", text)
    return dict(sorted(schemas.items()))


def _structs(kind: Any) -> Iterator[type[msgspec.Struct]]:
    """Yield the structs that a type is made of."""
    if isinstance(kind, types.StructType):
        yield kind.cls
        for field in kind.fields:
            yield from _structs(field.type)
        return
    for inside in msgspec.structs.asdict(kind).values() if isinstance(kind, msgspec.Struct) else ():
        for one in cast("tuple[Any, ...]", inside) if isinstance(inside, tuple) else (inside,):
            if isinstance(one, types.Type):
                yield from _structs(one)


def _sentences(struct: type) -> dict[str, str]:
    """Return the text that stands under each field in the source, as editors show it."""
    found: dict[str, str] = {}
    for kind in reversed(struct.__mro__[:-1]):
        if kind is msgspec.Struct or not kind.__module__.startswith("rose."):
            continue
        [body] = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
        statements = cast("ast.ClassDef", body).body
        for before, after in pairwise(statements):
            match before, after:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    found[name] = inspect.cleandoc(text).replace("\n", " ")
                case _:
                    pass
    return found


if __name__ == "__main__":
    for given in map(Path, sys.argv[1:]):
        given.write_text(with_table(given.read_text()))
