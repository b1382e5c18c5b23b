"""Conversations that are too long for a model: which turns go first, and where a question is cut. Pure."""

from __future__ import annotations

import msgspec

from rose.language_models.chat.answers import Chat
from rose.language_models.chat.sequences import TokenSequence


def shorter_parts(chat: Chat, last: int) -> list[Chat]:
    """Return the chat up to the message of position `last`: whole, without its oldest turn, without its two oldest, …

    A turn begins with a user's message; system messages at the start stay.
    """
    end = next(index for index, message in enumerate(chat.messages) if message.position == last) + 1
    messages = chat.messages[:end]
    head = next((i for i, message in enumerate(messages) if message.role != "system"), len(messages))
    starts = [start for start in range(head + 1, len(messages)) if messages[start].role == "user"]
    return [chat._replace(messages=messages[:head] + messages[start:]) for start in [head, *starts]]


def without_system(chat: Chat) -> Chat:
    """Return the chat without its system messages."""
    kept = [msgspec.structs.replace(message, before=()) for message in chat.messages if message.role != "system"]
    return chat._replace(messages=tuple(kept))


def with_shorter_text(chat: Chat, index: int, sequence: TokenSequence, excess: int) -> Chat | None:
    """Return the chat with about `excess` tokens less at the beginning of message `index`; None when nothing is left.

    `sequence` renders the chat; it tells where the message's tokens are.
    """
    message = chat.messages[index]
    place = sequence.place(message.position)
    if place is None:
        return None
    first, behind = sequence.tokens.first_at(place.start), sequence.tokens.first_at(place.end)
    kept = min(first + max(1, excess), behind - 1)
    if kept <= first:
        return None
    text = message.content.strip()[sequence.tokens.places[kept][0] - place.start :]
    shorter = msgspec.structs.replace(message, content=text)
    return chat._replace(messages=(*chat.messages[:index], shorter, *chat.messages[index + 1 :]))
