"""What is refused before an engine is bothered, and which field is named."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from rose.errors import InvalidRequest
from rose.inference.request import GenerationRequest, Sampling, parse_request

ROSE = {"model": "m", "base": {"source": "tiny", "revision": None, "fingerprint": "f"}}
VALID: dict[str, Any] = {"rose": ROSE, "messages": [{"role": "user", "content": "Hello"}]}


def parse(**changes: Any) -> GenerationRequest:
    return parse_request(msgspec.json.encode({**VALID, **changes}))


def test_defaults_are_openais() -> None:
    request = parse()
    assert request.sampling == Sampling(temperature=1.0, top_p=1.0)
    assert (request.choices, request.stop, request.max_tokens, request.stream) == (1, (), None, False)
    assert request.top_logprobs is None


def test_null_is_as_good_as_absent() -> None:
    names = [name for name in VALID | dict.fromkeys(OPTIONAL) if name not in VALID]
    assert parse(**dict.fromkeys(names)) == parse()


OPTIONAL = (
    *("temperature", "top_p", "frequency_penalty", "presence_penalty", "logit_bias", "stop", "max_tokens"),
    *("max_completion_tokens", "n", "seed", "logprobs", "top_logprobs", "stream", "stream_options", "tools"),
    *("tool_choice", "functions", "function_call", "response_format"),
)


def test_what_changes_nothing_here_is_ignored() -> None:
    ignored = {
        "user": "u",
        "store": True,
        "metadata": {"a": "b"},
        "service_tier": "auto",
        "reasoning_effort": "low",
        "verbosity": "low",
        "modalities": ["text"],
        "audio": None,
        "prediction": None,
        "web_search_options": {},
        "safety_identifier": "s",
        "prompt_cache_key": "k",
        "moderation": {},
        "parallel_tool_calls": True,
        "model": "m",
        "response_format": {"type": "text"},
        "never_heard_of": 1,
    }
    assert parse(**ignored) == parse()


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0]",
        ),
        ({"messages": "Hello"}, "messages"),
        ({"messages": [5]}, "messages[0]"),
        ({"messages": [{"role": "assistant", "tool_calls": 3}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "assistant", "tool_calls": ["x"]}]}, "messages[0].tool_calls[0].function"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]}, "messages[0].tool_calls[0].function"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": 1}}]}]},
            "messages[0].tool_calls[0].function.arguments",
        ),
        ({"messages": [{"role": "assistant", "function_call": "f"}]}, "messages[0].function_call"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": ["x"]}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "user", "content": "x", "function_call": {"name": "f"}}]}, "messages[0].function_call"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"frequency_penalty": 3}, "frequency_penalty"),
        ({"presence_penalty": -3}, "presence_penalty"),
        ({"n": 0}, "n"),
        ({"n": 9}, "n"),
        ({"n": 1.5}, "n"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"stop": list("abcde")}, "stop"),
        ({"stop": 5}, "stop"),
        ({"seed": "x"}, "seed"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1"),
        ({"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [{"type": "function"}]}, "tools[0]"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
        ({"functions": [{"name": "x"}], "tools": [{"type": "function", "function": {"name": "x"}}]}, "functions"),
        ({"functions": [{"description": "x"}]}, "functions[0]"),
        ({"functions": [{"name": "x"}], "function_call": {"name": "x"}}, "function_call"),
        ({"rose": {**ROSE, "kind": "full"}}, "rose.adapter"),
        ({"rose": {**ROSE, "base": 1}}, "rose.base"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(changes: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        parse(**changes)
    assert refused.value.param == param
    assert refused.value.status == 400
    assert "$" not in refused.value.message


def test_a_missing_field_is_named() -> None:
    with pytest.raises(InvalidRequest) as refused:
        parse_request(b'{"rose": {"model": "m"}, "messages": []}')
    assert refused.value.param == "rose.base"


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"\xff", b'{"messages": "\xff"}'])
def test_a_body_that_is_no_object_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequest):
        parse_request(body)


def test_an_empty_stop_string_stops_nothing() -> None:
    assert parse(stop="").stop == ()
    assert parse(stop=["", "a"]).stop == ("a",)


def test_max_completion_tokens_wins() -> None:
    assert parse(max_tokens=5, max_completion_tokens=3).max_tokens == 3
