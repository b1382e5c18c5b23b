"""Chat messages to tokens, by the model's own template: one way for training and for answering, without torch.

What is learned is what follows the prompt, in tokens: the prompt exactly as it is asked, then the answer with the mark
that ends its turn. That a text is rendered whole and where it belongs is proven for each conversation (chat/); what
cannot be proven is refused with its line.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from rose.domain.previews import Piece
from rose.domain.training_data import ChatExample, Problem, UnusableExample
from rose.errors import InvalidRequest
from rose.language_models.chat.answers import Answer, Answers, Chat, Frame, thinking_options
from rose.language_models.chat.caveats import Caveat, caveats_of
from rose.language_models.chat.conversation import Refused
from rose.language_models.chat.edges import opens_thought
from rose.language_models.chat.fitting import shorter_parts, with_shorter_text, without_system
from rose.language_models.chat.sequences import TokenSequence, as_few_as_possible


class Tokenized(msgspec.Struct, frozen=True, kw_only=True):
    """One sequence for the model."""

    ids: list[int]
    weights: list[float]
    """For each token its weight as a target: 0 for what is only read. The first is 0: nothing comes before it."""


class Rendering(msgspec.Struct, frozen=True, kw_only=True):
    """An example as the model sees it."""

    examples: tuple[Tokenized, ...]
    """As few sequences as teach every answer exactly as it is asked: mostly one. Where a template renders earlier
    answers in another way than the last one, there are more."""
    cut: bool
    """Whether the oldest turns, or the beginning of a question, were left out because they did not fit."""
    caveats: tuple[Caveat, ...] = ()
    """What a person should know about this example's rendering."""

    @property
    def tokens(self) -> int:
        """Tokens of all sequences."""
        return sum(len(example.ids) for example in self.examples)

    @property
    def label_tokens(self) -> int:
        """Those of them that are learned."""
        return sum(len(example.weights) - example.weights.count(0.0) for example in self.examples)


class Preview(NamedTuple):
    """An example as text."""

    sequences: list[list[Piece]]
    cut: bool


class Prompt(NamedTuple):
    """What a model reads before it answers."""

    ids: list[int]
    opens_thought: bool
    """It ends inside a thought, which the model has to close."""


class ChatTemplate:
    """A model's chat template with its tokenizer: prompts for answering, sequences for training."""

    def __init__(self, tokenizer: Any, *, stop_ids: frozenset[int] = frozenset(), rows: int | None = None) -> None:
        """`stop_ids` are those that the model's own files list; `rows` those of its embedding, where they are known.

        Raises: InvalidRequest when the tokenizer has no chat template or does not belong to the weights.
        """
        self.tokenizer = tokenizer
        own = {tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set[int]()
        self._answers = Answers(tokenizer, stop_ids | own)
        self._rows = rows
        self._require_rows()

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end an answer, in training and when the model is asked."""
        return self._answers.stop_ids

    @property
    def reads_thoughts(self) -> bool:
        """Whether the template knows thoughts."""
        return self._answers.reads_thoughts

    @cached_property
    def frame(self) -> Frame:
        """How the model writes a thought and an answer."""
        return self._answers.frame()

    @cached_property
    def silent_ids(self) -> frozenset[int]:
        """Special tokens that are no text of an answer; those that a thought is written with are, until it is found."""
        marks = self._answers.marks
        spoken = {number for content, number in marks.ids.items() if any(content in part for part in self.frame)}
        return marks.special_ids - spoken

    # --- answering

    def prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        thinking: bool = False,
    ) -> list[int]:
        """Return the token ids after which the model is to answer. Raises: InvalidRequest, see `ask`."""
        return self.ask(messages, tools, thinking=thinking).ids

    def ask(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        thinking: bool = False,
        options: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> Prompt:
        """Return what the model reads before it answers.

        `options` are variables of the template and win over `thinking`. With `continue_final_message` the last message
        is an answer that the model goes on with.

        Raises: InvalidRequest when the template leaves out or refuses what the messages say; `param` names the message.
        """
        chat = self._answers.chat(messages, tools, {**thinking_options(thinking), **(options or {})})
        if continue_final_message:
            text = self._answers.unfinished(chat)
        else:
            text = self._answers.prompt(chat, prompt=add_generation_prompt).text
        ids = self._answers.marks.encode(text, chat.hidden).ids
        self._check_rows(ids)
        return Prompt(ids, opens_thought(text))

    # --- training

    def render(self, example: ChatExample, maximum_tokens: int, *, thinking: bool = False) -> Rendering:
        """Return what the model learns from an example: each answer, with the mark that ends it, given all before it.

        Where it does not fit into `maximum_tokens`, the oldest whole turns go, then the beginning of the last question;
        system messages and the last answer stay.

        Raises: UnusableExample naming the example, the message and its line: the template leaves out or refuses what
        the messages say, the last answer alone does not fit, or nothing is left to learn.
        """
        chat, sequences, cut = self._in_its_words(example, maximum_tokens, thinking)
        return Rendering(
            examples=tuple(Tokenized(ids=one.tokens.ids, weights=one.weights) for one in sequences),
            cut=cut,
            caveats=tuple(caveats_of(self._answers, chat, sequences, thinking=thinking)),
        )

    def preview(self, example: ChatExample, maximum_tokens: int, *, thinking: bool = False) -> Preview:
        """Return the sequences of `render` as text. Raises: UnusableExample."""
        _, sequences, cut = self._in_its_words(example, maximum_tokens, thinking)
        return Preview(sequences=[_pieces(sequence) for sequence in sequences], cut=cut)

    def _in_its_words(
        self, example: ChatExample, maximum_tokens: int, thinking: bool
    ) -> tuple[Chat, list[TokenSequence], bool]:
        try:
            chat = self._answers.chat(example.messages, example.tools, thinking_options(thinking))
            sequences, cut = self._fitting(chat, maximum_tokens)
            for sequence in sequences:
                self._check_rows(sequence.tokens.ids)
        except InvalidRequest as error:
            raise _in_line(error, example) from error
        return chat, sequences, cut

    def _fitting(self, chat: Chat, maximum_tokens: int) -> tuple[list[TokenSequence], bool]:
        learned = [index for index, message in enumerate(chat.messages) if message.is_learned]
        learned = [index for index in learned if self._answers.is_asked(chat, index)]
        if not learned:
            raise Refused("no assistant message, so nothing to learn from")
        fitting: list[TokenSequence] = []
        cut = False
        for sequence in self._sequences(chat, learned):
            if len(sequence) <= maximum_tokens:
                fitting.append(sequence)
            else:
                fitting += self._cut(chat, sequence, maximum_tokens)
                cut = True
        return fitting, cut

    def _sequences(self, chat: Chat, learned: Sequence[int]) -> list[TokenSequence]:
        found: list[tuple[int, Answer]] = []
        for index in reversed(learned):  # the last one first: what it is refused for says most
            found.append((chat.messages[index].position, self._answers.answer(chat, index)))
        return as_few_as_possible(self._answers.marks, chat.hidden, found[::-1])

    # --- what does not fit

    def _cut(self, chat: Chat, sequence: TokenSequence, maximum_tokens: int) -> list[TokenSequence]:
        """Return the answers without as many of the oldest turns as necessary, or with a shorter question."""
        parts = shorter_parts(chat, max(sequence.answers))
        # Each part is shorter than the one before it, so the first that fits is found by halving.
        first = bisect_left(parts, True, key=lambda part: self._fits(part, maximum_tokens))
        for part in parts[first:]:
            learned = [i for i, message in enumerate(part.messages) if message.position in sequence.answers]
            found = self._sequences(part, learned)
            if all(len(one) <= maximum_tokens for one in found):
                return found
        return [self._shortened(parts[-1], maximum_tokens)]

    def _fits(self, chat: Chat, maximum_tokens: int) -> bool:
        try:
            [sequence] = self._sequences(chat, [len(chat.messages) - 1])
        except Refused:
            return False
        return len(sequence) <= maximum_tokens

    def _shortened(self, chat: Chat, maximum_tokens: int) -> TokenSequence:
        """Return the last answer with the beginnings of the texts before it left out, the oldest first."""
        for shorter in (chat, without_system(chat)):
            for index, message in enumerate(shorter.messages[:-1]):
                while message.role in ("user", "tool"):
                    [sequence] = self._sequences(shorter, [len(shorter.messages) - 1])
                    excess = len(sequence) - maximum_tokens
                    if excess <= 0:
                        return sequence
                    reduced = with_shorter_text(shorter, index, sequence, excess)
                    if reduced is None:
                        break
                    shorter = reduced
        [sequence] = self._sequences(shorter, [len(shorter.messages) - 1])
        if len(sequence) <= maximum_tokens:
            return sequence
        alone = len(sequence) - sequence.prompt_tokens
        if alone < maximum_tokens:
            raise Refused(
                f"the answer with what the template writes around it has {len(sequence)} tokens; "
                f"the model's context holds {maximum_tokens}"
            )
        raise Refused(f"the answer alone has {alone} tokens; the model's context holds {maximum_tokens}")

    def _require_rows(self) -> None:
        """Refuse weights that lack a row for a token of every conversation: a stop, the beginning, a mark of a turn.

        Tokens that no conversation needs may be beyond the rows, as Gemma 3's for pictures are.
        """
        needed = set(self.stop_ids) | self._answers.probe_ids()
        if self.tokenizer.bos_token_id is not None:
            needed.add(self.tokenizer.bos_token_id)
        if self._rows is None or max(needed, default=0) < self._rows:
            return
        largest = max(needed)
        token = self.tokenizer.convert_ids_to_tokens(largest)
        raise InvalidRequest(
            f"Tokenizer and weights do not belong together: {token!r} is number {largest}, "
            f"the embedding has {self._rows} rows.",
            code="model_not_available",
            param="model",
            hint="Take the tokenizer that came with these weights.",
        )

    def _check_rows(self, ids: Sequence[int]) -> None:
        """Refuse a token that the model has no numbers for. Raises: Refused naming both numbers."""
        if self._rows is not None and ids and (largest := max(ids)) >= self._rows:
            token = self.tokenizer.convert_ids_to_tokens(largest)
            raise Refused(f"token {token!r} has number {largest}; the model has {self._rows} rows")


def load_template(folder: Path, *, rows: int | None = None) -> ChatTemplate:
    """Return the chat template of a model folder; `rows` are those of its embedding, where they are known.

    Raises: InvalidRequest (`model_not_available`) when it has none that can be loaded.
    """
    return ChatTemplate(load_tokenizer(folder), stop_ids=listed_stop_ids(folder), rows=rows)


def listed_stop_ids(folder: Path) -> frozenset[int]:
    """Return the tokens that end a turn by the model's own files: one number or a list in either of them."""
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        try:
            settings = json.loads((folder / name).read_bytes())
        except (OSError, ValueError):
            continue
        text = settings.get("text_config")
        for given in (settings, text if isinstance(text, dict) else {}):
            value = given.get("eos_token_id")
            found.update(one for one in (value if isinstance(value, list) else [value]) if isinstance(one, int))
    return frozenset(found)


def load_tokenizer(path: Path) -> Any:
    """Return the tokenizer in a model folder; it has a chat template and knows each token's place in the text.

    Raises: InvalidRequest (`model_not_available`) when it cannot be loaded or lacks one of these.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the boundary to transformers and tokenizers, which raise whatever a file brings about
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise InvalidRequest(
            f"The tokenizer in {path} cannot be loaded: {reason}",
            code="model_not_available",
            hint="The folder needs tokenizer.json and tokenizer_config.json of a model that transformers knows.",
        ) from error
    if not tokenizer.chat_template:
        raise InvalidRequest(
            f"The model in {path} has no chat template, so ROSE cannot know how it was taught to read messages.",
            code="model_not_available",
            param="model",
            hint="Take the model's chat or instruct version, or put a chat_template.jinja into the folder.",
        )
    if not tokenizer.is_fast:
        raise InvalidRequest(
            f"The tokenizer in {path} is of the slow kind, which does not tell where a token stands in the text.",
            code="model_not_available",
            param="model",
            hint="Convert it to tokenizer.json with transformers, or take another model.",
        )
    return tokenizer


def _in_line(error: InvalidRequest, example: ChatExample) -> UnusableExample:
    """Say in which example, message and line of the file something is wrong."""
    position = error.position if isinstance(error, Refused) else None
    message = None if position is None else position + 1
    return UnusableExample(
        Problem(line=example.line, example=example.number, message=message, text=error.message),
    )


def _pieces(sequence: TokenSequence) -> list[Piece]:
    """Join neighbouring tokens that are both learned or both only read."""
    text = sequence.shown()
    pieces: list[Piece] = []
    weights, places = sequence.weights, sequence.tokens.places
    begin = 0
    for index in range(1, len(sequence) + 1):
        if index == len(sequence) or (weights[index] > 0) != (weights[begin] > 0):
            start = places[begin][0] if begin else 0
            end = places[index][0] if index < len(sequence) else len(text)
            pieces.append(Piece(text=text[start:end], tokens=index - begin, learned=weights[begin] > 0))
            begin = index
    return pieces
