"""Training methods by the name that a job gives them. A method is a module with what `Method` names.

Those of other packages are found by their entry points in the group `rose.methods`: name = "package.module".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from importlib.metadata import entry_points
from itertools import chain, islice

from rose.domain.training_data import Problem, bounded_lines, has_thought
from rose.errors import InvalidRequest
from rose.methods import dpo, supervised
from rose.methods.method import Item, Method

GROUP = "rose.methods"
LOOKED_AT = 20
"""Lines by which a file's method is known."""
_OWN: dict[str, Method] = {"supervised": supervised, "dpo": dpo}


@cache
def method_names() -> Sequence[str]:
    """Return the methods there are; packages are looked through once, since every shown job asks."""
    return sorted({*_OWN, *(point.name for point in entry_points(group=GROUP))})


def method_of(name: str) -> Method:
    """Return a method. Raises: InvalidRequest naming those there are."""
    if name in _OWN:
        return _OWN[name]
    for point in entry_points(group=GROUP, name=name):
        return point.load()
    raise InvalidRequest(
        f"The method {name} is not supported; supported: {', '.join(method_names())}.",
        code="unsupported_method",
        param="method.type",
    )


@cache
def options_of(name: str) -> Sequence[str]:
    """Return the hyperparameters that only this method has; none for one that is not there any more."""
    return tuple(method_of(name).OPTIONS) if name in method_names() else ()


def read_any(lines: Iterable[bytes]) -> Iterator[Item | Problem]:
    """Read a file by the method for whose data its first lines can be taken."""
    bounded = bounded_lines(lines)
    first = list(islice(bounded, LOOKED_AT))
    return likely_method(first).read(chain(first, bounded))


def likely_method(first: Sequence[bytes]) -> Method:
    """Return the method that finds the fewest problems in these lines; supervised where all find as many."""

    def problems(method: Method) -> int:
        return sum(isinstance(item, Problem) for item in method.read(first))

    others = sorted(set(method_names()) - _OWN.keys())
    return min((method_of(name) for name in (*_OWN, *others)), key=problems)


def thinks(lines: Iterable[bytes]) -> bool:
    """Tell whether a learned answer of a file has a thought, so that a job on it trains with thinking on."""
    items = (item for item in read_any(lines) if not isinstance(item, Problem))
    return any(has_thought(conversation) for item in items for conversation in item.conversations)
