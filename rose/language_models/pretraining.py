"""Pretrain the toy model `tiny`: a minute of next-token prediction on the shipped texts and lessons, on one thread.

Every number follows from the seed, so the same machine makes the same model. Knows nothing of folders.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from rose.language_models.lessons import lessons

STEPS = 320
"""About 50 s of one 2023 server core, at 7,000 tokens a second; the loss is then 0.5, and 400 steps gain little."""
ROWS = 8
"""Sequences per step."""
ROW_TOKENS = 128
PEAK_RATE = 3e-3
"""AdamW's usual rate for models of this width; higher ones diverge, half of it learns a third less in the time."""
WARMUP_STEPS = 20
LESSON_SHARE = 0.65
"""Share of documents that are conversations; most of the rest is plain English."""
ECHO_SHARE = 0.08
"""Share of documents that say a few random tokens twice. A token that never is an answer gets an embedding that no
adapter can make likely (measured: stuck at one half); and copying is learned from it."""
ECHO_TOKENS = 8

Report = Callable[[str], None]


def pretrain(model: Any, tokenizer: Any, texts: list[str], *, seed: int, steps: int = STEPS, report: Report) -> None:
    """Train all weights of `model` in place, on the thread count that torch is set to; tells `report` how it goes."""
    model.requires_grad_(True).train()
    rows = _rows(_documents(tokenizer, texts, seed))
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.01)
    started = time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = PEAK_RATE * _rate(step, steps)
        batch = torch.tensor(list(islice(rows, ROWS)))  # [B, T + 1]
        loss = _loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % max(1, steps // 10) == 0:
            speed = (step + 1) * ROWS * ROW_TOKENS / (time.monotonic() - started)
            report(f"step {step + 1}/{steps}: loss {loss.item():.2f}, {speed:.0f} tokens/s")
    model.requires_grad_(False).eval()


def _loss(model: Any, batch: Tensor) -> Tensor:
    logits = model(batch[:, :-1], use_cache=False).logits
    return functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def _rate(step: int, steps: int) -> float:
    """Return the share of the peak rate: a short warmup, then a cosine down to a twentieth."""
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)))


def _rows(documents: Iterator[list[int]]) -> Iterator[list[int]]:
    """Cut an endless stream of documents into rows of ROW_TOKENS + 1."""
    waiting: list[int] = []
    for document in documents:
        waiting += document
        while len(waiting) > ROW_TOKENS:
            yield waiting[: ROW_TOKENS + 1]
            waiting = waiting[ROW_TOKENS:]


def _documents(tokenizer: Any, texts: list[str], seed: int) -> Iterator[list[int]]:
    """Yield conversations, each as it would be rendered, and paragraphs, in a seeded mixture without end."""
    chance = random.Random(seed)
    turns = lessons(seed)
    paragraphs = [paragraph for text in texts for paragraph in text.split("\n\n")]
    while True:
        kind = chance.random()
        if kind < ECHO_SHARE:
            yield chance.choices(range(len(tokenizer)), k=ECHO_TOKENS) * 2
            continue
        if kind < ECHO_SHARE + LESSON_SHARE:
            asked, answer = next(turns)
            messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
            document: str = tokenizer.apply_chat_template(messages, tokenize=False)
        else:
            words = chance.choice(paragraphs).split(" ")
            start = chance.randrange(max(1, len(words) - 40))
            document = " ".join(words[start : start + 40]) + "\n"
        yield tokenizer(document, add_special_tokens=False)["input_ids"]
