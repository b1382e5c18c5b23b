"""Hyperparameters: ranges, and what `auto` becomes."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rose.domain.hyperparameters import DataFacts, LoraSettings, base_learning_rate, held_out, resolve
from rose.errors import InvalidRequest
from tests.hyperparameters import parse


def facts(examples: int = 100, **more: Any) -> DataFacts:
    return DataFacts(
        examples=examples,
        validation_file_examples=more.pop("validation_file_examples", None),
        hidden_size=2000,
        model_type="qwen2",
        context_tokens=4096,
        **more,
    )


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"n_epochs": 0}, "hyperparameters.n_epochs"),
        ({"n_epochs": 51}, "hyperparameters.n_epochs"),
        ({"n_epochs": True}, "hyperparameters.n_epochs"),
        ({"n_epochs": "3"}, "hyperparameters.n_epochs"),
        ({"batch_size": 257}, "hyperparameters.batch_size"),
        ({"learning_rate_multiplier": 0}, "hyperparameters.learning_rate_multiplier"),
        ({"learning_rate_multiplier": math.inf}, "hyperparameters.learning_rate_multiplier"),
        ({"learning_rate_multiplier": 10**400}, "hyperparameters.learning_rate_multiplier"),
        ({"validation_split": 1}, "hyperparameters.validation_split"),
        ({"early_stopping_patience": 0}, "hyperparameters.early_stopping_patience"),
        ({"warmup_ratio": 1.5}, "hyperparameters.warmup_ratio"),
        ({"use_lora": 1}, "hyperparameters.use_lora"),
        ({"epochs": 3}, "hyperparameters.epochs"),
        ({"lora_config": {"rank": 3}}, "hyperparameters.lora_config.rank"),
        ({"lora_config": {"r": 0}}, "hyperparameters.lora_config.r"),
        ({"lora_config": {"lora_dropout": 1}}, "hyperparameters.lora_config.lora_dropout"),
        ({"lora_config": {"target_modules": []}}, "hyperparameters.lora_config.target_modules"),
        ({"lora_config": {"target_modules": ["lm_head"]}}, "hyperparameters.lora_config.target_modules"),
        ({"lora_config": {"use_dora": True}}, "hyperparameters.lora_config.use_dora"),
        ({"lora_config": {"modules_to_save": ["embed_tokens"]}}, "hyperparameters.lora_config.modules_to_save"),
        ({"use_lora": False, "lora_config": {"r": 8}}, "hyperparameters.lora_config"),
        ([], "hyperparameters"),
    ],
)
def test_a_bad_value_is_refused_by_name(given: Any, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(given)
    assert caught.value.param == param


def test_the_seeds_curl_call_is_understood() -> None:
    asked = parse(
        {
            "n_epochs": 3,
            "batch_size": "auto",
            "learning_rate_multiplier": 1.5,
            "validation_split": 0.1,
            "early_stopping_patience": 3,
            "warmup_ratio": 0.1,
            "use_lora": True,
            "lora_config": {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05},
        }
    )
    chosen = resolve(asked, facts(2), seed=1)
    assert (chosen.training_examples, chosen.validation_examples, chosen.total_steps) == (1, 1, 3)
    assert chosen.learning_rate == pytest.approx(chosen.base_learning_rate * 1.5)
    assert chosen.early_stopping_patience == 3
    assert chosen.lora_config == LoraSettings(r=16, lora_alpha=32.0, lora_dropout=0.05, target_modules=("all-linear",))


@pytest.mark.parametrize(
    ("n", "epochs"), [(1, 25), (2, 25), (10, 10), (33, 3), (100, 3), (8333, 3), (10_000, 2), (99_999, 1)]
)
def test_auto_epochs_follow_the_cookbook(n: int, epochs: int) -> None:
    assert resolve(parse({}), facts(n), seed=0).n_epochs == epochs


@given(
    n=st.integers(1, 5000),
    epochs=st.one_of(st.just("auto"), st.integers(1, 50)),
    batch=st.one_of(st.just("auto"), st.integers(1, 256)),
    split=st.floats(0, 0.99),
    warmup=st.one_of(st.just("auto"), st.floats(0, 1)),
)
def test_every_plan_is_whole(n: int, epochs: Any, batch: Any, split: float, warmup: Any) -> None:
    asked = parse({"n_epochs": epochs, "batch_size": batch, "validation_split": split, "warmup_ratio": warmup})
    plan = resolve(asked, facts(n), seed=0)
    assert plan.training_examples + plan.validation_examples == n
    assert plan.training_examples >= 1
    assert plan.total_steps == math.ceil(plan.training_examples / plan.batch_size) * plan.n_epochs
    assert 0 <= plan.warmup_steps <= plan.total_steps
    assert epochs in ("auto", plan.n_epochs)
    assert batch in ("auto", plan.batch_size)
    names = ("n_epochs", "batch_size", "learning_rate_multiplier", "base_learning_rate", "warmup_ratio", "use_lora")
    assert all(plan.reasons[name] for name in names)


@pytest.mark.parametrize(("tokens", "rank"), [(0, 16), (16_000, 16), (16_001, 32), (100_000, 128), (10_000_000, 128)])
def test_the_rank_rises_until_the_adapter_has_a_number_for_each_learned_token(tokens: int, rank: int) -> None:
    plan = resolve(parse({}), facts(label_tokens=tokens, lora_numbers_per_rank=1000), seed=0)
    assert plan.lora_config == LoraSettings(r=rank, lora_alpha=32.0, lora_dropout=0.0, target_modules=("all-linear",))
    given_rank = resolve(parse({"lora_config": {"r": 8}}), facts(label_tokens=tokens, lora_numbers_per_rank=1), seed=0)
    assert given_rank.lora_config is not None
    assert given_rank.lora_config.r == 8


@pytest.mark.parametrize(
    ("asked", "more"),
    [({}, {}), ({"validation_split": 0.1}, {}), ({"use_lora": False}, {"validation_file_examples": 3})],
)
def test_every_value_has_its_reason(asked: dict[str, Any], more: dict[str, Any]) -> None:
    plan = resolve(parse(asked), facts(**more), seed=0)
    shown = {name for name in plan.__struct_fields__ if name not in ("reasons", "options")}
    if plan.lora_config is not None:
        shown = shown - {"lora_config"} | {f"lora_config.{name}" for name in LoraSettings.__struct_fields__}
    assert set(plan.reasons) == shown
    assert all(plan.reasons.values())


def test_a_split_holds_out_at_least_one_when_it_can() -> None:
    assert [held_out(n, 0.1) for n in (1, 2, 10, 15, 100)] == [0, 1, 1, 2, 10]
    assert held_out(2, 0.99) == 1
    assert held_out(100, 0) == 0


def test_a_split_beside_a_validation_file_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="exclude"):
        resolve(parse({"validation_split": 0.1}), facts(10, validation_file_examples=3), seed=0)


def test_the_base_rate_is_the_published_formula() -> None:
    assert base_learning_rate(2000, "qwen2", 128) == pytest.approx(5e-4)
    assert base_learning_rate(4000, "llama", 128) == pytest.approx(5e-4 * 0.5**0.781)
    assert base_learning_rate(128, "llama", 128) == 1e-3
    assert base_learning_rate(2000, "qwen2", 8) == pytest.approx(2.5e-4)
    assert base_learning_rate(2000, "qwen2", 8, lora=False) == pytest.approx(1.25e-4)
    assert base_learning_rate(2000, "qwen2", 1, lora=False) == 5e-5


def test_a_rate_set_for_the_base_is_taken() -> None:
    plan = resolve(parse({"learning_rate_multiplier": 2.0}), facts(base_learning_rate=3e-3), seed=0)
    assert plan.learning_rate == pytest.approx(6e-3)


def test_training_on_from_an_adapter_keeps_its_shape() -> None:
    parent = LoraSettings(r=8, lora_alpha=16.0, lora_dropout=0.0, target_modules=("q_proj",))
    assert resolve(parse({}), facts(parent_lora=parent), seed=0).lora_config == parent
    with pytest.raises(InvalidRequest, match="adapter has r 8"):
        resolve(parse({"lora_config": {"r": 4}}), facts(parent_lora=parent), seed=0)


def test_patience_without_validation_data_says_that_it_does_nothing() -> None:
    plan = resolve(parse({"early_stopping_patience": 3}), facts(), seed=0)
    assert plan.early_stopping_patience is None
    assert "nothing to stop on" in plan.reasons["early_stopping_patience"]


def test_a_request_survives_its_json() -> None:
    asked = parse({"n_epochs": 3, "lora_config": {"r": 4, "target_modules": ["q_proj"]}})
    assert msgspec.json.decode(msgspec.json.encode(asked), type=type(asked)) == asked
