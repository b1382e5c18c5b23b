"""One answer being written: tokens in, pieces out, and the reason why it ends."""

from __future__ import annotations

import msgspec
import torch

from rose.inference.generation import Finished, FinishReason, Piece, Text, TokenLogprob, ToolCall
from rose.inference.request import GenerationRequest
from rose.inference.resident import Resident
from rose.inference.sampling import Sampler, top_logprobs
from rose.inference.text import Detokeniser, StopFilter
from rose.inference.thoughts import Thought, ThoughtFilter
from rose.inference.tool_calls import ToolCallFilter


class Choice:
    """Choice `index` of a request. V is the vocabulary size."""

    def __init__(
        self,
        request: GenerationRequest,
        index: int,
        resident: Resident,
        max_tokens: int,
        thoughts: ThoughtFilter | None = None,
    ) -> None:
        """`thoughts` takes the model's thoughts apart from its answer; without it everything is the answer."""
        self.index = index
        self.tokens = 0
        """Tokens made so far, the end-of-turn token included."""
        self.finished = False
        self._resident = resident
        self._max_tokens = max_tokens
        self._top_logprobs = request.top_logprobs
        self._sampler = Sampler(request.sampling, seed=request.seed, index=index, vocabulary=resident.vocabulary)
        self._detokeniser = Detokeniser(resident.decode)
        self._stop = StopFilter(request.stop)
        self._thoughts = thoughts
        self._functions = request.functions
        self._tool_calls = ToolCallFilter(1 if request.functions else None) if request.tools else None
        self._made_characters = 0
        self._shown_characters = 0
        self._logprobs: list[tuple[int, TokenLogprob]] = []
        """Not sent yet: where the token's text begins, and the token."""

    def advance(self, logits: torch.Tensor, best: tuple[float, int] | None = None) -> tuple[int, list[Piece]]:
        """Choose the next token from `logits` [V]; return its id and what a client may see of it now.

        `best`: the largest logit and its token, where they are known already.
        """
        token_id = self._sampler.choose(logits, best)
        self.tokens += 1
        if token_id in self._resident.stop_ids:
            return token_id, self._end("stop")
        if self._top_logprobs is not None:
            self._logprobs.append((self._made_characters, self._logprob(logits, token_id)))
        text = self._detokeniser.push(token_id)
        self._made_characters += len(text)
        shown = self._stop.push(text)
        if self._stop.stopped:
            return token_id, [*self._show(shown), *self._finish("stop")]
        if self.tokens == self._max_tokens:
            return token_id, [*self._show(shown), *self._end("length")]
        return token_id, self._show(shown)

    def _end(self, reason: FinishReason) -> list[Piece]:
        """Show all that was held back; a stop string may still be complete in it."""
        shown = self._stop.push(self._detokeniser.finish())
        shown += "" if self._stop.stopped else self._stop.finish()
        pieces = self._show(shown, final=not self._stop.stopped)
        return [*pieces, *self._finish("stop" if self._stop.stopped else reason)]

    def _finish(self, reason: FinishReason) -> list[Piece]:
        self.finished = True
        held = self._thoughts.finish() if self._thoughts is not None else []
        pieces: list[Piece] = [*self._parts(held)]
        if self._tool_calls is not None:
            pieces += [self._piece(part) for part in self._tool_calls.finish()]
            if reason == "stop" and self._tool_calls.calls:
                reason = "function_call" if self._functions else "tool_calls"
        return [*pieces, Finished(index=self.index, reason=reason)]

    def _show(self, text: str, *, final: bool = False) -> list[Piece]:
        """Return `text` as pieces, the first with the log-probabilities of the tokens that begin before its end."""
        self._shown_characters += len(text)
        due = tuple(entry for start, entry in self._logprobs if final or start < self._shown_characters)
        self._logprobs = self._logprobs[len(due) :]
        pieces = self._parts([text] if self._thoughts is None else self._thoughts.push(text))
        if due:
            first = pieces[0] if pieces else Text(index=self.index, text="")
            pieces[:1] = [msgspec.structs.replace(first, logprobs=due)]
        return list(pieces)

    def _parts(self, parts: list[str | Thought]) -> list[Text]:
        """Return thoughts as they are, and the answer's text with the tool calls taken out of it."""
        found: list[str | Thought | ToolCall] = []
        for part in parts:
            if isinstance(part, Thought) or self._tool_calls is None:
                found.append(part)
            else:
                found += self._tool_calls.push(part)
        return [self._piece(part) for part in found if part]

    def _piece(self, part: str | Thought | ToolCall) -> Text:
        if isinstance(part, ToolCall):
            return Text(index=self.index, text="", tool_call=part)
        if isinstance(part, Thought):
            return Text(index=self.index, text="", reasoning=part.text)
        return Text(index=self.index, text=part)

    def _logprob(self, logits: torch.Tensor, token_id: int) -> TokenLogprob:
        value, top = top_logprobs(logits, token_id, self._top_logprobs or 0)
        entry = self._entry(token_id, value)
        return TokenLogprob(
            token=entry.token,
            logprob=entry.logprob,
            bytes=entry.bytes,
            top=tuple(self._entry(other, logprob) for other, logprob in top),
        )

    def _entry(self, token_id: int, logprob: float) -> TokenLogprob:
        text, raw = self._resident.token(token_id)
        return TokenLogprob(token=text, logprob=logprob, bytes=raw)
