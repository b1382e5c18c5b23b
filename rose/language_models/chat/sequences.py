"""Answers to sequences of tokens: as few as teach each answer exactly as it is asked."""

from __future__ import annotations

from collections.abc import Sequence

from rose.language_models.chat.answers import Answer
from rose.language_models.chat.marks import Hidden, Marks, Tokens
from rose.language_models.chat.rendering import Place


class TokenSequence:
    """One sequence for the model, and which of its tokens are learned."""

    def __init__(self, marks: Marks, answer: Answer, hidden: Hidden) -> None:
        self._marks = marks
        self._hidden = hidden
        said = answer.text + answer.behind
        self.text = answer.prompt.text + said
        """With the marks in users' texts hidden."""
        seam = len(answer.prompt.text)
        self.tokens = marks.encode(self.text, hidden)
        if not self._is_border(seam):
            # A token that reaches over the seam is never made: the prompt has ended before it.
            before, after = marks.encode(answer.prompt.text, hidden), marks.encode(said, hidden)
            moved = [(start + seam, end + seam) for start, end in after.places]
            self.tokens = Tokens(before.ids + after.ids, before.places + moved)
            self.prompt_tokens = len(before.ids)
        else:
            self.prompt_tokens = self.tokens.first_at(seam)
        """Tokens before the last answer."""
        self._learned = [(self.prompt_tokens, self.tokens.first_at(seam + len(answer.text)))]
        self.answers: dict[int, Answer] = {}
        """What is learned here, by its message's position; the last one first."""

    def __len__(self) -> int:
        return len(self.tokens.ids)

    @property
    def weights(self) -> list[float]:
        """For each token its weight; nothing comes before the first, so it is never learned."""
        weights = [0.0] * len(self)
        for start, end in self._learned:
            weights[start:end] = [1.0] * (end - start)
        weights[:1] = [0.0]
        return weights

    def place(self, position: int) -> Place | None:
        """Return where the content of a message that comes before the last answer stands in the text."""
        last = next(iter(self.answers.values()))
        return next(iter(last.prompt.places.get((position, "content", 0), ())), None)

    def shown(self) -> str:
        """Return the text as it is, with users' marks."""
        return self._hidden.show(self.text)

    def takes_in(self, answer: Answer) -> bool:
        """Learn an earlier answer here, too, if its prompt, text and end are the beginning of these tokens."""
        seam = len(answer.prompt.text)
        end = seam + len(answer.text)
        if not self.text.startswith(answer.prompt.text + answer.text) or not self._is_border(seam):
            return False
        behind = self.tokens.first_at(end)
        if self.tokens.places[behind - 1][1] > end and not self._is_mark(behind - 1):
            return False
        self._learned.append((self.tokens.first_at(seam), behind))
        return True

    def _is_mark(self, index: int) -> bool:
        """Whether a token is a mark; some of them take in the blanks behind them, which changes no id."""
        return self.tokens.ids[index] in self._marks.special_ids

    def _is_border(self, seam: int) -> bool:
        """Whether the tokens before this character are the same as those of the text before it alone.

        A tokenizer splits at marks before anything else, so it is enough to compare from the last mark on.
        """
        behind = self.tokens.first_at(seam)
        if behind and self.tokens.places[behind - 1][1] > seam:
            return False
        begin = max((match.start() for match in self._marks.pattern.finditer(self.text, 0, seam)), default=0)
        alone = self._marks.ids_of(self.text[begin:seam], self._hidden)
        return self.tokens.ids[self.tokens.first_at(begin) : behind] == alone


def as_few_as_possible(marks: Marks, hidden: Hidden, answers: Sequence[tuple[int, Answer]]) -> list[TokenSequence]:
    """Return the sequences that teach these answers, given with their messages' positions in the order of the chat."""
    found: list[TokenSequence] = []
    for position, answer in reversed(answers):
        sequence = next((sequence for sequence in found if sequence.takes_in(answer)), None)
        if sequence is None:
            sequence = TokenSequence(marks, answer, hidden)
            found.append(sequence)
        sequence.answers[position] = answer
    return found[::-1]
