"""Numbers of rows and lengths of keys that give other bits are found and left out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from rose.inference.batching.attention import good_length
from rose.inference.batching.sizes import MOST_ADDED, GoodSizes, Product


class Wrong:
    """A product that is a little wrong for some numbers of rows, in one of them."""

    def __init__(self, bad: set[int]) -> None:
        self.bad = bad
        self.calls = 0

    def __call__(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = x * 3
        if x.shape[0] in self.bad:
            y[-1, 0] += 1e-6 * (1 + abs(float(y[-1, 0])))
        return y


def make(*bad: set[int]) -> GoodSizes:
    return GoodSizes([Product(8, Wrong(one)) for one in bad], dtype=torch.float32)


def test_bad_numbers_are_rounded_up_to_good_ones() -> None:
    bad = {1, 2, 3, 7, 40, 41, 42, 100, 300}
    sizes = make(bad)
    for rows in range(1, 330):
        found = sizes.at_least(rows)
        assert found not in bad
        assert found == next(number for number in range(rows, 400) if number not in bad)


def test_a_number_has_to_be_good_for_every_product() -> None:
    sizes = make({1, 2}, {3, 4}, set())
    assert [sizes.at_least(rows) for rows in (1, 2, 3, 4, 5)] == [5] * 5


def test_where_none_is_good_near_the_number_stays() -> None:
    sizes = make(set(range(1, 200)) - {16})
    assert sizes.at_least(20) == 20
    assert sizes.at_least(16) == 16
    assert sizes.at_least(16 - MOST_ADDED + 2) == 16


def test_each_number_is_tried_once() -> None:
    product = Wrong({5})
    sizes = GoodSizes([Product(8, product)], dtype=torch.float32)
    assert sizes.at_least(5) == 6
    calls = product.calls
    assert sizes.at_least(5) == 6
    assert product.calls == calls


def test_without_products_every_number_is_good() -> None:
    assert GoodSizes([], dtype=torch.float32).at_least(3) == 3


@pytest.mark.parametrize("group", [1, 3, 4, 7])
def test_over_good_lengths_a_query_finds_the_same_bits(group: int) -> None:
    torch.manual_seed(1)
    query = torch.randn(1, 1, group, 32)
    keys, values = torch.randn(2, 1, 1, 1536, 32)

    def attend(over: int, valid: int) -> Tensor:
        mask = torch.zeros(1, 1, 1, over)
        mask[..., valid:] = -torch.inf
        return functional.scaled_dot_product_attention(query, keys[:, :, :over], values[:, :, :over], attn_mask=mask)

    for valid in (5, 64, 150, 200, 250, 300, 420, 512, 530, 700, 800):
        lengths = {good_length(length, group, 32, 32, torch.float32) for length in range(valid, 1500, 64)}
        assert min(lengths) >= valid
        expected = attend(1536, valid)
        assert all(torch.equal(attend(length, valid), expected) for length in lengths)
