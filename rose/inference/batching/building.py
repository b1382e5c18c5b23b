"""Make a loaded model answer in batches, if it can be shown that this changes nothing, and try what it promises.

A list of model families would be wrong with the next one: what counts is that the numbers are transformers' own.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rose.inference.batching.attention import NAME, Recording, current
from rose.inference.batching.linear import BatchLinear, fits_fp16
from rose.inference.batching.model import MAX_ROWS, BatchedModel
from rose.inference.batching.room import SMALLEST_CLASS, LayerShape, Room
from rose.inference.rows import Row
from rose.language_models.lora import replace_layer

log = logging.getLogger(__name__)

PROOF_LENGTHS = (20, 17, 23)
PROOF_PROMPTS = (12, 9, 5)
PROOF_CHUNK = 8
TRIED_PROMPTS = (70, 5, 30, 12, 3)
"""Of the rows whose bits are compared alone and together: one of two chunks, one of the length of few others."""
TRIED_ALONE = (0, 1)
LEAST_ROWS = len(TRIED_PROMPTS)
"""Rows of the smallest class that there is memory for in any case."""


class Bound(NamedTuple):
    """How far log-probabilities (nats) of all tokens may be from transformers' own."""

    largest: float
    mean: float


BOUNDS = {torch.float32: Bound(1e-4, 1e-4), torch.bfloat16: Bound(2.0, 0.15), torch.float16: Bound(0.3, 0.02)}
"""By the dtype of the activations. In bf16, SmolLM2's are up to 0.54 apart between two right ways to add (on average
0.05) and up to 1.2 (0.09) from those in fp32; a model that reads a wrong token or place is half a nat off or more."""
FP16_BOUND = Bound(0.01, 0.01)
"""The same for fp16 weights against fp32 ones; with real models it is about a hundredth of this."""
FAR_BOUND = {torch.float32: 1e-4}
"""For the same numbers through the same kernels; other dtypes have FAR_BOUND_ELSEWHERE."""
FAR_BOUND_ELSEWHERE = 0.3


class NotBatchable(Exception):
    """The model has to answer row by row; the reason is the text."""


class NotInFp16(Exception):
    """The weights have to stay in fp32."""


def build(model: Any, *, form: str, limit_bytes: int, context_tokens: int) -> BatchedModel:
    """Return `model`, as it was loaded, as a runner; its attention and its linear layers are replaced.

    Raises: NotBatchable, with the model's attention as it was; NotInFp16, after which the model is of no use.
    """
    if form == "fp16" and not fits_fp16(model):
        raise NotInFp16("a weight is too large for it")
    texts = _texts(model)
    with torch.inference_mode():
        expected = [model(input_ids=text[None], use_cache=False).logits[0].float() for text in texts]
    before = model.config._attn_implementation
    try:
        room = _prepare(model, limit_bytes, context_tokens)
        proof = BatchedModel(model, room, weights=form, chunk_tokens=PROOF_CHUNK)
        _compare(proof, texts, expected, BOUNDS[model.dtype])
    except Exception as error:  # the boundary to models that transformers may write in any way
        model.set_attn_implementation(before)
        if isinstance(error, NotBatchable):
            raise
        raise NotBatchable(_reason(error)) from error
    for name, module in list(model.named_modules()):
        if type(module) is torch.nn.Linear:
            replace_layer(model, name, BatchLinear(module, form))
    if form == "fp16":
        try:
            _compare(BatchedModel(model, room, weights=form, chunk_tokens=PROOF_CHUNK), texts, expected, FP16_BOUND)
        except Exception as error:  # as above: a model may do anything with a weight
            raise NotInFp16(_reason(error)) from error
    runner = BatchedModel(model, room, weights=form)
    runner.batch_invariant = model.device.type == "cpu" and _is_invariant(runner)
    runner.forget_prompts()
    return runner


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _texts(model: Any) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    return [torch.randint(vocabulary, (n,), generator=generator).to(model.device) for n in PROOF_LENGTHS]


def _prepare(model: Any, limit_bytes: int, context_tokens: int) -> Room:
    """Give the model our attention and find what its layers keep. Raises: NotBatchable."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    if strange := kinds - {"full_attention", "sliding_attention"}:
        raise NotBatchable(f"it has layers of the kind {', '.join(sorted(strange))}")
    model.set_attn_implementation(NAME)
    recording = Recording()
    near, far = (_recorded(model, recording, last) for last in (3, context_tokens - 1))
    layers = [recording.layers[number] for number in range(len(recording.layers))]
    if not layers:
        raise NotBatchable("its attention is its own")
    _check_windows(config, recording.windows)
    if not torch.allclose(near, far, atol=FAR_BOUND.get(model.dtype, FAR_BOUND_ELSEWHERE)):
        raise NotBatchable("how it counts places depends on the longest text")
    return _room(model, layers, limit_bytes, context_tokens)


def _recorded(model: Any, recording: Recording, last: int) -> Tensor:
    """Return the log-probabilities after the tokens at places 0, 1 and 2, where another one stands at place `last`."""
    current.step = recording
    try:
        places = torch.tensor([[0, 1, 2, last]], device=model.device)
        with torch.inference_mode():
            logits = model(input_ids=_texts(model)[0][None, :4], position_ids=places, use_cache=False).logits[0, :3]
    finally:
        current.step = None
    return logits.float().log_softmax(-1)


def _check_windows(config: Any, windows: dict[int, int | None]) -> None:
    """Refuse a model of whose window our attention is not told; a short text would not show it."""
    window = getattr(config, "sliding_window", None)
    if not window or getattr(config, "use_sliding_window", True) is False:
        return
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * len(windows)
    for layer, told in windows.items():
        if told != (window if kinds[layer] == "sliding_attention" else None):
            raise NotBatchable(f"its layer {layer} has a window of {told}, its configuration says otherwise")


def _room(model: Any, layers: Sequence[LayerShape], limit_bytes: int, context_tokens: int) -> Room:
    token_bytes = sum(layer.numbers for layer in layers) * model.dtype.itemsize
    return Room(
        layers,
        dtype=model.dtype,
        device=model.device,
        limit_bytes=max(limit_bytes, LEAST_ROWS * SMALLEST_CLASS * token_bytes),
        context_tokens=context_tokens,
        slots=MAX_ROWS,
    )


def _compare(runner: BatchedModel, texts: Sequence[Tensor], expected: Sequence[Tensor], bound: Bound) -> None:
    """Read and decode the texts together, one joining after the other. Raises: NotBatchable."""
    found = play(runner, [text.tolist() for text in texts], PROOF_PROMPTS)
    for text, prompt, logits, right in zip(texts, PROOF_PROMPTS, found, expected, strict=True):
        right = right[prompt - 1 : len(text) - 1]
        differences = (logits.log_softmax(-1) - right.log_softmax(-1)).abs()
        largest, mean = float(differences.max()), float(differences.mean())
        if not (largest <= bound.largest and mean <= bound.mean):  # NaN is not, either
            raise NotBatchable(
                f"its log-probabilities differ by up to {largest:.2g} from transformers' and by {mean:.2g} on average, "
                f"above {bound.largest:g} or {bound.mean:g}"
            )


def play(
    runner: BatchedModel, texts: Sequence[Sequence[int]], prompts: Sequence[int], *, apart: int = 1
) -> list[Tensor]:
    """Let rows read a text's first tokens and then choose the others; return the logits [chosen, V] of each.

    Each row joins `apart` steps after the one before it.
    """
    rows = [
        Row(text[:prompt], adapter=None, most_tokens=len(text)) for text, prompt in zip(texts, prompts, strict=True)
    ]
    logits: list[list[Tensor]] = [[] for _ in rows]
    active: list[Row] = []
    steps = 0
    try:
        while True:
            while len(active) < len(rows) and steps >= apart * len(active):
                if not runner.admit(rows[len(active) : len(active) + 1]):
                    raise NotBatchable("there is no memory for its keys and values")
                active.append(rows[len(active)])
            going = [row for row in active if row.pending]
            if not going and len(active) == len(rows):
                return [torch.stack(row) for row in logits]
            for row, chosen in zip(*runner.step(going), strict=True):
                number = rows.index(row)
                logits[number].append(chosen.clone())
                if len(row.tokens) < len(texts[number]) - 1:
                    row.tokens.append(texts[number][len(row.tokens)])
            steps += 1
    finally:
        for row in active:
            runner.release(row)


def _is_invariant(runner: BatchedModel) -> bool:
    """Tell whether rows have the same bits alone and together."""
    generator = torch.Generator().manual_seed(1)
    vocabulary = runner.model.get_input_embeddings().weight.shape[0]
    prompts = [min(prompt, runner.context_tokens - 5) for prompt in TRIED_PROMPTS]
    texts = [torch.randint(vocabulary, (prompt + 4,), generator=generator).tolist() for prompt in prompts]
    together = play(runner, texts, prompts)
    runner.forget_prompts()
    alone = [play(runner, texts[number : number + 1], prompts[number : number + 1])[0] for number in TRIED_ALONE]
    return all(torch.equal(alone[at], together[number]) for at, number in enumerate(TRIED_ALONE))
