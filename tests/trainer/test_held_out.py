"""A validation split is random, exact in size and leaks nothing that it need not."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rose.domain.hyperparameters import held_out
from rose.domain.training_data import ChatExample
from trainer.held_out import Question, question_of, split

ROLES = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}


def conversation(*said: str, **last: Any) -> ChatExample:
    """Return an example of messages such as `u: Hi`; `last` are more keys of the last message."""
    messages = [{"role": ROLES[one[0]], "content": one[3:]} for one in said]
    messages[-1] |= last
    return ChatExample(line=1, number=1, messages=tuple(messages))


def asking(text: str) -> Question:
    return question_of(conversation(f"u: {text}", "a: Yes."))


def together(*examples: ChatExample) -> bool:
    """Say whether the examples are never parted, among enough others that a choice is free."""
    others = [asking(f"other {n}") for n in range(12)]
    rows = [question_of(example) for example in examples]
    count = range(len(rows))
    for seed in range(12):
        sides = split([*rows, *others], 6, seed)
        assert not sides.leaked
        if len({row in sides.validation for row in count}) == 2:
            return False
    return True


@given(st.lists(st.sampled_from("abcdefgh"), min_size=2, max_size=60), st.floats(0.05, 0.9), st.integers(0, 5))
def test_a_split_has_the_exact_size_and_leaks_only_when_it_must(asked: list[str], share: float, seed: int) -> None:
    wanted = held_out(len(asked), share)
    sides = split([asking(text) for text in asked], wanted, seed)
    assert len(sides.validation) == wanted
    assert sorted(sides.training + sides.validation) == list(range(len(asked)))
    trained = {asked[row] for row in sides.training}
    assert sum(asked[row] in trained for row in sides.validation) == sides.leaked
    reachable = {0}
    for text in set(asked):
        reachable |= {total + asked.count(text) for total in reachable}
    assert (sides.leaked == 0) == (wanted in reachable)


TURNS = st.lists(st.sampled_from(["u: 1", "u: 2", "a: x", "a: y", "s: z", "t: 3", "u: "]), max_size=6)


@given(st.lists(st.tuples(TURNS, st.sampled_from(["a: x", "a: y"])), min_size=2, max_size=20), st.integers(0, 9))
def test_no_question_is_on_both_sides_whatever_the_conversations(talks: list[tuple[list[str], str]], seed: int) -> None:
    """What is asked is written out a second time here: joined texts instead of hashes."""
    rows = [[*turns, answer] for turns, answer in talks]
    sides = split([question_of(conversation(*row)) for row in rows], held_out(len(rows), 0.3), seed)
    asked = [" ".join(turn for turn in row if turn[0] in "ut" and turn[3:]) for row in rows]
    told_apart = len(set(asked)) > 1
    crossing = 0
    for row in sides.validation:
        for other in sides.training:
            same = told_apart and asked[row] and asked[row] == asked[other]
            begins = (asked[row] and rows[other][: len(rows[row])] == rows[row]) or (
                asked[other] and rows[row][: len(rows[other])] == rows[other]
            )
            crossing += bool(same or begins)
    assert not crossing or sides.leaked


@given(st.integers(8, 60), st.integers(0, 1000))
def test_conversations_that_begin_alike_are_held_out_at_random(count: int, seed: int) -> None:
    rows = [question_of(conversation("s: Be brief.", "a: Hello!", f"u: Question {n}?", "a: A.")) for n in range(count)]
    found = [split(rows, count // 4, seed + more) for more in range(8)]
    assert not any(sides.leaked for sides in found)
    assert len({sides.validation for sides in found}) > 1
    assert any(sides.validation != tuple(range(count // 4)) for sides in found)
    # The order of the file has no part in it.
    backwards = split(rows[::-1], count // 4, seed)
    assert sorted(count - 1 - row for row in backwards.validation) == list(found[0].validation)


def test_one_question_for_all_is_divided_at_random() -> None:
    rows = [asking("Again?")] * 20
    found = [split(rows, 5, seed) for seed in range(8)]
    assert {sides.leaked for sides in found} == {5}
    assert len({sides.validation for sides in found}) == 8


@pytest.mark.parametrize(
    "examples",
    [
        (conversation("u: What  is it?", "a: A."), conversation("u: what is IT?\n", "a: B.")),
        (conversation("s: Be brief.", "u: What?", "a: A."), conversation("u: What?", "a: B.")),
        (conversation("a: Hello!", "u: What?", "a: A."), conversation("a: Good day.", "u: What?", "a: B.")),
        (conversation("u: What?", "a: A.", "u: Why?", "a: B."), conversation("u: What?", "a: C.", "u: Why?", "a: D.")),
        (conversation("u: What?", "a: A."), conversation("u: What?", "a: B.", "u: Thanks!", "a: Bye.", weight=0)),
        (conversation("u: What?", "a: A."), conversation("u: What?", "a: A.", "u: Why?", "a: B.")),
        (conversation("a: One.", "a: Two."), conversation("a: one.", "a: two.")),
        (conversation("u: W", "a: x", "t: 3", "a: A."), conversation("u: W", "a: y", "t: 3", "a: B.")),
    ],
)
def test_what_asks_the_same_stays_together(examples: tuple[ChatExample, ...]) -> None:
    assert together(*examples)


@pytest.mark.parametrize(
    "examples",
    [
        (conversation("u: What?", "a: A."), conversation("u: Why?", "a: A.")),
        (conversation("s: Be brief.", "a: A."), conversation("s: Be brief.", "a: B.")),
        (conversation("a: Hello!"), conversation("a: Hello!", "u: What?", "a: A.")),
        (conversation("u: What?", "a: A.", "u: Why?", "a: B."), conversation("u: What?", "a: A.", "u: Who?", "a: C.")),
        (conversation("u: W", "a: x", "t: 3", "a: A."), conversation("u: W", "a: x", "t: 4", "a: A.")),
    ],
)
def test_what_only_begins_alike_may_be_parted(examples: tuple[ChatExample, ...]) -> None:
    assert not together(*examples)


def test_turns_of_one_conversation_are_one_group() -> None:
    turns = ["u: 1", "a: x", "u: 2", "a: y", "u: 3", "a: z"]
    assert together(*(conversation(*turns[:end]) for end in (4, 2, 6)))


def test_system_messages_tell_rows_apart_where_all_else_that_is_asked_is_the_same() -> None:
    rows = [question_of(conversation(f"s: Text {n // 2}.", "u: Summarise.", f"a: A{n}.")) for n in range(20)]
    sides = split(rows, 6, 3)
    assert not sides.leaked
    assert not {row // 2 for row in sides.validation} & {row // 2 for row in sides.training}


def test_a_split_depends_on_the_seed_and_on_nothing_else() -> None:
    rows = [asking(f"question {row}") for row in range(50)]
    assert split(rows, 10, 1) == split(rows, 10, 1)
    assert split(rows, 10, 1) != split(rows, 10, 2)


def test_nothing_is_held_out_without_a_split() -> None:
    sides = split([asking("a"), asking("b")], 0, 1)
    assert (sides.training, sides.validation, sides.leaked) == ((0, 1), (), 0)
    assert split([], 0, 1).training == ()
