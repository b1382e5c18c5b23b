"""Route decorators that answer 200 to every method, as OpenAI does (Litestar would answer 201 and 204).

They put the structs that a handler reads and answers (schema.py) into `/openapi.json`; the framework reads nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import litestar
from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.spec import OpenAPIMediaType, OpenAPIResponse, Operation, Parameter, RequestBody, Schema

from rose.api.schema import ErrorAnswer
from rose.decoding import json_schema

Handler = Callable[..., Any]

EVENT_STREAM = "text/event-stream"


class Described(Schema):
    """A schema that is written already."""

    def __init__(self, described: dict[str, Any]) -> None:
        super().__init__()
        self._described = described

    def to_schema(self) -> dict[str, Any]:
        return self._described


TEXT = Described({"type": "string"})
FRAME = Described(
    {
        "type": "object",
        "required": ["data"],
        "properties": {
            "data": {"type": "string", "description": "JSON, or `[DONE]` at the end."},
            "id": {"type": "string", "description": "What `Last-Event-ID` takes, where a stream can be resumed."},
        },
    }
)
"""Before OpenAPI 3.2 the schema of an event stream describes one of its events."""
KEY = Parameter(
    "Idempotency-Key", "header", schema=TEXT, description="The same key again gives the first answer, and does nothing."
)


def get(path: str | list[str], **options: Any) -> Callable[[Handler], Any]:
    """Register a GET handler; `answer` is the struct of its JSON, `query` the struct of what its address takes."""
    return litestar.get(path, tags=_group(path), **_described(**options))


def post(path: str | list[str], **options: Any) -> Callable[[Handler], Any]:
    """Register a POST handler; `body` is the struct of its JSON, `form` of its multipart form."""
    return litestar.post(path, tags=_group(path), status_code=200, **_described(changes=True, **options))


def delete(path: str | list[str], **options: Any) -> Callable[[Handler], Any]:
    """Register a DELETE handler that answers with a JSON object."""
    return litestar.delete(path, tags=_group(path), status_code=200, **_described(changes=True, **options))


def _group(path: str | list[str]) -> list[str]:
    """Return the heading under which `/docs` shows a route: what its address begins with."""
    first = path if isinstance(path, str) else path[0]
    return [first.removeprefix("/v1/").partition("/")[0] if first.startswith("/v1/") else "server"]


def _parameters(query: Any) -> list[Parameter]:
    """Describe what an address takes; an empty value counts as none."""
    if query is None:
        return []
    described = json_schema(query)
    return [
        Parameter(
            name,
            "query",
            schema=Described({key: value for key, value in one.items() if key != "description"}),
            description=_description(one),
            required=name in described.get("required", ()),
            allow_empty_value=True,
        )
        for name, one in described["properties"].items()
    ]


def _description(schema: dict[str, Any]) -> str | None:
    """Return the description of a schema, or of what it is beside null."""
    choices = [schema, *schema.get("anyOf", ())]
    return next((one["description"] for one in choices if "description" in one), None)


def _described(
    *,
    answer: Any = None,
    other: str | None = None,
    query: Any = None,
    headers: Sequence[Parameter] = (),
    body: Any = None,
    optional_body: bool = False,
    form: Any = None,
    changes: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Return Litestar's options for a handler that is so; `other` is a media type beside the JSON, or instead of it."""
    content = {"application/json": body} if body else {"multipart/form-data": form} if form else {}
    media = {kind: OpenAPIMediaType(schema=Described(json_schema(struct))) for kind, struct in content.items()}
    parameters = [*_parameters(query), *headers, *([KEY] if changes else [])]

    @dataclass
    class Documented(Operation):
        def __post_init__(self) -> None:
            self.parameters = [*(self.parameters or ()), *parameters] or None
            if media:
                self.request_body = RequestBody(content=dict(media), required=not optional_body)
            found = (self.responses or {}).get("200")
            if other and isinstance(found, OpenAPIResponse):
                kept = dict(found.content or {}) if answer is not None else {}
                found.content = {**kept, other: OpenAPIMediaType(schema=FRAME if other == EVENT_STREAM else TEXT)}

    responses = {
        status: ResponseSpec(ErrorAnswer, generate_examples=False, description=description)
        for status, description in (
            (400, "A parameter is wrong; `param` names it."),
            (401, "No valid API key."),
            (404, "There is nothing of that name."),
            (413, "The body is too large."),
            (
                429,
                "A limit of the project is reached; `code` names it, and `x-should-retry` says whether waiting helps.",
            ),
            (503, "A service that this needs does not answer; try again after `retry-after` seconds."),
        )
    }
    if answer is not None:
        responses[200] = ResponseSpec(answer, generate_examples=False, description="Done.")
    responses |= options.pop("responses", {})
    return {"operation_class": Documented, "responses": responses, **options}
