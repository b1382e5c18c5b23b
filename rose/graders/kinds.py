"""The graders, as OpenAI's API describes them. Pure: structs only, shared by whoever grades and whoever stores them."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

Operation = Literal["eq", "ne", "like", "ilike"]
Metric = Literal[
    "cosine",
    "fuzzy_match",
    "bleu",
    "gleu",
    "meteor",
    "rouge_1",
    "rouge_2",
    "rouge_3",
    "rouge_4",
    "rouge_5",
    "rouge_l",
]
Role = Literal["user", "assistant", "system", "developer"]
ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]

MAX_NAME = 200
MAX_SOURCE_BYTES = 256 << 10
"""Longest source of a python grader."""

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_NAME)]
Temperature = Annotated[float, msgspec.Meta(ge=0, le=2)]
Probability = Annotated[float, msgspec.Meta(ge=0, le=1)]
TokenCount = Annotated[int, msgspec.Meta(ge=1)]


class StringCheck(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="string_check"):
    """1 or 0: how a text compares with another."""

    name: Name
    input: str
    """The text; may hold templates."""
    reference: str
    """What it is compared with; may hold templates."""
    operation: Operation


class TextSimilarity(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="text_similarity"):
    """0 to 1: how near a text is to another."""

    name: Name
    input: str
    """The text; may hold templates."""
    reference: str
    """What it is compared with; may hold templates."""
    evaluation_metric: Metric


class Python(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="python"):
    """What the function `grade(sample, item)` of a source returns."""

    name: Name
    source: Annotated[str, msgspec.Meta(min_length=1)]
    image_tag: str | None = None
    """OpenAI's name for a set of packages. Here always those of this installation; kept and repeated."""


class TextPart(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of a message."""

    type: Literal["input_text", "output_text"]
    text: str


class Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A message to a grading model; its texts may hold templates."""

    role: Role
    content: str | TextPart | list[str | TextPart]
    type: Literal["message"] | None = None


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a grading model answers."""

    seed: int | None = None
    temperature: Temperature | None = None
    top_p: Probability | None = None
    max_completions_tokens: TokenCount | None = None
    max_completion_tokens: TokenCount | None = None
    """The same by chat's name."""
    max_tokens: TokenCount | None = None
    """The same by its name in OpenAI's guide."""
    reasoning_effort: ReasoningEffort | None = None

    @property
    def token_limit(self) -> int | None:
        """Most tokens of the answer, thoughts included; None: as many as the context holds."""
        given = (self.max_completions_tokens, self.max_completion_tokens, self.max_tokens)
        return next((limit for limit in given if limit is not None), None)


class ScoreModel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="score_model"):
    """The number that a model gives."""

    name: Name
    model: Name
    input: Annotated[list[Message], msgspec.Meta(min_length=1)]
    range: tuple[float, float] | None = None
    """Lowest and highest score; [0, 1] when absent."""
    sampling_params: SamplingParams | None = None

    @property
    def limits(self) -> tuple[float, float]:
        """Lowest and highest score."""
        return self.range or (0.0, 1.0)


class LabelModel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="label_model"):
    """1 when a model chooses one of the passing labels, else 0."""

    name: Name
    model: Name
    input: Annotated[list[Message], msgspec.Meta(min_length=1)]
    labels: Annotated[list[Name], msgspec.Meta(min_length=1)]
    passing_labels: Annotated[list[Name], msgspec.Meta(min_length=1)]
    sampling_params: SamplingParams | None = None


Single = StringCheck | TextSimilarity | Python | ScoreModel | LabelModel


class Multi(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="multi"):
    """A formula over the rewards of other graders."""

    name: Name
    graders: dict[str, Single]
    """By the name that the formula knows each by."""
    calculate_output: str
    """For example `0.7 * exact + 0.3 * max(near, 0)`."""


Grader = Single | Multi
MODEL_GRADERS = (ScoreModel, LabelModel)
