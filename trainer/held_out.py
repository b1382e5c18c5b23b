"""Which rows of a data file are held out for validation: at random, and so that what is measured was not trained on.

Pure and torch-free: a function of the conversations, the wanted number and the seed. What a row asks is told by
`question_of`; which rows stand on one side is the rule of `split`.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence, Set
from dataclasses import dataclass

import msgspec

from rose.domain.training_data import ChatExample

_SUBSET_WORK = 50_000_000
"""Most (groups x rows) for which an exact filling of the validation set is searched."""
_DIGEST_BYTES = 16
"""Of a row's hashes; by chance two of a billion rows meet once in 10^20 files."""
_HABIT_SHARE = 10
"""A beginning that more than one in so many rows have is a habit of the file, no question."""
_HABIT_ROWS = 3
"""So many rows with one beginning are no habit yet, however small the file is."""


@dataclass(frozen=True, slots=True)
class Question:
    """What a row asks, in hashes that two rows share when they ask the same."""

    whole: bytes
    """Of everything that comes before the last learned answer and is no answer itself."""
    parts: frozenset[bytes]
    """Of what comes before each learned answer, with and without what instructs or greets; the whole is one of them."""


@dataclass(frozen=True, slots=True)
class Split:
    """Rows of a data file by use, each in file order."""

    training: tuple[int, ...]
    validation: tuple[int, ...]
    leaked: int
    """Validation rows of whose question more than a habit is trained on, because no other choice had the exact size."""


def question_of(example: ChatExample) -> Question:
    """Return what an example asks before each answer that is learned, without regard to case and spacing.

    Users and tools ask. System messages, and what an assistant says before anybody asked (a greeting, a scene that is
    set), only belong to the whole. Answers belong to no question, so that several answers to one are together. Where
    nothing is asked, only a copy of the example asks the same.
    """
    whole, asked = hashlib.sha256(), hashlib.sha256()
    anything = False
    parts: list[bytes] = []
    for message in example.messages:
        role = message["role"]
        if role == "assistant" and anything:
            if message.get("weight") != 0:
                parts += (asked.digest()[:_DIGEST_BYTES], whole.digest()[:_DIGEST_BYTES])
            continue
        text = " ".join(message["content"].casefold().split())
        said = msgspec.json.encode([role, text])
        whole.update(said)
        if role not in ("system", "assistant") and text:
            asked.update(said)
            anything = True
    parts = parts or [whole.digest()[:_DIGEST_BYTES]]
    return Question(whole=parts[-1], parts=frozenset(parts))


def split(questions: Sequence[Question], held_out: int, seed: int) -> Split:
    """Hold out exactly `held_out` rows so that no question is on both sides.

    Rows with a part in common stay together: the same question after other instructions or with other answers, a
    conversation and its continuation. But a part that very many rows begin with, to ask different things then, is a
    habit of the file: a greeting, or "Summarise." below another text each time. It keeps no rows together; a row that
    asks nothing more is trained on, because all the others teach it.

    Whole groups are taken in the order of a seeded hash. What their sizes leave missing is filled with rows whose
    whole question nobody else asks, and where these are too few, one by one, at random as well; `leaked` counts what
    became of it.
    """
    habits = _habits(questions, range(len(questions)), max(held_out, len(questions) // _HABIT_SHARE, _HABIT_ROWS))
    held: set[int] = set()
    if held_out:
        held.update(_whole_groups(questions, range(len(questions)), habits, held_out, seed))
    if len(held) < held_out:
        rest = [row for row in range(len(questions)) if row not in held]
        held.update(_whole_groups(questions, rest, _habits(questions, rest, 0), held_out - len(held), seed))
    if len(held) < held_out:
        rest = [row for row in range(len(questions)) if row not in held]
        rest.sort(key=lambda row: (_hash(seed, questions[row].whole.hex()), _hash(seed, str(row))))
        held.update(rest[: held_out - len(held)])
    training = tuple(row for row in range(len(questions)) if row not in held)
    trained = {part for row in training for part in questions[row].parts}
    return Split(
        training=training,
        validation=tuple(sorted(held)),
        leaked=sum(not trained.isdisjoint({questions[row].whole} | questions[row].parts - habits) for row in held),
    )


def _habits(questions: Sequence[Question], rows: Sequence[int], most: int) -> set[bytes]:
    """Return the parts that more than `most` of the rows have, and that are not the whole question of all of these."""
    count: Counter[bytes] = Counter()
    only: Counter[bytes] = Counter()
    for row in rows:
        count.update(questions[row].parts)
        only[questions[row].whole] += 1
    return {part for part, number in count.items() if number > most and number > only[part]}


def _whole_groups(
    questions: Sequence[Question], rows: Sequence[int], habits: Set[bytes], wanted: int, seed: int
) -> list[int]:
    """Choose at most `wanted` of the rows, in whole groups of those that have a part in common that is no habit."""
    joined = _Joined(rows)
    first: dict[bytes, int] = {}
    for row in rows:
        for part in questions[row].parts - habits:
            joined.join(row, first.setdefault(part, row))
    groups: defaultdict[int, list[int]] = defaultdict(list)
    for row in rows:
        groups[joined.of(row)].append(row)
    taught = {joined.of(row) for row in rows if questions[row].whole in habits}
    free = [group for name, group in groups.items() if name not in taught]
    free.sort(key=lambda group: _hash(seed, min(questions[row].whole for row in group).hex()))
    return [row for index in _fill([len(group) for group in free], wanted) for row in free[index]]


class _Joined:
    """Sets of rows that grow together; each is named by one of its rows."""

    def __init__(self, rows: Sequence[int]) -> None:
        self._names = {row: row for row in rows}

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


def _hash(seed: int, text: str) -> bytes:
    return hashlib.sha256(f"split/{seed}/{text}".encode()).digest()
