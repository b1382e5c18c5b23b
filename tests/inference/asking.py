"""Ask an engine in a test: build requests, gather pieces, make adapters that answer differently from their base."""

from __future__ import annotations

import queue
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import torch

from rose.blobs import Blobs
from rose.domain.artifacts import Artifact
from rose.domain.hyperparameters import LoraSettings
from rose.domain.job_values import BaseModel
from rose.errors import RoseError
from rose.inference.engine import TorchEngine
from rose.inference.generation import Accepted, Done, Failed, Finished, Piece, Text, TokenLogprob
from rose.inference.request import GenerationRequest, Target, parse_request
from rose.language_models.load import load_model
from rose.language_models.lora import attach

SECONDS = 180.0
"""Longest wait for one piece; far above what a piece takes."""
QUESTION = [{"role": "user", "content": "What does a rose need to bloom?"}]


class World(msgspec.Struct, frozen=True, kw_only=True):
    """A base with two adapters, and the base once more as a full model."""

    folder: Path
    blobs: Blobs
    base: BaseModel
    red: Artifact
    white: Artifact
    full: Artifact

    def target(self, adapter: Artifact | None = None, **changes: Any) -> Target:
        """Return what the API would ask for."""
        facts: dict[str, Any] = {"model": "rose-test", "base": self.base, "adapter": adapter, **changes}
        return Target(**facts)


def make_adapter(world_folder: Path, blobs: Blobs, base: BaseModel, seed: int) -> Artifact:
    """Publish an adapter that was never trained but changes every answer."""
    model = load_model(world_folder)
    adapter = attach(model, LoraSettings(r=8, lora_alpha=16.0, lora_dropout=0.0, target_modules=("all-linear",)), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in adapter.layers.values():
            layer.lora_b.normal_(0, 0.05, generator=generator)
    folder = blobs.temporary_folder()
    adapter.save(folder, base)
    return blobs.publish_folder(folder, f"jobs/ftjob_{seed}/e1/model")


def ask(target: Target, **body: Any) -> GenerationRequest:
    """Return the request that this body makes, greedy unless it says otherwise."""
    asked = {"messages": QUESTION, "temperature": 0, "max_tokens": 24, **body, "rose": msgspec.to_builtins(target)}
    return parse_request(msgspec.json.encode(asked))


class Listener:
    """Receives the pieces of one request."""

    def __init__(self, engine: TorchEngine, request: GenerationRequest) -> None:
        self._pieces: queue.SimpleQueue[Piece] = queue.SimpleQueue()
        self.cancel: Callable[[], None] = engine.submit(request, self._pieces.put)

    def next(self) -> Piece:
        """Return the next piece. Raises: queue.Empty when none comes."""
        return self._pieces.get(timeout=SECONDS)

    def all(self) -> Reply:
        """Return everything until the end. Raises: the engine's error."""
        pieces: list[Piece] = []
        while True:
            piece = self.next()
            if isinstance(piece, Failed):
                raise piece.error
            pieces.append(piece)
            if isinstance(piece, Done):
                return Reply(pieces)

    def all_text(self, index: int = 0) -> str:
        """Return the rest of a choice's text, after pieces that were already taken with `next`."""
        text = ""
        while not isinstance(piece := self.next(), (Done, Failed)):
            text += piece.text if isinstance(piece, Text) and piece.index == index else ""
        return text


class Reply:
    """A complete answer."""

    def __init__(self, pieces: list[Piece]) -> None:
        self.pieces = pieces
        self.prompt_tokens = next(piece.prompt_tokens for piece in pieces if isinstance(piece, Accepted))
        self.done = next(piece for piece in pieces if isinstance(piece, Done))

    def texts(self, index: int = 0) -> list[str]:
        return [piece.text for piece in self.pieces if isinstance(piece, Text) and piece.index == index]

    def text(self, index: int = 0) -> str:
        return "".join(self.texts(index))

    def reason(self, index: int = 0) -> str:
        return next(piece.reason for piece in self.pieces if isinstance(piece, Finished) and piece.index == index)

    def logprobs(self, index: int = 0) -> list[TokenLogprob]:
        texts = [piece for piece in self.pieces if isinstance(piece, Text) and piece.index == index]
        return [entry for piece in texts for entry in piece.logprobs]


def reply(engine: TorchEngine, request: GenerationRequest) -> Reply:
    """Return the engine's whole answer. Raises: the engine's error."""
    return Listener(engine, request).all()


def refusal(engine: TorchEngine, request: GenerationRequest) -> RoseError:
    """Return the error that the engine answers with."""
    try:
        answered = reply(engine, request)
    except RoseError as error:
        return error
    raise AssertionError(f"the engine answered {answered.text()!r}")
