"""The sampler draws from the distribution it says, and only from it."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rose.inference.request import Sampling
from rose.inference.sampling import FIRST_LIKELY, Sampler, _likeliest, top_logprobs

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, -20.0])
DRAWS = 4000


def draw(sampling: Sampling, logits: torch.Tensor = LOGITS) -> dict[int, float]:
    """Return how often each token is drawn."""
    sampler = Sampler(sampling, seed=1, index=0, vocabulary=len(logits))
    counts = Counter(sampler.choose(logits) for _ in range(DRAWS))
    return {token_id: count / DRAWS for token_id, count in counts.items()}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_temperature(temperature: float) -> None:
    expected = torch.softmax(LOGITS / temperature, dim=0)
    drawn = draw(Sampling(temperature=temperature))
    for token_id, probability in enumerate(expected.tolist()):
        assert drawn.get(token_id, 0.0) == pytest.approx(probability, abs=0.04)


def test_top_p_keeps_the_fewest_tokens_that_reach_it() -> None:
    probabilities = torch.softmax(LOGITS, dim=0).tolist()
    assert sum(probabilities[:1]) < 0.8 < sum(probabilities[:2])
    drawn = draw(Sampling(top_p=0.8))
    assert set(drawn) == {0, 1}
    assert drawn[0] == pytest.approx(probabilities[0] / sum(probabilities[:2]), abs=0.04)
    assert set(draw(Sampling(top_p=0.0))) == {0}


def test_a_tiny_temperature_is_greedy_and_does_not_overflow() -> None:
    for temperature in (1e-6, 1e-45, 5e-324):
        assert draw(Sampling(temperature=temperature), LOGITS * 100) == {0: 1.0}


def test_a_token_of_probability_zero_is_never_drawn() -> None:
    logits = torch.tensor([float("-inf"), 0.0, float("-inf"), 0.0, float("-inf")])
    assert set(draw(Sampling(), logits)) == {1, 3}


def test_bias_forces_and_bans() -> None:
    assert draw(Sampling(logit_bias={4: 100.0})) == {4: 1.0}
    assert 0 not in draw(Sampling(logit_bias={0: -100.0}))


def test_penalties_count_what_was_made() -> None:
    logits = torch.tensor([1.0, 0.4, 0.0])
    frequency = Sampler(Sampling(temperature=0, frequency_penalty=0.5), seed=None, index=0, vocabulary=3)
    assert [frequency.choose(logits) for _ in range(6)] == [0, 0, 1, 0, 2, 1]
    presence = Sampler(Sampling(temperature=0, presence_penalty=0.7), seed=None, index=0, vocabulary=3)
    assert [presence.choose(logits) for _ in range(4)] == [0, 1, 0, 0]
    assert logits.tolist() == pytest.approx([1.0, 0.4, 0.0]), "the model's logits stay as they are"


def test_log_probabilities_are_of_the_plain_distribution() -> None:
    value, top = top_logprobs(LOGITS, 2, 2)
    expected = torch.log_softmax(LOGITS, dim=0).tolist()
    assert value == pytest.approx(expected[2])
    assert top == [(0, pytest.approx(expected[0])), (1, pytest.approx(expected[1]))]


@settings(max_examples=150, deadline=None)
@given(
    size=st.sampled_from([1, 2, 255, 256, 257, 1000, 5000]),
    sharpness=st.sampled_from([0.0, 0.3, 1.0, 3.0, 30.0]),
    top_p=st.one_of(st.floats(0, 0.9999), st.sampled_from([0.5, 0.9, 0.99])),
    seed=st.integers(0, 1000),
)
def test_the_likeliest_are_those_of_all_sorted(size: int, sharpness: float, top_p: float, seed: int) -> None:
    """Few for a peaked distribution; for a flat one more than are looked at first."""
    generator = torch.Generator().manual_seed(seed)
    probabilities = torch.softmax(torch.randn(size, generator=generator) * sharpness, dim=0)
    found, order = _likeliest(probabilities, top_p)
    assert torch.equal(probabilities[order], found)
    everything = probabilities.sort(descending=True).values
    before = everything.double().cumsum(0) - everything.double()
    kept = max(1, int((before < top_p).sum()))
    assert abs(len(found) - kept) <= (0 if sharpness else 1) + int(size > FIRST_LIKELY)  # a sum's last bit
    assert torch.equal(found, everything[: len(found)])
    assert len(set(order.tolist())) == len(found)


def test_top_p_reaches_beyond_the_tokens_that_are_looked_at_first() -> None:
    found, _ = _likeliest(torch.full((1000,), 1e-3), 0.5)
    assert abs(len(found) - 500) <= 1
    assert len(found) > FIRST_LIKELY
