"""Reads a data file into a run's examples, as validation counted them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rose.domain.hyperparameters import Hyperparameters
from rose.domain.training_data import Problem, UnusableExample
from rose.methods.method import Method, Template
from trainer.batches import Example
from trainer.held_out import question_of


def read_file(
    path: Path, method: Method, template: Template, hyperparameters: Hyperparameters, alive: Callable[[], None]
) -> list[Example]:
    """Read and render a data file; what is too long is cut. `alive` is called after each example.

    Raises: UnusableExample for a line that validation would have refused.
    """
    examples: list[Example] = []
    with path.open("rb") as lines:
        for item in method.read(lines):
            if isinstance(item, Problem):
                raise UnusableExample(item)
            rendered = method.render(item, template, hyperparameters.maximum_tokens, thinking=hyperparameters.thinking)
            examples.append(Example(units=rendered.units, question=question_of(item.conversations[0])))
            alive()
    return examples
