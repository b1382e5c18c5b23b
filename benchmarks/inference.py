"""The engine's time per token and to the first one, beside transformers' generate (with PEFT for adapters).

Processor time of the process, not time on the wall, so that neighbours on the machine count little. One thread, fp32,
greedy, random weights in two sizes: in the small one the interpreter counts, in the larger one the weights.
"""

from __future__ import annotations

import queue
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from transformers.models.qwen3 import Qwen3Config

from benchmarks.record import record
from rose.blobs import Blobs
from rose.domain.artifacts import Artifact
from rose.inference.engine import TorchEngine
from rose.inference.generation import Done, Failed, Piece, Text
from rose.inference.loading import Loader
from rose.inference.request import GenerationRequest, Target
from rose.language_models.locate import describe
from rose.language_models.template import load_template
from rose.language_models.tiny import build_fixture
from tests.inference.asking import ask, make_adapter

NEW_TOKENS = 64
REPEATS = 3
SHAPES: dict[str, dict[str, int] | None] = {
    "0.9M": None,
    "50M": {"hidden_size": 640, "intermediate_size": 1920, "num_hidden_layers": 10, "num_attention_heads": 10},
}
PROMPTS = {"short": "What does a rose need?", "long": "A rose is a rose is a rose. " * 60}


class Timing(msgspec.Struct, frozen=True):
    """Of one answer."""

    first_seconds: float
    token_seconds: float
    """Mean over the tokens after the first."""


def build(folder: Path, shape: dict[str, int] | None) -> Path:
    """Write a model with random weights; its tokenizer is the fixture's."""
    build_fixture(folder)
    if shape is not None:
        facts: dict[str, Any] = {
            **shape,
            "num_key_value_heads": 5,
            "head_dim": 64,
            "vocab_size": 1024,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": True,
        }
        config = Qwen3Config(**facts)
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def time_engine(engine: TorchEngine, requests: list[GenerationRequest]) -> Timing:
    """Time requests that are answered at once."""
    pieces: queue.SimpleQueue[tuple[float, Piece]] = queue.SimpleQueue()
    begin = time.process_time()
    for request in requests:
        engine.submit(request, lambda piece: pieces.put((time.process_time(), piece)))
    first = end = 0.0
    tokens = done = 0
    while done < len(requests):
        end, piece = pieces.get(timeout=600)
        if isinstance(piece, Failed):
            raise piece.error
        first = first or (end if isinstance(piece, Text) else 0.0)
        if isinstance(piece, Done):
            done += 1
            tokens += piece.completion_tokens
    return Timing(first - begin, (end - first) / (tokens - 1))


class _Clock:
    """A streamer of generate that notes when tokens come."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.process_time())

    def end(self) -> None:
        pass


def time_generate(model: Any, ids: list[int]) -> Timing:
    """Time transformers' generate for one prompt."""
    clock = _Clock()
    begin = time.process_time()
    with torch.inference_mode():
        model.generate(
            input_ids=torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            do_sample=False,
            min_new_tokens=NEW_TOKENS,
            max_new_tokens=NEW_TOKENS,
            streamer=clock,
        )
    first = clock.times[1]  # the first call brings the prompt
    return Timing(first - begin, (clock.times[-1] - first) / (NEW_TOKENS - 1))


def median(measure: Callable[[], Timing]) -> Timing:
    """Return the median of some runs after one that does not count."""
    measure()
    runs = [measure() for _ in range(REPEATS)]
    return Timing(
        statistics.median(run.first_seconds for run in runs), statistics.median(run.token_seconds for run in runs)
    )


def measure(name: str, folder: Path, blobs: Blobs) -> list[list[str]]:
    """Return the table's rows for one model."""
    located = describe(folder, source=str(folder), revision=None)
    base = located.base_model()
    adapters = [make_adapter(folder, blobs, base, seed) for seed in (1, 2, 3, 4)]
    engine = TorchEngine(Loader(blobs, models_dir=folder, offline=True, device="cpu"))
    template = load_template(folder)
    plain: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tuned: Any = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), str(blobs.path(adapters[0].path))
    )
    end = {str(template.tokenizer.eos_token_id): -100}

    def asked(prompt: str, adapter: Artifact | None) -> GenerationRequest:
        messages = [{"role": "user", "content": prompt}]
        target = Target(model=name, base=base, adapter=adapter)
        return ask(target, messages=messages, max_tokens=NEW_TOKENS, logit_bias=end)

    rows: list[list[str]] = []

    def row(what: str, prompt: str, own: Timing, other: Timing | None) -> None:
        cells = [cell for timing in (own, other) for cell in _cells(timing)]
        ratio = f"{other.token_seconds / own.token_seconds:.2f}" if other else "-"
        rows.append([name, what, prompt, *cells, ratio])

    try:
        for prompt, text in PROMPTS.items():
            ids = template.prompt([{"role": "user", "content": text}])
            for what, adapter, model in (("base", None, plain), ("adapter", adapters[0], tuned)):
                request = asked(text, adapter)
                row(
                    what,
                    f"{prompt} ({len(ids)} tokens)",
                    median(lambda r=request: time_engine(engine, [r])),
                    median(lambda m=model, i=ids: time_generate(m, i)),
                )
        several = [asked(PROMPTS["short"], adapter) for adapter in adapters]
        row("4 adapters at once", "short", median(lambda: time_engine(engine, several)), None)
    finally:
        engine.stop()
        engine.join(60)
    return rows


def _cells(timing: Timing | None) -> list[str]:
    return ["-", "-"] if timing is None else [f"{timing.first_seconds * 1e3:.0f}", f"{timing.token_seconds * 1e3:.2f}"]


def main() -> None:
    """Run on models built for this."""
    torch.set_num_threads(1)
    rows: list[list[str]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, shape in SHAPES.items():
            model = build(Path(folder) / name, shape)
            rows += measure(name, model, Blobs(Path(folder) / f"blobs-{name}"))
    columns = ("model", "what", "prompt", "first ms", "ms/token", "generate first ms", "generate ms/token", "speed")
    what = "Processor milliseconds of the engine beside transformers' generate (with PEFT for adapters), one thread."
    print("written to", record("inference", what, columns, rows))


if __name__ == "__main__":
    main()
