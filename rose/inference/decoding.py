"""One request in the engine: its prompt, the rows of its choices, and what is told of them."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from rose.errors import InvalidRequest, RoseError
from rose.inference.choice import Choice
from rose.inference.generation import Accepted, Done, Failed, Finished, Piece
from rose.inference.request import GenerationRequest, Target
from rose.inference.resident import Resident
from rose.inference.rows import Row
from rose.inference.thoughts import ThoughtFilter
from rose.language_models.template import Prompt


class Decoding:
    """The life of one request. Only the engine's thread moves it; `cancelled` may be set from any thread."""

    def __init__(self, request: GenerationRequest, sink: Callable[[Piece], None]) -> None:
        self.request = request
        self.target = request.target
        self.sink = sink
        self.cancelled = False
        self.resident: Resident | None = None
        self.unplaced: list[Row] = []
        """Rows that need a place before anything else."""
        self._choices: dict[Row, Choice] = {}
        self._unforked: list[Row] = []
        """Rows that will begin where the first one has read the prompt."""
        self._going: list[Row] = []
        """Rows that read or write."""
        self._cached_tokens = 0

    def start(self, resident: Resident) -> None:
        """Render the prompt for `resident`, check that it fits, and say so. Raises: InvalidRequest."""
        request = self.request
        asked = resident.template.ask(
            request.messages,
            request.tools,
            thinking=request.thinking,
            options=request.template_options,
            add_generation_prompt=request.add_generation_prompt,
            continue_final_message=request.continue_final_message,
        )
        prompt = asked.ids
        room = resident.context_tokens - len(prompt)
        if room < (0 if request.max_tokens == 0 else 1):
            raise InvalidRequest(
                f"This model's context holds {resident.context_tokens} tokens; "
                f"the messages alone have {len(prompt)} tokens.",
                code="context_length_exceeded",
                param="messages",
                hint="Shorten the messages.",
            )
        max_tokens = room if request.max_tokens is None else min(request.max_tokens, room)
        self.resident = resident
        self._prompt_tokens = len(prompt)
        for index in range(request.choices):
            choice = Choice(request, index, resident, max_tokens, self._thoughts(resident, asked))
            row = Row(
                prompt,
                adapter=adapter_key(self.target),
                most_tokens=len(prompt) + max_tokens,
                project=self.target.project,
            )
            self._choices[row] = choice
        rows = list(self._choices)
        if max_tokens and not resident.runner.ever_fits(rows):
            raise InvalidRequest(
                f"The engine has no memory for {len(rows)} answers to {len(prompt)} tokens.",
                code="context_length_exceeded",
                param="n" if len(rows) > 1 else "messages",
                hint="Ask for fewer choices, or shorten the messages.",
            )
        self.sink(Accepted(prompt_tokens=len(prompt), adapter=resident.weights_of(rows[0].adapter)))
        if max_tokens:
            self.unplaced, self._going, self._unforked = rows, rows[:1], rows[1:]
            return
        for choice in self._choices.values():
            self.sink(Finished(index=choice.index, reason="length"))

    def _thoughts(self, resident: Resident, asked: Prompt) -> ThoughtFilter | None:
        """Return what tells the model's thoughts from its answer, where it can be expected to think."""
        template = resident.template
        if self.request.continue_final_message and not asked.opens_thought:
            return None
        if not (asked.opens_thought or self.request.thinking or template.reads_thoughts):
            return None
        return ThoughtFilter(template.frame, opened=asked.opens_thought)

    def going(self) -> list[Row]:
        """Return the rows that have tokens to be read."""
        return [] if self.unplaced else self._going

    def rows(self) -> int:
        """Return how many rows have a place."""
        return 0 if self.unplaced else len(self._going) + len(self._unforked)

    def take(self, row: Row, logits: Tensor, best: tuple[float, int]) -> int:
        """Choose what follows a row that has read its tokens; return how many tokens were made.

        `logits` [V]; `best`: the largest of them, and its token. Raises: RoseError when they are no numbers.
        """
        assert self.resident is not None
        rows = [row, *self._unforked]
        if self._unforked:
            self._cached_tokens = row.cached_tokens
            self.resident.runner.fork(row, self._unforked)
            self._going, self._unforked = rows, []
        self._cached_tokens = max(self._cached_tokens, row.cached_tokens)
        for one in rows:
            choice = self._choices[one]
            token_id, pieces = choice.advance(logits, best)
            for piece in pieces:
                self.sink(piece)
            if choice.finished:
                self._going.remove(one)
                self.resident.runner.release(one)
            else:
                one.tokens.append(token_id)
        return len(rows)

    def finish(self) -> bool:
        """Say so when everything is written; return whether it is."""
        if self._going or self._unforked:
            return False
        made = sum(choice.tokens for choice in self._choices.values())
        self.sink(
            Done(
                prompt_tokens=self._prompt_tokens,
                completion_tokens=made,
                cached_tokens=self._cached_tokens,
            )
        )
        return True

    def release(self) -> None:
        """Let go of places and model, whoever still holds this object."""
        for row in self._choices:
            if self.resident is not None:
                self.resident.runner.release(row)
        self.resident = None
        self._choices, self.unplaced, self._going, self._unforked = {}, [], [], []

    def fail(self, error: RoseError) -> None:
        """Say that the request cannot be answered."""
        self.sink(Failed(error=error))


def adapter_key(target: Target) -> str | None:
    """Return the hash of the adapter that a target needs; None for a base or a full model."""
    return target.adapter.sha256 if target.adapter is not None and target.kind == "adapter" else None
