"""What a person should know of how an example is rendered, although nothing about it is wrong. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from rose.language_models.chat.answers import Answers, Chat
from rose.language_models.chat.sequences import TokenSequence


class Caveat(msgspec.Struct, frozen=True):
    """Something to know, and how often it is so in one example."""

    code: str
    count: int


SENTENCES = {
    "thoughts_left_out": "{count} thought(s) of earlier answers are not shown to the model by its chat template",
    "answers_without_thought": "{count} answer(s) have no thought, while the job trains with thinking on; "
    "they teach the template's own empty thought",
    "answers_apart": "{count} more sequence(s) than conversations: this model's template renders earlier answers "
    "otherwise than the last one, so they are learned apart",
    "answers_not_asked": "{count} answer(s) before any question are only read, since no prompt asks for them",
    "names_left_out": "{count} name(s) of messages are not part of this model's prompt",
    "blanks_cut": "{count} answer(s) lose blanks at their ends by the chat template",
    "marks_as_text": "{count} conversation(s) hold a control token of the model written as text; it stays text",
    "system_in_front": "{count} conversation(s) have a system message, for which this model's template has no role; "
    "it stands in front of the first question",
}
"""By code; the places are filled with the counts of a whole file."""


def caveats_of(answers: Answers, chat: Chat, sequences: Sequence[TokenSequence], *, thinking: bool) -> Iterator[Caveat]:
    """Yield what is to know about an example that is rendered as these sequences."""
    learned = {position: answer for sequence in sequences for position, answer in sequence.answers.items()}
    left_out = {key for answer in learned.values() for key in answer.prompt.missing}
    messages = {message.position: message for message in chat.messages}
    counts = {
        "thoughts_left_out": sum(kind == "thought" for _, kind, _ in left_out),
        "answers_without_thought": sum(thinking and not messages[position].thought for position in learned),
        "answers_apart": len(sequences) - 1,
        "answers_not_asked": sum(
            message.is_learned and not answers.is_asked(chat, index) for index, message in enumerate(chat.messages)
        ),
        "names_left_out": sum(kind == "name" for _, kind, _ in left_out),
        "blanks_cut": sum(
            chat.hidden.hide(messages[position].content) not in answer.text for position, answer in learned.items()
        ),
        "marks_as_text": int(any(answers.marks.holds_mark(message.content) for message in chat.messages)),
        "system_in_front": int(any(message.before for message in chat.messages)),
    }
    return (Caveat(code, count) for code, count in counts.items() if count)
