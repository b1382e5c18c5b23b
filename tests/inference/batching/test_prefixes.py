"""Beginnings of prompts that were read are copied with all their bits, and only where they may be."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rose.inference.batching.model import CHUNK_TOKENS, BatchedModel
from rose.inference.batching.prefixes import Prefixes
from rose.inference.rows import Row
from tests.inference.batching.models import make_adapter, make_model, make_runner, make_text

MODEL_TOKEN_BYTES = 2 * 2 * 2 * 16 * 4
"""Of the tiny llama: layers, keys and values, heads, width, fp32."""


def fresh(*, limit_bytes: int = 1 << 26) -> BatchedModel:
    return make_runner(make_model("llama"), limit_bytes=limit_bytes)


def read(runner: BatchedModel, text: list[int], adapter: str | None = None) -> tuple[int, Tensor]:
    """Read a prompt; return how many of its tokens were copied, and the logits after it."""
    row = Row(text, adapter=adapter, most_tokens=len(text) + 1)
    assert runner.admit([row])
    cached = row.cached_tokens
    assert row.read == cached
    while row.pending:
        _, logits = runner.step([row])
    runner.release(row)
    return cached, logits[0].clone()


@pytest.mark.parametrize(
    ("tokens", "shared", "cached"),
    [
        (150, 150, 128),
        (200, 150, 128),
        (65, 64, 64),
        (64, 64, 32),
        (128, 128, 96),
        (129, 129, 128),
        (150, 31, 0),
        (33, 33, 32),
        (32, 32, 0),
    ],
)
def test_whole_chunks_of_the_same_beginning_are_copied_bit_for_bit(tokens: int, shared: int, cached: int) -> None:
    runner = fresh()
    text = make_text(tokens)
    expected = read(runner, text)[1]
    runner.forget_prompts()
    first = make_text(shared) + make_text(220, seed=5)
    assert read(runner, first)[0] == 0
    found = read(runner, text)
    assert found[0] == cached
    assert torch.equal(found[1], expected)
    assert read(runner, text)[0] == (tokens - 1) // CHUNK_TOKENS * CHUNK_TOKENS


def test_another_beginning_shares_nothing_though_what_follows_is_the_same() -> None:
    runner = fresh()
    text = make_text(200)
    read(runner, text)
    assert read(runner, [text[0] ^ 1, *text[1:]])[0] == 0
    assert read(runner, text[64:])[0] == 0


def test_adapters_and_the_base_share_nothing() -> None:
    runner = fresh()
    text = make_text(150)
    for key in ("red", "white"):
        runner.add_adapter(key, make_adapter(runner, rank=8, seed=len(key)))
    expected: dict[str | None, Tensor] = {}
    for adapter in (None, "red", "white"):
        cached, expected[adapter] = read(runner, text, adapter)
        assert cached == 0
    for adapter in ("white", None, "red"):
        cached, found = read(runner, text, adapter)
        assert cached == 128
        assert torch.equal(found, expected[adapter])


def test_a_scored_text_copies_nothing_and_leaves_nothing() -> None:
    """Each of its tokens has to be read for its score."""
    runner = fresh()
    text = make_text(150)
    for _ in range(2):
        row = Row(text, adapter=None, most_tokens=len(text), scored=True)
        assert runner.admit([row])
        assert row.cached_tokens == 0
        runner.step([row])
        assert len(row.logprobs or []) == 149
        runner.release(row)
        assert runner.cache_bytes() == 0
    read(runner, text)
    row = Row(text, adapter=None, most_tokens=len(text), scored=True)
    assert runner.admit([row])
    assert row.read == 0
    runner.release(row)


def test_at_most_half_of_the_memory_is_kept_and_the_least_recently_used_goes_first() -> None:
    runner = fresh(limit_bytes=2048 * MODEL_TOKEN_BYTES)
    texts = [make_text(257, seed=seed) for seed in range(6)]
    for text in texts[:4]:
        assert read(runner, text)[0] == 0
    half = 1024 * MODEL_TOKEN_BYTES
    assert runner.cache_bytes() == half
    assert read(runner, texts[0])[0] == 256
    read(runner, texts[4])
    assert runner.cache_bytes() == half
    assert [read(runner, texts[at])[0] for at in (0, 2, 3, 4)] == [256, 256, 256, 256]
    assert read(runner, texts[1])[0] == 0


def chains(prefixes: Prefixes) -> None:
    """Check that each chunk's parent is there, and was used no earlier."""
    order = list(prefixes._chunks)
    numbers = {chunk.number: at for at, chunk in enumerate(prefixes._chunks.values())}
    for at, (before, _) in enumerate(order):
        if isinstance(before, int):
            assert numbers[before] > at


def test_what_follows_a_chunk_never_outlives_it() -> None:
    runner = fresh(limit_bytes=2048 * MODEL_TOKEN_BYTES)
    begin = make_text(128)
    generator = torch.Generator().manual_seed(0)
    for seed in range(25):
        shared, tokens = (int(n) for n in torch.randint(1, 200, (2,), generator=generator))
        read(runner, begin[:shared] + make_text(tokens + 200, seed=seed % 4))
        chains(runner._prefixes)
        assert runner.cache_bytes() <= 1024 * MODEL_TOKEN_BYTES


def test_memory_that_rows_need_is_theirs_at_once() -> None:
    runner = fresh(limit_bytes=2048 * MODEL_TOKEN_BYTES)
    for seed in range(4):
        read(runner, make_text(257, seed=seed))
    limit = runner.cache_limit_bytes()
    large = Row(make_text(1000, seed=9), adapter=None, most_tokens=1024)
    assert runner.admit([large])
    assert runner.cache_bytes() == limit
    more = [Row(make_text(100, seed=at), adapter=None, most_tokens=256) for at in range(4)]
    assert runner.admit(more)
    assert runner.cache_bytes() == limit
    assert runner._prefixes.held_bytes() == 0
    while large.pending:
        runner.step([large])
        assert runner.cache_bytes() <= limit
    for row in (large, *more):
        runner.release(row)
    assert runner.cache_bytes() == 0


def test_chunks_that_went_while_their_row_was_read_are_not_continued() -> None:
    runner = fresh()
    text = make_text(600)
    expected = read(runner, text)[1]
    runner.forget_prompts()
    row = Row(text, adapter=None, most_tokens=601)
    assert runner.admit([row])
    runner.step([row])
    assert row.read == 256
    runner.forget_prompts()
    while row.pending:
        _, logits = runner.step([row])
    assert torch.equal(logits[0], expected)
    assert runner._prefixes.held_bytes() == 0
    runner.release(row)
