"""`rose chat`: one question, or a conversation."""

from __future__ import annotations

import importlib
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from cli.options import COMMON, Common
from cli.output import error
from rose.errors import InvalidRequest, NotFound, RoseError

if TYPE_CHECKING:
    from cli.client import Client


def chat(
    prompt: str | None = None,
    /,
    *,
    model: Annotated[str | None, Parameter(name=["--model", "-m"], env_var="ROSE_MODEL")] = None,
    system: Annotated[str | None, Parameter(env_var="ROSE_SYSTEM")] = None,
    temperature: Annotated[float | None, Parameter(env_var="ROSE_TEMPERATURE")] = None,
    top_p: Annotated[float | None, Parameter(env_var="ROSE_TOP_P")] = None,
    max_tokens: Annotated[int | None, Parameter(env_var="ROSE_MAX_TOKENS")] = None,
    stop: Annotated[list[str] | None, Parameter(env_var="ROSE_STOP", negative="")] = None,
    seed: Annotated[int | None, Parameter(env_var="ROSE_SEED")] = None,
    common: Common = COMMON,
) -> None:
    """Ask a model; without a prompt, have a conversation.

    Parameters
    ----------
    prompt
        The question. Without one: a conversation on a terminal, else the question is read from standard input.
    model
        A model's name; default: the newest fine-tuned model.
    system
        Instructions that come before the conversation.
    temperature
        0 always takes the likeliest token; up to 2.
    top_p
        Choose among the likeliest tokens that together have this probability.
    max_tokens
        Longest answer in tokens.
    stop
        Text at which the answer ends; up to four.
    seed
        The same seed gives the same answer.
    """
    options = {
        "temperature": temperature,
        "top_p": top_p,
        "max_completion_tokens": max_tokens,
        "stop": stop or None,
        "seed": seed,
    }
    body: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
    with common.client() as client:
        body["model"] = model or newest_model(client)
        if prompt is None and sys.stdin.isatty():
            _converse(client, body, messages, common)
            return
        question = sys.stdin.read().strip() if prompt is None else prompt
        if not question:
            raise InvalidRequest("There is no prompt.", hint="Give one, or call `rose chat` on a terminal to talk.")
        messages.append({"role": "user", "content": question})
        if common.json:
            common.output.raw(client.chat({**body, "messages": messages}))
            return
        stream_answer(client, {**body, "messages": messages}, common)


def newest_model(client: Client) -> str:
    """Return the name of the newest fine-tuned model. Raises: NotFound."""
    tuned = [item for item in client.models() if item.job_id]
    if not tuned:
        raise NotFound(
            "There is no fine-tuned model yet.", hint="Name a model with --model; `rose models list` shows all."
        )
    return max(tuned, key=lambda item: item.created).id


def stream_answer(client: Client, body: dict[str, Any], common: Common) -> str:
    """Print an answer piece by piece as it is made and return it; what the model thinks before it is only talk."""
    pieces: list[str] = []
    thinking = False
    try:
        for chunk in client.stream_chat(body):
            for choice in chunk["choices"]:
                if thought := choice["delta"].get("reasoning_content"):
                    thinking = True
                    common.output.thought(thought)
                piece = choice["delta"].get("content") or ""
                if piece and thinking:
                    thinking = False
                    common.output.thought("\n\n")
                pieces.append(piece)
                common.output.piece(piece)
    finally:
        if pieces:
            common.output.piece("\n")
    return "".join(pieces)


def _converse(client: Client, body: dict[str, Any], messages: list[dict[str, str]], common: Common) -> None:
    with suppress(ImportError):
        importlib.import_module("readline")  # gives input() line editing and a history
    common.output.talk(f"Talking with {body['model']}. Ctrl-D ends, Ctrl-C stops an answer.")
    while True:
        try:
            question = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            common.output.talk("")
            return
        if not question:
            continue
        messages.append({"role": "user", "content": question})
        try:
            answer = stream_answer(client, {**body, "messages": messages}, common)
        except KeyboardInterrupt:
            common.output.talk("(stopped)")
            messages.pop()
            continue
        except RoseError as problem:
            error(problem)
            messages.pop()
            continue
        messages.append({"role": "assistant", "content": answer})
