"""Direct preference optimization: make the preferred answer likelier than the other one, near where the model began.

loss = -log sigmoid(beta x ((log p(y+) - log p0(y+)) - (log p(y-) - log p0(y-)))), the mean over pairs, where p is the
model and p0 the model before the first step (Rafailov et al. 2023, equation 7; TRL's `loss_type="sigmoid"`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

from rose.domain import preferences
from rose.domain.preferences import PreferencePair
from rose.domain.training_data import Problem, UnusableExample
from rose.methods.method import Option, Rendered, Scores, Template, Tensor, Unit
from rose.methods.supervised import document

OPTIONS: Mapping[str, Option] = {
    "beta": Option(0.1, "the usual strength; a larger one stays nearer to the model that training begins with"),
}
NEEDS_REFERENCE = True
RATE = 0.1
"""Pairs pull in one direction for ever: at the rate of supervised fine-tuning both answers become unlikely."""


def read(lines: Iterable[bytes]) -> Iterator[PreferencePair | Problem]:
    """Yield each pair, or its first problem."""
    return preferences.read_pairs(lines)


def render(item: PreferencePair, template: Template, maximum_tokens: int, *, thinking: bool) -> Rendered:
    """Return the two conversations of a pair, in each the last answer learned.

    Raises: UnusableExample, also for a pair that does not fit whole: cut, its two prompts could differ.
    """
    sides = [template.render(one, maximum_tokens, thinking=thinking) for one in item.conversations]
    for name, side in zip(preferences.OUTPUTS, sides, strict=True):
        if side.cut or len(side.examples) != 1:
            why = f"is longer than the model's context of {maximum_tokens} tokens" if side.cut else "has no one answer"
            text = f"the conversation with {name} {why}; a pair is learned whole or not at all"
            raise UnusableExample(Problem(line=item.line, example=item.number, text=text))
    unit = Unit(tuple(document(side.examples[0]) for side in sides))
    return Rendered(units=(unit,), cut=False, caveats=sides[0].caveats)


def weight(unit: Unit) -> float:
    """Return 1: every pair counts alike."""
    return 1.0


def blind_loss(units: Sequence[Unit]) -> float:
    """Return the loss of finding both answers alike: log 2."""
    return math.log(2)


def loss(scores: Scores, options: Mapping[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the sum of the pairs' losses, with TRL's metrics (its `rewards/chosen` is `reward_chosen` here)."""
    beta = options["beta"]
    preferred, other = scores.logprobs.view(-1, 2).unbind(1)
    reward, other_reward = (beta * (scores.logprobs - scores.reference)).view(-1, 2).unbind(1)
    margin = reward - other_reward
    labels = scores.correct.new_tensor([unit.documents[0].label_weight for unit in scores.units])
    losses = (-margin).logaddexp(margin.new_zeros(()))  # -log sigmoid(margin)
    return losses.sum(), {
        "mean_token_accuracy": (scores.correct.view(-1, 2)[:, 0] / labels).sum(),
        "reward_chosen": reward.sum(),
        "reward_rejected": other_reward.sum(),
        "reward_margin": margin.sum(),
        "reward_accuracy": (margin > 0).float().sum(),
        "logprob_chosen": preferred.sum(),
        "logprob_rejected": other.sum(),
    }
