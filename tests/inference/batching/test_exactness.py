"""A row's logits have the same bits alone, beside others, with others that come and go, and with adapters about."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from rose.inference.batching.attention import current
from rose.inference.batching.linear import has_fp16
from rose.inference.batching.model import BatchedModel
from rose.inference.rows import Row
from tests.inference.batching.models import Part, make_adapter, make_model, make_runner, make_text, own_logits, perform

DECODED = 12
PROMPTS = (1, 5, 31, 32, 65, 150)
LONG_PROMPTS = (185, 250)
"""With four queries for a key, torch adds up the values of 193 keys and of 256 in another order than of fewer."""
FORMS = [
    "fp32",
    pytest.param("fp16", marks=pytest.mark.skipif(not has_fp16(), reason="this torch has no fp16 weights")),
]


def wide_llama() -> Any:
    """Return a random llama of 1.6 million parameters with four queries for each key."""
    return make_model(
        "llama",
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=512,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        initializer_range=0.05,
    )


@pytest.fixture(scope="module")
def make(fixture_base: Path) -> Callable[[str, str], BatchedModel]:
    """Factory of runners, each made once."""
    made: dict[tuple[str, str], BatchedModel] = {}

    def runner(model: str, form: str) -> BatchedModel:
        if (model, form) not in made:
            plain = AutoModelForCausalLM.from_pretrained(fixture_base) if model == "fixture" else wide_llama()
            made[model, form] = make_runner(plain.eval(), form=form)
        made[model, form].forget_prompts()
        return made[model, form]

    return runner


def parts_of(*, adapters: Sequence[str | None] = (None,)) -> list[Part]:
    prompts = PROMPTS + LONG_PROMPTS
    return [
        Part(make_text(prompt + DECODED - 1, seed=prompt, vocabulary=1000), prompt, adapters[at % len(adapters)])
        for at, prompt in enumerate(prompts)
    ]


def alone(runner: BatchedModel, parts: Sequence[Part]) -> list[Tensor]:
    found: list[Tensor] = []
    for part in parts:
        runner.forget_prompts()
        found += perform(runner, [replace(part, joins=0)])
        assert found[-1].shape[0] == DECODED
    runner.forget_prompts()
    return found


def assert_same(found: Sequence[Tensor], expected: Sequence[Tensor], parts: Sequence[Part]) -> None:
    for one, right, part in zip(found, expected, parts, strict=True):
        assert torch.equal(one, right[: part.leaves]), (part.prompt, part.adapter)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("model", ["fixture", "wide"])
class TestBits:
    def test_together(self, make: Callable[[str, str], BatchedModel], model: str, form: str) -> None:
        runner = make(model, form)
        assert runner.batch_invariant
        parts = parts_of()
        assert_same(perform(runner, parts), alone(runner, parts), parts)
        assert runner.room.held_bytes == 0

    def test_joining_at_random_steps_and_leaving_before_the_end(
        self, make: Callable[[str, str], BatchedModel], model: str, form: str
    ) -> None:
        runner, chance = make(model, form), random.Random(3)
        parts = parts_of()
        expected = alone(runner, parts)
        for _ in range(2):
            mixed = [
                replace(part, joins=chance.randrange(15), leaves=chance.choice([None, None, 1, 5])) for part in parts
            ]
            chance.shuffle(order := list(range(len(parts))))
            found = perform(runner, [mixed[at] for at in order])
            assert_same(found, [expected[at] for at in order], [mixed[at] for at in order])

    def test_with_adapters_that_are_loaded_and_removed_meanwhile(
        self, make: Callable[[str, str], BatchedModel], model: str, form: str
    ) -> None:
        runner = make(model, form)
        stored = {f"r{rank}": make_adapter(runner, rank=rank, seed=rank) for rank in (4, 16, 24)}
        for key, adapter in stored.items():
            runner.add_adapter(key, adapter)
        parts = parts_of(adapters=("r4", None, "r16", "r24"))
        expected = alone(runner, parts)
        others = {key: make_adapter(runner, rank=rank, seed=9) for key, rank in (("a", 8), ("b", 16), ("c", 32))}

        def load() -> None:
            for key, adapter in others.items():
                runner.add_adapter(key, adapter)

        def forget() -> None:
            runner.remove_adapter("a")
            runner.remove_adapter("b")

        joined = [replace(part, joins=(3 * at) % 11) for at, part in enumerate(parts)]
        assert_same(perform(runner, joined, before={2: load, 7: forget}), expected, parts)
        base = [part for part in parts if part.adapter is None]
        for key in runner.adapters():
            runner.remove_adapter(key)
        runner.forget_prompts()
        assert_same(perform(runner, base), [expected[parts.index(part)] for part in base], base)

    def test_many_rows_of_one_adapter_beside_one_of_another(
        self, make: Callable[[str, str], BatchedModel], model: str, form: str
    ) -> None:
        runner = make(model, form)
        runner.add_adapter("red", make_adapter(runner, rank=8, seed=1))
        runner.add_adapter("white", make_adapter(runner, rank=8, seed=2))
        parts = [
            Part(make_text(17, seed=at, vocabulary=1000), 5 + at % 3, "white" if at == 4 else "red", joins=at % 3)
            for at in range(15)
        ]
        together = perform(runner, parts)
        for at in (0, 4, 9):
            runner.forget_prompts()
            assert torch.equal(perform(runner, [replace(parts[at], joins=0)])[0], together[at])
        runner.remove_adapter("red")
        runner.remove_adapter("white")


@pytest.mark.parametrize("form", FORMS)
def test_a_scored_text_changes_no_bit_of_those_who_write(make: Callable[[str, str], BatchedModel], form: str) -> None:
    """All its tokens go through the head: other numbers of rows there than ever without it."""
    runner = make("wide", form)
    parts = [Part(make_text(40, seed=at, vocabulary=1000), 2) for at in range(3)]
    expected = [perform(runner, [part])[0] for part in parts]
    scored = Row(make_text(401, seed=8, vocabulary=1000), adapter=None, most_tokens=401, scored=True)
    assert runner.admit([scored])
    rows = [Row(part.text[:2], adapter=None, most_tokens=40) for part in parts]
    for row in rows:
        assert runner.admit([row])
    found: list[list[Tensor]] = [[] for _ in rows]
    while any(row.pending for row in (*rows, scored)):
        ready, logits = runner.step([row for row in (*rows, scored) if row.pending])
        for row, one in zip(ready, logits, strict=True):
            if row is not scored:
                found[rows.index(row)].append(one.clone())
                row.tokens += parts[rows.index(row)].text[len(row.tokens) :][:1]
    for row in (*rows, scored):
        runner.release(row)
    for one, right in zip(found, expected, strict=True):
        assert torch.equal(torch.stack(one), right)


@pytest.mark.parametrize("tokens", [1, 2, 32, 33, 34, 64, 65, 129, 300])
def test_scores_of_a_text_of_any_length_beside_a_row_that_writes(tokens: int) -> None:
    model = make_model("llama")
    text = make_text(tokens, seed=tokens)
    expected = own_logits(model, text).log_softmax(-1)[torch.arange(tokens - 1), torch.tensor(text[1:]).long()]
    runner = make_runner(model)
    scored = Row(text, adapter=None, most_tokens=tokens, scored=True)
    writing = Row([5, 6], adapter=None, most_tokens=40)
    assert runner.admit([writing])
    assert runner.admit([scored])
    while scored.pending:
        ready, logits = runner.step([writing, scored])
        assert ready[0] is writing
        writing.tokens.append(int(logits[0].argmax()))
    assert ready[1:] == [scored]
    torch.testing.assert_close(torch.tensor(scored.logprobs), expected, atol=1e-4, rtol=0)


def test_the_logits_of_a_step_are_those_of_the_rows_it_names() -> None:
    """Writing, scored, whole and half-read rows in one step, and more prompt tokens than it takes."""
    model = make_model("llama")
    texts = [make_text(tokens, seed=tokens) for tokens in (3, 9, 70, 20, 300, 40)]
    expected = [own_logits(model, text) for text in ([*texts[1], 7], *texts)]
    runner = make_runner(model)
    rows = [Row(text, adapter=None, most_tokens=len(text) + 5, scored=len(text) == 70) for text in texts]
    assert runner.admit([rows[1]])
    (first,), _ = runner.step([rows[1]])
    first.tokens.append(7)
    expected = [expected[1], expected[0], *expected[3:]]
    for row in (*rows[:1], *rows[2:]):
        assert runner.admit([row])
    seen: list[Row] = []
    while any(row.pending for row in rows):
        ready, logits = runner.step([row for row in rows if row.pending])
        assert len(ready) == len(logits)
        for row, found in zip(ready, logits, strict=True):
            torch.testing.assert_close(found, expected[rows.index(row)][-1], atol=1e-4, rtol=0)
        seen += ready
    assert sorted(map(rows.index, seen)) == list(range(len(rows)))
    assert seen[0] is rows[1]


def test_a_failed_step_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama")
    runner = make_runner(model)
    part = Part(make_text(70), 60)
    expected = perform(runner, [part])[0]
    runner.forget_prompts()
    row = Row(part.text[:60], adapter=None, most_tokens=70)
    assert runner.admit([row])
    layer = runner.model.model.layers[1].mlp
    with monkeypatch.context() as patch:
        patch.setattr(layer, "forward", lambda x: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            runner.step([row])
    assert current.step is None
    assert row.read == 0
    (ready, logits) = runner.step([row])
    assert ready == [row]
    assert torch.equal(logits[0], expected[0])
    runner.release(row)


def test_an_adapter_that_diverged_harms_nobody_who_gets_its_place() -> None:
    """A masked NaN would still be one."""
    runner = make_runner(make_model("gemma2"))
    part = Part(make_text(20), 6)
    expected = perform(runner, [part])[0]
    broken = make_adapter(runner, rank=8, seed=1)
    for a, _ in broken.layers.values():
        a[:] = float("nan")
    runner.add_adapter("broken", broken)
    for parts in ([Part(make_text(80), 70, "broken"), part], [part, Part(make_text(80), 70, "broken", joins=2)]):
        runner.forget_prompts()
        found = perform(runner, [replace(one, leaves=1) if one.adapter else one for one in parts])
        assert torch.equal(found[parts.index(part)], expected)
    keep = Row(part.text[:6], adapter=None, most_tokens=20)
    bad = Row(make_text(70), adapter="broken", most_tokens=80)
    assert runner.admit([bad])
    assert runner.admit([keep])
    runner.step([bad, keep])
    runner.release(bad)  # and `keep` fills its place
    keep.tokens.append(part.text[6])
    _, logits = runner.step([keep])
    assert torch.equal(logits[0], expected[1])
    runner.release(keep)


def test_choices_of_one_prompt_go_on_where_it_was_read_or_copied() -> None:
    runner = make_runner(make_model("llama"))
    part = Part(make_text(140), 130)
    expected = perform(runner, [part])[0]
    for cached in (128, 0):  # the first time from the cache
        rows = [Row(part.text[:130], adapter=None, most_tokens=140) for _ in range(3)]
        assert runner.admit(rows)
        assert rows[0].cached_tokens == cached
        _, logits = runner.step(rows[:1])
        assert torch.equal(logits[0], expected[0])
        runner.fork(rows[0], rows[1:])
        assert [(row.read, row.cached_tokens) for row in rows] == [(130, cached)] * 3
        for step in range(1, 5):
            for row in rows:
                row.tokens.append(part.text[len(row.tokens)])
            ready, logits = runner.step(rows)
            assert ready == rows
            assert all(torch.equal(one, expected[step]) for one in logits)
        for row in rows:
            runner.release(row)
        runner.forget_prompts()


def test_a_row_that_waits_for_memory_changes_no_bit_of_the_others_or_of_itself() -> None:
    """Its slot lies among those that write."""
    runner = make_runner(make_model("llama"))
    parts = [Part(make_text(prompt + 10, seed=prompt), prompt) for prompt in (20, 250, 40)]
    expected = [perform(runner, [part])[0] for part in parts]
    runner.forget_prompts()
    rows = [Row(part.text[: part.prompt], adapter=None, most_tokens=len(part.text)) for part in parts]
    for row in rows:
        assert runner.admit([row])
    grow = runner.room.grow
    found: list[list[Tensor]] = [[] for _ in rows]
    for step in range(25):
        runner.room.grow = lambda row, step=step: not (row is rows[step % 3] or step < 3) and grow(row)
        ready, logits = runner.step([row for row in rows if row.pending])
        for row, one in zip(ready, logits, strict=True):
            number = rows.index(row)
            found[number].append(one.clone())
            row.tokens += parts[number].text[len(row.tokens) :][:1]
    for one, right in zip(found, expected, strict=True):
        assert len(one) == 11
        assert torch.equal(torch.stack(one), right)
