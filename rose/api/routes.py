"""Route decorators that answer 200 to every method, as OpenAI does (Litestar would answer 201 and 204).

Bodies and queries are read by hand, so that refusals name the field; here is also what they look like in
`/openapi.json`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import litestar
from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.spec import (
    OpenAPIMediaType,
    OpenAPIResponse,
    OpenAPIType,
    Operation,
    Parameter,
    RequestBody,
    Schema,
)

from rose.api.errors import ErrorAnswer

Handler = Callable[..., Any]

TEXT = Schema(type=OpenAPIType.STRING)
WHOLE = Schema(type=OpenAPIType.INTEGER)
NUMBER = Schema(type=OpenAPIType.NUMBER)
BOOLEAN = Schema(type=OpenAPIType.BOOLEAN)
BINARY = Schema(type=OpenAPIType.STRING)
EVENT_STREAM = "text/event-stream"

AFTER = Parameter("after", "query", schema=TEXT, description="Id of the entry to go on behind.")
KEY = Parameter(
    "Idempotency-Key", "header", schema=TEXT, description="The same key again gives the first answer, and does nothing."
)


def limit(default: int, maximum: int) -> Parameter:
    """Describe the size of a page."""
    size = Schema(type=OpenAPIType.INTEGER, minimum=0, default=default)
    return Parameter("limit", "query", schema=size, description=f"Entries on the page; at most {maximum} are given.")


def choice(name: str, choices: Sequence[str], description: str) -> Parameter:
    """Describe a query parameter that takes one of `choices`."""
    return Parameter(name, "query", schema=Schema(type=OpenAPIType.STRING, enum=list(choices)), description=description)


def text(name: str, description: str) -> Parameter:
    """Describe a query parameter that takes any text."""
    return Parameter(name, "query", schema=TEXT, description=description)


def listing(item: Schema) -> Schema:
    """Describe a list."""
    return Schema(type=OpenAPIType.ARRAY, items=item)


def record(required: Sequence[str] = (), /, **properties: Schema) -> Schema:
    """Describe an object; more keys than these are ignored."""
    return Schema(type=OpenAPIType.OBJECT, properties=dict(properties), required=list(required) or None)


def closed(required: Sequence[str] = (), /, **properties: Schema) -> Schema:
    """Describe an object that has no other keys than these, except with the value null."""
    described = record(required, **properties)
    described.additional_properties = Schema(type=OpenAPIType.NULL)
    return described


FRAME = record(
    ("data",),
    data=Schema(type=OpenAPIType.STRING, description="JSON, or `[DONE]` at the end."),
    id=Schema(type=OpenAPIType.STRING, description="What `Last-Event-ID` takes, where a stream can be resumed."),
)
"""Before OpenAPI 3.2 the schema of an event stream describes one of its events."""


def optional(schema: Schema) -> Schema:
    """Describe what may also be null."""
    return Schema(one_of=[schema, Schema(type=OpenAPIType.NULL)])


def get(path: str | list[str], **options: Any) -> Callable[[Handler], Any]:
    """Register a GET handler; `answer` is the type of its JSON, `queries` what its address takes."""
    return litestar.get(path, tags=_group(path), **_described(**options))


def post(path: str | list[str], **options: Any) -> Callable[[Handler], Any]:
    """Register a POST handler; `body` describes its JSON, `form` its multipart form."""
    return litestar.post(path, tags=_group(path), status_code=200, **_described(changes=True, **options))


def delete(path: str | list[str], **options: Any) -> Callable[[Handler], Any]:
    """Register a DELETE handler that answers with a JSON object."""
    return litestar.delete(path, tags=_group(path), status_code=200, **_described(changes=True, **options))


def _group(path: str | list[str]) -> list[str]:
    """Return the heading under which `/docs` shows a route: what its address begins with."""
    first = path if isinstance(path, str) else path[0]
    return [first.removeprefix("/v1/").partition("/")[0] if first.startswith("/v1/") else "server"]


def _described(
    *,
    answer: Any = None,
    other: str | None = None,
    queries: Sequence[Parameter] = (),
    body: Schema | None = None,
    form: Schema | None = None,
    changes: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Return Litestar's options for a handler that is so; `other` is a media type beside the JSON, or instead of it."""
    content = {"application/json": body} if body else {"multipart/form-data": form} if form else {}
    described = [replace(query, allow_empty_value=True) for query in queries]  # an empty value counts as none
    described += [KEY] if changes else []

    @dataclass
    class Described(Operation):
        def __post_init__(self) -> None:
            self.parameters = [*(self.parameters or ()), *described] or None
            if content:
                media = {kind: OpenAPIMediaType(schema=schema) for kind, schema in content.items()}
                self.request_body = RequestBody(content=media, required=True)
            found = (self.responses or {}).get("200")
            if other and isinstance(found, OpenAPIResponse):
                kept = dict(found.content or {}) if answer is not None else {}
                found.content = {**kept, other: OpenAPIMediaType(schema=FRAME if other == EVENT_STREAM else BINARY)}

    responses = {
        status: ResponseSpec(ErrorAnswer, generate_examples=False, description=description)
        for status, description in (
            (400, "A parameter is wrong; `param` names it."),
            (401, "No valid API key."),
            (404, "There is nothing of that name."),
            (413, "The body is too large."),
            (503, "A service that this needs does not answer; try again after `retry-after` seconds."),
        )
    }
    if answer is not None:
        responses[200] = ResponseSpec(answer, generate_examples=False, description="Done.")
    responses |= options.pop("responses", {})
    return {"operation_class": Described, "responses": responses, **options}
