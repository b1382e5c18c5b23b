"""Which rows of a data file are held out for validation: at random, and so that what is measured was not trained on.

Pure and torch-free: a function of the conversations, the wanted number and the seed. The order of the file has no part.

Two rows stand on the same side when they ask the same: when all texts of users and tools before the last answer that is
learned are equal, whatever their case and spacing. What a file's conversations have in common without asking, a system
message or a greeting, joins no rows. Rows stand on the same side, too, when the whole of one is the beginning of the
other, as in files that hold a conversation once after each of its turns.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from rose.domain.training_data import ChatExample

_SUBSET_WORK = 50_000_000
"""Most (groups x rows) for which an exact filling of the validation set is searched."""
_DIGEST_BYTES = 16
"""Of a row's hashes; by chance two of a billion rows meet once in 10^20 files."""


@dataclass(frozen=True, slots=True)
class Question:
    """What a row asks, in hashes."""

    asked: bytes
    """Of the users' and tools' texts; of the whole conversation where there are none."""
    instructed: bytes
    """Of these and the system messages."""
    dialogue: tuple[bytes, ...]
    """Of the conversation up to each of its messages, this included; empty where nothing is asked."""


@dataclass(frozen=True, slots=True)
class Split:
    """Rows of a data file by use, each in file order."""

    training: tuple[int, ...]
    validation: tuple[int, ...]
    leaked: int
    """Validation rows whose question is also trained on, because the groups' sizes did not allow otherwise."""


def question_of(example: ChatExample) -> Question:
    """Return what an example asks before its last learned answer."""
    messages = example.messages
    learned = [at for at, one in enumerate(messages) if one["role"] == "assistant" and one.get("weight") != 0]
    before = [one for one in messages[: learned[-1]] if one["role"] != "assistant"]
    said = [one for one in before if one["role"] != "system" and one["content"].strip()]
    dialogue = _running(messages)
    if not said:
        return Question(asked=dialogue[-1], instructed=dialogue[-1], dialogue=())
    return Question(asked=_running(said)[-1], instructed=_running(before)[-1], dialogue=dialogue)


def _running(messages: Sequence[Mapping[str, Any]]) -> tuple[bytes, ...]:
    """Return the hash of the messages up to each of them, without regard to case and spacing."""
    digest = hashlib.sha256()
    hashes: list[bytes] = []
    for message in messages:
        text = " ".join(message["content"].casefold().split())
        calls = [message.get("tool_calls"), message.get("function_call")]
        digest.update(msgspec.json.encode([message["role"], text, calls]))
        hashes.append(digest.digest()[:_DIGEST_BYTES])
    return tuple(hashes)


def split(questions: Sequence[Question], held_out: int, seed: int) -> Split:
    """Hold out exactly `held_out` rows so that no question is on both sides.

    Whole groups are taken in the order of a seeded hash of what they ask. Only when no choice of groups has the exact
    size, one group is divided, at random as well; `leaked` then counts the rows of it that were held out.
    """
    groups = _groups(questions)
    names = {min(questions[row].asked + questions[row].instructed for row in rows): rows for rows in groups}
    shuffled = [names[name] for name in sorted(names, key=lambda name: _hash(f"split/{seed}/{name.hex()}"))]
    chosen = _fill([len(rows) for rows in shuffled], held_out)
    held = [row for index in chosen for row in shuffled[index]]
    leaked = held_out - len(held)
    if leaked:
        divided = next(rows for index, rows in enumerate(shuffled) if index not in chosen)
        held += sorted(divided, key=lambda row: _hash(f"divide/{seed}/{row}"))[:leaked]
    validation = frozenset(held)
    return Split(
        training=tuple(row for row in range(len(questions)) if row not in validation),
        validation=tuple(sorted(validation)),
        leaked=leaked,
    )


def _groups(questions: Sequence[Question]) -> list[list[int]]:
    """Return the rows that must stay together, in file order.

    In a file that asks the same everywhere the question stands in the system messages, which then tell rows apart.
    """
    one = len({question.asked for question in questions}) == 1
    keys = [question.instructed if one else question.asked for question in questions]
    first = {key: row for row, key in reversed([*enumerate(keys)])}
    joined = _Joined([first[key] for key in keys])
    whole = {question.dialogue[-1]: row for row, question in enumerate(questions) if question.dialogue}
    for row, question in enumerate(questions):
        for beginning in question.dialogue:
            if beginning in whole:
                joined.join(row, whole[beginning])
    groups: defaultdict[int, list[int]] = defaultdict(list)
    for row in range(len(questions)):
        groups[joined.of(row)].append(row)
    return list(groups.values())


class _Joined:
    """Sets of rows that grow together; each is named by one of its rows."""

    def __init__(self, names: list[int]) -> None:
        self._names = names

    def of(self, row: int) -> int:
        while self._names[row] != row:
            self._names[row] = row = self._names[self._names[row]]
        return row

    def join(self, row: int, other: int) -> None:
        first, second = sorted((self.of(row), self.of(other)))
        self._names[second] = first


def _fill(sizes: Sequence[int], wanted: int) -> set[int]:
    """Choose indexes, early ones first, whose sizes sum to `wanted`, or to as much below it as is found."""
    chosen: set[int] = set()
    missing = wanted
    for index, size in enumerate(sizes):
        if size <= missing:
            chosen.add(index)
            missing -= size
    if not missing or len(sizes) * wanted > _SUBSET_WORK:
        return chosen
    # Taking each group that fits got stuck: search all sums. Bit s of reachable[i] says that i groups can sum to s.
    mask = (1 << (wanted + 1)) - 1
    reachable = [1]
    for size in sizes:
        reachable.append((reachable[-1] | (reachable[-1] << size)) & mask)
    total = reachable[-1].bit_length() - 1
    chosen = set()
    for index in range(len(sizes) - 1, -1, -1):
        if not reachable[index] >> total & 1:
            chosen.add(index)
            total -= sizes[index]
    return chosen


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
