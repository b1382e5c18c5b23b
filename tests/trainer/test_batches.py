"""The schedule is a pure function of data, seed and step; packing loses nothing."""

from __future__ import annotations

import math
from array import array

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rose.domain.hyperparameters import DataFacts, Hyperparameters, LoraSettings, resolve
from rose.methods.method import Document, Unit
from tests.hyperparameters import parse
from trainer.batches import Example, Schedule, epoch_order, pack, plan_hash
from trainer.held_out import Question

QUESTION = Question(whole=b"", parts=frozenset())


def hyperparameters(examples: int, **asked: object) -> Hyperparameters:
    facts = DataFacts(
        examples=examples,
        validation_file_examples=None,
        hidden_size=128,
        model_type="qwen3",
        context_tokens=2048,
        base_learning_rate=5e-3,
    )
    return resolve(parse(asked), facts, seed=7)


def example(*tokens: int) -> Example:
    ids = array("q", tokens)
    return Example(units=(Unit((Document(ids=ids, weights=array("f", [1.0] * len(ids))),)),), question=QUESTION)


@given(st.lists(st.integers(1, 300), max_size=40), st.integers(1, 400))
def test_packing_keeps_every_document_once_and_the_budget(lengths: list[int], budget: int) -> None:
    bins = pack(lengths, budget)
    assert sorted(index for part in bins for index in part) == list(range(len(lengths)))
    for part in bins:
        assert len(part) == 1 or sum(lengths[index] for index in part) <= budget


def test_packing_many_documents_takes_a_moment() -> None:
    """Looking for room in one micro-batch after the other would take minutes."""
    assert len(pack([5] * 30_000, 4)) == 30_000
    assert len(pack([5] * 30_000, 10)) == 15_000


def test_packing_fills_what_fits() -> None:
    assert pack([5, 3, 2, 4, 1], 6) == [[0, 4], [2, 3], [1]]
    assert pack([5, 3, 2], 0) == [[0], [1], [2]]


def test_every_epoch_visits_every_example_once_in_its_own_order() -> None:
    schedule = Schedule(hyperparameters(10, n_epochs=3, batch_size=4))
    assert schedule.total_steps == 9
    steps = [schedule.step_examples(step) for step in range(1, 10)]
    assert [len(step) for step in steps] == [4, 4, 2] * 3
    epochs = [[*steps[start], *steps[start + 1], *steps[start + 2]] for start in (0, 3, 6)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[1] == epoch_order(10, 7, 1)
    assert [step for step in range(1, 10) if schedule.ends_epoch(step)] == [3, 6, 9]


def test_the_order_does_not_depend_on_where_it_is_asked_from() -> None:
    forward, fresh = Schedule(hyperparameters(10, n_epochs=2)), Schedule(hyperparameters(10, n_epochs=2))
    expected = [forward.step_examples(step) for step in range(1, forward.total_steps + 1)]
    assert [fresh.step_examples(step) for step in range(forward.total_steps, 0, -1)] == expected[::-1]


def test_the_rate_rises_to_the_peak_and_falls_to_zero() -> None:
    plan = hyperparameters(100, n_epochs=1, batch_size=1, warmup_ratio=0.1)
    schedule = Schedule(plan)
    rates = [schedule.learning_rate(step) for step in range(1, 101)]
    assert rates[0] == pytest.approx(plan.learning_rate / 10)
    assert rates[9] == rates[10] == pytest.approx(plan.learning_rate)
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(plan.learning_rate / 90)


@pytest.mark.parametrize(("ratio", "first"), [(0.0, 1.0), (1.0, 1 / 10)])
def test_the_rate_without_and_with_nothing_but_warmup(ratio: float, first: float) -> None:
    plan = hyperparameters(10, n_epochs=1, batch_size=1, warmup_ratio=ratio)
    schedule = Schedule(plan)
    assert schedule.learning_rate(1) == pytest.approx(plan.learning_rate * first)
    assert all(schedule.learning_rate(step) > 0 for step in range(1, 11))


def test_evaluations_come_at_the_interval_and_at_each_epochs_end() -> None:
    plan = hyperparameters(100, n_epochs=2, batch_size=1, validation_split=0.1)
    schedule = Schedule(plan)
    assert plan.evaluate_every_steps == 9
    evaluated = [step for step in range(1, schedule.total_steps + 1) if schedule.evaluates_after(step)]
    assert evaluated == [*range(9, 181, 9)]
    assert Schedule(hyperparameters(100)).evaluates_after(100) is False


def test_the_epoch_fraction_counts_examples() -> None:
    schedule = Schedule(hyperparameters(10, n_epochs=2, batch_size=4))
    assert [schedule.epoch_fraction(step) for step in (1, 2, 3, 4, 6)] == [0.4, 0.8, 1.0, 1.4, 2.0]


def test_the_plan_hash_sees_data_and_numbers_but_not_reasons() -> None:
    plan = hyperparameters(2)
    rows = [example(1, 2), example(3)]
    usual = plan_hash(rows, [], plan, "base")
    assert usual == plan_hash(rows, [], plan, "base")
    others = [
        plan_hash([example(1), example(2, 3)], [], plan, "base"),
        plan_hash(rows[:1], rows[1:], plan, "base"),
        plan_hash(rows, [], plan, "other base"),
        plan_hash(rows, [], hyperparameters(2, learning_rate_multiplier=2.0), "base"),
    ]
    assert len({usual, *others}) == 5
    given_now = hyperparameters(2, learning_rate_multiplier=1.0)
    assert plan_hash(rows, [], given_now, "base") == usual
    assert given_now.reasons != plan.reasons


def test_the_plan_of_a_run_from_before_there_was_thinking_is_taken_up() -> None:
    """The number is what the version before `thinking` and rendering by proof computed for the same plan."""
    plan = Hyperparameters(
        n_epochs=3,
        batch_size=1,
        learning_rate_multiplier=1.0,
        base_learning_rate=0.005,
        learning_rate=0.005,
        warmup_ratio=0.05,
        warmup_steps=2,
        validation_split=0.0,
        early_stopping_patience=None,
        use_lora=True,
        lora_config=LoraSettings(r=16, lora_alpha=32.0, lora_dropout=0.0, target_modules=("all-linear",)),
        seed=7,
        total_steps=6,
        evaluate_every_steps=None,
        training_examples=2,
        validation_examples=0,
        maximum_tokens=2048,
        reasons={},
    )
    rows = [example(1, 2), example(3)]
    assert plan_hash(rows, [], plan, "base") == "119f46743bd9bf84bbf7cef1a71413dc4c70d38d4cb9dc250d1e1c971147c5a8"
    thinking = msgspec.structs.replace(plan, thinking=True)
    assert plan_hash(rows, [], thinking, "base") != plan_hash(rows, [], plan, "base")


def test_the_first_token_is_no_label() -> None:
    document = Document(ids=array("q", [1, 2, 3]), weights=array("f", [1.0, 0.5, 1.0]))
    assert math.isclose(document.label_weight, 1.5)
