"""Whose account an answer's tokens go on: the usage that is kept, and the rate of tokens per minute."""

from __future__ import annotations

from typing import Any

from litestar.types import Scope

from rose.api.services import Services


class Account:
    """Where the tokens of one request's answers are counted."""

    def __init__(self, services: Services, project: str, model: str, scope: Scope) -> None:
        self._services = services
        self._project = project
        self._model = model
        self._scope = scope

    def count(self, prompt_tokens: int, completion_tokens: int) -> None:
        """Count an answer."""
        self._services.meter.note(self._project, self._model, prompt_tokens, completion_tokens)
        self._services.limits.spend_tokens(self._project, prompt_tokens + completion_tokens, self._scope)

    def count_answer(self, answer: dict[str, Any]) -> None:
        """Count a whole answer by what the engine says in it."""
        usage = answer.get("usage") or {}
        self.count(usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0))
