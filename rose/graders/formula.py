"""Reads and computes `calculate_output`: numbers, names of graders, + - * / ^, and the functions that OpenAI lists.

The text is parsed to a tree, of which only these parts are taken; nothing of it is ever run as a program.
"""

from __future__ import annotations

import ast
import keyword
import math
import unicodedata
import warnings
from collections.abc import Callable, Mapping

MAX_CHARACTERS = 2000
MAX_DEPTH = 50
MAX_SHOWN = 80

FUNCTIONS: Mapping[str, tuple[int, int, Callable[..., float]]] = {
    "min": (1, 100, lambda *values: min(values)),
    "max": (1, 100, lambda *values: max(values)),
    "abs": (1, 1, math.fabs),
    "floor": (1, 1, math.floor),
    "ceil": (1, 1, math.ceil),
    "exp": (1, 1, math.exp),
    "sqrt": (1, 1, math.sqrt),
    "log": (1, 1, math.log),
}
"""Name -> fewest arguments, most arguments, what it computes (`log` is the natural one)."""
_OPERATORS: Mapping[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: lambda left, right: left + right,
    ast.Sub: lambda left, right: left - right,
    ast.Mult: lambda left, right: left * right,
    ast.Div: lambda left, right: left / right,
    ast.Pow: math.pow,
}


class FormulaError(Exception):
    """A formula that cannot be read, or has no value for these rewards."""


class Formula:
    """A formula that was read."""

    def __init__(self, text: str, names: frozenset[str]) -> None:
        """`names` are the graders there are. Raises: FormulaError saying what cannot be read."""
        self.text = text
        if len(text) > MAX_CHARACTERS:
            raise FormulaError(f"it has {len(text)} characters; at most {MAX_CHARACTERS} are read")
        # OpenAI writes powers with ^, which binds as ** does in Python; nothing else has that character.
        self._source = text.strip().replace("^", "**")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Python's advice about odd numbers is no concern of a grader
                self._tree = ast.parse(self._source, mode="eval").body
        except SyntaxError as error:
            raise FormulaError(f"it cannot be read: {error.msg}") from None
        except (RecursionError, MemoryError, SystemError, ValueError):  # the third: a flaw of Python 3.11 at depth
            raise FormulaError("it cannot be read: it is too deeply nested") from None
        self._check(self._tree, names, MAX_DEPTH)

    def value(self, rewards: Mapping[str, float]) -> float:
        """Return the formula's value for these rewards. Raises: FormulaError when it has none that is finite."""
        try:
            value = float(self._value(self._tree, rewards))
        except ZeroDivisionError:
            raise FormulaError("it divides by zero") from None
        except (OverflowError, ValueError):
            raise FormulaError("it has no finite value for these rewards") from None
        if not math.isfinite(value):
            raise FormulaError("it has no finite value for these rewards")
        return value

    def _check(self, node: ast.expr, names: frozenset[str], depth: int) -> None:
        if depth == 0:
            raise FormulaError("it is too deeply nested")
        match node:
            case ast.Constant(value=value) if isinstance(value, (int, float)) and not isinstance(value, bool):
                if isinstance(value, int) and value.bit_length() > 64:
                    raise FormulaError("it has a number that is too large")
            case ast.Name(id=name):
                if name not in names:
                    raise FormulaError(f"it names {name!r}; there is {', '.join(sorted(names)) or 'no grader'}")
            case ast.UnaryOp(op=ast.USub() | ast.UAdd(), operand=operand):
                self._check(operand, names, depth - 1)
            case ast.BinOp(left=left, op=operator, right=right) if type(operator) in _OPERATORS:
                self._check(left, names, depth - 1)
                self._check(right, names, depth - 1)
            case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in FUNCTIONS:
                fewest, most, _ = FUNCTIONS[name]
                if not fewest <= len(arguments) <= most:
                    raise FormulaError(f"{name} takes {fewest if fewest == most else 'one or more'} values")
                for argument in arguments:
                    self._check(argument, names, depth - 1)
            case _:
                raise FormulaError(
                    f"{self._shown(node)!r} is not allowed; there are numbers, names of graders, + - * / ^, "
                    f"brackets, and {', '.join(FUNCTIONS)}"
                )

    def _shown(self, node: ast.expr) -> str:
        return (ast.get_source_segment(self._source, node) or "")[:MAX_SHOWN].replace("**", "^")

    def _value(self, node: ast.expr, rewards: Mapping[str, float]) -> float:
        match node:
            case ast.Constant(value=int() | float() as value):
                return float(value)
            case ast.Name(id=name):
                return float(rewards[name])
            case ast.UnaryOp(op=operator, operand=operand):
                value = self._value(operand, rewards)
                return -value if isinstance(operator, ast.USub) else value
            case ast.BinOp(left=left, op=operator, right=right):
                return _OPERATORS[type(operator)](self._value(left, rewards), self._value(right, rewards))
            case ast.Call(func=ast.Name(id=name), args=arguments):
                return float(FUNCTIONS[name][2](*(self._value(argument, rewards) for argument in arguments)))
            case _:  # _check took nothing else
                raise FormulaError("it cannot be computed")


def is_name(text: str) -> bool:
    """Say whether a formula can name a grader so."""
    return text.isidentifier() and not keyword.iskeyword(text) and text == unicodedata.normalize("NFKC", text)
