"""One table of errors: what the server answers, what whoever reads the answer makes of it, and what the docs show."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import cli
import projections
import rose
import trainer
from rose import errors
from rose.api.errors import answer
from rose.errors import TABLE, Conflict, InvalidRequest, NoSpace, RoseError, StaleEpoch, Unavailable, error_of
from rose.inference.generation import EngineBusy

ROOT = Path(rose.__file__).parent.parent
ROW = re.compile(r"\| (\d+) \| `(\w+)` \| (\d+) \| (.*) \|")


def modules() -> Iterator[ModuleType]:
    """Load every module of ROSE but those that run when they are loaded."""
    for package in (rose, trainer, projections, cli):
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not found.name.endswith("__main__"):
                yield importlib.import_module(found.name)


def raised(module: ModuleType) -> Iterator[tuple[type[RoseError], str, str]]:
    """Yield every error that a module makes with a code of its own: class, code, place."""
    path = Path(str(module.__file__))
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
            continue
        kind = getattr(module, node.func.id, None)
        if isinstance(kind, type) and issubclass(kind, RoseError):
            for given in node.keywords:
                if given.arg == "code" and isinstance(given.value, ast.Constant) and given.value.value:
                    yield kind, str(given.value.value), f"{path}:{node.lineno}"


def family(kind: type[RoseError]) -> Iterator[type[RoseError]]:
    for child in kind.__subclasses__():
        yield child
        yield from family(child)


def test_every_error_is_the_same_for_whoever_reads_the_answer() -> None:
    """Status and code are all that an answer says of its kind, so no code may stand for two."""
    made = [found for module in modules() for found in raised(module)]
    assert len(made) > 100
    made += [(kind, kind.default_code, kind.__qualname__) for kind in family(RoseError) if kind.default_code]
    wrong = [
        f"{place}: {code} of {kind.__name__} is read as {error_of(kind.status, code).__name__}"
        for kind, code, place in made
        if (error_of(kind.status, code).exit_code, error_of(kind.status, code).kind) != (kind.exit_code, kind.kind)
    ]
    assert wrong == []


def test_status_and_exit_status_are_said_in_one_place() -> None:
    list(modules())
    for kind in family(RoseError):
        if kind.__module__ != errors.__name__:
            assert not {"status", "exit_code", "kind", "codes"} & set(vars(kind)), kind


def test_every_code_that_tells_errors_apart_is_one_that_is_made() -> None:
    made = {code for module in modules() for _, code, _ in raised(module)}
    made |= {kind.default_code for kind in family(RoseError) if kind.default_code}
    assert {code for kind in TABLE for code in kind.codes} <= made


def test_the_table_is_complete() -> None:
    own = {kind for kind in [RoseError, *family(RoseError)] if kind.__module__ == errors.__name__}
    assert set(TABLE) == own - {StaleEpoch}


@pytest.mark.parametrize(("status", "kind"), [(418, InvalidRequest), (451, InvalidRequest), (502, RoseError)])
def test_an_answer_of_somebody_else_is_read_by_its_hundred(status: int, kind: type[RoseError]) -> None:
    assert error_of(status, "whatever") is kind


@pytest.mark.parametrize(
    ("error", "headers"),
    [
        (InvalidRequest("no"), {}),
        (Conflict(), {"retry-after": "2"}),
        (Unavailable(), {"retry-after": "2"}),
        (EngineBusy(retry_after_seconds=14.2), {"retry-after": "15", "retry-after-ms": "14200"}),
        (NoSpace(), {"x-should-retry": "false"}),
    ],
)
def test_an_answer_says_whether_and_when_to_ask_again(error: RoseError, headers: dict[str, str]) -> None:
    given = answer(error)
    assert (given.status_code, given.headers) == (error.status, headers)


def test_the_documentation_shows_the_table() -> None:
    shown = [
        found.groups() for found in map(ROW.fullmatch, (ROOT / "docs" / "api.md").read_text().splitlines()) if found
    ]
    assert [(int(status), kind, int(code)) for status, kind, code, _ in shown] == [
        (kind.status, kind.kind, kind.exit_code) for kind in TABLE
    ]
    for kind, (*_, when) in zip(TABLE, shown, strict=True):
        assert kind.codes <= set(re.findall(r"`(\w+)`", when)), kind
