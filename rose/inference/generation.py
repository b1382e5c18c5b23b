"""What an engine says while it answers a request, and what a server needs of an engine. No torch here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

import msgspec

from rose.errors import RoseError, Unavailable
from rose.inference.request import GenerationRequest, Target

FinishReason = Literal["stop", "length", "tool_calls", "function_call"]

STOPPING = "engine_stopping"
"""Code with which an engine that ends lets go of its requests."""
FULL = "engine_busy"
"""Code with which an engine refuses a request for which it has no room now."""


class EngineBusy(Unavailable):
    """The inference engine cannot take this request now."""

    def __init__(
        self,
        message: str | None = None,
        *,
        retry_after_seconds: float,
        code: str = FULL,
        hint: str | None = None,
    ) -> None:
        super().__init__(message, code=code, hint=hint)
        self.retry_after_seconds = retry_after_seconds


class TokenLogprob(msgspec.Struct, frozen=True, kw_only=True):
    """A token with its log-probability (nats) before temperature."""

    token: str
    logprob: float
    bytes: list[int] | None
    top: tuple[TokenLogprob, ...] = ()


class ToolCall(msgspec.Struct, frozen=True, kw_only=True):
    """A function that the model wants called."""

    id: str
    name: str
    arguments: str
    """JSON."""


class Accepted(msgspec.Struct, frozen=True, kw_only=True):
    """The weights are there and the prompt fits; tokens follow."""

    prompt_tokens: int
    adapter: str | None = None
    """SHA-256 of the weights that are computed with: the adapter's, or the full model's; None: a base alone."""


class Text(msgspec.Struct, frozen=True, kw_only=True):
    """More of choice `index`; the text may be empty when only log-probabilities or a tool call are new."""

    index: int
    text: str
    reasoning: str = ""
    """More of what the model thinks before it answers."""
    logprobs: tuple[TokenLogprob, ...] = ()
    tool_call: ToolCall | None = None


class Finished(msgspec.Struct, frozen=True, kw_only=True):
    """Choice `index` is complete."""

    index: int
    reason: FinishReason


class Done(msgspec.Struct, frozen=True, kw_only=True):
    """All choices are complete; nothing follows."""

    prompt_tokens: int
    completion_tokens: int
    """Tokens that the model made for all choices, the end-of-turn token included."""
    cached_tokens: int = 0
    """Of the prompt's tokens, those that were not read again because an earlier prompt began alike."""


class Failed(msgspec.Struct, frozen=True, kw_only=True):
    """The request cannot be answered; nothing follows."""

    error: RoseError


class ScoringRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Asks how likely a model finds given tokens; nothing is written."""

    target: Target
    rows: list[list[int]]
    """Token ids of each row, two at least, at most as many as the model's context."""


class Scored(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to a ScoringRequest; nothing follows."""

    logprobs: list[list[float]]
    """For each row the log-probability (nats) of its tokens after the first, each given those before it."""
    adapter: str | None
    """As in Accepted."""
    weights: str
    """Form of the linear layers' weights: fp32, fp16 or bf16."""
    dtype: str
    """The model's dtype, which its arithmetic has."""


class ScoringAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """How an engine answers a ScoringRequest over HTTP."""

    logprobs: list[list[float | None]]
    """As in Scored; null where the model's numbers are none (infinite, or not a number)."""
    adapter: str | None
    """SHA-256 of the weights that were used: the adapter's, or the full model's; null for a base alone."""
    weights: str
    """Form of the linear layers' weights: fp32, fp16 or bf16."""
    dtype: str
    """The model's dtype, which its arithmetic has."""


Piece = Accepted | Text | Finished | Done | Failed


class EngineStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine has loaded and does; the answer of GET /health and the capabilities in `workers`."""

    device: str
    active_requests: int
    """Requests accepted and not finished, waiting ones included."""
    bases: tuple[LoadedBase, ...]
    loading: tuple[str, ...]
    """Sources of the bases that are being loaded."""
    max_requests: int
    """Most requests that are accepted at a time."""
    waiting: int = 0
    """Requests whose model is being loaded, or for which there is no room yet."""
    rows: int = 0
    """Answers that are being written now; a request with n > 1 has several."""
    cache_bytes: int = 0
    """Memory that keys and values of rows and kept prompts take."""
    cache_limit_bytes: int = 0
    tokens_per_second: float = 0.0
    """Tokens made, over the last ten seconds."""
    threads: int = 0
    """Of the process; 0 when it does not say."""


class LoadedBase(msgspec.Struct, frozen=True, kw_only=True):
    """A base (or full model) that answers without loading."""

    source: str
    fingerprint: str
    dtype: str
    adapters: tuple[str, ...]
    """SHA-256 of the adapters that are loaded on it."""
    weights: str = "fp32"
    """Form of the linear layers' weights: fp32, fp16 or bf16."""
    batched: bool = False
    """Whether all rows share each forward pass; else they take turns."""
    batch_invariant: bool = False
    """Whether an answer was found to have the same bits whatever else is being answered."""


class Engine(Protocol):
    """Something that answers requests in its own thread."""

    def submit(self, request: GenerationRequest, sink: Callable[[Piece], None]) -> Callable[[], None]:
        """Queue `request` and return the function that cancels it (idempotent, from any thread, frees it in one step).

        `sink` is called in the engine's threads with Accepted, then Text and Finished, then Done; Failed may come at
        any time instead. It must not block.

        Raises: EngineBusy when the queue is full or the engine stops.
        """
        ...

    def score(self, request: ScoringRequest, sink: Callable[[Scored | Failed], None]) -> Callable[[], None]:
        """Queue a scoring, as `submit` does; `sink` is called once."""
        ...

    def status(self) -> EngineStatus:
        """Return what is loaded; callable from any thread."""
        ...

    def stop(self) -> None:
        """End every request with Failed at the next step, refuse new ones and let the threads end."""
        ...

    def join(self, timeout_seconds: float) -> bool:
        """Wait for the engine's thread; return whether it has ended, by `stop` or by an error of its own."""
        ...
