"""Served as trained: which tokens are compared, and what is found."""

from __future__ import annotations

from array import array

import msgspec
import pytest

from rose.inference.generation import ScoringAnswer
from rose.methods.method import Document
from trainer.proof import MAX_ROW_TOKENS, MAX_ROWS, MAX_TOKENS, compare, sample
from trainer.protocol import ScoredRow, ScoredRows

OURS = ScoredRows(
    rows=[
        ScoredRow(ids=[1, 2, 3, 4], learned=[2, 3], logprobs=[-1.0, -2.0]),
        ScoredRow(ids=[1, 2], learned=[1], logprobs=[-3.0]),
    ],
    held_out=True,
    trained_as="fp32",
)
SHA = "a" * 64


def document(tokens: int, *, learned: int = 2) -> Document:
    weights = [0.0] * (tokens - learned) + [1.0] * learned
    return Document(ids=array("q", range(tokens)), weights=array("f", weights))


def served(*rows: list[float | None], weights: str = "fp32", dtype: str = "float32") -> ScoringAnswer:
    return ScoringAnswer(logprobs=list(rows), adapter=SHA, weights=weights, dtype=dtype)


def test_the_rows_are_some_of_the_whole_data_and_always_the_same() -> None:
    documents = [document(5 + number) for number in range(100)]
    chosen = sample(documents, seed=1)
    assert len(chosen) == MAX_ROWS
    assert chosen == sample(documents, seed=1)
    assert chosen != sample(documents, seed=2)
    assert max(len(row) for row in chosen) > 70, "not the first ones of the file"


def test_a_long_row_gives_its_end_and_all_together_are_bounded() -> None:
    chosen = sample([document(10_000) for _ in range(20)], seed=1)
    assert [len(row) for row in chosen] == [MAX_ROW_TOKENS] * (MAX_TOKENS // MAX_ROW_TOKENS)
    assert chosen[0].label_weight == 2


def test_a_row_of_which_nothing_is_learned_is_left_out() -> None:
    assert sample([document(5, learned=0), Document(ids=array("q", [1]), weights=array("f", [1]))], seed=1) == []


def test_only_learned_tokens_count() -> None:
    found = compare(OURS, served([-99.0, -1.001, -2.0], [-3.0]), SHA)
    assert (found.status, found.rows, found.tokens, found.held_out) == ("proven", 2, 3, True)
    assert found.largest_difference == pytest.approx(0.001)
    assert found.mean_difference == pytest.approx(0.001 / 3)


def test_a_mean_beyond_its_bound_is_a_miss_where_no_token_is() -> None:
    found = compare(OURS, served([0.0, -1.009, -2.009], [-3.009]), SHA)
    assert found.status == "differs"
    assert "on average" in found.reason


@pytest.mark.parametrize(
    ("trained_as", "weights", "dtype", "allowed"),
    [
        ("fp32", "fp32", "float32", 0.01),
        ("fp32", "fp16", "float32", 0.1),
        ("fp32", "bf16", "float32", 2.0),
        ("fp32", "fp32", "bfloat16", 2.0),
        ("bf16", "fp32", "float32", 2.0),
        ("fp32", "", "", 2.0),
    ],
)
def test_the_coarsest_numbers_on_either_side_set_the_bound(
    trained_as: str, weights: str, dtype: str, allowed: float
) -> None:
    ours = msgspec.structs.replace(OURS, trained_as=trained_as)
    found = compare(ours, served([0.0, -1.0, -2.0], [-3.0], weights=weights, dtype=dtype), SHA)
    assert (found.status, found.largest_allowed) == ("proven", allowed)


def test_a_model_that_chooses_experts_has_the_widest_bound() -> None:
    found = compare(msgspec.structs.replace(OURS, routed=True), served([0.0, -1.2, -2.0], [-3.0]), SHA)
    assert found.largest_allowed == 2.0


def test_a_number_that_neither_side_has_is_no_difference() -> None:
    row = ScoredRow(ids=[1, 2, 3], learned=[1, 2], logprobs=[None, -2.0])
    found = compare(ScoredRows(rows=[row], held_out=False, trained_as="fp32"), served([None, -2.0]), SHA)
    assert found.status == "proven"
