"""What the API asks an inference engine: OpenAI's chat request plus the field `rose` that names base and adapter.

Parsing refuses what the engine cannot honour and names the field; OpenAI's fields that change nothing here are ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from rose.decoding import convert
from rose.domain.artifacts import Artifact
from rose.domain.job_values import BaseModel
from rose.errors import InvalidRequest

MAX_CHOICES = 8
"""Most answers to one request; each keeps a cache of its own in memory."""
MAX_STOPS = 4
MAX_TOP_LOGPROBS = 20
RESERVED_OPTIONS = (
    "messages",
    "tools",
    "documents",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template",
)
"""Variables of chat templates that are no options: the request says them otherwise."""
ROLES = ("developer", "system", "user", "assistant", "tool", "function")


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """Which weights answer; every field comes from the model's row, so a name means one hash for ever."""

    model: str
    """The name that the client asked for; repeated in the answer."""
    base: BaseModel
    """An empty fingerprint is allowed when there is no adapter: then whatever lies at the source answers."""
    adapter: Artifact | None = None
    """The published folder: the adapter's, or with `full` the whole model's; None asks the base itself."""
    kind: Literal["adapter", "full"] = "adapter"
    thinking: bool = False
    """Whether the model was trained to think before it answers."""
    project: str = "default"
    """Who asks; where requests wait, projects take turns."""


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """How the next token is chosen."""

    temperature: float = 1.0
    """0 takes the most likely token."""
    top_p: float = 1.0
    """Only the most likely tokens that together reach this probability are drawn from."""
    frequency_penalty: float = 0.0
    """Taken off a token's logit for each time it was already made."""
    presence_penalty: float = 0.0
    """Taken off a token's logit once it was made at all."""
    logit_bias: dict[int, float] = {}
    """Added to the logits of these token ids."""


class GenerationRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A valid request."""

    target: Target
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    functions: bool = False
    """Whether the tools came by their old name, `functions`: then one call at most is answered, as `function_call`."""
    sampling: Sampling = Sampling()
    stop: tuple[str, ...] = ()
    max_tokens: int | None = None
    """Most tokens of each choice; None: as many as the context holds."""
    choices: int = 1
    seed: int | None = None
    top_logprobs: int | None = None
    """None: no log-probabilities at all."""
    stream: bool = False
    include_usage: bool = False
    thinking: bool = False
    """Whether the model is asked to think before it answers."""
    template_options: dict[str, Any] = {}
    """Further variables of the chat template; they win over `thinking`."""
    add_generation_prompt: bool = True
    continue_final_message: bool = False


class StreamOptions(msgspec.Struct, frozen=True):
    """What a stream says beside the answer."""

    include_usage: bool | None = None


class ResponseFormat(msgspec.Struct, frozen=True):
    """Which form the answer has; text."""

    type: str


Penalty = Annotated[float, Meta(ge=-2, le=2)]
Bias = Annotated[float, Meta(ge=-100, le=100)]
Message = Annotated[
    dict[str, Any], Meta(extra_json_schema={"required": ["role"], "properties": {"role": {"enum": list(ROLES)}}})
]
"""A message; what else stands in it is the chat template's business."""


class Conversation(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A conversation to answer; every optional field may be null."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: dict[str, Bias] | None = None
    """By token id."""
    stop: str | list[str] | None = None
    """At most four; empty ones do not count."""
    max_tokens: Annotated[int, Meta(ge=0)] | None = None
    max_completion_tokens: Annotated[int, Meta(ge=0)] | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    seed: int | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    functions: list[dict[str, Any]] | None = None
    function_call: str | dict[str, Any] | None = None
    response_format: ResponseFormat | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    reasoning_effort: str | None = None


class ChatRequest(Conversation, frozen=True, kw_only=True, omit_defaults=True):
    """What a client asks of a model by its name."""

    model: Annotated[str, Meta(min_length=1, max_length=512)]


class EngineRequest(Conversation, frozen=True, kw_only=True, omit_defaults=True):
    """What the API asks of an engine: the weights that it found for the name stand for it."""

    rose: Target


def parse_request(data: bytes) -> GenerationRequest:
    """Return the request in `data` (JSON). Raises: InvalidRequest naming the field that is wrong."""
    try:
        given = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"The body is not valid JSON: {error}.", code="invalid_json") from None
    return checked(convert(given, EngineRequest))


def checked(body: EngineRequest) -> GenerationRequest:
    """Return what the engine does for a request. Raises: InvalidRequest naming what it cannot honour."""
    _check_messages(body.messages)
    _refuse_unsupported(body)
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    return GenerationRequest(
        target=_target(body.rose),
        messages=body.messages,
        tools=_tools(body),
        functions=bool(body.functions),
        sampling=_sampling(body),
        stop=_stops(body.stop),
        max_tokens=max_tokens,
        choices=body.n or 1,
        seed=body.seed,
        top_logprobs=_top_logprobs(body),
        stream=bool(body.stream),
        include_usage=bool(body.stream_options and body.stream_options.include_usage),
        thinking=_thinking(body),
        template_options=_template_options(body.chat_template_kwargs or {}),
        add_generation_prompt=_asks(body),
        continue_final_message=bool(body.continue_final_message),
    )


def _target(target: Target) -> Target:
    if target.kind == "full" and target.adapter is None:
        raise InvalidRequest("A full model needs its folder.", code="invalid_value", param="rose.adapter")
    if target.kind == "adapter" and target.adapter is not None and not target.base.fingerprint:
        raise InvalidRequest(
            "An adapter needs the fingerprint of its base.", code="invalid_value", param="rose.base.fingerprint"
        )
    return target


def _check_messages(messages: list[dict[str, Any]]) -> None:
    """Refuse messages that no template could render; what is rendered how is the template's business."""
    for position, message in enumerate(messages):
        where = f"messages[{position}]"
        role = message.get("role")
        if role not in ROLES:
            raise InvalidRequest(
                f"{where}.role is {role!r}; expected one of {', '.join(ROLES)}.",
                code="invalid_value",
                param=f"{where}.role",
            )
        _check_calls(message, where)
        content = message.get("content")
        if content is None and role == "assistant":
            continue
        if isinstance(content, list):
            _check_parts(content, f"{where}.content")
        elif not isinstance(content, str):
            raise InvalidRequest(
                f"{where}.content must be a string or a list of text parts.",
                code="invalid_type",
                param=f"{where}.content",
            )


def _check_calls(message: dict[str, Any], where: str) -> None:
    """Refuse calls of tools that `template.prepare` could not read."""
    calls: Any = message.get("tool_calls") or []
    if not isinstance(calls, list):
        raise _no_call(f"{where}.tool_calls", "must be a list of calls")
    if (calls or message.get("function_call")) and message["role"] != "assistant":
        raise _no_call(f"{where}.{'tool_calls' if calls else 'function_call'}", "belongs to assistant messages only")
    for position, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        _check_call(function, f"{where}.tool_calls[{position}].function")
    if message.get("function_call"):
        _check_call(message["function_call"], f"{where}.function_call")


def _check_call(function: Any, where: str) -> None:
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise _no_call(where, "must be {'name': …, 'arguments': …}")
    if not isinstance(function.get("arguments", ""), (str, dict)):
        raise _no_call(f"{where}.arguments", "must be JSON as a string")


def _no_call(param: str, expected: str) -> InvalidRequest:
    return InvalidRequest(f"{param} {expected}.", code="invalid_type", param=param)


def _check_parts(parts: list[Any], where: str) -> None:
    for position, part in enumerate(parts):
        kind: Any = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", "refusal") or not isinstance(part.get(kind), str):
            raise InvalidRequest(
                f"{where}[{position}] is of type {kind!r}; ROSE's models read text parts only.",
                code="unsupported_content",
                param=f"{where}[{position}]",
            )


def _refuse_unsupported(body: EngineRequest) -> None:
    if body.response_format is not None and body.response_format.type != "text":
        raise InvalidRequest(
            f"response_format {body.response_format.type!r} is not supported: the engine cannot promise JSON.",
            code="unsupported_parameter",
            param="response_format",
            hint="Ask for JSON in the prompt, or train on answers that are JSON.",
        )
    if body.functions and body.tools:
        raise InvalidRequest(
            "tools and functions exclude each other; functions is the old name. Leave one out.",
            code="invalid_combination",
            param="functions",
        )
    for name, choice in (("tool_choice", body.tool_choice), ("function_call", body.function_call)):
        if choice not in (None, "none", "auto"):
            raise InvalidRequest(
                f"{name} can be 'auto' or 'none': the engine cannot force a call.",
                code="unsupported_parameter",
                param=name,
            )


def _thinking(body: EngineRequest) -> bool:
    """Say whether the model is asked to think: as it was trained, unless the request says otherwise."""
    options = body.chat_template_kwargs or {}
    given = options.get("enable_thinking", options.get("thinking"))
    if isinstance(given, bool):
        return given
    return body.rose.thinking and body.reasoning_effort != "none"


def _template_options(given: dict[str, Any]) -> dict[str, Any]:
    for name in given:
        if name in RESERVED_OPTIONS or name.endswith("_token"):
            raise InvalidRequest(
                f"chat_template_kwargs.{name} cannot be set; it is decided by the request and the model.",
                code="invalid_value",
                param=f"chat_template_kwargs.{name}",
            )
    return given


def _asks(body: EngineRequest) -> bool:
    """Say whether the template adds what comes before an answer."""
    if body.continue_final_message and body.add_generation_prompt:
        raise InvalidRequest(
            "continue_final_message and add_generation_prompt exclude each other: a model begins an answer or goes on "
            "with one. Leave one out.",
            code="invalid_combination",
            param="continue_final_message",
        )
    return not body.continue_final_message and body.add_generation_prompt is not False


def _tools(body: EngineRequest) -> list[dict[str, Any]] | None:
    if body.functions:
        return None if body.function_call == "none" else _from_functions(body.functions)
    if not body.tools or body.tool_choice == "none":
        return None
    for position, tool in enumerate(body.tools):
        function = tool.get("function")
        if tool.get("type") != "function" or not isinstance(function, dict) or not function.get("name"):
            raise InvalidRequest(
                f"tools[{position}] must be {{'type': 'function', 'function': {{'name': …}}}}.",
                code="invalid_value",
                param=f"tools[{position}]",
            )
    return body.tools


def _from_functions(functions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for position, function in enumerate(functions):
        if not isinstance(function.get("name"), str) or not function["name"]:
            raise InvalidRequest(
                f"functions[{position}] has no name; it must be {{'name': …, 'parameters': …}}.",
                code="invalid_value",
                param=f"functions[{position}]",
            )
    return [{"type": "function", "function": function} for function in functions]


def _sampling(body: EngineRequest) -> Sampling:
    return Sampling(
        temperature=_or(body.temperature, 1.0),
        top_p=_or(body.top_p, 1.0),
        frequency_penalty=_or(body.frequency_penalty, 0.0),
        presence_penalty=_or(body.presence_penalty, 0.0),
        logit_bias=_logit_bias(body.logit_bias or {}),
    )


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _logit_bias(raw: dict[str, float]) -> dict[int, float]:
    for key in raw:
        if not (key.isascii() and key.isdecimal() and len(key) < 19):
            raise InvalidRequest(
                f"logit_bias maps token ids to numbers; {key!r} is no token id.",
                code="invalid_value",
                param="logit_bias",
            )
    return {int(key): value for key, value in raw.items()}


def _stops(stop: str | list[str] | None) -> tuple[str, ...]:
    stops = () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)
    if len(stops) > MAX_STOPS:
        raise InvalidRequest(f"stop takes at most {MAX_STOPS} strings.", code="array_above_max_length", param="stop")
    return tuple(text for text in stops if text)


def _top_logprobs(body: EngineRequest) -> int | None:
    if not body.logprobs:
        if body.top_logprobs:
            raise InvalidRequest("top_logprobs needs logprobs to be true.", code="invalid_value", param="top_logprobs")
        return None
    return body.top_logprobs or 0
