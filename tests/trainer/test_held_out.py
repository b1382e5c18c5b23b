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
    """What is asked is written out a second time here: texts instead of hashes."""
    rows = [[*turns, answer] for turns, answer in talks]
    wanted = held_out(len(rows), 0.3)
    sides = split([question_of(conversation(*row)) for row in rows], wanted, seed)
    wholes = [asked_by(row)[-1] for row in rows]
    parts = [set(asked_by(row)) for row in rows]
    askers = {part: [row for row, asked in enumerate(parts) if part in asked] for part in set().union(*parts)}
    habits = {
        part
        for part, those in askers.items()
        if len(those) > max(wanted, 3) and any(wholes[row] != part for row in those)
    }
    trained = set().union(*(parts[row] for row in sides.training))
    crossing = [row for row in sides.validation if ({wholes[row]} | parts[row] - habits) & trained]
    assert sides.leaked == len(crossing)
    # Rows that nothing binds are enough: then nothing crosses.
    alone = sum(all(len(askers[part]) == 1 for part in asked - habits) for asked in parts)
    assert not crossing or alone < wanted


def asked_by(row: list[str]) -> list[str]:
    """Return what a row of `u: text` and the like asks before each answer: without and with what is not asked."""
    found: list[str] = []
    for at, said in enumerate(row):
        asked = [one for one in row[:at] if one[0] in "ut" and one[3:]]
        if said[0] == "a" and asked:
            begins = row.index(asked[0])
            whole = [one for number, one in enumerate(row[:at]) if one[0] != "a" or number < begins]
            found += [f"asked {asked}", f"asked {whole}"]
    return found or [f"asked {row}"]


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
        (conversation("u: What?", "a: C."), conversation("u: What?", "a: A.", "u: Why?", "a: B.")),
        (conversation("u: What?", "a: A.", "u: Why?", "a: B."), conversation("u: What?", "a: A.", "u: Who?", "a: C.")),
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
        (conversation("a: What is 1?", "u: Say!", "a: 1."), conversation("a: What is 2?", "u: Tell!", "a: 2.")),
    ],
)
def test_what_only_begins_alike_may_be_parted(examples: tuple[ChatExample, ...]) -> None:
    assert not together(*examples)


def test_turns_of_one_conversation_are_one_group() -> None:
    turns = ["u: 1", "a: x", "u: 2", "a: y", "u: 3", "a: z"]
    assert together(*(conversation(*turns[:end]) for end in (4, 2, 6)))


HABITS = {
    "a greeting that is answered": [("u: Hi", "a: Hello!", f"u: Question {n}?", "a: A.") for n in range(60)],
    "and once is all": [("u: Hi", "a: Hey!"), *(("u: Hi", "a: Hello!", f"u: Q {n}?", "a: A.") for n in range(60))],
    "three greetings": [(f"u: Hi {n % 3}", "a: Hello!", f"u: Question {n}?", "a: A.") for n in range(60)],
    "a greeting first": [("a: Hello!", f"u: Question {n}?", "a: A.") for n in range(60)],
    "one system message": [("s: Be brief.", f"u: Question {n}?", "a: A.") for n in range(60)],
    "and no question": [("s: Write a haiku.", f"a: Haiku {n}.") for n in range(60)],
    "texts and one order": [(f"s: Text {n}.", "u: Summarise.", f"a: A {n}.") for n in range(60)],
    "texts and two orders": [(f"s: Text {n}.", f"u: {'Sum up' if n % 2 else 'TL;DR'}", "a: A.") for n in range(60)],
    "and something else": [("u: Who?", "a: I."), *((f"s: Text {n}.", "u: Sum up.", "a: A.") for n in range(60))],
    "a quiz": [(f"a: What is {n} + {n}?", "u: Tell me.", f"a: {2 * n}") for n in range(60)],
    "a scene": [("a: Night.", "u: Go on.", "a: B."), *((f"a: Day {n}.", "u: Continue.", "a: B.") for n in range(60))],
}


@pytest.mark.parametrize("name", HABITS)
def test_what_very_many_rows_have_in_common_binds_nobody(name: str) -> None:
    """All rows but the one that all others teach are held out by some seed, none by all, and nothing is leaked."""
    rows = [question_of(conversation(*said)) for said in HABITS[name]]
    found = [split(rows, 6, seed) for seed in range(120)]
    assert not any(sides.leaked for sides in found)
    times = [sum(row in sides.validation for sides in found) for row in range(len(rows))]
    never = [row for row, count in enumerate(times) if not count]
    assert never == ([0] if name == "and once is all" else [])
    assert max(times) < 40


def test_two_answers_to_each_question_of_two_turns_stay_together() -> None:
    rows = [question_of(conversation(f"u: Q {n}", "a: Short.")) for n in range(20)]
    rows += [question_of(conversation(f"u: Q {n}", "a: Long.", f"u: Why {n}?", "a: B.")) for n in range(20)]
    for seed in range(20):
        sides = split(rows, 4, seed)
        assert not sides.leaked
        assert not {row % 20 for row in sides.validation} & {row % 20 for row in sides.training}


def test_the_rest_that_fits_no_group_is_counted() -> None:
    """Ten conversations, each once after each of its three turns: five rows are one of them and two rows besides."""
    turns = [[f"{role}: {n} {turn}" for turn in range(3) for role in "ua"] for n in range(10)]
    rows = [question_of(conversation(*said[:end])) for said in turns for end in (2, 4, 6)]
    for seed in range(10):
        sides = split(rows, 5, seed)
        talks = [row // 3 for row in sides.validation]
        assert sorted(talks.count(one) for one in set(talks)) in ([2, 3], [1, 1, 3])
        assert sides.leaked == 2
        # Also theirs are such as nobody else asks to the end.
        trained = {part for row in sides.training for part in rows[row].parts}
        assert not trained & {rows[row].whole for row in sides.validation}
        assert split(rows, 6, seed).leaked == 0


def test_a_split_depends_on_the_seed_and_on_nothing_else() -> None:
    rows = [asking(f"question {row}") for row in range(50)]
    assert split(rows, 10, 1) == split(rows, 10, 1)
    assert split(rows, 10, 1) != split(rows, 10, 2)


def test_nothing_is_held_out_without_a_split() -> None:
    sides = split([asking("a"), asking("b")], 0, 1)
    assert (sides.training, sides.validation, sides.leaked) == ((0, 1), (), 0)
    assert split([], 0, 1).training == ()
