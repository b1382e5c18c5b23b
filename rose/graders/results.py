"""What grading gives: a reward, and where there is none, which kind of fault was in the way."""

from __future__ import annotations

from typing import Literal

import msgspec

Flag = Literal[
    "formula_parse_error",
    "invalid_variable_error",
    "model_grader_parse_error",
    "model_grader_refusal_error",
    "model_grader_server_error",
    "other_error",
    "python_grader_runtime_error",
    "python_grader_server_error",
    "sample_parse_error",
    "truncated_observation_error",
    "unresponsive_reward_error",
]


class Fault(Exception):
    """A grader gave no reward; its reward counts as 0."""

    def __init__(self, flag: Flag, details: str) -> None:
        super().__init__(details)
        self.flag: Flag = flag
        self.details = details


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens that a grading model read and made."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0

    def plus(self, other: Usage) -> Usage:
        """Return both together."""
        return Usage(
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            completion_tokens=self.completion_tokens + other.completion_tokens,
            total_tokens=self.total_tokens + other.total_tokens,
        )


class Errors(msgspec.Struct, frozen=True, kw_only=True):
    """Which faults there were. The details say what to change; those that OpenAI's types lack are ROSE's."""

    formula_parse_error: bool = False
    """The formula cannot be read, or has no finite value."""
    formula_parse_error_details: str | None = None
    invalid_variable_error: bool = False
    """A template names what the item or the sample does not have."""
    invalid_variable_error_details: str | None = None
    model_grader_parse_error: bool = False
    """A model's answer holds no score or label."""
    model_grader_parse_error_details: str | None = None
    model_grader_refusal_error: bool = False
    """A model refused to grade."""
    model_grader_refusal_error_details: str | None = None
    model_grader_server_error: bool = False
    """A model could not be asked."""
    model_grader_server_error_details: str | None = None
    other_error: bool = False
    """Anything else, for example a text that is too long to be compared."""
    other_error_details: str | None = None
    python_grader_runtime_error: bool = False
    """A source failed, took too long, or returned no number."""
    python_grader_runtime_error_details: str | None = None
    python_grader_server_error: bool = False
    """A source could not be run now."""
    python_grader_server_error_type: str | None = None
    sample_parse_error: bool = False
    """A template needs the sample as JSON, and it is none."""
    sample_parse_error_details: str | None = None
    truncated_observation_error: bool = False
    """What a model was to grade is longer than its context."""
    truncated_observation_error_details: str | None = None
    unresponsive_reward_error: bool = False
    """A model answered with nothing, or not in time."""
    unresponsive_reward_error_details: str | None = None


class Graded(msgspec.Struct, frozen=True, kw_only=True):
    """The result of one grader."""

    reward: float
    sub_rewards: dict[str, float] = {}
    """Of a multi grader: the reward of each."""
    faults: tuple[Fault, ...] = ()
    usage: dict[str, Usage] = {}
    """Tokens by grading model."""

    @property
    def errors(self) -> Errors:
        """The faults as the answer shows them."""
        told: dict[str, bool | str] = {}
        for fault in self.faults:
            told[fault.flag] = True
            name = f"{fault.flag}_{'type' if fault.flag == 'python_grader_server_error' else 'details'}"
            told[name] = "\n".join(part for part in (str(told.get(name) or ""), fault.details) if part)
        return msgspec.convert(told, Errors)
