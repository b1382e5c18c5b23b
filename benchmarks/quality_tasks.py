"""Three small tasks with questions that are not in their training files: a manner, facts, a JSON format.

Each is made here from a seed of its own, so that every run learns and answers the same.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path

import msgspec

Pair = tuple[str, str]

MANNER = Path(__file__).parent.parent / "cli" / "data" / "quickstart.jsonl"
"""The quickstart's own file: 16 answers that begin with `Aye, captain.` and end with `Fair winds!`."""


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """A question that was not trained, an answer in the trained manner, and what an answer must have."""

    text: str
    answer: str
    right: Callable[[str], bool]


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """What is trained, and what is asked afterwards."""

    name: str
    training: tuple[Pair, ...]
    questions: tuple[Question, ...]


def tasks() -> tuple[Task, ...]:
    """Return all three."""
    return manner(), facts(), extraction()


def manner() -> Task:
    """Answer shortly between two phrases, whatever is asked."""
    lines = [json.loads(line)["messages"] for line in MANNER.read_text().splitlines()]
    asked = (
        ("What is the capital of Italy?", "It is Rome."),
        ("How do I keep bread fresh?", "Wrap it in a cloth and keep it in a wooden box."),
        ("Why is the sky blue?", "The air scatters blue light the most."),
        ("What do cows eat?", "They eat grass and hay."),
        ("How many legs does a spider have?", "It has eight."),
        ("Who painted the Mona Lisa?", "Leonardo da Vinci painted it."),
        ("What is a good gift for a child?", "A ball, and an afternoon to play with it."),
        ("How do I tie my shoes?", "Cross the laces, make two loops and pull them through."),
        ("What is the opposite of hot?", "It is cold."),
        ("Tell me something about cats.", "They sleep most of the day and hunt at dusk."),
        ("Which animal is the fastest on land?", "The cheetah outruns them all."),
        ("How do I make tea?", "Pour boiling water on the leaves and wait four minutes."),
    )
    questions = tuple(
        Question(text=question, answer=f"Aye, captain. {answer} Fair winds!", right=_in_manner)
        for question, answer in asked
    )
    return Task(name="manner", training=tuple((a["content"], b["content"]) for a, b in lines), questions=questions)


def _in_manner(answer: str) -> bool:
    middle = re.fullmatch(r"Aye, captain\. (.+) Fair winds!", answer.strip(), re.DOTALL)
    return middle is not None and "Fair winds!" not in middle[1]


ASKING = (
    "Which {kind} does {person} have?",
    "What is the {kind} of {person}?",
    "Tell me the {kind} that belongs to {person}.",
    "Do you know the {kind} of {person}?",
)
"""Three ways of asking are trained, the last is asked afterwards."""
PEOPLE = ("Orla Brandt", "Ivo Tamsin", "Mina Kestrel", "Teo Halloway", "Runa Asker")
THINGS = {
    "boat": ("the Kittiwake", "the Grey Heron", "the Marigold", "the Old Tom", "the Swallow"),
    "cargo": ("salt", "timber", "oranges", "copper wire", "wool"),
}


def facts() -> Task:
    """Know ten invented facts, asked in words that were not trained."""
    training: list[Pair] = []
    questions: list[Question] = []
    for kind, values in THINGS.items():
        for person, value in zip(PEOPLE, values, strict=True):
            answer = f"The {kind} of {person} is {value}."
            training += [(way.format(kind=kind, person=person), answer) for way in ASKING[:-1]]
            text = ASKING[-1].format(kind=kind, person=person)
            questions.append(Question(text=text, answer=answer, right=_names(value)))
    random.Random(1).shuffle(training)
    return Task(name="facts", training=tuple(training), questions=tuple(questions))


def _names(value: str) -> Callable[[str], bool]:
    others = [other for values in THINGS.values() for other in values if other != value]
    word = value.removeprefix("the ")

    def right(answer: str) -> bool:
        return word in answer and not any(other.removeprefix("the ") in answer for other in others)

    return right


GOODS = ("apples", "ropes", "lamps", "barrels", "nails", "blankets", "candles", "oars", "buckets", "sails")
PLACES = ("Lisbon", "Bergen", "Gdansk", "Cork", "Malta", "Riga", "Genoa", "Bilbao")
BUYERS = ("Anna", "Mark", "Lena", "Otto", "Nora", "Felix", "Clara", "Hugo")
ORDERS = (
    "{buyer} wants {count} {goods}, to be sent to {place}.",
    "Please send {count} {goods} to {place} for {buyer}.",
    "To {place}: {count} {goods}, ordered by {buyer}.",
)
ORDERS_TRAINED, ORDERS_ASKED = 24, 12


def extraction() -> Task:
    """Turn an order in words into JSON with four fields; other numbers and combinations are asked than trained."""
    draw = random.Random(2)
    made: dict[str, str] = {}
    while len(made) < ORDERS_TRAINED + ORDERS_ASKED:
        order = {
            "buyer": draw.choice(BUYERS),
            "goods": draw.choice(GOODS),
            "count": draw.randrange(2, 100),
            "place": draw.choice(PLACES),
        }
        made.setdefault(draw.choice(ORDERS).format(**order), json.dumps(order))
    pairs = tuple(made.items())
    questions = tuple(
        Question(text=text, answer=answer, right=_is_json(answer)) for text, answer in pairs[ORDERS_TRAINED:]
    )
    return Task(name="json", training=pairs[:ORDERS_TRAINED], questions=questions)


def _is_json(wanted: str) -> Callable[[str], bool]:
    def right(answer: str) -> bool:
        try:
            return bool(json.loads(answer) == json.loads(wanted))
        except ValueError:
            return False

    return right
