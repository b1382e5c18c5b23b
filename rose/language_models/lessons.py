"""Small conversations from which the toy model `tiny` learns what an answer looks like. Pure and seeded."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

Turn = tuple[str, str]
"""What is asked, and the answer."""

_NAMES = (
    "Ada", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Hugo", "Ida", "Jonas", "Karla", "Leo", "Maria", "Nora",
    "Oscar", "Paula", "Ruth", "Simon", "Tara", "Victor",
)  # fmt: skip
_WORDS = (
    "apple", "bridge", "candle", "door", "engine", "flower", "garden", "house", "island", "jacket", "kitchen",
    "lemon", "mountain", "needle", "ocean", "paper", "queen", "river", "stone", "table", "umbrella", "village",
    "window", "yellow", "winter", "summer", "morning", "evening", "silver", "copper", "bread", "milk", "horse",
    "bird", "tree", "letter", "music", "train", "boat", "road", "cloud", "rain", "snow", "fire", "water", "light",
)  # fmt: skip
_COLOURS = {
    "grass": "green", "snow": "white", "coal": "black", "the sky": "blue", "a lemon": "yellow", "a tomato": "red",
    "a carrot": "orange", "blood": "red", "milk": "white", "a leaf": "green", "the sun": "yellow", "the sea": "blue",
    "a raven": "black", "chocolate": "brown", "an elephant": "grey", "a plum": "purple",
}  # fmt: skip
_SOUNDS = {
    "dog": "barks", "cat": "meows", "cow": "moos", "bird": "sings", "horse": "neighs", "bee": "hums",
    "lion": "roars", "duck": "quacks", "pig": "grunts", "sheep": "bleats", "owl": "hoots", "frog": "croaks",
}  # fmt: skip
_OPPOSITES = {
    "hot": "cold", "big": "small", "up": "down", "left": "right", "day": "night", "black": "white", "old": "young",
    "fast": "slow", "open": "closed", "full": "empty", "loud": "quiet", "early": "late", "high": "low",
    "wet": "dry", "good": "bad", "long": "short",
}  # fmt: skip
_FACTS: tuple[Turn, ...] = (
    ("What is an epoch?", "An epoch is one pass over all the examples."),
    ("What is a token?", "A token is a piece of text with a number."),
    ("What is the loss?", "The loss says how badly the model guessed."),
    ("What is a batch?", "A batch is the examples that one step looks at."),
    ("What is an adapter?", "An adapter is a small set of weights beside a base model."),
    ("What is a checkpoint?", "A checkpoint is a model that can be used."),
    ("What is a recovery point?", "A recovery point is the state from which a run goes on."),
    ("What is a job?", "A job is one fine-tuning, from its files to its model."),
    ("What is a lease?", "A lease says who owns a job, and for how long."),
    ("What is a log?", "A log is a list to which rows are only added."),
    ("Who are you?", "I am tiny, a toy model that was built on this machine."),
    ("What can you do?", "I can repeat, count and answer very small questions."),
    ("What is your name?", "My name is tiny."),
    ("Thank you.", "You are welcome."),
    ("Good night.", "Good night. Sleep well."),
    ("Goodbye.", "Goodbye. Have a nice day."),
    ("How are you?", "I am well, thank you."),
    ("How many days has a week?", "A week has seven days."),
    ("How many months has a year?", "A year has twelve months."),
    ("How many legs has a cat?", "A cat has four legs."),
    ("Where does the sun rise?", "The sun rises in the east."),
    ("Where does the sun go down?", "The sun goes down in the west."),
    ("What do bees make?", "Bees make honey."),
    ("What is bread made of?", "Bread is made of flour, water, salt and yeast."),
)


def lessons(seed: int) -> Iterator[Turn]:
    """Yield conversations of one turn without end, the same ones for the same seed."""
    chance = random.Random(seed)
    kinds = (_copy, _count, _colour, _greet, _sum, _sound, _opposite, _fact, _fact)
    while True:
        yield chance.choice(kinds)(chance)


def _copy(chance: random.Random) -> Turn:
    words = " ".join(chance.choices(_WORDS, k=chance.randint(1, 4)))
    return chance.choice(("Repeat: {}", "Say: {}", "Please repeat: {}")).format(words), words


def _count(chance: random.Random) -> Turn:
    first = chance.randint(1, 9)
    last = first + chance.randint(1, 6)
    return f"Count from {first} to {last}.", ", ".join(map(str, range(first, last + 1)))


def _colour(chance: random.Random) -> Turn:
    thing, colour = chance.choice(list(_COLOURS.items()))
    return f"What colour is {thing}?", f"{thing[0].upper()}{thing[1:]} is {colour}."


def _greet(chance: random.Random) -> Turn:
    name = chance.choice(_NAMES)
    greeting: Callable[..., str] = chance.choice(("Hello", "Good morning", "Good evening")).format
    if chance.random() < 0.3:
        return f"{greeting()}.", f"{greeting()}. How can I help you?"
    return f"{greeting()}, I am {name}.", f"{greeting()}, {name}. How can I help you?"


def _sum(chance: random.Random) -> Turn:
    a, b = chance.randint(1, 9), chance.randint(1, 9)
    return f"What is {a} plus {b}?", f"{a} plus {b} is {a + b}."


def _sound(chance: random.Random) -> Turn:
    animal, sound = chance.choice(list(_SOUNDS.items()))
    article = "an" if animal[0] in "aeiou" else "a"
    return f"What does {article} {animal} do?", f"{article.capitalize()} {animal} {sound}."


def _opposite(chance: random.Random) -> Turn:
    pair = chance.choice(list(_OPPOSITES.items()))
    word, other = pair if chance.random() < 0.5 else pair[::-1]
    return f"What is the opposite of {word}?", f"The opposite of {word} is {other}."


def _fact(chance: random.Random) -> Turn:
    return chance.choice(_FACTS)
